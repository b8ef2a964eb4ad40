"""What a checkpoint is to those who read it: names, shapes, and a tensor at a time.

A format opens its file as one (`weights.files`), a wrapper makes one of another (`weights.renamed`), and `weights.load`
puts one into a network. Every failure is a CheckpointError of one sentence with the file, the key, both shapes where
shapes are the trouble, and the remedy.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError

PACKED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bits8)
"""Dtypes of stored weights in which no network runs."""


class Checkpoint(ABC):
    """Tensors of one component: `shapes` by key without reading data, `read(key)` for one tensor on the CPU.

    `metadata` is what the file says beside its tensors: of a safetensors file the `__metadata__` of its header, of a
    GGUF file its key-value pairs, of a training's `.pt` the `table` that the tensors lie in.
    """

    is_closed = False
    is_held = False
    """Whether the tensors are somebody's in memory, who lets them be used as they are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: Mapping[str, Any] = {}

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """The tensor under `key`, possibly still mapped from its file."""

    def fill(self, key: str, out: Tensor) -> None:
        """Write the tensor under `key` into `out`, of any float dtype; a format that unpacks does it part by part."""
        out.copy_(self.read(key))

    def copy(self, key: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor under `key` in memory of its own, or that of who holds it, where device and dtype are those
        wanted. Raises CheckpointError where it is none of floats."""
        stored = self.stored_dtype(key)
        if stored in PACKED and self.read_dtype(key).is_floating_point:
            out = torch.empty(self.shapes[key], dtype=dtype)
            self.fill(key, out)
            return out.to(device)
        if not stored.is_floating_point:
            raise CheckpointError(
                f"{self.path} holds {self.key_in_file(key)} as {self.type_name(key)}, from which no weights follow: "
                "give float weights"
            )
        return self.read(key).to(device=device, dtype=dtype, copy=not self.is_held)

    def read_dtype(self, key: str) -> torch.dtype:
        """In which `read` gives the tensor: as it is stored, or float32 of packed blocks."""
        stored = self.stored_dtype(key)
        return torch.float32 if stored is torch.bits8 else stored

    def stored_dtype(self, key: str) -> torch.dtype:
        """In which the file has the tensor under `key`, found without reading data where the format tells it; bits8
        where its values lie in packed blocks, of which `read` gives floats."""
        return self.read(key).dtype

    def type_name(self, key: str) -> str:
        """How the tensor under `key` is stored, in the format's own words."""
        return str(self.stored_dtype(key)).removeprefix("torch.")

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


def network_dtype(checkpoint: Checkpoint, key: str) -> torch.dtype:
    """Dtype for a network where nobody chooses one: that of `key` as it is stored, bfloat16 where weights are in eight
    bits or packed. CheckpointError where it cannot run in what is stored."""
    if any(name.endswith(".weight") and checkpoint.stored_dtype(name) in PACKED for name in checkpoint.shapes):
        return torch.bfloat16
    if key not in checkpoint.shapes:
        return torch.float32  # the missing key will be named when the module is filled
    dtype = checkpoint.stored_dtype(key)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{checkpoint.path} stores {name}, in which it cannot run: choose a dtype like bfloat16")
    return dtype


def form_of(checkpoint: Checkpoint) -> str:
    """A short name of how weights are stored, from the names, shapes and dtypes of the tensors: other numbers have the
    same, another format or precision another. No data are read."""
    digest = hashlib.blake2b(digest_size=8)
    for key, shape in sorted(checkpoint.shapes.items()):
        digest.update(f"{key} {shape} {checkpoint.type_name(key)}".encode())
    return digest.hexdigest()


def check_fit(root: Path, what: str, **sizes: int) -> None:
    """CheckpointError where networks of one folder differ in a size that they must share."""
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} ({name.replace('_', ' ')})" for name, size in sizes.items())
        raise CheckpointError(
            f"the networks in {root} do not fit together, with {what} of {found}: give those of one and the same model"
        )
