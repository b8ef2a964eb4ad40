"""What a weights file is, in a few lines, told without reading its tensors."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from miga_engine.errors import CheckpointError
from miga_engine.models.loading import FAMILIES
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.files import format_of, open_checkpoint
from miga_engine.weights.lora_keys import parsed_keys

_FORMATS = {".gguf": "GGUF", ".safetensors": "safetensors", ".sft": "safetensors", ".json": "safetensors with an index"}


def describe_file(path: Path) -> list[tuple[str, str]]:
    """(name, text) of kind, use, format, size, dtypes and, of a LoRA, rank. Raises CheckpointError."""
    checkpoint = open_checkpoint(path)
    kind, use = next(
        (said for family in FAMILIES if (said := family.describe(checkpoint))),
        ("nothing that this engine knows", "give a Wan2.1 or VideoCrafter2 model, or a part of one"),
    )
    rows = [("file", str(path)), ("what it is", kind), ("how it is used", use)]
    form = _FORMATS.get(path.suffix, "pickle of torch.save")
    size = path.stat().st_size
    rows += [("format", f"{form}, {len(checkpoint.shapes)} tensors, {size / 1e9:.3f} GB" if format_of(path) else form)]
    rows += [("stored as", _dtypes(checkpoint))]
    with suppress(CheckpointError):  # no LoRA, or of a kind that has no rank
        downs = [key for key, parsed in parsed_keys(checkpoint).items() if parsed.part == "down"]
        found = Counter(checkpoint.shapes[key][0] for key in downs if checkpoint.shapes[key])
        rows += [("rank", ", ".join(f"{rank} ({count} modules)" for rank, count in sorted(found.items())))]
    return rows


def _dtypes(checkpoint: Checkpoint) -> str:
    """How many weights there are of each dtype, the commonest first, and whether scales go with them."""
    counts: Counter[str] = Counter()
    for key, shape in checkpoint.shapes.items():
        name = checkpoint.type_name(key)
        counts[name] += torch.Size(shape).numel()
    is_scaled = any(key.endswith((".scale_weight", ".weight_scale")) for key in checkpoint.shapes)
    listed = ", ".join(f"{name} ({count / 1e6:.1f} M)" for name, count in counts.most_common())
    return f"{listed}; with scales" if is_scaled else listed
