"""Rewrite a weights file as safetensors, which loads without Python's pickle."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from miga_engine.errors import OutputError
from miga_engine.files import path_written_whole
from miga_engine.models import loading
from miga_engine.weights.files import open_checkpoint


def convert(source: Path, target: Path, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Write all tensors of `source` under their keys to `target`, replacing it only once all is written.

    Floating-point tensors are cast to `dtype`, except those that are loaded in float32 anyway; None keeps them all.
    → (number of tensors, bytes). Raises CheckpointError, OutputError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(source)
    tensors, storages = {}, set()
    keeps = next((kept for family in loading.FAMILIES if (kept := family.kept_dtypes(checkpoint))), lambda key: False)
    for key in checkpoint.shapes:
        tensor = checkpoint.read(key)
        if dtype is not None and tensor.is_floating_point() and not keeps(key):
            tensor = tensor.to(dtype)
        storage = tensor.untyped_storage().data_ptr()
        is_shared = storage in storages  # in safetensors each key has its own bytes
        tensors[key] = tensor.clone(memory_format=torch.contiguous_format) if is_shared else tensor.contiguous()
        storages.add(storage)
    try:
        with path_written_whole(target) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
            num_bytes = partial.stat().st_size
            shutil.copymode(source, partial)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot write {target}: {reason}; free space or choose another folder") from error
    return len(tensors), num_bytes
