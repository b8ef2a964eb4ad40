"""Files from elsewhere, taken to be hostile: read within bounds, and what they say made fit for a message.

What such a file claims is compared with its size before memory is asked for. Every failure is a CheckpointError of one
sentence, with the remedy.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from miga_engine.errors import CheckpointError

MAX_TABLE_BYTES = 8 * 2**20
"""Of a JSON file, a safetensors header or a pickle without its tensors: twenty times those of the published models."""
MAX_KEY_CHARS = 500
_START_BYTES = 200  # which tell what a download that went wrong has left


class WeightsFile:
    """A weights file, opened once: its start, its size, and whether it keeps its length while it is mapped.

    Where a mapped file is cut, what lies behind is no memory any more. A look before each tensor is what can be had; a
    file that is cut during the copy of one still ends the process with a signal, which reading instead of mapping would
    avoid at four fifths of the speed. Weights are to be replaced by renaming new ones into their place, which maps
    outlive. Raises CheckpointError where the file cannot be opened or is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.stream = path.open("rb")
            self.size = os.fstat(self.stream.fileno()).st_size
            _refuse_start(path, self.stream.read(_START_BYTES))
            self.stream.seek(0)
        except OSError as error:
            raise not_mapped(path, error) from error

    def __del__(self) -> None:
        if hasattr(self, "stream"):
            self.close()

    def close(self) -> None:
        """Give the file back."""
        self.stream.close()

    def check(self) -> None:
        """CheckpointError where the file is shorter than it was."""
        if os.fstat(self.stream.fileno()).st_size < self.size:
            raise CheckpointError(f"{self.path} was cut while it was read: download it again")


def refuse_spoilt(path: Path) -> None:
    """CheckpointError for what a download that went wrong leaves under the name of the file."""
    try:
        with path.open("rb") as stream:
            start = stream.read(_START_BYTES)
    except OSError:
        return  # named where it is read
    _refuse_start(path, start)


def _refuse_start(path: Path, start: bytes) -> None:
    is_empty, start = not start, start.lstrip()
    if is_empty:
        reason = "is empty"
    elif start.startswith(b"version https://git-lfs.github.com/spec/"):
        reason = "is only Git LFS's pointer to the file (git lfs pull)"
    elif start[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        reason = "is a web page, and not the file that it was saved as"
    else:
        return
    raise CheckpointError(f"{path} {reason}: download it again")


def read_bounded(path: Path, max_bytes: int = MAX_TABLE_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises CheckpointError."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is not a regular file: download it again")
    try:
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): make it readable") from error
    if len(content) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes >> 20} MiB, as no such file is: download it again")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`. Raises CheckpointError when it is not one."""
    if os.path.isfile(path):  # a pipe would be waited for
        refuse_spoilt(path)
    try:
        content = json.loads(read_bounded(path).decode())
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({first_line(error)}): download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: download it again")
    return content


def check_key(path: Path, key: str) -> None:
    """CheckpointError for the name of a tensor that no model has, and that no message could show."""
    if len(key) > MAX_KEY_CHARS or not key.isprintable():
        raise CheckpointError(f"{path} holds a tensor called {short(key)}, as in no model: download it again")


def not_mapped(path: Path, error: BaseException) -> CheckpointError:
    """What to raise where the system does not give a file."""
    return CheckpointError(
        f"{path} cannot be mapped into memory ({getattr(error, 'strerror', None) or first_line(error)}): "
        "make it readable, free memory, or give the weights in several smaller files"
    )


def short(name: str, max_chars: int = 100) -> str:
    """A name out of a file, fit for a message."""
    name = name if len(name) <= max_chars else name[:max_chars] + "…"
    return name if name.isprintable() else ascii(name)


def first_line(error: BaseException) -> str:
    """What an error says, fit for a message."""
    return short(str(error).strip().partition("\n")[0], 300) or type(error).__name__
