"""Where a batch lies: a folder that every worker sees, or a store behind a URL, whose files are brought and taken."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miga_engine.errors import OutputError
from miga_engine.files import hold, open_own, write_whole

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")
_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "r2", "hf", "memory"}
"""Stores in which a file is there once all of it is; elsewhere it is written beside its name, and moved."""


class Store(ABC):
    """The files of a batch, by name. Every failure is an OutputError."""

    name: str

    @abstractmethod
    def workplace(self, files: list[str]) -> contextlib.AbstractContextManager[Path]:
        """A folder to make these files in; those that are there already are in it."""

    @abstractmethod
    def keep(self, folder: Path, file: str) -> None:
        """Have the store hold a file of a workplace as it is now, whole."""

    @abstractmethod
    def names(self) -> set[str]:
        """Files that are there."""

    @abstractmethod
    def remove(self, file: str) -> None:
        """Delete a file, if it is there."""

    @abstractmethod
    def read(self, file: str) -> str:
        """A text; empty where there is none."""

    @abstractmethod
    def write(self, file: str, text: str) -> None:
        """Replace a text as a whole."""

    @abstractmethod
    def append(self, file: str, line: str) -> None:
        """A line more, which is safe when this returns."""

    @abstractmethod
    def held(self) -> contextlib.AbstractContextManager[object]:
        """While a batch is made into it: for this process alone, as far as the store can tell."""

    @abstractmethod
    def mark(self, token: str | None) -> None:
        """Leave a sign that `marked` finds, or take it away."""

    @abstractmethod
    def marked(self, token: str) -> bool:
        """Whether this is the store in which another process has left the sign."""


def store_of(name: str) -> Store:
    """The folder, which is made where it is missing, or the store of a URL. OutputError where it cannot be."""
    return UrlStore(name) if _URL.match(name) else Folder(name)


class Folder(Store):
    """A folder; videos grow in it under their own names."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._path = Path(os.path.abspath(name))
        with _told(f"make {name}"):
            self._path.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def workplace(self, files: list[str]) -> Iterator[Path]:
        yield self._path

    def keep(self, folder: Path, file: str) -> None:
        return None

    def names(self) -> set[str]:
        with _told(f"read {self.name}"):
            return {entry.name for entry in os.scandir(self._path) if entry.is_file()}

    def remove(self, file: str) -> None:
        with _told(f"delete {file} in {self.name}"), contextlib.suppress(FileNotFoundError):
            (self._path / file).unlink()

    def read(self, file: str) -> str:
        with _told(f"read {file} in {self.name}"):
            try:
                with open_own(self._path / file) as opened:
                    return opened.readall().decode()
            except FileNotFoundError:
                return ""

    def write(self, file: str, text: str) -> None:
        with _told(f"write {file} in {self.name}"):
            write_whole(self._path / file, text)

    def append(self, file: str, line: str) -> None:
        with _told(f"write {file} in {self.name}"), open_own(self._path / file, "a") as opened:
            opened.write(f"{line}\n".encode())
            os.fsync(opened.fileno())

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with _told(f"write in {self.name}"):
            lock = open_own(self._path / ".lock", "a")
        with lock:
            if hold(lock) is False:
                raise OutputError(f"another batch is being made in {self.name}: wait for it, or name another folder")
            yield

    def mark(self, token: str | None) -> None:
        if token is None:
            self.remove(".batch")
        else:
            self.write(".batch", token)

    def marked(self, token: str) -> bool:
        return self.read(".batch") == token


class UrlStore(Store):
    """A store of fsspec's. Videos are made in a folder of the worker's own, and put there whenever they are saved."""

    def __init__(self, name: str) -> None:
        self.name = name.rstrip("/")
        try:
            import fsspec
        except ImportError:
            raise OutputError(f"{name} needs fsspec: install miga_engine[stores], or name a folder") from None
        with _told(f"reach {name}"):
            self._files: Any
            self._files, self._root = fsspec.core.url_to_fs(self.name)
        protocols = self._files.protocol
        self._is_whole = not _WHOLE.isdisjoint([protocols] if isinstance(protocols, str) else protocols)

    def __reduce__(self) -> tuple[Any, ...]:
        return UrlStore, (self.name,)

    @contextlib.contextmanager
    def workplace(self, files: list[str]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="miga-batch-") as folder:
            there = self.names()
            for file in files:
                if file in there:
                    with _told(f"read {file} in {self.name}"):
                        self._files.get_file(self._at(file), os.path.join(folder, file))
            yield Path(folder)

    def keep(self, folder: Path, file: str) -> None:
        source = folder / file
        if not source.is_file():
            return
        with _told(f"write {file} in {self.name}"):
            self._files.makedirs(self._root, exist_ok=True)
            if self._is_whole:
                self._files.put_file(str(source), self._at(file))
            else:
                self._files.put_file(str(source), self._at(f".{file}.part"))
                self._files.mv(self._at(f".{file}.part"), self._at(file))

    def names(self) -> set[str]:
        with _told(f"read {self.name}"):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return set()
            return {entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "file"}

    def remove(self, file: str) -> None:
        with _told(f"delete {file} in {self.name}"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._at(file))

    def read(self, file: str) -> str:
        if file not in self.names():
            return ""
        with _told(f"read {file} in {self.name}"):
            return str(self._files.cat_file(self._at(file)).decode())

    def write(self, file: str, text: str) -> None:
        with tempfile.TemporaryDirectory(prefix="miga-batch-") as folder:
            write_whole(Path(folder) / file, text)
            self.keep(Path(folder), file)

    def append(self, file: str, line: str) -> None:
        self.write(file, f"{self.read(file)}{line}\n")

    def held(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def mark(self, token: str | None) -> None:
        """Whoever can reach a URL reaches the same."""

    def marked(self, token: str) -> bool:
        return True

    def _at(self, file: str) -> str:
        return f"{self._root}/{file}"


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """What a library says of a failure, in a sentence."""
    try:
        yield
    except OutputError:
        raise
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OutputError(f"cannot {what}: {error.strerror or error}") from error
    except Exception as error:  # of the libraries behind fsspec
        raise OutputError(f"cannot {what}: {type(error).__name__}: {' '.join(str(error).split())}") from error
