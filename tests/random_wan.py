"""A small Wan of random weights with heads as wide as the published ones, in the layouts in which people have it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from golden_model import GOLDENS
from safetensors.torch import load_file, save_file
from wan_names import diffusers_name

from miga_engine.models.wan.dit import WanDiT, WanDiTConfig
from miga_engine.models.wan.vae import WAN22_VAE, WanVAE

CONFIG = WanDiTConfig(
    dim=128, ffn_dim=256, freq_dim=64, num_heads=1, num_layers=2, text_dim=32, text_len=16, in_dim=16, out_dim=16
)
TRANSFORMER = "diffusion_pytorch_model.safetensors"
VAE = "Wan2.1_VAE.safetensors"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.safetensors"
TOKENIZER = GOLDENS / "umt5" / "tokenizer" / "tokenizer.json"
Tensors = Mapping[str, torch.Tensor]

TI2V_CONFIG = dataclasses.replace(CONFIG, in_dim=48, out_dim=48)
TI2V_VAE_CONFIG = dataclasses.replace(WAN22_VAE, dim=4, decoder_dim=6, num_res_blocks=1)
TI2V_VAE = "Wan2.2_VAE.safetensors"
CONFIGS = {"t2v": CONFIG, "ti2v": TI2V_CONFIG, "skyreels": dataclasses.replace(CONFIG, inject_sample_info=True)}
"""Wan2.1, Wan2.2 TI2V-5B and SkyReels-V2-DF 1.3B in small."""

_DIFFUSERS_VAE = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
    (r"coder\.head\.0\.", "coder.norm_out."),
    (r"coder\.head\.2\.", "coder.conv_out."),
    (r"coder\.middle\.1\.", "coder.mid_block.attentions.0."),
    (r"coder\.middle\.0\.", "coder.mid_block.resnets.0."),
    (r"coder\.middle\.2\.", "coder.mid_block.resnets.1."),
    (r"\.(down|up)samples\.(\d)\.(?:down|up)samples\.\d\.(resample\.1|time_conv)\.", r".\1_blocks.\2.\1sampler.\3."),
    (r"\.(down|up)samples\.(\d)\.(?:down|up)samples\.(\d)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def diffusers_vae_name(key: str) -> str:
    """What diffusers calls a parameter of Wan2.2's VAE."""
    for ours, theirs in _DIFFUSERS_VAE:
        key = re.sub(ours, theirs, key)
    return key


def _random(build: Callable[[], torch.nn.Module], seed: int, std: float) -> dict[str, torch.Tensor]:
    """Parameters of the size of a trained network's, gains around 1, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
        for name, parameter in network.named_parameters():
            is_gain = ("norm" in name and "weight" in name) or name.endswith("gamma")
            torch.nn.init.normal_(parameter, mean=is_gain, std=std)
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def transformer(seed: int = 0, kind: str = "t2v") -> dict[str, torch.Tensor]:
    """Official names, float32."""
    return _random(lambda: WanDiT(CONFIGS[kind]), seed, 0.05)


def vae(kind: str = "t2v") -> dict[str, torch.Tensor]:
    """Official names, float32: the goldens' VAE of base width 6, or a random one of Wan2.2's form."""
    if kind == "ti2v":
        return _random(lambda: WanVAE(TI2V_VAE_CONFIG), 0, 0.15)
    return load_file(GOLDENS / "wan_vae" / "official" / VAE)


def text_encoder(layout: str = "official") -> dict[str, torch.Tensor]:
    """The goldens' UMT5 of width 32, under official or Hugging Face's ("hf") names."""
    folder, file = ("official", "models_t5_tiny") if layout == "official" else ("hf/text_encoder", "model")
    return load_file(GOLDENS / "umt5" / folder / f"{file}.safetensors")


def official(folder: Path, kind: str = "t2v") -> Path:
    """The official layout of a model of a kind in `CONFIGS`."""
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    save_file(transformer(kind=kind), folder / TRANSFORMER)
    save_file(vae(kind), folder / (TI2V_VAE if kind == "ti2v" else VAE))
    save_file(text_encoder(), folder / TEXT_ENCODER)
    shutil.copy(TOKENIZER, folder / "google" / "umt5-xxl")
    model_type = "ti2v" if kind == "ti2v" else "t2v"
    sizes = {"_class_name": "WanModel", "model_type": model_type, **dataclasses.asdict(CONFIGS[kind])}
    if kind != "skyreels":
        del sizes["inject_sample_info"]
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


def diffusers_ti2v(folder: Path) -> Path:
    """The Diffusers layout of the "ti2v" model, with the entries of its JSON files that distinguish it."""
    statistics = dict(zip(("latents_mean", "latents_std"), TI2V_VAE_CONFIG.statistics(), strict=True))
    networks = {
        "transformer": (
            transformer(kind="ti2v"),
            diffusers_name,
            {"_class_name": "WanTransformer3DModel", "text_len": 16},
        ),
        "vae": (
            vae("ti2v"),
            diffusers_vae_name,
            {"_class_name": "AutoencoderKLWan", "is_residual": True, **statistics},
        ),
        "text_encoder": (text_encoder("hf"), str, {}),
    }
    for name, (tensors, rename, config) in networks.items():
        (folder / name).mkdir(parents=True)
        file = "model.safetensors" if name == "text_encoder" else TRANSFORMER
        save_file({rename(key): value for key, value in tensors.items()}, folder / name / file)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer").mkdir()
    shutil.copy(TOKENIZER, folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": None, "expand_timesteps": True}))
    return folder


def comfy(folder: Path) -> Path:
    """A ComfyUI folder with files of its names; the tokenizer is not among them."""
    models = folder / "models"
    for name in ("diffusion_models", "text_encoders", "vae", "loras", "vae_approx"):
        (models / name).mkdir(parents=True)
    save_file(
        {f"model.diffusion_model.{key}": value.half() for key, value in transformer().items()},
        models / "diffusion_models" / "wan2.1_t2v_1.3B_fp16.safetensors",
    )
    save_file(vae(), models / "vae" / "wan_2.1_vae.safetensors")
    save_file(text_encoder("hf"), models / "text_encoders" / "umt5_xxl_fp16.safetensors")
    return folder


def scaled_fp8(tensors: Tensors, style: str = "comfy") -> dict[str, torch.Tensor]:
    """Matrices in fp8 with a scale each: "comfy" (X.scale_weight, and the mark), "weight_scale" (newer ComfyUI), or
    "rows" (one a row, LightX2V)."""
    out: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        is_linear = value.ndim == 2 and key.endswith(".weight") and "embedding" not in key and "shared" not in key
        if not is_linear or key.startswith("head"):
            out[key] = value
            continue
        most = value.abs().amax(1, keepdim=True) if style == "rows" else value.abs().amax()
        scale = (most.clamp(min=1e-6) / 448).float()
        out[key] = (value / scale).to(torch.float8_e4m3fn)
        layer = key.removesuffix(".weight")
        out[f"{layer}.scale_weight" if style == "comfy" else f"{layer}.weight_scale"] = scale
    if style == "comfy":
        out["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    return out


def dequantized(tensors: Tensors) -> dict[str, torch.Tensor]:
    """What `scaled_fp8` stands for, in float32: the rule, written once more."""
    scales = {}
    for key, value in tensors.items():
        for suffix in (".scale_weight", ".weight_scale"):
            if key.endswith(suffix):
                scales[key.removesuffix(suffix) + ".weight"] = value
    beside = (".scale_weight", ".weight_scale", ".comfy_quant", "scaled_fp8")
    return {
        key: value.float() * scales[key] if key in scales else value.float()
        for key, value in tensors.items()
        if not key.endswith(beside)
    }
