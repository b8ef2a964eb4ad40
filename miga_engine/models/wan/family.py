"""The family of Wan: official and `-Diffusers` folders, ComfyUI trees, a component's own folder, single files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from miga_engine.errors import CheckpointError
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.family import Device, Family, Sources
from miga_engine.models.protocols import VAE
from miga_engine.models.wan import kinds, layouts, places, vae_layouts, variants
from miga_engine.models.wan.assembly import Opened, bundle_of, check_pair, loaded, variant_of_opened
from miga_engine.models.wan.components import of_components
from miga_engine.models.wan.dit import WanDiT, WanDiTConfig
from miga_engine.models.wan.dit_layers import MAX_POSITIONS
from miga_engine.models.wan.experts import WanExperts
from miga_engine.models.wan.lora import merge_loras
from miga_engine.models.wan.tae import load_tiny_decoder
from miga_engine.models.wan.tokenizer import (
    MAX_TOKENIZER_BYTES,
    UMT5Tokenizer,
    spiece_in,
)
from miga_engine.models.wan.umt5 import UMT5Encoder
from miga_engine.models.wan.vae import WanVAE
from miga_engine.models.wan.variants import Variant, variant_of
from miga_engine.weights.checkpoint import Checkpoint, form_of, network_dtype
from miga_engine.weights.files import indexed_files, open_checkpoint, open_files
from miga_engine.weights.load import load_module
from miga_engine.weights.lora import Lora
from miga_engine.weights.untrusted import read_bounded, read_json

_log = logging.getLogger("miga_engine")


def load_transformer(sources: Sources, device: Device = None, dtype: torch.dtype | None = None) -> WanDiT | WanExperts:
    """The transformer, LoRAs merged; what it uses in float32 stays float32. Of Wan2.2 A14B both networks in one.

    Raises CheckpointError.
    """
    return _built(_opened_transformers(sources), sources, device, dtype)


def _built(
    opened: Sequence[Opened], sources: Sources, device: Device, dtype: torch.dtype | None
) -> WanDiT | WanExperts:
    dtype = dtype or network_dtype(opened[0].checkpoint, "patch_embedding.bias")
    target = torch.device(device or "cpu")
    if opened[0].is_causal and target.type != "meta":
        _log.warning(
            "%s holds a generator, as CausVid, Self-Forcing and Rolling Forcing have it, whose training had each block "
            "of frames see the ones before it alone: here the frames of a window see one another, which is another "
            "network but for Rolling Forcing's (--preset wan2.1-rolling), and how good its pictures are is not known",
            opened[0].checkpoint.path,
        )
    if len(opened) == 1:
        return loaded(opened[0], target, dtype)
    check_pair(sources.folder, opened)
    boundary = variant_of_opened(opened).boundary_timestep
    ratio = places.boundary_ratio(opened[0].path.parent)
    boundary = boundary if ratio is None else 1000 * ratio
    is_swapped, is_read = sources.experts == "swap" and target.type != "cpu", target.type != "meta"
    on = torch.device("cpu") if is_swapped and is_read else target
    high = loaded(opened[0], on, dtype)
    # Anew, for a LoRA of both was closed with the first that read it.
    low = loaded(_opened_transformers(sources)[1] if sources.loras else opened[1], on, dtype)
    if is_swapped and not is_read:  # of shapes alone: those of what is on a device at a time
        return WanExperts(high, high, boundary)
    return WanExperts(high, low, boundary, target if is_swapped else None)


def _opened_transformers(sources: Sources) -> list[Opened]:
    """The transformer, or, of Wan2.2 A14B, those for high and for low noise."""
    opened: list[Opened] = []
    for one in places.networks(sources):
        files = places.files_of(one, "transformer")
        stored = open_files(files)
        kinds.require(stored, "transformer")
        official = layouts.official_transformer(stored)
        said = _stored_config(files[0], variants.CLASS_NAMES) or (opened[0].stored if opened else {})
        config = layouts.transformer_config(official, said)
        loras = [Lora(open_checkpoint(file), strength) for file, strength in one.loras]
        is_causal = str(stored.metadata.get("table", "")).startswith("generator")
        opened.append(Opened(merge_loras(official, loras), config, said, one.leading, is_causal))
    return opened


def load_vae(sources: Sources, device: Device = None, dtype: torch.dtype = torch.float32) -> VAE:
    """The VAE, or the decoder that is to take its place. Raises CheckpointError."""
    if sources.decoder == "tae":
        stored = open_files(places.files_of(sources, "tae"))
        kinds.require(stored, "tae")
        return load_tiny_decoder(stored, device, dtype)
    files = places.files_of(sources, "vae")
    stored = open_files(files)
    kinds.require(stored, "vae")
    checkpoint = vae_layouts.official_vae(stored)
    config = vae_layouts.vae_config(checkpoint, _stored_config(files[0], {"AutoencoderKLWan"}))
    return load_module(lambda: WanVAE(config), checkpoint, device=device, dtype=dtype).lay_out()


def load_text_encoder(sources: Sources, device: Device = None, dtype: torch.dtype | None = None) -> UMT5Encoder:
    """The text encoder. Raises CheckpointError."""
    stored = open_files(places.files_of(sources, "text_encoder"))
    kinds.require(stored, "text_encoder")
    checkpoint = layouts.official_text_encoder(stored)
    config = layouts.text_encoder_config(checkpoint)
    return load_module(
        lambda: UMT5Encoder(config),
        checkpoint,
        device=device,
        dtype=dtype or network_dtype(checkpoint, "norm.weight"),
    )


def load_tokenizer(sources: Sources, text_len: int | None = None) -> UMT5Tokenizer:
    """The tokenizer: a file of its own, or what lies in that of the text encoder. Raises CheckpointError."""
    return UMT5Tokenizer.from_file(places.tokenizer_file(sources), text_len or layouts.TEXT_LEN)


def open_bundle(sources: Sources, device: Device, dtype: torch.dtype | None, vae_dtype: torch.dtype) -> ModelBundle:
    """All networks; the text encoder and the tokenizer are read when the first prompt is encoded."""
    opened = _opened_transformers(sources)
    variant = variant_of_opened(opened)
    _refuse_tiny_decoder(sources, opened[0])
    for part in ("text_encoder", "tae" if sources.decoder == "tae" else "vae"):  # read late, but missed at once
        kinds.require(open_files(places.files_of(sources, part)), part)
    texts_form = form_of(open_files(places.files_of(sources, "text_encoder")))
    places.tokenizer_file(sources)
    return bundle_of(
        sources.folder,
        variant,
        _built(opened, sources, device, dtype),
        load_vae(sources, device, vae_dtype),
        device,
        lambda device: load_text_encoder(sources, device, dtype),
        lambda text_len: load_tokenizer(sources, text_len),
        texts_form,
    )


def _refuse_tiny_decoder(sources: Sources, opened: Opened) -> None:
    """CheckpointError where a tiny decoder is asked for and there is none for the transformer's latents."""
    if sources.decoder == "tae" and opened.config.in_dim == kinds.TI2V_CHANNELS:
        raise CheckpointError(
            f"{opened.path} is the transformer of Wan2.2 TI2V-5B, whose latents the decoder 'tae' does not decode, "
            "being TAEW2.1: load the model with decoder 'vae'"
        )


def network_bytes(sources: Sources) -> dict[str, int]:
    """Bytes of the files of each network. Raises CheckpointError."""
    decoder = "tae" if sources.decoder == "tae" else "vae"
    transformers = [
        file
        for one in places.networks(sources)
        for file in (*places.files_of(one, "transformer"), *(file for file, _ in one.loras))
    ]
    components = {
        "transformer": transformers,
        "VAE": places.files_of(sources, decoder),
        "text encoder": places.files_of(sources, "text_encoder"),
    }
    return {
        name: sum(
            part.stat().st_size
            for file in files
            for part in (indexed_files(file) if file.name.endswith(".index.json") else [file])
        )
        for name, files in components.items()
    }


def kept_dtypes(checkpoint: Checkpoint) -> Callable[[str], bool] | None:
    """What the transformer uses in float32 whatever its dtype, and the VAE, which is meant to run in it."""
    return layouts.keeps_fp32(checkpoint) if layouts.is_network(checkpoint.shapes) else None


def plain_files(sources: Sources) -> dict[str, Checkpoint | dict[str, Any] | bytes]:
    """The official folder of a model: floats under official keys, LoRAs merged. Raises CheckpointError."""
    opened = _opened_transformers(sources)
    vae, text_encoder = (open_files(places.files_of(sources, part)) for part in ("vae", "text_encoder"))
    kinds.require(vae, "vae")
    kinds.require(text_encoder, "text_encoder")
    is_ti2v = opened[0].config.in_dim == kinds.TI2V_CHANNELS
    tokenizer, extra = places.tokenizer_file(sources), sources.folder / "miga.json"
    load_tokenizer(sources)  # known to be one
    is_json = tokenizer.suffix == ".json"
    variant, said = variant_of_opened(opened), read_json(extra) if extra.is_file() else {}
    config = _official_config(opened[0].config, variant)
    if variant_of(opened[0].config, config, Path("unnamed"), len(opened)).window_frames != variant.window_frames:
        said = {"window_frames": variant.window_frames, **said}  # which the old name told
    transformers: dict[str, Checkpoint | dict[str, Any] | bytes] = {}
    for one, folder in zip(opened, ("",) if len(opened) == 1 else places.OFFICIAL_PAIR, strict=True):
        transformers[str(Path(folder, "config.json"))] = config
        transformers[str(Path(folder, "diffusion_pytorch_model.safetensors"))] = one.checkpoint
    ratio = places.boundary_ratio(opened[0].path.parent)
    if ratio is not None:
        transformers["model_index.json"] = {"boundary_ratio": ratio}
    return {
        **transformers,
        f"Wan2.{2 if is_ti2v else 1}_VAE.safetensors": vae_layouts.official_vae(vae),
        "models_t5_umt5-xxl-enc-bf16.safetensors": layouts.official_text_encoder(text_encoder),
        "google/umt5-xxl/" + ("tokenizer.json" if is_json else "spiece.model"): (
            read_bounded(tokenizer, MAX_TOKENIZER_BYTES) if is_json else spiece_in(tokenizer)
        ),
        **({"miga.json": said} if said else {}),
    }


def _official_config(config: WanDiTConfig, variant: Variant) -> dict[str, Any]:
    """The config.json that its makers would give a transformer: a sign of SkyReels-V2 only where it is one."""
    sizes = dataclasses.asdict(config)
    if variant.default_preset != "skyreels-v2-df":
        del sizes["inject_sample_info"]
    is_ti2v = config.in_dim == kinds.TI2V_CHANNELS
    return {"_class_name": "WanModel", "model_type": "ti2v" if is_ti2v else "t2v", **sizes}


def _stored_config(file: Path, class_names: Collection[str]) -> Mapping[str, Any]:
    """The config.json beside a weights file, or nothing where there is none or it belongs to another network."""
    config_file = file.parent / "config.json"
    if not config_file.is_file():
        return {}
    config = read_json(config_file)
    return config if str(config.get("_class_name")) in class_names else {}


WAN = Family(
    name="Wan2.1",
    window_bound=MAX_POSITIONS,
    recognises=places.recognises,
    open_bundle=open_bundle,
    load_transformer=load_transformer,
    load_vae=load_vae,
    load_text_encoder=load_text_encoder,
    load_tokenizer=load_tokenizer,
    network_bytes=network_bytes,
    kept_dtypes=kept_dtypes,
    plain_files=plain_files,
    of_components=of_components,
    refuses=places.refuse_described,
    describe=kinds.describe,
)
