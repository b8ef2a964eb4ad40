"""Which format a weights file is in, several files as one, and files that are opened once for all who read them.

A new format is a file beside this one and a line of `FORMATS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.gguf import GgufCheckpoint
from miga_engine.weights.pickle import PICKLE_SUFFIXES, PickleCheckpoint
from miga_engine.weights.safetensors import SafetensorsCheckpoint
from miga_engine.weights.untrusted import WeightsFile, read_json, short


class Format(NamedTuple):
    """A way to store tensors: what its files are called, who opens one, and whether one network may lie in several."""

    suffixes: tuple[str, ...]
    opens: Callable[[WeightsFile], Checkpoint]
    has_shards: bool = False


FORMATS: tuple[Format, ...] = (
    Format((".safetensors", ".sft"), SafetensorsCheckpoint, has_shards=True),
    Format(PICKLE_SUFFIXES, PickleCheckpoint),
    Format((".gguf",), GgufCheckpoint, has_shards=False),
)


class JoinedCheckpoint(Checkpoint):
    """The files of one network as one; `path` is their index or their folder. Raises CheckpointError."""

    def __init__(self, path: Path, parts: Sequence[Checkpoint]) -> None:
        super().__init__(path)
        self._parts = parts
        self._part_of = {key: part for part in parts for key in part.shapes}
        for part in parts:
            if twice := next((key for key in part.shapes if key in self.shapes), None):
                raise CheckpointError(
                    f"{path} holds {twice} in two files, {part.path.name} being one: keep the files of one set of "
                    "weights"
                )
            self.shapes |= part.shapes
            self.metadata = {**self.metadata, **part.metadata}

    def read(self, key: str) -> Tensor:
        return self._part_of[key].read(key)

    def fill(self, key: str, out: Tensor) -> None:
        self._part_of[key].fill(key, out)

    def stored_dtype(self, key: str) -> torch.dtype:
        return self._part_of[key].stored_dtype(key)

    def close(self) -> None:
        for part in self._parts:
            part.close()


# What tells a file from one that has taken its place, or was written anew: device, number, size, times.
_Stamp = tuple[int, ...]
_shared: ContextVar[dict[str, tuple[_Stamp, Checkpoint]] | None] = ContextVar("shared", default=None)


@contextmanager
def opened_once() -> Iterator[None]:
    """A weights file is opened once within, as long as it stays the same, until its data are in a network.

    For a while in which the same files are looked at by several: who knows them, what a run of them needs, who builds
    of them. Blocks may lie within one another.
    """
    if _shared.get() is not None:
        yield
        return
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def format_of(path: Path) -> Format | None:
    """The format of a file, by its name."""
    return next((format for format in FORMATS if path.suffix in format.suffixes), None)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a weights file or a `*.index.json`. Raises CheckpointError."""
    if not os.path.isfile(path):  # a pipe or device would be read for ever
        raise CheckpointError(f"{path} is not a regular file: give a weights file")
    if path.name.endswith(".index.json"):
        return JoinedCheckpoint(path, [open_checkpoint(file) for file in indexed_files(path)])
    format = format_of(path)
    if format is None:
        suffixes = [suffix for known in FORMATS for suffix in known.suffixes]
        raise CheckpointError(
            f"{path} is no known weights file: give a {', '.join([*suffixes, '.index.json'][:-1])} or .index.json file"
        )
    shared = _shared.get()
    if shared is None:
        return _open(path, format)
    name, stamp = os.path.realpath(path), _stamp(path)
    known_stamp, checkpoint = shared.get(name, (None, None))
    if checkpoint is None or checkpoint.is_closed or checkpoint.path != path or known_stamp != stamp:
        checkpoint = _open(path, format)
        shared[name] = stamp, checkpoint
    return checkpoint


def open_files(files: Sequence[Path]) -> Checkpoint:
    """The weights of one network, in one file, or in several of one folder. Raises CheckpointError."""
    if len(files) == 1:
        return open_checkpoint(files[0])
    for file in files:
        format = format_of(file)
        if format is None or not format.has_shards:
            raise CheckpointError(
                f"{file.parent} holds {len(files)} weights files, {file.name} among them: give one of them"
            )
    return JoinedCheckpoint(files[0].parent, [open_checkpoint(file) for file in files])


def indexed_files(index: Path) -> list[Path]:
    """Files that an index names, each of them beside it. They may be links, as in the caches of hubs."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} names no files in a weight_map: download it again")
    files = []
    for name in sorted({str(name) for name in weight_map.values()}):
        if name != Path(name).name or "\\" in name:
            raise CheckpointError(
                f"{index} points outside its folder, at {short(name)}: use an index that names files beside it"
            )
        file = index.parent / name
        if not os.path.isfile(file):
            raise CheckpointError(
                f"{index} names {short(name)}, which is not in {index.parent}: download the missing file"
            )
        files.append(file)
    return files


def _open(path: Path, format: Format) -> Checkpoint:
    return format.opens(WeightsFile(path))


def _stamp(path: Path) -> _Stamp:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
