"""Load a model, or one network of it, from the layouts its makers publish: the public face of all families.

Understood: a model's folder, a component's own folder, and single files. Weights load strictly; each failure is a
CheckpointError of one sentence.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from miga_engine.device import own_modes
from miga_engine.errors import CheckpointError
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.family import Device, Family
from miga_engine.models.protocols import VAE, TextEncoder, Tokenizer, Transformer
from miga_engine.models.videocrafter2.family import VIDEOCRAFTER2
from miga_engine.models.wan.family import WAN
from miga_engine.weights.files import opened_once
from miga_engine.weights.untrusted import read_json, short

EXTRA_FILE = "miga.json"  # facts about a model that no layout has a place for

FAMILIES: tuple[Family, ...] = (
    WAN,
    VIDEOCRAFTER2,
)
"""Asked in this order; where none recognises a path the first says what it misses."""


def family_of(path: Path) -> Family:
    """The family whose names or keys are under a path."""
    return next((family for family in FAMILIES if family.recognises(path)), FAMILIES[0])


@own_modes()
def load_transformer(path: str | Path, device: Device = None, dtype: torch.dtype | None = None) -> Transformer:
    """The diffusion transformer under `path`: a model folder, its `transformer` folder, or a weights file.

    device defaults to the CPU, dtype to the file's own; what the network uses in float32 stays float32. Without a
    config.json beside the weights the sizes follow from the shapes. Raises CheckpointError.
    """
    with opened_once():
        return family_of(Path(path)).load_transformer(Path(path), device, dtype)


@own_modes()
def load_vae(path: str | Path, device: Device = None, dtype: torch.dtype = torch.float32) -> VAE:
    """The video VAE under `path`: a model folder, its `vae` folder, or a weights file.

    device defaults to the CPU. The published VAEs are meant to run in float32. Raises CheckpointError.
    """
    with opened_once():
        return family_of(Path(path)).load_vae(Path(path), device, dtype)


@own_modes()
def load_text_encoder(path: str | Path, device: Device = None, dtype: torch.dtype | None = None) -> TextEncoder:
    """The text encoder under `path`: a model folder, its `text_encoder` folder, or a weights file.

    device defaults to the CPU, dtype to the file's own (bfloat16 as published). Raises CheckpointError.
    """
    with opened_once():
        return family_of(Path(path)).load_text_encoder(Path(path), device, dtype)


def load_tokenizer(path: str | Path, text_len: int | None = None) -> Tokenizer:
    """The tokenizer under `path`: a model folder, its tokenizer folder, or a `tokenizer.json`.

    text_len: tokens that a prompt is cut to, None for those of the family. Raises CheckpointError.
    """
    with opened_once():
        return family_of(Path(path)).load_tokenizer(Path(path), text_len)


@own_modes()
def load_bundle(
    path: str | Path,
    device: Device = None,
    dtype: torch.dtype | None = None,
    vae_dtype: torch.dtype = torch.float32,
) -> ModelBundle:
    """All networks of a model folder, with the facts the runtime asks for.

    path is the folder, or the weights file of its transformer. device defaults to the CPU. dtype is that of the
    transformer and the text encoder, by default each file's own; vae_dtype that of the VAE. The text encoder and the
    tokenizer are read when the first prompt is encoded. Raises CheckpointError.
    """
    with opened_once():
        family = family_of(Path(path))
        extra = _extra_facts((Path(path).parent if Path(path).is_file() else Path(path)) / EXTRA_FILE, family)
        return dataclasses.replace(family.open_bundle(Path(path), device, dtype, vae_dtype), extra=extra)


def file_bytes(path: str | Path) -> dict[str, int]:
    """Bytes that a model's networks take of its weights files, in the order in which `load_bundle`'s model reads them.

    Raises CheckpointError.
    """
    with opened_once():
        return family_of(Path(path)).network_bytes(Path(path))


def _extra_facts(file: Path, family: Family) -> dict[str, Any]:
    """What miga.json says, or nothing where there is none."""
    if not file.is_file():
        return {}
    extra = read_json(file)
    frames, negative = extra.get("window_frames", 1), extra.get("default_negative_prompt", "")
    most = family.window_bound
    if isinstance(frames, bool) or not isinstance(frames, int) or not 1 <= frames <= most:
        raise CheckpointError(f"{file} says window_frames {short(repr(frames))}: give a whole number from 1 to {most}")
    if not isinstance(negative, str):
        raise CheckpointError(f"{file} says default_negative_prompt {short(repr(negative))}: give a text")
    return extra
