"""A model of Wan's family of parts that are in memory: modules or state dicts, official, of Diffusers or of ComfyUI."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from miga_engine.models.bundle import ModelBundle
from miga_engine.models.family import Components, Device
from miga_engine.models.protocols import VAE, TextEncoder
from miga_engine.models.wan import kinds, layouts, vae_layouts
from miga_engine.models.wan.assembly import Opened, bundle_of, check_pair, loaded, variant_of_opened
from miga_engine.models.wan.dit import WanDiT
from miga_engine.models.wan.experts import WanExperts
from miga_engine.models.wan.tae import load_tiny_decoder
from miga_engine.models.wan.tokenizer import tokenizer_of, without_texts
from miga_engine.models.wan.umt5 import UMT5Encoder
from miga_engine.models.wan.vae import WanVAE
from miga_engine.weights.checkpoint import Checkpoint, form_of, network_dtype
from miga_engine.weights.held import held, said_of
from miga_engine.weights.load import load_module


def of_components(
    parts: Components, device: Device, dtype: torch.dtype | None, vae_dtype: torch.dtype | None
) -> ModelBundle:
    """All networks of parts in memory, tensors shared where device and dtype are those wanted. CheckpointError."""
    high, low = parts.transformer, parts.transformer_2
    if isinstance(high, WanExperts):
        high, low = high.high_noise_model, high.low_noise_model
    named = {"transformer": high} | ({} if low is None else {"transformer_2": low})
    opened = [_opened(name, given, parts) for name, given in named.items()]
    root, target, variant = Path(parts.name), torch.device(device or "cpu"), variant_of_opened(opened)
    own = network_dtype(opened[0].checkpoint, "patch_embedding.bias")
    networks = [loaded(one, target, dtype or own) for one in opened]
    if len(networks) == 2:
        check_pair(root, opened)
    boundary = variant.boundary_timestep
    transformer = networks[0] if len(networks) == 1 else WanExperts(networks[0], networks[1], boundary)
    texts, tokenizer = parts.text_encoder, parts.tokenizer
    is_own = isinstance(texts, TextEncoder) and not isinstance(texts, UMT5Encoder)
    form = "" if texts is None or is_own else form_of(_texts(texts))

    def open_text_encoder(device: Device) -> TextEncoder:
        if is_own:
            return texts
        checkpoint = _texts(texts)
        config, own = layouts.text_encoder_config(checkpoint), network_dtype(checkpoint, "norm.weight")
        return load_module(lambda: UMT5Encoder(config), checkpoint, device=device, dtype=dtype or own)

    return bundle_of(
        root,
        variant,
        transformer,
        _vae(parts, device, vae_dtype),
        device,
        open_text_encoder,
        lambda text_len: without_texts if texts is None else tokenizer_of(tokenizer, text_len),
        form,
    )


def _opened(name: str, given: Any, parts: Components) -> Opened:
    stored = held(name, given)
    kinds.require(stored, "transformer")
    said = {**said_of(given), **(parts.transformer_config or {})}
    sizes = dataclasses.asdict(given.config) if isinstance(given, WanDiT) else said
    official = layouts.official_transformer(stored)
    return Opened(official, layouts.transformer_config(official, sizes), said, Path(parts.name), False)


def _vae(parts: Components, device: Device, dtype: torch.dtype | None) -> VAE:
    """A decoder of one's own as it is; weights are not laid out as when they are read, for they are shared."""
    if isinstance(parts.vae, VAE):
        return parts.vae
    stored, part = held("vae", parts.vae), "tae" if parts.decoder == "tae" else "vae"
    kinds.require(stored, part)
    if part == "tae":
        return load_tiny_decoder(stored, device, dtype or network_dtype(stored, "decoder.1.bias"))
    checkpoint = vae_layouts.official_vae(stored)
    config = vae_layouts.vae_config(checkpoint, {**said_of(parts.vae), **(parts.vae_config or {})})
    own = network_dtype(checkpoint, "conv2.bias")
    return load_module(lambda: WanVAE(config), checkpoint, device=device, dtype=dtype or own)


def _texts(given: Any) -> Checkpoint:
    stored = held("text_encoder", given)
    kinds.require(stored, "text_encoder")
    return layouts.official_text_encoder(stored)
