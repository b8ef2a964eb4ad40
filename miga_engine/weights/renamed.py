"""A checkpoint under other names: the first of the wrappers, which wrap one another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from miga_engine.weights.checkpoint import Checkpoint


class RenamedCheckpoint(Checkpoint):
    """Another checkpoint under other keys; `rename` gives the new key, or None for an entry to leave out."""

    def __init__(self, source: Checkpoint, rename: Callable[[str], str | None]) -> None:
        super().__init__(source.path)
        self._source = source
        self._names = {new: old for old in source.shapes if (new := rename(old)) is not None}
        self.shapes = {new: source.shapes[old] for new, old in self._names.items()}
        self.metadata = source.metadata
        self.is_held = source.is_held

    def read(self, key: str) -> Tensor:
        return self._source.read(self._names[key])

    def fill(self, key: str, out: Tensor) -> None:
        self._source.fill(self._names[key], out)

    def stored_dtype(self, key: str) -> torch.dtype:
        return self._source.stored_dtype(self._names[key])

    def key_in_file(self, key: str) -> str:
        return self._source.key_in_file(self._names[key])

    def close(self) -> None:
        self._source.close()
