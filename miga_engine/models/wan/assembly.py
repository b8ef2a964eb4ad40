"""Networks of a checkpoint that is opened, and a model of networks, wherever their tensors are from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from miga_engine.errors import CheckpointError
from miga_engine.models.bundle import ModelBundle, ModelFacts
from miga_engine.models.family import Device
from miga_engine.models.protocols import VAE, TextEncoder, Tokenizer
from miga_engine.models.wan import kinds
from miga_engine.models.wan.dit import WanDiT, WanDiTConfig
from miga_engine.models.wan.experts import WanExperts
from miga_engine.models.wan.umt5 import UMT5Encoder
from miga_engine.models.wan.vae import WanVAE, WanVAEConfig
from miga_engine.models.wan.variants import Variant, variant_of
from miga_engine.weights.checkpoint import Checkpoint, check_fit
from miga_engine.weights.load import load_module

_VAE_OF = {16: "the VAE of Wan2.1 (Wan2.1_VAE.pth)", kinds.TI2V_CHANNELS: "the VAE of Wan2.2 (Wan2.2_VAE.pth)"}


class Opened(NamedTuple):
    """A transformer before its tensors are read."""

    checkpoint: Checkpoint  # official names, floats, LoRAs merged as they are read
    config: WanDiTConfig
    stored: Mapping[str, Any]  # its config.json
    path: Path  # of its folder, or of its file where that was named
    is_causal: bool  # in a file as trainings of networks have it that make a block of frames after another


def loaded(one: Opened, device: torch.device, dtype: torch.dtype) -> WanDiT:
    return load_module(
        lambda: WanDiT(one.config), one.checkpoint, device=device, dtype=dtype, keeps_fp32=WanDiT.keeps_fp32
    )


def variant_of_opened(opened: Sequence[Opened]) -> Variant:
    return variant_of(opened[0].config, opened[0].stored, opened[0].path, len(opened))


def check_pair(root: Path, opened: Sequence[Opened]) -> None:
    """CheckpointError where the networks for high and for low noise differ in a size."""
    of_high, of_low = (dataclasses.asdict(one.config) for one in opened)
    for name, size in of_high.items():
        check_fit(root, name, high_noise=size, low_noise=of_low[name])


def bundle_of(
    root: Path,
    variant: Variant,
    transformer: WanDiT | WanExperts,
    vae: VAE,
    device: Device,
    open_text_encoder: Callable[[Device], TextEncoder],
    open_tokenizer: Callable[[int], Tokenizer],
    texts_form: str,
) -> ModelBundle:
    """The networks with their facts. Raises CheckpointError where they do not fit together."""
    config, target = transformer.config, torch.device(device or "cpu")
    _check_latents(root, vae, config)

    def open_fitting(device: torch.device = target) -> TextEncoder:
        encoder = open_text_encoder(device)
        if isinstance(encoder, UMT5Encoder):
            check_fit(root, "widths of a text", text_encoder=encoder.config.dim, transformer=config.text_dim)
        return encoder

    return ModelBundle(
        path=root,
        device=target,
        dtype=transformer.dtype,
        transformer=transformer,
        vae=vae,
        facts=ModelFacts(
            window_frames=variant.window_frames,
            size_multiple=vae.config.spatial_factor * max(config.patch_size),
            text_len=config.text_len,
            prediction_type="velocity",
            default_preset=variant.default_preset,
            default_negative_prompt=variant.default_negative_prompt,
            protocol_frames=variant.protocol_frames,
        ),
        texts_form=texts_form,
        open_text_encoder=open_fitting,
        open_tokenizer=lambda: open_tokenizer(config.text_len),
        rehearse=functools.partial(rehearse, transformer.dtype),
    )


def _check_latents(root: Path, vae: VAE, config: WanDiTConfig) -> None:
    """CheckpointError where the VAE's latents are not those that the transformer takes and gives."""
    has, wanted = vae.config.z_dim, config.in_dim
    if wanted == config.out_dim != has and wanted in _VAE_OF:
        raise CheckpointError(
            f"the transformer of {root} takes latents of {wanted} channels and the VAE has {has}: "
            f"give {_VAE_OF[wanted]} with --vae"
        )
    check_fit(root, "channels of a latent", vae=has, input=wanted, output=config.out_dim)


def rehearse(dtype: torch.dtype) -> None:
    """A run in small, which makes the libraries load and build what a run needs of them."""
    config = WanDiTConfig(
        dim=32, ffn_dim=64, freq_dim=16, num_heads=2, num_layers=1, text_dim=8, text_len=4, in_dim=4, out_dim=4
    )
    transformer = WanDiT(config).to(dtype)
    transformer(torch.zeros(1, 4, 5, 32, 32, dtype=dtype), 0.0, torch.zeros(1, 4, 8))
    vae = WanVAE(WanVAEConfig(dim=8, z_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)))
    vae.decode(torch.zeros(1, 4, 2, 8, 8))
