"""Weights in a safetensors file, mapped; its header's sizes are compared with the file before memory is asked for."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.untrusted import MAX_TABLE_BYTES, WeightsFile, check_key, first_line, not_mapped

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class SafetensorsCheckpoint(Checkpoint):
    """The tensors of one file. Raises CheckpointError."""

    def __init__(self, file: WeightsFile) -> None:
        from safetensors import SafetensorError, safe_open

        super().__init__(file.path)
        try:
            _check_header(file)
            self._handle: Any = safe_open(file.path, framework="pt", device="cpu")
        except (SafetensorError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{file.path} is cut short or not a safetensors file ({first_line(error)}): download it again"
            ) from error
        except (OSError, RuntimeError, MemoryError) as error:
            raise not_mapped(file.path, error) from error
        self._file = file
        self.metadata = self._handle.metadata() or {}
        for key in self._handle.keys():  # noqa: SIM118 - the handle is no mapping
            check_key(file.path, key)
            self.shapes[key] = tuple(self._handle.get_slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        self._file.check()
        try:
            tensor: Tensor = self._handle.get_tensor(key)
        except Exception as error:  # the library's own error, and whatever torch makes of an odd dtype or shape
            raise CheckpointError(
                f"{self.path} holds {key} in a form that cannot be read ({first_line(error)}): download it again"
            ) from error
        return tensor

    def stored_dtype(self, key: str) -> torch.dtype:
        known = _DTYPES.get(self._handle.get_slice(key).get_dtype())
        return super().stored_dtype(key) if known is None else known

    def close(self) -> None:
        super().close()
        self._handle = None
        self._file.close()


def _check_header(file: WeightsFile) -> None:
    """ValueError for a header that is no table, or larger than the file or any model's."""
    header_bytes = int.from_bytes(file.stream.read(8), "little")
    if header_bytes > file.size - 8:
        raise ValueError(f"a header of {header_bytes} bytes in {file.size}")
    if header_bytes > MAX_TABLE_BYTES:
        raise ValueError(f"a header of {header_bytes} bytes")
    json.loads(file.stream.read(header_bytes), object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return table
