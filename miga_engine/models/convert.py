"""Rewrite weights as plain safetensors: a file under its own keys, or a model as a folder in its makers' layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from miga_engine.errors import OutputError
from miga_engine.files import path_written_whole, write_whole
from miga_engine.models import loading
from miga_engine.models.family import Sources
from miga_engine.weights.checkpoint import PACKED, Checkpoint
from miga_engine.weights.files import open_checkpoint, opened_once
from miga_engine.weights.quantized import dequantized

SHARD_BYTES = 5 * 10**9
"""Of a file of a folder at most: what is held in memory while it is written."""


def convert(source: Path, target: Path, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Write all tensors of `source` under their keys to `target`, replacing it only once all is written.

    Weights in eight bits or in packed blocks become floats. Floating-point tensors are cast to `dtype`, except those
    that are loaded in float32 anyway; None keeps them all, and makes what was packed bfloat16.
    → (number of tensors, bytes). Raises CheckpointError, OutputError.
    """
    checkpoint = dequantized(open_checkpoint(source))
    dtypes = _dtypes(checkpoint, dtype)
    tensors, storages = {}, set()
    for key in checkpoint.shapes:
        tensor = checkpoint.read(key).to(dtypes[key])
        storage = tensor.untyped_storage().data_ptr()
        is_shared = storage in storages  # in safetensors each key has its own bytes
        tensors[key] = tensor.clone(memory_format=torch.contiguous_format) if is_shared else tensor.contiguous()
        storages.add(storage)
    with _reported(target), path_written_whole(target) as partial:
        num_bytes = _save(tensors, partial)
        shutil.copymode(source, partial)
    return len(tensors), num_bytes


def convert_model(sources: Sources, target: Path, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Write a model as a new folder in the layout of its makers, LoRAs merged, every weight a float.

    Floating-point tensors are cast to `dtype` as by `convert`. One file at a time is held in memory, of at most
    `SHARD_BYTES`. → (number of tensors, bytes). Raises CheckpointError, and OutputError also where `target` is there.
    """
    if target.exists():
        raise OutputError(f"cannot write {target}: it is there; name a folder that is not")
    num_tensors = num_bytes = 0
    with opened_once(), _reported(target), path_written_whole(target) as partial:
        partial.mkdir()
        for name, content in loading.family_of(sources).plain_files(sources).items():
            file = partial / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if not isinstance(content, Checkpoint):
                write_whole(file, content if isinstance(content, bytes) else json.dumps(content, indent=2))
                continue
            num_tensors += len(content.shapes)
            num_bytes += _save_shards(content, file, dtype)
    return num_tensors, num_bytes


def _dtypes(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """In which each tensor is written: see `convert`."""
    keeps = next((kept for family in loading.FAMILIES if (kept := family.kept_dtypes(checkpoint))), lambda key: False)

    def of(key: str) -> torch.dtype:
        stored, read = checkpoint.stored_dtype(key), checkpoint.read_dtype(key)
        if not read.is_floating_point:
            return stored
        if stored in PACKED:
            return torch.float32 if keeps(key) else dtype or torch.bfloat16
        return read if keeps(key) else dtype or stored

    return {key: of(key) for key in checkpoint.shapes}


def _save_shards(checkpoint: Checkpoint, file: Path, dtype: torch.dtype | None) -> int:
    """Tensors in one file, or in several with an index, as large models are published. → bytes."""
    dtypes = _dtypes(checkpoint, dtype)
    shards = list(_shards(checkpoint, dtypes))
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for i, keys in enumerate(shards):
        part = file if len(shards) == 1 else file.with_name(f"{file.stem}-{i + 1:05}-of-{len(shards):05}{file.suffix}")
        tensors = {key: checkpoint.copy(key, torch.device("cpu"), dtypes[key]) for key in keys}
        num_bytes += _save(tensors, part)
        part.chmod(part.parent.stat().st_mode & 0o666)  # as any new file here; safetensors lets its owner alone read it
        weight_map |= dict.fromkeys(keys, part.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        write_whole(file.with_name(f"{file.name}.index.json"), json.dumps(index, indent=2))
    return num_bytes


def _shards(checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> Iterator[list[str]]:
    """Keys of each file, by sizes that are known without reading."""
    keys: list[str] = []
    held = 0
    for key, shape in checkpoint.shapes.items():
        size = torch.Size(shape).numel() * dtypes[key].itemsize
        if keys and held + size > SHARD_BYTES:
            yield keys
            keys, held = [], 0
        keys.append(key)
        held += size
    yield keys


def _save(tensors: Mapping[str, Tensor], file: Path) -> int:
    from safetensors.torch import save_file

    save_file(dict(tensors), file, metadata={"format": "pt"})
    return file.stat().st_size


@contextmanager
def _reported(target: Path) -> Iterator[None]:
    """What goes wrong in writing, as one OutputError."""
    from safetensors import SafetensorError

    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot write {target}: {reason}; free space or choose another folder") from error
