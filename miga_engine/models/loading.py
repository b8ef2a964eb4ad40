"""Load a model, or one network of it, from the layouts its makers publish: the public face of all families.

Understood: a model's folder, a component's own folder, and single files. Weights load strictly; each failure is a
CheckpointError of one sentence.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from miga_engine.config import PARTS, LoadOptions
from miga_engine.device import own_modes
from miga_engine.errors import CheckpointError
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.family import Components, Device, Family, Sources
from miga_engine.models.protocols import VAE, TextEncoder, Tokenizer, Transformer
from miga_engine.models.videocrafter2.family import VIDEOCRAFTER2
from miga_engine.models.wan.family import WAN
from miga_engine.weights.files import open_checkpoint, opened_once
from miga_engine.weights.held import held
from miga_engine.weights.hub import is_hub_name, snapshot
from miga_engine.weights.lora import lora_fingerprint
from miga_engine.weights.untrusted import read_json, short

EXTRA_FILE = "miga.json"  # facts about a model that no layout has a place for

FAMILIES: tuple[Family, ...] = (
    WAN,
    VIDEOCRAFTER2,
)
"""Asked in this order; where none recognises a path the first says what it misses."""


HUB_FILES = (
    "*.json", "diffusion_pytorch_model*", "model*.safetensors", "model.ckpt", "Wan2.1_VAE.*", "Wan2.2_VAE.*",
    "models_t5*", "google/umt5-xxl/*", "transformer/*", "transformer_2/*", "high_noise_model/*", "low_noise_model/*",
    "vae/*", "text_encoder/*", "tokenizer/*", "merges.txt",
)  # fmt: skip
"""Files of a model of Hugging Face's hub that loading it reads, of whatever family."""


def family_of(sources: Sources) -> Family:
    """The family whose names or keys are where a model's transformer lies."""
    return next((family for family in FAMILIES if family.recognises(sources.leading)), FAMILIES[0])


def sources_of(given: LoadOptions, root: Path | None = None) -> Sources:
    """Where the parts of a model lie that is asked for; `root` in the place of its name.

    Raises CheckpointError where there is nothing, or ConfigError.
    """
    parts = {name: _existing(name, getattr(given, name)) for name in PARTS}
    loras = tuple((_existing("lora", file), strength) for file, strength in given.lora or ())
    if root is None and parts["transformer"] is not None and given.model == LoadOptions.model:
        root = parts.pop("transformer")
    hub: tuple[tuple[str, str], ...] = ()
    if root is None:
        name = str(given.model)
        if is_hub_name(name):
            hub = tuple((key, value) for key in ("revision", "cache_dir") if (value := getattr(given, key)))
            root = snapshot(
                name, HUB_FILES, check=_check_described, revision=given.revision, cache_dir=given.cache_dir,
                download=given.download,
            )  # fmt: skip
        elif not os.path.exists(name):
            raise CheckpointError(
                f"there is no model at {name!r}: give 'tiny', a model folder, a weights file, or a name on Hugging "
                "Face's hub such as Wan-AI/Wan2.1-T2V-1.3B"
            )
        root = root or Path(name)
    return Sources(root, **parts, loras=loras, decoder=given.decoder, experts=given.experts, hub=hub)  # type: ignore[arg-type]


def _check_described(folder: Path) -> None:
    for family in FAMILIES:
        family.refuses(folder)


def _existing(part: str, path: str | os.PathLike[str] | None) -> Path | None:
    if path is not None and not os.path.exists(path):
        raise CheckpointError(f"there is no {part.replace('_', ' ')} at {os.fspath(path)!r}: give a folder or a file")
    return None if path is None else Path(path)


@own_modes()
def load_transformer(
    path: str | Path,
    device: Device = None,
    dtype: torch.dtype | None = None,
    *,
    loras: Sequence[tuple[str | Path, float]] = (),
    second: str | Path | None = None,
    experts: str = "resident",
) -> Transformer:
    """The diffusion transformer under `path`: a model folder, its `transformer` folder, or a weights file.

    Of Wan2.2 A14B both networks, in one; `second` is where that for low noise lies, if not beside the other, and
    `experts` as in `config.LoadOptions`.

    device defaults to the CPU, dtype to the file's own, bfloat16 where that is in eight bits or packed; what the
    network uses in float32 stays float32. loras are files and strengths, merged into it. Without a config.json beside
    the weights the sizes follow from the shapes. Raises CheckpointError, or ConfigError.
    """
    sources = Sources(
        Path(path),
        transformer_2=None if second is None else Path(second),
        loras=tuple((Path(file), strength) for file, strength in loras),
        experts=LoadOptions(experts=experts).experts,  # checked
    )
    with opened_once():
        return family_of(sources).load_transformer(sources, device, dtype)


@own_modes()
def load_vae(
    path: str | Path, device: Device = None, dtype: torch.dtype = torch.float32, *, decoder: str = "vae"
) -> VAE:
    """The video VAE under `path`: a model folder, its `vae` folder, or a weights file; with decoder "tae" TAEW2.1.

    device defaults to the CPU. The published VAEs are meant to run in float32. Raises CheckpointError.
    """
    sources = _of_part(path, "vae", decoder)
    with opened_once():
        return family_of(sources).load_vae(sources, device, dtype)


@own_modes()
def load_text_encoder(path: str | Path, device: Device = None, dtype: torch.dtype | None = None) -> TextEncoder:
    """The text encoder under `path`: a model folder, its `text_encoder` folder, or a weights file.

    device defaults to the CPU, dtype to the file's own (bfloat16 as published, and where that is in eight bits or
    packed). Raises CheckpointError.
    """
    sources = _of_part(path, "text_encoder")
    with opened_once():
        return family_of(sources).load_text_encoder(sources, device, dtype)


def load_tokenizer(path: str | Path, text_len: int | None = None) -> Tokenizer:
    """The tokenizer under `path`: a model folder, its tokenizer folder, a `tokenizer.json`, a `spiece.model`, or a text
    encoder's file that holds one.

    text_len: tokens that a prompt is cut to, None for those of the family. Raises CheckpointError.
    """
    sources = _of_part(path, "tokenizer")
    with opened_once():
        return family_of(sources).load_tokenizer(sources, text_len)


def _of_part(path: str | Path, part: str, decoder: str = "vae") -> Sources:
    """A path that leads to one part: its file, or a folder that holds it as a model's does."""
    path = Path(path)
    return Sources(path, **({part: path} if path.is_file() else {}), decoder=decoder)  # type: ignore[arg-type]


@own_modes()
def load_bundle(
    path: str | Path | Sources,
    device: Device = None,
    dtype: torch.dtype | None = None,
    vae_dtype: torch.dtype = torch.float32,
) -> ModelBundle:
    """All networks of a model, with the facts the runtime asks for.

    path is its folder, the weights file of its transformer, or what says where each part lies. device defaults to the
    CPU. dtype is that of the transformer and the text encoder, by default each file's own; vae_dtype that of the VAE.
    The text encoder and the tokenizer are read when the first prompt is encoded. Raises CheckpointError.
    """
    sources = path if isinstance(path, Sources) else Sources(Path(path))
    with opened_once():
        family = family_of(sources)
        extra = _extra_facts(sources.folder / EXTRA_FILE, family)
        bundle = family.open_bundle(sources, device, dtype, vae_dtype)
        is_read = torch.device(device or "cpu").type != "meta"
        merged = [
            (os.path.abspath(file), strength, lora_fingerprint(open_checkpoint(file)) if is_read else "")
            for file, strength in sources.loras
        ]
        return dataclasses.replace(bundle, extra=extra, merged=tuple(merged))


@own_modes()
def bundle_of_components(
    parts: Components,
    device: Device,
    dtype: torch.dtype | None = None,
    vae_dtype: torch.dtype | None = None,
    extra: Mapping[str, Any] = {},
) -> ModelBundle:
    """A model of parts that are in memory. Their tensors are shared where device and dtype stay, None being as they
    are; no file of weights is read. `extra` is what a miga.json would say. Raises CheckpointError."""
    checkpoint = held("transformer", parts.transformer)
    family = next((family for family in FAMILIES if family.describe(checkpoint) is not None), FAMILIES[0])
    if family.of_components is None:
        raise CheckpointError(f"the networks of {family.name} are read from files: use `Engine.from_pretrained`")
    bundle = family.of_components(parts, device, dtype, vae_dtype)
    return dataclasses.replace(bundle, extra=_checked_extra(dict(extra), parts.name, family))


def file_bytes(path: str | Path | Sources) -> dict[str, int]:
    """Bytes that a model's networks take of its weights files, in the order in which `load_bundle`'s model reads them.

    Raises CheckpointError.
    """
    sources = path if isinstance(path, Sources) else Sources(Path(path))
    with opened_once():
        return family_of(sources).network_bytes(sources)


def _extra_facts(file: Path, family: Family) -> dict[str, Any]:
    """What miga.json says, or nothing where there is none."""
    if not file.is_file():
        return {}
    return _checked_extra(read_json(file), file, family)


def _checked_extra(extra: dict[str, Any], file: object, family: Family) -> dict[str, Any]:
    frames, negative = extra.get("window_frames", 1), extra.get("default_negative_prompt", "")
    most = family.window_bound
    if isinstance(frames, bool) or not isinstance(frames, int) or not 1 <= frames <= most:
        raise CheckpointError(f"{file} says window_frames {short(repr(frames))}: give a whole number from 1 to {most}")
    if not isinstance(negative, str):
        raise CheckpointError(f"{file} says default_negative_prompt {short(repr(negative))}: give a text")
    return extra
