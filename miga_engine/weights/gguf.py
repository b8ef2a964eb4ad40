"""Weights in a GGUF file, mapped; blocks of a quantised tensor are unpacked to float32 when that tensor is read.

The container is read here, and all that it claims compared with the file before memory is asked for. Only blocks need
the package `gguf`, which is optional.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.untrusted import WeightsFile, check_key, first_line, not_mapped, short

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Before a tensor's name: the shape of one that was reshaped so that its rows are whole blocks."""

_MAX_HEAD_BYTES = 32 * 2**20  # four times that of a text encoder with a vocabulary of 256,384
_MAX_ITEMS = 2**22  # of all arrays together, each of which is a Python object
_MAX_ENTRIES = 2**16  # tensors, or key-value pairs; the largest published models have some thousand
_MAX_DIMS = 8
_CHUNK = 2**19  # values that are unpacked at a time, beside the tensor they go into

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Type(NamedTuple):
    """How numbers are stored: so many values in so many bytes, one by one where there is a dtype."""

    name: str
    block_values: int
    block_bytes: int
    dtype: torch.dtype | None = None


_TYPES = {
    0: _Type("F32", 1, 4, torch.float32), 1: _Type("F16", 1, 2, torch.float16), 30: _Type("BF16", 1, 2, torch.bfloat16),
    28: _Type("F64", 1, 8, torch.float64), 24: _Type("I8", 1, 1, torch.int8), 25: _Type("I16", 1, 2, torch.int16),
    26: _Type("I32", 1, 4, torch.int32), 27: _Type("I64", 1, 8, torch.int64),
    2: _Type("Q4_0", 32, 18), 3: _Type("Q4_1", 32, 20), 6: _Type("Q5_0", 32, 22), 7: _Type("Q5_1", 32, 24),
    8: _Type("Q8_0", 32, 34), 9: _Type("Q8_1", 32, 40), 10: _Type("Q2_K", 256, 84), 11: _Type("Q3_K", 256, 110),
    12: _Type("Q4_K", 256, 144), 13: _Type("Q5_K", 256, 176), 14: _Type("Q6_K", 256, 210), 15: _Type("Q8_K", 256, 292),
    16: _Type("IQ2_XXS", 256, 66), 17: _Type("IQ2_XS", 256, 74), 18: _Type("IQ3_XXS", 256, 98),
    19: _Type("IQ1_S", 256, 50), 20: _Type("IQ4_NL", 32, 18), 21: _Type("IQ3_S", 256, 110), 22: _Type("IQ2_S", 256, 82),
    23: _Type("IQ4_XS", 256, 136), 29: _Type("IQ1_M", 256, 56), 34: _Type("TQ1_0", 256, 54),
    35: _Type("TQ2_0", 256, 66), 39: _Type("MXFP4", 32, 17),
}  # fmt: skip


class _Entry(NamedTuple):
    """Where a tensor lies in its file, and as what."""

    number: int  # of its type
    type: _Type
    row_values: int
    start: int
    stop: int


class GgufCheckpoint(Checkpoint):
    """The tensors of one file. Raises CheckpointError.

    `metadata` has strings, numbers and lists of them; bytes of a string that are no UTF-8, as in some tokens, are
    lone surrogates of `surrogateescape`.
    """

    def __init__(self, file: WeightsFile) -> None:
        super().__init__(file.path)
        self._file = file
        try:
            reader = _Reader(file)
            num_tensors, num_pairs = _start(reader)
            self.metadata = _metadata(reader, num_pairs)
            alignment = self.metadata.get("general.alignment", 32)
            if type(alignment) is not int or alignment not in (2**n for n in range(3, 21)):
                raise ValueError(f"an alignment of {short(str(alignment))}")
            self._entries = self._read_table(reader, num_tensors, alignment)
        except CheckpointError:
            raise
        except (ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{file.path} is cut short or not a GGUF file ({first_line(error)}): download it again"
            ) from error
        except (OSError, MemoryError) as error:
            raise not_mapped(file.path, error) from error
        try:
            self._bytes = torch.from_file(str(file.path), shared=False, size=file.size, dtype=torch.uint8)
        except (OSError, RuntimeError, MemoryError) as error:
            raise not_mapped(file.path, error) from error

    def read(self, key: str) -> Tensor:
        entry, shape = self._entries[key], self.shapes[key]
        self._file.check()
        if entry.type.dtype is not None:
            return self._bytes[entry.start : entry.stop].view(entry.type.dtype).view(shape)
        out = torch.empty(shape)
        self.fill(key, out)
        return out

    def fill(self, key: str, out: Tensor) -> None:
        entry = self._entries[key]
        if entry.type.dtype is not None:
            super().fill(key, out)
            return
        self._file.check()
        self._unpack(key, self._bytes[entry.start : entry.stop], entry, out)

    def stored_dtype(self, key: str) -> torch.dtype:
        return self._entries[key].type.dtype or torch.bits8

    def type_name(self, key: str) -> str:
        return self._entries[key].type.name

    def close(self) -> None:
        super().close()
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._file.close()

    def _read_table(self, reader: _Reader, num_tensors: int, alignment: int) -> dict[str, _Entry]:
        """Names, shapes and places of the tensors, each of which lies in the file and in no other's place."""
        entries = {}
        for _ in range(num_tensors):
            name = reader.string()
            check_key(self.path, name)
            if name in entries:
                raise ValueError(f"{name} stands twice in its table")
            num_dims = reader.number("I")
            if num_dims > _MAX_DIMS:
                raise ValueError(f"{name} of {num_dims} dimensions")
            dims = [reader.number("Q") for _ in range(num_dims)]  # the length of a row first
            number, offset = reader.number("I"), reader.number("Q")
            if number not in _TYPES:
                raise CheckpointError(
                    f"{self.path} holds {name} in a type of number {number}, which is unknown: "
                    "use a version of it in Q8_0, or upgrade miga_engine"
                )
            kind, row_values = _TYPES[number], dims[0] if dims else 1
            num_values = math.prod(dims)
            if not 0 < num_values <= reader.size * kind.block_values or row_values % kind.block_values:
                raise ValueError(f"{name} of {kind.name} and shape {dims[::-1]}")
            if offset % alignment:
                raise ValueError(f"{name} at {offset}, which is no multiple of {alignment}")
            entries[name] = _Entry(
                number, kind, row_values, offset, offset + num_values // kind.block_values * kind.block_bytes
            )
            self.shapes[name] = self._shape(name, dims, num_values)
        start = -(-reader.position // alignment) * alignment
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            if entry.start < end or start + entry.stop > reader.size:
                raise ValueError(f"{name} at {entry.start} to {entry.stop}")
            end = entry.stop
            entries[name] = entry._replace(start=start + entry.start, stop=start + entry.stop)
        return entries

    def _shape(self, name: str, dims: list[int], num_values: int) -> tuple[int, ...]:
        """As torch has it, which is the one before the tensor was reshaped, where the file says it."""
        shape = self.metadata.get(ORIGINAL_SHAPE + name)
        if shape is None:
            return tuple(dims[::-1])
        is_shape = isinstance(shape, list) and len(shape) <= _MAX_DIMS and all(type(n) is int and n > 0 for n in shape)
        if not is_shape or math.prod(shape) != num_values:
            raise ValueError(f"{name} of shape {dims[::-1]} once had {short(str(shape)[:200])}")
        return tuple(shape)

    def _unpack(self, key: str, content: Tensor, entry: _Entry, out: Tensor) -> None:
        """The values of a tensor's blocks, rounded once from float32, a few rows at a time."""
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError(
                f"{self.path} holds {key} in {entry.type.name}, for which the package gguf is missing: "
                'pip install "miga_engine[gguf]"'
            ) from error
        import numpy as np

        row_bytes = entry.row_values // entry.type.block_values * entry.type.block_bytes
        rows = content.view(-1, row_bytes).numpy()
        unpacked = out.view(len(rows), entry.row_values)
        step = max(1, _CHUNK // entry.row_values)
        try:
            kind = gguf.GGMLQuantizationType(entry.number)
            with np.errstate(all="ignore"):  # scales that are no numbers are found where weights are checked
                for i in range(0, len(rows), step):
                    unpacked[i : i + step] = torch.from_numpy(gguf.quants.dequantize(rows[i : i + step], kind))
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} holds {key} in {entry.type.name}, which the package gguf does not unpack: "
                "use a version of it in Q8_0"
            ) from error


class _Reader:
    """The head of a file from its start, never beyond what such a head may be. Raises ValueError."""

    def __init__(self, file: WeightsFile) -> None:
        self.size = file.size
        self.position = 0
        self._stream = file.stream
        self._items_left = _MAX_ITEMS

    def take(self, num_bytes: int) -> bytes:
        self.position += num_bytes
        if self.position > self.size:
            raise ValueError(f"{self.position} bytes in {self.size}")
        if self.position > _MAX_HEAD_BYTES:
            raise ValueError(f"a head of more than {_MAX_HEAD_BYTES >> 20} MiB")
        content = self._stream.read(num_bytes)
        if len(content) < num_bytes:
            raise ValueError("it was cut while it was read")
        return content

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode(errors="surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        if kind not in _NUMBERS:
            raise ValueError(f"a value of type {kind}")
        return self.number(_NUMBERS[kind])

    def array(self, kind: int, length: int) -> list[Any]:
        self._items_left -= length
        if self._items_left < 0:
            raise ValueError(f"arrays of more than {_MAX_ITEMS} values")
        if kind == _STRING:
            return [self.string() for _ in range(length)]
        if kind not in _NUMBERS:
            raise ValueError(f"an array of type {kind}")
        code = _NUMBERS[kind]
        return list(struct.unpack(f"<{length}{code}", self.take(length * struct.calcsize("<" + code))))


def _start(reader: _Reader) -> tuple[int, int]:
    """How many tensors and how many key-value pairs follow."""
    if (magic := reader.take(4)) != b"GGUF":
        raise ValueError(f"it begins with {magic!r}")
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError("it is big-endian" if version in (2 << 24, 3 << 24) else f"its version is {version}")
    num_tensors, num_pairs = reader.number("Q"), reader.number("Q")
    if max(num_tensors, num_pairs) > _MAX_ENTRIES:
        raise ValueError(f"{num_tensors} tensors and {num_pairs} values")
    return num_tensors, num_pairs


def _metadata(reader: _Reader, num_pairs: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        name = reader.string()
        if name in metadata:
            raise ValueError(f"{short(name)} stands twice in its head")
        metadata[name] = reader.value(reader.number("I"))
    return metadata
