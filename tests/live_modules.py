"""Modules of diffusers and transformers that hold a model's weights, as a host has them in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from miga_engine.models import load_bundle
from miga_engine.models.wan import layouts, vae_layouts
from miga_engine.weights.held import held


@torch.no_grad()
def modules_of(folder: Path) -> dict[str, Any]:
    """The parts of a Wan2.1 folder, by the names of a `WanPipeline`."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

    bundle = load_bundle(folder)
    dit, vae, text = bundle.transformer.config, bundle.vae.config, bundle.text_encoder.config
    transformer = WanTransformer3DModel(
        patch_size=dit.patch_size, num_attention_heads=dit.num_heads, attention_head_dim=dit.dim // dit.num_heads,
        in_channels=dit.in_dim, out_channels=dit.out_dim, text_dim=dit.text_dim, freq_dim=dit.freq_dim,
        ffn_dim=dit.ffn_dim, num_layers=dit.num_layers, eps=dit.eps,
    )  # fmt: skip
    decoder = AutoencoderKLWan(
        base_dim=vae.dim, z_dim=vae.z_dim, dim_mult=list(vae.dim_mult), num_res_blocks=vae.num_res_blocks,
        temperal_downsample=list(vae.temporal_downsample), latents_mean=bundle.vae.latents_mean.tolist(),
        latents_std=bundle.vae.latents_std.tolist(),
    )  # fmt: skip
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=text.vocab_size, d_model=text.dim, d_kv=text.dim_attn // text.num_heads, d_ff=text.dim_ffn,
            num_layers=text.num_layers, num_heads=text.num_heads, relative_attention_num_buckets=text.num_buckets,
        )
    )  # fmt: skip
    _fill(transformer, layouts.official_transformer, bundle.transformer)
    _fill(decoder, vae_layouts.official_vae, bundle.vae)
    _fill(encoder, layouts.official_text_encoder, bundle.text_encoder)
    tokenizer = next(folder.glob("google/*/tokenizer.json"))
    return {
        "transformer": transformer.eval(),
        "vae": decoder.eval(),
        "text_encoder": encoder.eval(),
        "tokenizer": T5TokenizerFast(tokenizer_file=str(tokenizer)),
    }


def facts_of(folder: Path) -> dict[str, Any]:
    """What no module says of a model, by the options of `Engine.from_components`."""
    bundle = load_bundle(folder)
    return {
        "window_frames": bundle.window_frames,
        "default_negative_prompt": bundle.default_negative_prompt,
        "transformer_config": {"text_len": dataclasses.asdict(bundle.transformer.config)["text_len"]},
    }


def _fill(module: nn.Module, official: Any, ours: nn.Module) -> None:
    """The module's own tensors get what our network has, told by the official names of both."""
    theirs, weights = official(held("module", module)), ours.state_dict()
    for name in theirs.shapes:
        theirs.read(name).copy_(weights[name])
