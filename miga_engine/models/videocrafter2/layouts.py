"""How VideoCrafter2's `model.ckpt` is laid out: three networks under their prefixes, and tables of its noise schedule.

A safetensors file with the same keys is read alike. Sizes follow from the shapes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.models.videocrafter2.clip_text import CLIPTextConfig
from miga_engine.models.videocrafter2.vae import KLVAEConfig
from miga_engine.schedule import COLUMNS, make_schedule
from miga_engine.weights.checkpoint import Checkpoint, count_numbered
from miga_engine.weights.renamed import RenamedCheckpoint

UNET, VAE, TEXT_ENCODER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
_NETWORKS = {UNET: "UNet", VAE: "VAE", TEXT_ENCODER: "text encoder"}
_MARKS = (UNET + "input_blocks.0.0.weight", UNET + "init_attn.0.norm.weight", UNET + "fps_embedding.0.weight")

SCHEDULE_TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "scale_arr",
)
"""Keys outside the networks: constants of training, which the sampler computes for itself."""

_TRAIN_STEPS = 1000
_TOLERANCE = 1e-6
_BLOCK = r"transformer\.resblocks\.(\d+)\."
_HEAD_DIM = 64  # of the published text tower
_UNUSED_TEXT_KEYS = ("text_projection", "logit_scale")  # they serve the comparison of a text with a picture


def is_model(keys: Collection[str]) -> bool:
    """Whether these are the keys of a file with VideoCrafter2's UNet."""
    return set(_MARKS) <= set(keys)


def is_part(keys: Collection[str]) -> bool:
    """Whether these are the keys of that file or of one of its networks."""
    return is_model(keys) or any(key.startswith((VAE, TEXT_ENCODER)) for key in keys)


def network(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """The network under `prefix`, by its own keys. Raises CheckpointError where it is absent, or the file another's."""
    known = (*_NETWORKS, *SCHEDULE_TABLES)
    unknown = [key for key in checkpoint.shapes if not key.startswith(tuple(_NETWORKS)) and key not in known]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.path} holds {unknown[0]} {list(checkpoint.shapes[unknown[0]])}{more}, "
            "which VideoCrafter2 has no place for: give its model.ckpt"
        )
    part = RenamedCheckpoint(checkpoint, lambda key: key.removeprefix(prefix) if key.startswith(prefix) else None)
    if not part.shapes:
        raise CheckpointError(
            f"{checkpoint.path} does not hold a VideoCrafter2 {_NETWORKS[prefix]} (no {prefix}* in it): "
            "give the complete model.ckpt"
        )
    return part


def text_encoder(checkpoint: Checkpoint) -> Checkpoint:
    """The text tower without what VideoCrafter2 does not use of it: its last block and two heads of CLIP."""
    part = network(checkpoint, TEXT_ENCODER)
    last_block = f"transformer.resblocks.{count_numbered(part.shapes, _BLOCK, part.path) - 1}."
    return RenamedCheckpoint(part, lambda key: None if key.startswith((last_block, *_UNUSED_TEXT_KEYS)) else key)


def vae_config(vae: Checkpoint) -> KLVAEConfig:
    """Sizes from the shapes of the VAE. Raises CheckpointError."""
    levels = range(count_numbered(vae.shapes, r"encoder\.down\.(\d+)\.", vae.path))
    dim = _size(vae, "encoder.conv_in.weight", 32)
    widths = [_size(vae, f"encoder.down.{level}.block.0.conv1.weight", dim) for level in levels]
    return KLVAEConfig(
        dim=dim,
        z_dim=_size(vae, "post_quant_conv.weight", 1),
        dim_mult=tuple(width // dim for width in widths),
        num_res_blocks=count_numbered(vae.shapes, r"encoder\.down\.0\.block\.(\d+)\.", vae.path),
    )


def text_encoder_config(text: Checkpoint) -> CLIPTextConfig:
    """Sizes from the shapes of `text_encoder`. Raises CheckpointError."""
    dim = _size(text, "ln_final.weight", _HEAD_DIM)
    return CLIPTextConfig(
        vocab_size=_size(text, "token_embedding.weight", 1),
        dim=dim,
        dim_ffn=_size(text, "transformer.resblocks.0.mlp.c_fc.weight", 1),
        num_heads=dim // _HEAD_DIM,
        num_layers=count_numbered(text.shapes, _BLOCK, text.path),
        text_len=_size(text, "positional_embedding", 1),
    )


def check_schedule(checkpoint: Checkpoint) -> None:
    """CheckpointError where a stored table of the noise schedule is not the one that the sampler uses."""
    if not any(name in checkpoint.shapes for name in SCHEDULE_TABLES):
        return
    for name, expected in _schedule_tables().items():
        if name not in checkpoint.shapes:
            continue
        if checkpoint.shapes[name] != expected.shape:
            raise CheckpointError(
                f"{checkpoint.path} holds {name} as {list(checkpoint.shapes[name])} where VideoCrafter2 has "
                f"{list(expected.shape)}: give the model.ckpt of VideoCrafter2"
            )
        dtype = checkpoint.read(name).dtype
        stored = checkpoint.read(name).double()
        tolerance = max(_TOLERANCE, torch.finfo(dtype).eps if dtype.is_floating_point else 0.0)
        differs = ~torch.isclose(stored, expected, rtol=tolerance, atol=tolerance)
        if differs.any():
            i = int(differs.nonzero()[0])
            raise CheckpointError(
                f"{checkpoint.path} was trained with another noise schedule ({name}[{i}] is {stored[i]:.6g}, the "
                f"sampler's is {expected[i]:.6g}): give the model.ckpt of VideoCrafter2"
            )


def _schedule_tables() -> dict[str, Tensor]:
    """The stored tables by name, float64, from the very schedule that the sampler uses."""

    def inverse_scale(use_scale_array: bool) -> Tensor:
        """1 / (√ᾱ·scale) by training timestep."""
        rows = make_schedule("ddim", _TRAIN_STEPS, use_scale_array=use_scale_array).coefficients.rows64
        return rows[:, 0, COLUMNS.index("m_x")].flip(0)

    alpha_bar = inverse_scale(False) ** -2
    scales = inverse_scale(False) / inverse_scale(True)
    alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / alpha_bar_prev
    variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return {
        "betas": beta,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": alpha_bar_prev,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": alpha_bar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
        "posterior_mean_coef1": beta * alpha_bar_prev.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - alpha_bar_prev) * (1 - beta).sqrt() / (1 - alpha_bar),
        "scale_arr": torch.cat([scales, scales[-1:].expand(400)]),  # the release made it longer than there are steps
    }


def _size(checkpoint: Checkpoint, key: str, divisor: int) -> int:
    """Length of the first dimension of `key`, a multiple of `divisor`."""
    shape = checkpoint.shapes.get(key)
    name = checkpoint.key_in_file(key) if shape is not None else key
    if shape is None:
        raise CheckpointError(
            f"{checkpoint.path} lacks {name}, from which the model's size is read: give the complete weights"
        )
    if not shape or 0 in shape or shape[0] % divisor:
        raise CheckpointError(
            f"{checkpoint.path} holds {name} as {list(shape)}, where the model has a multiple of {divisor} first: "
            "give weights of VideoCrafter2"
        )
    return shape[0]
