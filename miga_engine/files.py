"""Files that appear whole or not at all, and are never opened through somebody else's link.

A file is made beside the one it shall become, under a name that nobody uses, and created exclusively: whatever has that
name already, be it a link, is left alone. Renaming then replaces what has the name, and never what a link leads to.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]


class WholeFile(io.FileIO):
    """An unbuffered file whose `write` takes everything or raises: the system may take a part."""

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        while rest:
            rest = rest[super().write(rest) or 0 :]
        return length


def create(path: str | os.PathLike[str]) -> WholeFile:
    """A new file, readable too; FileExistsError where anything has the name, even a link that leads nowhere."""
    return WholeFile(os.fspath(path), "x+")  # O_EXCL, which follows no link


def open_own(path: str | os.PathLike[str], mode: str = "r", *, follows_links: bool = False) -> WholeFile:
    """A regular file that is there under its own name; OSError for a link, a pipe or a device."""

    def opener(name: str, flags: int) -> int:
        flags |= getattr(os, "O_NONBLOCK", 0)  # a pipe is not waited for
        return os.open(name, flags if follows_links else flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    try:
        file = WholeFile(os.fspath(path), mode, opener=opener)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link; name the file itself") from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def flush_file(path: Path) -> None:
    """What was written under the name is on the disk when this returns."""
    with open_own(path) as file:
        os.fsync(file.fileno())


def beside(path: Path, token: str | None = None) -> Path:
    """Where a file grows that shall become `path`: name.1f2e3d4c.part.suffix, with random digits unless given."""
    return path.with_name(f"{path.stem[:48]}.{token or secrets.token_hex(4)}.part{path.suffix}")


def is_beside(name: object, path: Path) -> bool:
    """Whether `beside` may have given this name for `path`."""
    form = re.escape(path.stem[:48]) + r"\.[0-9a-f]{8}\.part" + re.escape(path.suffix)
    return isinstance(name, str) and re.fullmatch(form, name) is not None


def hold(file: WholeFile) -> bool | None:
    """Lock the file while it is open; False where another process has it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_abandoned(path: Path) -> None:
    """Delete the empty files that processes which were killed have left beside `path`; not what anybody holds."""
    for entry in os.scandir(path.parent):
        if is_beside(entry.name, path):
            with suppress(OSError), open_own(entry.path, "r+") as file:
                if hold(file) and os.fstat(file.fileno()).st_size == 0:
                    os.unlink(entry.path)


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[WholeFile]:
    """A file to write into, which takes the place of `path` when the block ends, and is gone where it fails."""
    target = Path(path)
    partial = beside(target)
    partial = partial.with_name(f".{partial.name}")
    file = create(partial)
    try:
        with file:
            yield file
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file of bytes, or of text in UTF-8."""
    with written_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def path_written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `written_whole`, for writers that want a name: the file is made in a folder of its own, with all that such a
    writer may put beside it."""
    target = Path(path)
    folder = target.with_name(f".{beside(target).name}")
    folder.mkdir(mode=0o700)
    try:
        partial = folder / target.name
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
