"""Tensors that are in memory already, as a checkpoint: of a module, or of a state dict, and of nobody's file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miga_engine.errors import CheckpointError
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.untrusted import short


class HeldCheckpoint(Checkpoint):
    """What others hold: whoever loads it uses the very tensors where their device and dtype are those wanted.

    `path` is what messages call it.
    """

    is_held = True

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(Path(name))
        self._tensors: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{name} holds {short(str(key))} of type {type(tensor).__name__}: give tensors")
            if tensor.is_meta:
                raise CheckpointError(
                    f"{name} holds {short(str(key))} without data, on the device 'meta', as when its weights are "
                    "offloaded: give it with its weights in memory"
                )
            self._tensors[str(key)] = tensor.detach()
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}

    @property
    def device(self) -> torch.device:
        """Where the tensors lie, told by the first."""
        return next((tensor.device for tensor in self._tensors.values()), torch.device("cpu"))

    def read(self, key: str) -> Tensor:
        return self._tensors[key]

    def close(self) -> None:
        super().close()
        self._tensors = {}


def held(part: str, given: Any) -> HeldCheckpoint:
    """A module's tensors, or those of a state dict. CheckpointError where it is neither."""
    name = f"the {part.replace('_', ' ')} that was given"
    if isinstance(given, nn.Module):
        given = given.state_dict()
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{name} is of type {type(given).__name__}: give a module or a state dict")
    return HeldCheckpoint(name, given)


def said_of(given: Any) -> dict[str, Any]:
    """What a module says of its sizes, as its config.json would; nothing of a state dict."""
    config: Any = getattr(given, "config", None)
    if not isinstance(config, Mapping):
        return {}
    as_read = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    return {"_class_name": type(given).__name__, **as_read}
