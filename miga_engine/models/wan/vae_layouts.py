"""How the checkpoints of Wan's VAEs are laid out: official and Diffusers key names, and sizes read off the shapes."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from miga_engine.models.wan import layouts
from miga_engine.models.wan.vae import WanVAEConfig
from miga_engine.weights.checkpoint import Checkpoint, count_numbered
from miga_engine.weights.quantized import dequantized
from miga_engine.weights.renamed import RenamedCheckpoint

_NESTED_LAYER = re.compile(r"encoder\.downsamples\.(\d{1,9})\.downsamples\.(\d{1,9})\.")
_NESTED = re.compile(r"encoder\.(downsamples\.\d+\.downsamples|down_blocks\.\d+\.resnets)\.")

# (pattern in Diffusers keys, official replacement), applied one after the other.
_RULES = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"(samples\.\d+|middle\.[02])\.norm1\.", r"\1.residual.0."),
    (r"(samples\.\d+|middle\.[02])\.conv1\.", r"\1.residual.2."),
    (r"(samples\.\d+|middle\.[02])\.norm2\.", r"\1.residual.3."),
    (r"(samples\.\d+|middle\.[02])\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


def is_nested(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these are the keys of Wan2.2's VAE, whose levels are modules, in either layout."""
    return any(_NESTED.match(key) for key in shapes)


def latent_channels(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Channels of the latents of a VAE in either layout; 0 where its keys do not tell."""
    shape = shapes.get("conv2.weight", shapes.get("post_quant_conv.weight", ()))
    return shape[0] if len(shape) == 5 else 0


def official_vae(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under official VAE keys. Raises CheckpointError when it holds something else."""
    checkpoint = layouts.without_prefix(checkpoint, "vae")
    layouts.require_key(checkpoint, "a Wan VAE", *layouts.VAE_MARKS)
    if "decoder.conv_in.weight" not in checkpoint.shapes:
        return dequantized(checkpoint)

    def count(coder: str) -> int:
        pattern = rf"{coder}\.resnets\.(\d+)\."
        return max(1, count_numbered(checkpoint.shapes, pattern, checkpoint.path))

    # Blocks of a level; the resampling comes behind them.
    num_down, num_up = count(r"encoder\.down_blocks\.0"), count(r"decoder\.up_blocks\.0")
    nested = is_nested(checkpoint.shapes)

    def down(match: re.Match[str]) -> str:
        return f"encoder.downsamples.{match[1]}.downsamples.{match[2] or num_down}."

    def up(match: re.Match[str]) -> str:
        level, block = int(match[1]), int(match[2] or num_up)
        place = f"{level}.upsamples.{block}" if nested else f"{level * (num_up + 1) + block}"
        return f"decoder.upsamples.{place}."

    def rename(key: str) -> str:
        key = re.sub(r"^encoder\.down_blocks\.(\d{1,9})\.(?:resnets\.(\d{1,9})|downsampler)\.", down, key)
        resampler = "upsampler" if nested else r"upsamplers\.0"
        key = re.sub(rf"^decoder\.up_blocks\.(\d{{1,9}})\.(?:resnets\.(\d{{1,9}})|{resampler})\.", up, key)
        return layouts.renamed(_RULES, key)

    return dequantized(RenamedCheckpoint(checkpoint, rename))


def vae_config(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> WanVAEConfig:
    """Sizes from the shapes under official keys; statistics of the latents from config.json where it has them."""
    shapes = layouts.RequiredShapes(checkpoint)
    dim, num_channels = shapes.of("encoder.conv1.weight", 5)[:2]
    decoder_width = shapes.of("decoder.conv1.weight", 5)[0]
    is_residual = is_nested(checkpoint.shapes)
    widths: list[int] = []  # by level
    blocks_in_level = 0
    temporal: list[bool] = []
    for prefix in _layers(checkpoint, is_residual):
        if prefix + "resample.1.weight" in checkpoint.shapes:
            temporal.append(prefix + "time_conv.weight" in checkpoint.shapes)
            continue
        if len(widths) == len(temporal):
            widths.append(shapes.of(prefix + "residual.6.weight", 5)[0])
            blocks_in_level = 0
        blocks_in_level += 1

    def build() -> WanVAEConfig:
        statistics = {
            name: _numbers(name, stored[name])
            for name in ("latents_mean", "latents_std")
            if stored.get(name) is not None
        }
        dim_mult = tuple(width // dim for width in widths)
        return WanVAEConfig(
            dim=dim,
            z_dim=shapes.of("conv2.weight", 5)[0],
            dim_mult=dim_mult,
            num_res_blocks=blocks_in_level,
            temporal_downsample=tuple(temporal),
            decoder_dim=decoder_width // dim_mult[-1] if is_residual and dim_mult else None,
            patch_size=math.isqrt(num_channels // 3) or 1,
            is_residual=is_residual,
            **statistics,
        )

    return layouts.checked(checkpoint, build)


def _layers(checkpoint: Checkpoint, is_residual: bool) -> list[str]:
    """What stands before the names of each layer of the encoder's levels, in their order."""
    if is_residual:
        found = {(int(m[1]), int(m[2])) for key in checkpoint.shapes if (m := _NESTED_LAYER.match(key))}
        return [f"encoder.downsamples.{level}.downsamples.{i}." for level, i in sorted(found)]
    count = count_numbered(checkpoint.shapes, r"encoder\.downsamples\.(\d+)\.", checkpoint.path)
    return [f"encoder.downsamples.{i}." for i in range(count)]


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    is_list = isinstance(values, list) and all(isinstance(v, int | float) and abs(v) < 1e6 for v in values)
    if not is_list or (name == "latents_std" and not all(v > 0 for v in values)):
        raise ValueError(f"{name} must be a list of numbers, got {reprlib.repr(values)}")
    return tuple(map(float, values))
