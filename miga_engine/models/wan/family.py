"""The family of Wan2.1: the official folder, the `-Diffusers` folder, a component's own folder, and single files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from miga_engine.errors import CheckpointError
from miga_engine.models.bundle import ModelBundle, ModelFacts
from miga_engine.models.family import Device, Family
from miga_engine.models.wan import layouts
from miga_engine.models.wan.dit import WanDiT, WanDiTConfig
from miga_engine.models.wan.dit_layers import MAX_POSITIONS
from miga_engine.models.wan.tokenizer import WAN_DEFAULT_NEGATIVE_PROMPT, UMT5Tokenizer
from miga_engine.models.wan.umt5 import UMT5Encoder
from miga_engine.models.wan.vae import WanVAE, WanVAEConfig
from miga_engine.weights.checkpoint import Checkpoint, check_fit, stored_dtype
from miga_engine.weights.files import format_of, indexed_files, open_checkpoint, open_files
from miga_engine.weights.load import load_module
from miga_engine.weights.untrusted import read_json

WINDOW_FRAMES = 21  # latent frames of the 81-frame clips that Wan2.1 was trained on
PROTOCOL_FRAMES = 161  # video frames of MIGA's evaluation

# File names that hold a component, in the order in which they are looked for.
_DIFFUSION_FILES = ("diffusion_pytorch_model*.index.json", "diffusion_pytorch_model*.safetensors")
_TRANSFORMER_FILES = (*_DIFFUSION_FILES, "diffusion_pytorch_model*.bin")
_EXPERTS = ("high_noise_model", "low_noise_model")  # folders of the two networks of Wan2.2 A14B
_VAE_FILES = ("*VAE*.safetensors", "*VAE*.pth", *_DIFFUSION_FILES)
_TEXT_ENCODER_FILES = ("models_t5*.safetensors", "models_t5*.pth", "model*.index.json", "model*.safetensors")
_TOKENIZER_FILES = ("tokenizer/tokenizer.json", "google/*/tokenizer.json", "tokenizer.json")
_OFFICIAL_FILES = ("diffusion_pytorch_model*", "*/diffusion_pytorch_model*", "models_t5*", "text_encoder/model*")


def recognises(path: Path) -> bool:
    """Whether a folder has file names of one of Wan's layouts, or a file the keys of one of its networks."""
    if path.is_file():
        return format_of(path) is not None and layouts.is_network(open_checkpoint(path).shapes)
    return path.is_dir() and any(any(path.glob(pattern)) for pattern in _OFFICIAL_FILES)


def load_transformer(path: Path, device: Device = None, dtype: torch.dtype | None = None) -> WanDiT:
    """The transformer under a path; what it uses in float32 stays float32. Raises CheckpointError."""
    _refuse_experts(path)
    files = _component_files(path, "transformer", _TRANSFORMER_FILES)
    checkpoint = layouts.official_transformer(open_files(files))
    config = layouts.transformer_config(checkpoint, _stored_config(files[0], {"WanModel", "WanTransformer3DModel"}))
    return load_module(
        lambda: WanDiT(config),
        checkpoint,
        device=device,
        dtype=dtype or stored_dtype(checkpoint, "patch_embedding.bias"),
        keeps_fp32=WanDiT.keeps_fp32,
    )


def load_vae(path: Path, device: Device = None, dtype: torch.dtype = torch.float32) -> WanVAE:
    """The VAE under a path. Raises CheckpointError."""
    files = _component_files(path, "vae", _VAE_FILES)
    checkpoint = layouts.official_vae(open_files(files))
    config = layouts.vae_config(checkpoint, _stored_config(files[0], {"AutoencoderKLWan"}))
    return load_module(lambda: WanVAE(config), checkpoint, device=device, dtype=dtype).lay_out()


def load_text_encoder(path: Path, device: Device = None, dtype: torch.dtype | None = None) -> UMT5Encoder:
    """The text encoder under a path. Raises CheckpointError."""
    checkpoint = layouts.official_text_encoder(open_files(_component_files(path, "text_encoder", _TEXT_ENCODER_FILES)))
    config = layouts.text_encoder_config(checkpoint)
    return load_module(
        lambda: UMT5Encoder(config),
        checkpoint,
        device=device,
        dtype=dtype or stored_dtype(checkpoint, "norm.weight"),
    )


def load_tokenizer(path: Path, text_len: int | None = None) -> UMT5Tokenizer:
    """The tokenizer under a path, or a `tokenizer.json`. Raises CheckpointError."""
    return UMT5Tokenizer.from_folder(_tokenizer_file(path), text_len or layouts.TEXT_LEN)


def open_bundle(path: Path, device: Device, dtype: torch.dtype | None, vae_dtype: torch.dtype) -> ModelBundle:
    """All networks; the text encoder and the tokenizer are read when the first prompt is encoded."""
    root = path.parent if path.is_file() else path
    _refuse_experts(path)
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
            window_frames=WINDOW_FRAMES,
            size_multiple=vae.config.spatial_factor * max(config.patch_size),
            text_len=config.text_len,
            prediction_type="velocity",
            default_preset="wan2.1",
            default_negative_prompt=WAN_DEFAULT_NEGATIVE_PROMPT,
            protocol_frames=PROTOCOL_FRAMES,
        ),
        open_text_encoder=open_text_encoder,
        open_tokenizer=lambda: load_tokenizer(root, config.text_len),
        rehearse=lambda: rehearse(transformer.dtype),
    )


def network_bytes(path: Path) -> dict[str, int]:
    """Bytes of the files of each network. Raises CheckpointError."""
    root = path.parent if path.is_file() else path
    components = {
        "transformer": _component_files(path, "transformer", _TRANSFORMER_FILES),
        "VAE": _component_files(root, "vae", _VAE_FILES),
        "text encoder": _component_files(root, "text_encoder", _TEXT_ENCODER_FILES),
    }
    for files in components.values():
        if files[0].name.endswith(".index.json"):
            files[:] = indexed_files(files[0])
    return {name: sum(file.stat().st_size for file in files) for name, files in components.items()}


def kept_dtypes(checkpoint: Checkpoint) -> Callable[[str], bool] | None:
    """What the transformer uses in float32 whatever its dtype, and the VAE, which is meant to run in it."""
    return layouts.keeps_fp32(checkpoint) if layouts.is_network(checkpoint.shapes) else None


def rehearse(dtype: torch.dtype) -> None:
    """A run in small, which makes the libraries load and build what a run needs of them."""
    config = WanDiTConfig(
        dim=32, ffn_dim=64, freq_dim=16, num_heads=2, num_layers=1, text_dim=8, text_len=4, in_dim=4, out_dim=4
    )
    transformer = WanDiT(config).to(dtype)
    transformer(torch.zeros(1, 4, 5, 32, 32, dtype=dtype), 0.0, torch.zeros(1, 4, 8))
    vae = WanVAE(WanVAEConfig(dim=8, z_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)))
    vae.decode(torch.zeros(1, 4, 2, 8, 8))


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


WAN = Family(
    name="Wan2.1",
    window_bound=MAX_POSITIONS,
    recognises=recognises,
    open_bundle=open_bundle,
    load_transformer=load_transformer,
    load_vae=load_vae,
    load_text_encoder=load_text_encoder,
    load_tokenizer=load_tokenizer,
    network_bytes=network_bytes,
    kept_dtypes=kept_dtypes,
)
