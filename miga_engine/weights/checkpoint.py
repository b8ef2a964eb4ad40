"""What a checkpoint is to those who read it: names, shapes, and a tensor at a time.

A format opens its file as one (`weights.files`), a wrapper makes one of another (`weights.renamed`), and `weights.load`
puts one into a network. Every failure is a CheckpointError of one sentence with the file, the key, both shapes where
shapes are the trouble, and the remedy.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError


class Checkpoint(ABC):
    """Tensors of one component: `shapes` by key without reading data, `read(key)` for one tensor on the CPU."""

    is_closed = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """The tensor under `key`, possibly still mapped from its file."""

    def key_in_file(self, key: str) -> str:
        """What the file itself calls `key`."""
        return key

    def close(self) -> None:
        """Give back the file, if there is one; the tensors can be read no more."""
        self.is_closed = True


def count_numbered(keys: Collection[str], pattern: str, holder: object) -> int:
    r"""One more than the largest number that `pattern`, with `(\d+)` in it, captures at the start of a key.

    Raises CheckpointError, blaming the `holder` of the keys, where the numbers go beyond the number of keys.
    """
    found = (match[1] for key in keys if (match := re.match(pattern, key)))
    last = max((int(digits) if len(digits) < 9 else 10**9 for digits in found), default=-1)
    if last >= len(keys):
        raise CheckpointError(f"layers in {holder} are numbered beyond its {len(keys)} tensors: download it again")
    return last + 1


def stored_dtype(checkpoint: Checkpoint, key: str) -> torch.dtype:
    """Dtype a checkpoint's tensors are in, where networks can run in it."""
    if key not in checkpoint.shapes:
        return torch.float32  # the missing key will be named when the module is filled
    dtype = checkpoint.read(key).dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{checkpoint.path} stores {name}, in which it cannot run: choose a dtype like bfloat16")
    return dtype


def check_fit(root: Path, what: str, **sizes: int) -> None:
    """CheckpointError where networks of one folder differ in a size that they must share."""
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} ({name.replace('_', ' ')})" for name, size in sizes.items())
        raise CheckpointError(
            f"the networks in {root} do not fit together, with {what} of {found}: give those of one and the same model"
        )
