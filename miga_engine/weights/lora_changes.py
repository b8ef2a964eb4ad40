"""What a LoRA file does to a tensor: a difference or the product of a pair is added, and lengths may be set (DoRA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.untrusted import first_line, short


class Change(Protocol):
    """A change of one tensor."""

    @property
    def is_by_row(self) -> bool:
        """Whether rows change each for itself, so that some of them can be changed without the others."""

    def apply(self, tensor: Tensor, rows: slice = slice(None)) -> None:
        """Change rows of a tensor, by default all, in place: contiguous, in float32. Raises CheckpointError."""


class Difference(NamedTuple):
    """A tensor to add."""

    checkpoint: Checkpoint
    key: str
    factor: float

    @property
    def is_by_row(self) -> bool:
        return True

    def apply(self, tensor: Tensor, rows: slice = slice(None)) -> None:
        tensor.add_(_floats(self.checkpoint, self.key, rows), alpha=self.factor)


class Pair(NamedTuple):
    """Two factors whose product is added; with a magnitude, rows of the sum are brought to that length (DoRA).

    Convolutions are the matrix products that they are over a patch.
    """

    checkpoint: Checkpoint
    down: str
    up: str
    magnitude: str | None
    scale: float
    strength: float

    @property
    def is_by_row(self) -> bool:
        return self.magnitude is None

    def apply(self, tensor: Tensor, rows: slice = slice(None)) -> None:
        matrix = tensor.flatten(1)
        down = _floats(self.checkpoint, self.down).flatten(1)
        up = _floats(self.checkpoint, self.up, rows).flatten(1)
        if self.magnitude is None:
            matrix.addmm_(up, down, alpha=self.strength * self.scale)
            return
        value = torch.addmm(matrix, up, down, alpha=self.scale).view_as(tensor)
        magnitude = _floats(self.checkpoint, self.magnitude)
        axis = magnitude_axis(magnitude.shape, tensor.shape)
        others = [i for i in range(tensor.ndim) if i != axis]
        lengths = torch.linalg.vector_norm(value, dim=others, keepdim=True)
        value *= magnitude.reshape(lengths.shape) / (lengths + torch.finfo(torch.float32).eps)
        tensor.lerp_(value, self.strength)


def magnitude_axis(magnitude: Sequence[int], weight: Sequence[int]) -> int | None:
    """Along which axis of a weight its magnitudes lie: the output's, or the input's as in early LyCORIS files.

    Shapes of both; None where they do not fit.
    """
    length = math.prod(magnitude)
    is_input = length == weight[1] and len(magnitude) > 1 and magnitude[0] == 1
    if is_input and (len(weight) == 2 or length != weight[0]):
        return 1
    return 0 if length == weight[0] else None


def cast(checkpoint: Checkpoint, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the file, or a part of it, in another dtype. Raises CheckpointError."""
    try:
        return tensor.to(dtype)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{checkpoint.path} holds {short(key)} as {str(tensor.dtype).removeprefix('torch.')}, which cannot be "
            f"used ({first_line(error)}): give a LoRA in float weights"
        ) from error


def _floats(checkpoint: Checkpoint, key: str, rows: slice = slice(None)) -> Tensor:
    stored = checkpoint.read(key)
    tensor = cast(checkpoint, key, stored[rows] if stored.ndim else stored, torch.float32)
    if not tensor.isfinite().all():
        raise CheckpointError(f"{checkpoint.path} holds {short(key)} with NaN or infinity: download it again")
    return tensor
