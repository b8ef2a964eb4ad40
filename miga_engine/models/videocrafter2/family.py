"""The family of VideoCrafter2: its `model.ckpt`, the same as safetensors, or the folder of either."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from miga_engine.errors import CheckpointError, ConfigError
from miga_engine.models.bundle import ModelBundle, ModelFacts
from miga_engine.models.family import Components, Device, Family, Sources
from miga_engine.models.videocrafter2 import layouts
from miga_engine.models.videocrafter2.clip_text import CLIPTextConfig, CLIPTextEncoder
from miga_engine.models.videocrafter2.tokenizer import TEXT_LEN, CLIPTokenizer
from miga_engine.models.videocrafter2.unet import VideoUNet, VideoUNetConfig, unet_config
from miga_engine.models.videocrafter2.vae import KLVAE, KLVAEConfig
from miga_engine.weights.checkpoint import Checkpoint, check_fit, network_dtype
from miga_engine.weights.files import format_of, open_checkpoint
from miga_engine.weights.held import held
from miga_engine.weights.load import load_module

WINDOW_BOUND = 1024  # latent frames; the network knows no positions in time, but the rings of a run grow with them
PROTOCOL_FRAMES = 128  # video frames of MIGA's evaluation


def recognises(path: Path) -> bool:
    """Whether `path` is a weights file with VideoCrafter2's UNet, or a folder that holds one, judged by its keys.

    Raises CheckpointError where a file is damaged.
    """
    if path.is_file():
        return format_of(path) is not None and layouts.is_model(open_checkpoint(path).shapes)
    return bool(_models_in(path))


def open_bundle(sources: Sources, device: Device, dtype: torch.dtype | None, vae_dtype: torch.dtype) -> ModelBundle:
    """All networks of a model; the text encoder and the tokenizer are read when the first prompt is encoded."""
    load_tokenizer(sources)  # read late, but missed at once
    checkpoint = _open(_path(sources))
    return _bundle_of(
        checkpoint.path.parent,
        layouts.text_encoder_config(layouts.text_encoder(checkpoint)),
        load_unet(sources, device, dtype),
        load_vae(sources, device, vae_dtype),
        device,
        lambda device: load_text_encoder(sources, device, dtype),
        lambda: load_tokenizer(sources),
    )


def of_components(
    parts: Components, device: Device, dtype: torch.dtype | None, vae_dtype: torch.dtype | None
) -> ModelBundle:
    """A model that is in memory, all networks in one module or state dict, as its one file has them, given as the
    transformer; the tokenizer is a file. Raises CheckpointError."""
    apart = [name for name in ("vae", "text_encoder", "transformer_2") if getattr(parts, name) is not None]
    if apart or not isinstance(parts.tokenizer, str | os.PathLike):
        raise CheckpointError(
            "a VideoCrafter2 model is given as its one state dict holds it, as the transformer, and its tokenizer as a "
            f"file: {f'leave {apart[0]} out' if apart else 'name that of OpenCLIP ViT-H/14'}"
        )

    def whole() -> Checkpoint:  # anew for each network, which closes it
        return held("transformer", parts.transformer)

    layouts.check_schedule(whole())
    vae = layouts.network(whole(), layouts.VAE)
    config, own = layouts.vae_config(vae), network_dtype(vae, "post_quant_conv.weight")
    tokenizer, text = Path(parts.tokenizer), layouts.text_encoder(whole())
    text_config, text_dtype = layouts.text_encoder_config(text), network_dtype(text, "ln_final.weight")
    return _bundle_of(
        Path(parts.name),
        text_config,
        _unet(layouts.network(whole(), layouts.UNET), device, dtype),
        load_module(lambda: KLVAE(config), vae, device=device, dtype=vae_dtype or own),
        device,
        lambda device: load_module(
            lambda: CLIPTextEncoder(text_config),
            layouts.text_encoder(whole()),
            device=device,
            dtype=dtype or text_dtype,
        ),
        lambda: CLIPTokenizer.from_file(tokenizer),
    )


def _bundle_of(
    root: Path,
    text: CLIPTextConfig,
    unet: VideoUNet,
    vae: KLVAE,
    device: Device,
    open_text_encoder: Callable[[Device], CLIPTextEncoder],
    open_tokenizer: Callable[[], CLIPTokenizer],
) -> ModelBundle:
    config, target = unet.config, torch.device(device or "cpu")
    check_fit(root, "channels of a latent", vae=vae.config.z_dim, input=config.in_channels, output=config.out_channels)
    check_fit(root, "widths of a text", text_encoder=text.dim, UNet=config.context_dim)
    check_fit(root, "tokens of a text", text_encoder=text.text_len, tokenizer=TEXT_LEN)
    return ModelBundle(
        path=root,
        device=target,
        dtype=unet.dtype,
        transformer=unet,
        vae=vae,
        facts=ModelFacts(
            window_frames=config.temporal_length,
            size_multiple=vae.config.spatial_factor * config.size_multiple,
            text_len=TEXT_LEN,
            prediction_type=unet.prediction_type,
            default_preset="videocrafter2",
            default_negative_prompt="",
            protocol_frames=PROTOCOL_FRAMES,
        ),
        open_text_encoder=lambda device=target: open_text_encoder(device),
        open_tokenizer=open_tokenizer,
        rehearse=functools.partial(rehearse, unet.dtype),
    )


def network_bytes(sources: Sources) -> dict[str, int]:
    """Bytes that each network has in the weights file, of which no others are read with it.

    Raises CheckpointError.
    """
    checkpoint = _open(_path(sources))
    networks = {
        "transformer": layouts.network(checkpoint, layouts.UNET),
        "VAE": layouts.network(checkpoint, layouts.VAE),
        "text encoder": layouts.text_encoder(checkpoint),
    }
    return {name: sum(part.read(key).nbytes for key in part.shapes) for name, part in networks.items()}


def load_unet(sources: Sources | Path, device: Device = None, dtype: torch.dtype | None = None) -> VideoUNet:
    """The UNet of a weights file, or of its folder.

    device defaults to the CPU, dtype to the file's own; what the network uses in float32 stays float32.
    Raises CheckpointError, also where the file's noise schedule is not the sampler's.
    """
    checkpoint = _open(_path(sources))
    layouts.check_schedule(checkpoint)
    return _unet(layouts.network(checkpoint, layouts.UNET), device, dtype)


def _unet(unet: Checkpoint, device: Device, dtype: torch.dtype | None) -> VideoUNet:
    config = unet_config(unet.shapes)
    return load_module(
        lambda: VideoUNet(config),
        unet,
        device=device,
        dtype=dtype or network_dtype(unet, "input_blocks.0.0.weight"),
        keeps_fp32=VideoUNet.keeps_fp32,
    )


def load_vae(sources: Sources | Path, device: Device = None, dtype: torch.dtype = torch.float32) -> KLVAE:
    """The image VAE of a weights file, or of its folder. device defaults to the CPU. Raises CheckpointError."""
    vae = layouts.network(_open(_path(sources)), layouts.VAE)
    config = layouts.vae_config(vae)
    module = load_module(lambda: KLVAE(config), vae, device=device, dtype=dtype)
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def load_text_encoder(
    sources: Sources | Path, device: Device = None, dtype: torch.dtype | None = None
) -> CLIPTextEncoder:
    """The text encoder of a weights file, or of its folder.

    device defaults to the CPU, dtype to the file's own. Raises CheckpointError.
    """
    text = layouts.text_encoder(_open(_path(sources)))
    config = layouts.text_encoder_config(text)
    dtype = dtype or network_dtype(text, "ln_final.weight")
    return load_module(lambda: CLIPTextEncoder(config), text, device=device, dtype=dtype)


def load_tokenizer(sources: Sources | Path, text_len: int | None = None) -> CLIPTokenizer:
    """The tokenizer: the model's folder or weights file, beside which it lies, or the tokenizer's file.

    Raises CheckpointError, also where the model beside it has embeddings for another number of tokens, and ConfigError
    for any other text_len than the one that the text tower has positions for.
    """
    if text_len not in (None, TEXT_LEN):
        raise ConfigError(f"text_len is {text_len}: VideoCrafter2 takes {TEXT_LEN}, so leave it out")
    path = (sources.tokenizer if isinstance(sources, Sources) else None) or _path(sources)
    folder = path if format_of(path) is None else path.parent
    tokenizer = CLIPTokenizer.from_file(folder)
    if path != folder or _models_in(path):
        num_embeddings = layouts.text_encoder_config(layouts.text_encoder(_open(path))).vocab_size
        if num_embeddings != tokenizer.vocab_size:
            raise CheckpointError(
                f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens and the text encoder embeddings for "
                f"{num_embeddings}: use the tokenizer of OpenCLIP ViT-H/14"
            )
    return tokenizer


def kept_dtypes(checkpoint: Checkpoint) -> Callable[[str], bool] | None:
    """The VAE, what the UNet uses in float32 whatever its dtype, and the tables of the noise schedule."""
    return keeps_dtype if layouts.is_part(checkpoint.shapes) else None


def keeps_dtype(key: str) -> bool:
    """Whether a tensor of model.ckpt stays as it is when the networks are stored in another dtype."""
    is_fp32 = key.startswith(layouts.UNET) and VideoUNet.keeps_fp32(key.removeprefix(layouts.UNET))
    return is_fp32 or key.startswith(layouts.VAE) or key in layouts.SCHEDULE_TABLES


def describe(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """What a weights file is, and how it is used."""
    if layouts.is_model(checkpoint.shapes):
        return "VideoCrafter2: UNet, VAE and text encoder", "give it as the model; it needs the tokenizer of CLIP"
    return ("a part of VideoCrafter2", "give the whole model.ckpt") if layouts.is_part(checkpoint.shapes) else None


def plain_files(sources: Sources) -> dict[str, Checkpoint | dict[str, Any] | bytes]:
    """Raises CheckpointError: it is a model of one file."""
    raise CheckpointError(
        f"{_path(sources)} is a VideoCrafter2 model, which lies in one file: give its model.ckpt, and a "
        ".safetensors file to write"
    )


def rehearse(dtype: torch.dtype) -> None:
    """A run in small, which makes the libraries load and build what a run needs of them."""
    sizes = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, "head_dim": 16}
    config = VideoUNetConfig(**sizes, channel_mult=(1,), attention_ratios=(1,), transformer_depth=1, context_dim=8)
    VideoUNet(config).to(dtype)(torch.zeros(1, 4, 5, 16, 16, dtype=dtype), 0.0, torch.zeros(1, 4, 8))
    KLVAE(KLVAEConfig(dim=32, dim_mult=(1, 2), num_res_blocks=1)).decode(torch.zeros(1, 4, 2, 8, 8))


def _path(sources: Sources | Path) -> Path:
    """Where the one file of all networks is. CheckpointError for what only models of several files have."""
    if isinstance(sources, Path):
        return sources
    named = [name for name in sources.apart() if getattr(sources, name) != sources.root and name != "tokenizer"]
    named += ["lora"] if sources.loras else []
    named += ["decoder"] if sources.decoder != "vae" else []
    if named:
        flag = "--" + named[0].replace("_", "-")
        raise CheckpointError(
            f"{sources.leading} is a VideoCrafter2 model, whose networks lie in one file, and for which there is no "
            f"{flag}: leave {flag} out"
        )
    return sources.root


def _open(path: Path) -> Checkpoint:
    if path.is_file():
        return open_checkpoint(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give VideoCrafter2's model.ckpt or its folder")
    models = _models_in(path)
    if len(models) != 1:
        found = ", ".join(model.path.name for model in models) or "no .safetensors or .ckpt file with its UNet"
        raise CheckpointError(f"{path} does not hold one VideoCrafter2 model but {found}: give the file itself")
    return models[0]


def _models_in(folder: Path) -> list[Checkpoint]:
    """Files of a folder that hold the UNet; pickled ones only where no safetensors file does."""
    for pattern in ("*.safetensors", "*.ckpt"):
        checkpoints = map(open_checkpoint, sorted(folder.glob(pattern)))
        if models := [checkpoint for checkpoint in checkpoints if layouts.is_model(checkpoint.shapes)]:
            return models
    return []


VIDEOCRAFTER2 = Family(
    name="VideoCrafter2",
    window_bound=WINDOW_BOUND,
    recognises=recognises,
    open_bundle=open_bundle,
    load_transformer=load_unet,
    load_vae=load_vae,
    load_text_encoder=load_text_encoder,
    load_tokenizer=load_tokenizer,
    network_bytes=network_bytes,
    kept_dtypes=kept_dtypes,
    plain_files=plain_files,
    of_components=of_components,
    describe=describe,
)
