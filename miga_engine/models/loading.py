"""Load a model, or one network of it, from the layouts its makers publish.

Understood: the official Wan2.1 folder, the `-Diffusers` folder, a component's own folder, and single files. Weights
load strictly; each failure is a CheckpointError of one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from miga_engine.device import own_modes
from miga_engine.errors import CheckpointError
from miga_engine.models.bundle import ModelBundle, ModelFacts
from miga_engine.models.videocrafter2 import loading as videocrafter2
from miga_engine.models.videocrafter2.loading import is_videocrafter2
from miga_engine.models.wan import layouts
from miga_engine.models.wan.dit import WanDiT
from miga_engine.models.wan.dit_layers import MAX_POSITIONS
from miga_engine.models.wan.tokenizer import WAN_DEFAULT_NEGATIVE_PROMPT, Tokenizer
from miga_engine.models.wan.umt5 import UMT5Encoder
from miga_engine.models.wan.vae import WanVAE
from miga_engine.weights.checkpoint import check_fit, stored_dtype
from miga_engine.weights.files import open_files
from miga_engine.weights.load import load_module
from miga_engine.weights.untrusted import read_json, short

Device = torch.device | str | None

WAN_WINDOW_FRAMES = 21  # latent frames of the 81-frame clips that Wan2.1 was trained on
EXTRA_FILE = "miga.json"  # facts about a model that no layout has a place for

# File names that hold a component, in the order in which they are looked for.
_DIFFUSION_FILES = ("diffusion_pytorch_model*.index.json", "diffusion_pytorch_model*.safetensors")
_TRANSFORMER_FILES = (*_DIFFUSION_FILES, "diffusion_pytorch_model*.bin")
_EXPERTS = ("high_noise_model", "low_noise_model")  # folders of the two networks of Wan2.2 A14B
_VAE_FILES = ("*VAE*.safetensors", "*VAE*.pth", *_DIFFUSION_FILES)
_TEXT_ENCODER_FILES = ("models_t5*.safetensors", "models_t5*.pth", "model*.index.json", "model*.safetensors")
_TOKENIZER_FILES = ("tokenizer/tokenizer.json", "google/*/tokenizer.json", "tokenizer.json")


@own_modes()
def load_transformer(path: str | Path, device: Device = None, dtype: torch.dtype | None = None) -> WanDiT:
    """The diffusion transformer under `path`: a model folder, its `transformer` folder, or a weights file.

    device defaults to the CPU, dtype to the file's own; what the network uses in float32 stays float32. Without a
    config.json beside the weights the sizes follow from the shapes. Raises CheckpointError.
    """
    _refuse_experts(Path(path))
    files = _component_files(Path(path), "transformer", _TRANSFORMER_FILES)
    checkpoint = layouts.official_transformer(open_files(files))
    config = layouts.transformer_config(checkpoint, _stored_config(files[0], {"WanModel", "WanTransformer3DModel"}))
    return load_module(
        lambda: WanDiT(config),
        checkpoint,
        device=device,
        dtype=dtype or stored_dtype(checkpoint, "patch_embedding.bias"),
        keeps_fp32=WanDiT.keeps_fp32,
    )


@own_modes()
def load_vae(path: str | Path, device: Device = None, dtype: torch.dtype = torch.float32) -> WanVAE:
    """The video VAE under `path`: a model folder, its `vae` folder, or a weights file.

    device defaults to the CPU. The published VAE is meant to run in float32. Raises CheckpointError.
    """
    files = _component_files(Path(path), "vae", _VAE_FILES)
    checkpoint = layouts.official_vae(open_files(files))
    config = layouts.vae_config(checkpoint, _stored_config(files[0], {"AutoencoderKLWan"}))
    return load_module(lambda: WanVAE(config), checkpoint, device=device, dtype=dtype).lay_out()


@own_modes()
def load_text_encoder(path: str | Path, device: Device = None, dtype: torch.dtype | None = None) -> UMT5Encoder:
    """The text encoder under `path`: a model folder, its `text_encoder` folder, or a weights file.

    device defaults to the CPU, dtype to the file's own (bfloat16 as published). Raises CheckpointError.
    """
    files = _component_files(Path(path), "text_encoder", _TEXT_ENCODER_FILES)
    checkpoint = layouts.official_text_encoder(open_files(files))
    config = layouts.text_encoder_config(checkpoint)
    return load_module(
        lambda: UMT5Encoder(config),
        checkpoint,
        device=device,
        dtype=dtype or stored_dtype(checkpoint, "norm.weight"),
    )


def load_tokenizer(path: str | Path, text_len: int = layouts.TEXT_LEN) -> Tokenizer:
    """The tokenizer under `path`: a model folder, its tokenizer folder, or a `tokenizer.json`.

    Raises CheckpointError.
    """
    return Tokenizer.from_folder(_tokenizer_file(Path(path)), text_len)


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
    root = Path(path).parent if Path(path).is_file() else Path(path)
    extra = _extra_facts(root / EXTRA_FILE)
    if is_videocrafter2(path):
        return videocrafter2.load_bundle(path, extra, device, dtype, vae_dtype)
    _refuse_experts(Path(path))
    _component_files(root, "text_encoder", _TEXT_ENCODER_FILES)  # read late, but missed at once
    _tokenizer_file(root)
    transformer = load_transformer(path, device, dtype)
    vae = load_vae(root, device, vae_dtype)
    config = transformer.config
    check_fit(root, "channels of a latent", vae=vae.config.z_dim, input=config.in_dim, output=config.out_dim)

    def open_text_encoder() -> UMT5Encoder:
        encoder = load_text_encoder(root, device, dtype)
        check_fit(root, "widths of a text", text_encoder=encoder.config.dim, transformer=config.text_dim)
        return encoder

    return ModelBundle(
        path=root,
        device=torch.device(device or "cpu"),
        dtype=transformer.dtype,
        transformer=transformer,
        vae=vae,
        facts=ModelFacts(
            window_frames=WAN_WINDOW_FRAMES,
            size_multiple=vae.config.spatial_factor * max(config.patch_size),
            text_len=config.text_len,
            prediction_type="velocity",
            default_preset="wan2.1",
            default_negative_prompt=WAN_DEFAULT_NEGATIVE_PROMPT,
        ),
        extra=extra,
        open_text_encoder=open_text_encoder,
        open_tokenizer=lambda: load_tokenizer(root, config.text_len),
    )


def file_bytes(path: str | Path) -> dict[str, int]:
    """Bytes that a model's networks take of its weights files, in the order in which `load_bundle`'s model reads them.

    Raises CheckpointError.
    """
    root = Path(path).parent if Path(path).is_file() else Path(path)
    if is_videocrafter2(path):
        return videocrafter2.network_bytes(path)
    components = {
        "transformer": _component_files(Path(path), "transformer", _TRANSFORMER_FILES),
        "VAE": _component_files(root, "vae", _VAE_FILES),
        "text encoder": _component_files(root, "text_encoder", _TEXT_ENCODER_FILES),
    }
    for files in components.values():
        if files[0].name.endswith(".index.json"):
            files[:] = [files[0].parent / name for name in set(read_json(files[0])["weight_map"].values())]
    return {name: sum(file.stat().st_size for file in files) for name, files in components.items()}


def _extra_facts(file: Path) -> dict[str, Any]:
    """What miga.json says, or nothing where there is none."""
    if not file.is_file():
        return {}
    extra = read_json(file)
    frames, negative = extra.get("window_frames", WAN_WINDOW_FRAMES), extra.get("default_negative_prompt", "")
    if isinstance(frames, bool) or not isinstance(frames, int) or not 1 <= frames <= MAX_POSITIONS:
        raise CheckpointError(
            f"{file} says window_frames {short(repr(frames))}: give a whole number from 1 to {MAX_POSITIONS}"
        )
    if not isinstance(negative, str):
        raise CheckpointError(f"{file} says default_negative_prompt {short(repr(negative))}: give a text")
    return extra


def _refuse_experts(path: Path) -> None:
    """CheckpointError where the path leads to two networks that share a schedule, or to one of the two."""
    root = path.parent if path.is_file() else path
    inside = root.parent if root.name in (*_EXPERTS, "transformer", "transformer_2") else root
    index = inside / "model_index.json"
    is_pair = inside.joinpath("transformer_2").is_dir() or (
        index.is_file() and read_json(index).get("boundary_ratio") is not None
    )
    if is_pair or root.name in _EXPERTS or any(inside.joinpath(name).is_dir() for name in _EXPERTS):
        raise CheckpointError(
            f"{path} holds a Wan2.2 model of two networks, for high and for low noise: "
            "give a Wan2.1 text-to-video model"
        )


def _component_files(path: Path, component: str, patterns: tuple[str, ...]) -> list[Path]:
    """The weights files of a component: `path` itself, or what a folder holds of the first pattern that matches."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a model folder or a weights file")
    folder = path / component if (path / component).is_dir() else path
    for pattern in patterns:
        if files := sorted(folder.glob(pattern)):
            return files
    raise CheckpointError(
        f"{folder} holds no {component.replace('_', ' ')} weights (none of {', '.join(patterns)}): "
        "give an official or Diffusers Wan2.1 folder, or the weights file itself"
    )


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        return path
    for pattern in _TOKENIZER_FILES:
        if files := sorted(path.glob(pattern)):
            return files[0]
    raise CheckpointError(
        f"{path} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): "
        "download the tokenizer.json of google/umt5-xxl"
    )


def _stored_config(file: Path, class_names: set[str]) -> Mapping[str, Any]:
    """The config.json beside a weights file, or nothing where there is none or it belongs to another network."""
    config_file = file.parent / "config.json"
    if not config_file.is_file():
        return {}
    config = read_json(config_file)
    return config if str(config.get("_class_name")) in class_names else {}
