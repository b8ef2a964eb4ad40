"""What a LoRA file says: which part of which change a key holds, and by what a pair is scaled.

The trainers and their formats name the same few parts differently; what they call the network's modules is the
family's matter (`weights.lora.Names`). Every failure is a CheckpointError.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from miga_engine.errors import CheckpointError
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.untrusted import first_line, read_json, short

# What a key ends in. A pair may bear the name of its adapter, as PEFT calls it in memory.
_PARTS = {
    "down": r"\.lora_(A|down)((\.[\w-]+)?\.weight)?|[._]lora(_linear_layer)?\.down\.weight",
    "up": r"\.lora_(B|up)((\.[\w-]+)?\.weight)?|[._]lora(_linear_layer)?\.up\.weight",
    "up_bias": r"\.lora_(B|up)(\.[\w-]+)?\.bias",
    "alpha": r"\.alpha",
    "magnitude": r"\.dora_scale|\.lora_magnitude_vector(\.[\w-]+){0,2}",
    "weight": r"\.(diff|w_norm)",
    "bias": r"\.(diff_b|b_norm)",
    "modulation": r"\.diff_m",
}
_PATTERNS = {part: re.compile(rf"(?P<name>.+?)(?:{ending})") for part, ending in _PARTS.items()}
# Kinds of change that are not of this form, by what their keys end in.
_OTHER_KINDS = {
    "a LoHa": re.compile(r"\.hada_[wt]\d\w*(\.|$)"),
    "a LoKr": re.compile(r"\.lokr_[wt]\d\w*(\.|$)"),
    "an OFT or BOFT": re.compile(r"\.(oft_blocks|oft_diag|b?oft_[RS])(\.|$)"),
    "a GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "a LoCon in Tucker's form": re.compile(r"\.lora_mid(\.|$)"),
    "a control LoRA, which changes the network's shape": re.compile(r"\.(set|reshape)_weight$"),
}
_TEXT_ENCODER = re.compile(r"lora_te\d*_|text_encoder(_\d+)?\.")
_LARGEST = 3e38  # of float32

_CONFIG_FILE, _CONFIG_FOR = "adapter_config.json", "adapter_model"  # PEFT's, beside its weights
_CONFIG_KEY = "lora_adapter_metadata"  # diffusers', in the header


class Key(NamedTuple):
    """A key of a LoRA file: what it calls the module, and which part of the change is there."""

    module: str
    part: str


class Scaling(NamedTuple):
    """What a configuration says of the pairs beside their alphas; the rank is read off the shapes."""

    alpha: float | None = None
    alphas: tuple[tuple[str, float], ...] = ()
    is_rank_stabilised: bool = False


def parsed_keys(checkpoint: Checkpoint) -> dict[str, Key]:
    """Every key of a LoRA file, understood. Raises CheckpointError for what is none, and for the kinds not known."""
    path, keys = checkpoint.path, {}
    for key in checkpoint.shapes:
        if _TEXT_ENCODER.match(key):
            raise CheckpointError(
                f"{path} holds {short(key)}, which changes a text encoder: give a LoRA of the transformer alone"
            )
        if kind := next((kind for kind, pattern in _OTHER_KINDS.items() if pattern.search(key)), None):
            raise CheckpointError(
                f"{path} holds {short(key)}, of {kind}: give a LoRA of pairs A and B, the only kind that is merged"
            )
        keys[key] = _parsed(key)
    found = {key: parsed for key, parsed in keys.items() if parsed is not None}
    if not found:
        first = next(iter(keys), "nothing")
        raise CheckpointError(
            f"{path} holds {short(first)} and no LoRA: give a LoRA file, and a whole model as the model itself"
        )
    if other := next((key for key in keys if key not in found), None):
        raise CheckpointError(
            f"{path} holds {short(other)} {list(checkpoint.shapes[other])}, which is no part of a LoRA: "
            "give a file of pairs A and B or of differences alone"
        )
    return found


def _parsed(key: str) -> Key | None:
    matches = ((part, pattern.fullmatch(key)) for part, pattern in _PATTERNS.items())
    return next((Key(match["name"], part) for part, match in matches if match), None)


def read_alpha(checkpoint: Checkpoint, key: str) -> float:
    """The number under `key`, which trainers store in any dtype. Raises CheckpointError."""
    tensor = checkpoint.read(key)
    value = math.nan
    if tensor.numel() == 1 and not tensor.is_complex():
        value = float(tensor.double().item())
    if not abs(value) <= _LARGEST:
        raise CheckpointError(
            f"{checkpoint.path} holds {short(key)} as {value if tensor.numel() == 1 else list(tensor.shape)}, "
            "where one finite number belongs: download it again"
        )
    return value


def scalings(checkpoint: Checkpoint) -> dict[str, Scaling]:
    """By the first component of the names that it is for, "" for all others, what is said in the file or beside it."""
    found: dict[str, dict[str, Any]] = {}
    config_file = checkpoint.path.parent / _CONFIG_FILE
    if checkpoint.path.stem == _CONFIG_FOR and os.path.exists(config_file):
        found[""] = read_json(config_file)
    text = checkpoint.metadata.get(_CONFIG_KEY)
    if text is not None:
        try:
            content = json.loads(text)
            items = content.items()
        except (ValueError, RecursionError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint.path} says {_CONFIG_KEY} that is no table ({first_line(error)}): download it again"
            ) from error
        for name, value in items:
            prefix, _, field = name.rpartition(".")
            found.setdefault(prefix, {})[field] = value
    return {prefix: _scaling(checkpoint, config) for prefix, config in found.items()}


def scale_of(scalings: Mapping[str, Scaling], name: str, rank: int, alpha: float | None) -> float:
    """By what the pair of the module that the file calls `name` is multiplied; `alpha` is the pair's own, if any."""
    prefix, _, rest = name.partition(".")
    scaling = scalings.get(prefix) or scalings.get("") or Scaling()
    if alpha is None:
        names = (name, rest, name.removeprefix("base_model.model."))
        alpha = next((a for pattern, a in scaling.alphas if _fits(pattern, names)), scaling.alpha)
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if scaling.is_rank_stabilised else rank)


def _fits(pattern: str, names: tuple[str, ...]) -> bool:
    """Whether a pattern of PEFT, which is a whole name after `^`, or the end of one, means one of these names."""
    if pattern.startswith("^"):
        return pattern[1:] in names
    return any(name == pattern or name.endswith("." + pattern) for name in names)


def _scaling(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Scaling:
    def number(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise CheckpointError(
                f"the configuration of {checkpoint.path} says {name} {reprlib.repr(value)}, where a finite number "
                "belongs: download it again"
            )
        return float(value)

    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(
            f"the configuration of {checkpoint.path} says alpha_pattern {reprlib.repr(patterns)}, where a table "
            "belongs: download it again"
        )
    for pattern in patterns:  # expressions of strangers could take for ever
        if not re.fullmatch(r"\^?[\w.-]+", pattern):
            raise CheckpointError(
                f"the configuration of {checkpoint.path} says alpha_pattern for {short(pattern)}, which is no plain "
                "name: write the names of the modules into it"
            )
    return Scaling(
        alpha=None if alpha is None else number("lora_alpha", alpha),
        alphas=tuple((pattern, number("alpha_pattern", value)) for pattern, value in patterns.items()),
        is_rank_stabilised=config.get("use_rslora") is True,
    )
