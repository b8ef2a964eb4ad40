"""An engine for other processes: its objects as bytes, its weights as memory that all of them look at.

Processes of one machine that each load a model hold it as often. Here the weights lie in one place: a
file of memory (`SharedEngine`), or the object store of a cluster, which gets `Packed` as it is.
"""

from __future__ import annotations

import dataclasses
import io
import mmap
import os
import pickle
import tempfile
import warnings
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from miga_engine.device import own_modes
from miga_engine.engine import Engine
from miga_engine.errors import ConfigError, MigaError
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.layers import copied_to
from miga_engine.presets import PRESETS

_ALIGNMENT = 64
"""Bytes to which torch aligns a tensor on a CPU: sums may depend on it."""


class Packed(NamedTuple):
    """An engine taken apart: `record`, which is for `unpacked` alone, and its weights, uint8 [n] a storage each."""

    record: bytes
    storages: list[np.ndarray[Any, Any]]


@own_modes()
def packed(engine: Engine) -> Packed:
    """An engine on the CPU as data, its text encoder with it; no weights are copied. Raises ConfigError."""
    if engine.device.type != "cpu" or engine.ranks is not None or engine._sharing is not None:
        raise ConfigError(
            f"an engine on {engine.device} is not handed to other processes, nor one that shares its windows: load it "
            "with device 'cpu', and move it there with `to`"
        )
    bundle = engine.bundle
    fields = {field.name: getattr(bundle, field.name) for field in dataclasses.fields(ModelBundle) if field.init}
    fields["open_text_encoder"] = _Kept.of(lambda: bundle.text_encoder)
    fields["open_tokenizer"] = _Kept.of(lambda: bundle.tokenizer)
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(
        {
            "bundle": fields,
            "compile": bundle.transformer._compiled_call_impl is not None,
            "preset": engine.preset_name or engine.preset,
            "name": engine.name,
            "sources": engine.sources,
            "capture": engine.capture,
        }
    )
    return Packed(file.getvalue(), packer.storages)


@own_modes()
def unpacked(record: bytes, storages: Sequence[np.ndarray[Any, Any]]) -> Engine:
    """The engine of `packed`, whose weights are the given memory, which is not to be written while it is used.

    `record` makes objects as a pickle does: it is only ever to be one's own.
    """
    found = _Unpacker(io.BytesIO(record), storages).load()
    bundle = ModelBundle(**found["bundle"])
    if found["compile"]:
        bundle.transformer.compile()
    preset = found["preset"]
    known = PRESETS[preset] if isinstance(preset, str) else preset
    engine = Engine(bundle, known, name=found["name"], device=bundle.device, sources=found["sources"])
    engine.capture = found["capture"]
    return engine


class SharedEngine:
    """An engine in memory that is nobody's own: what is passed to a process that is spawned, whose `open` gives it."""

    def __init__(self, engine: Engine) -> None:
        self._record, storages = packed(engine)
        self._places: list[tuple[int, int]] = []  # start and length of each storage
        end = 0
        self._fd = _memory()
        for storage in storages:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + len(storage)
            self._places.append((start, len(storage)))
        os.ftruncate(self._fd, max(end, 1))
        with mmap.mmap(self._fd, max(end, 1)) as memory:
            whole = np.frombuffer(memory, np.uint8)
            for (start, length), storage in zip(self._places, storages, strict=True):
                whole[start : start + length] = storage
            del whole
        self.num_bytes = end

    def open(self) -> Engine:
        """The engine; what is written to its weights, if anything is, is written to a copy of this process's own."""
        memory = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        whole = np.frombuffer(memory, np.uint8)  # which keeps the memory
        return unpacked(self._record, [whole[start : start + length] for start, length in self._places])

    def close(self) -> None:
        """Let go of it; who has opened it keeps it."""
        os.close(self._fd)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fd": DupFd(self._fd)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _fd=state["_fd"].detach())


def _memory() -> int:
    """A file that has no name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("miga_engine")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What a bundle opens, already opened, or why it cannot be."""

    thing: Any

    @classmethod
    def of(cls, open_thing: Any) -> _Kept:
        try:
            return cls(open_thing())
        except MigaError as error:
            return cls(error)

    def __call__(self, device: torch.device | None = None) -> Any:
        if isinstance(self.thing, MigaError):
            raise self.thing
        if device is None or device.type == "cpu" or not isinstance(self.thing, nn.Module):
            return self.thing
        return copied_to(device, self.thing)


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.storages: list[np.ndarray[Any, Any]] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, Tensor):
            return None
        storage = thing.untyped_storage()
        number = self._numbers.get(storage.data_ptr()) if storage.nbytes() else None
        if number is None:
            number = self._numbers[storage.data_ptr()] = len(self.storages)
            self.storages.append(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
        is_parameter = isinstance(thing, nn.Parameter)
        return number, thing.dtype, tuple(thing.shape), thing.stride(), thing.storage_offset(), is_parameter


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storages: Sequence[np.ndarray[Any, Any]]) -> None:
        super().__init__(file)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            self._storages = [torch.from_numpy(storage).untyped_storage() for storage in storages]

    def persistent_load(self, place: Any) -> Tensor:
        number, dtype, shape, stride, offset, is_parameter = place
        tensor = torch.empty(0, dtype=dtype).set_(self._storages[number], offset, shape, stride)
        return nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
