"""Outputs that cannot be written: refused before any work is done for them, and told in one sentence."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from miga_engine.errors import MigaError, OutputError


def check_output(path: str | os.PathLike[str], suffixes: Sequence[str], *, overwrite: bool = False) -> Path:
    """The path, if a file can be written there; otherwise OutputError with one sentence."""
    target = Path(path)
    if os.path.isdir(target) or os.fspath(path).endswith("/"):
        raise OutputError(
            f"cannot write {path}: it is a folder, and a file name ending in {' or '.join(suffixes)} is expected"
        )
    if target.suffix.lower() not in suffixes:
        received = f"the suffix {target.suffix!r} is" if target.suffix else "a name without suffix is"
        raise OutputError(f"cannot write {path}: {received} not one of {', '.join(suffixes)}")
    check_folder(target.parent, path)
    if os.path.lexists(target) and not overwrite:
        raise OutputError(f"cannot write {path}: it exists already, and --overwrite (overwrite=True) was not given")
    return target


def check_folder(folder: Path, path: str | os.PathLike[str]) -> None:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long a name, or a character that no name may have
        raise OutputError(f"cannot write {os.fspath(path)[:100]!r}: {reason(error)}") from error
    if not os.path.exists(folder):
        raise OutputError(f"cannot write {path}: the folder {folder} does not exist")
    if not os.path.isdir(folder):
        raise OutputError(f"cannot write {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: the folder {folder} is not writable")


def reason(error: BaseException) -> str:
    """The system's words for a failed write, without errno and file name."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")


@contextmanager
def reported(
    name: str | os.PathLike[str], failures: tuple[type[BaseException], ...] = (OSError,), verb: str = "write"
) -> Iterator[None]:
    """A failed write as one OutputError sentence."""
    try:
        yield
    except MigaError:
        raise
    except BrokenPipeError as error:
        raise OutputError(f"cannot {verb} {name} any further: the program that read it has closed it") from error
    except failures as error:
        raise OutputError(f"cannot {verb} {name}: {reason(error)}") from error
