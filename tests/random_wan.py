"""A small Wan of random weights with heads as wide as the published ones, in the layouts in which people have it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from golden_model import GOLDENS
from safetensors.torch import load_file, save_file

from miga_engine.models.wan.dit import WanDiT, WanDiTConfig

CONFIG = WanDiTConfig(
    dim=128, ffn_dim=256, freq_dim=64, num_heads=1, num_layers=2, text_dim=32, text_len=16, in_dim=16, out_dim=16
)
TRANSFORMER = "diffusion_pytorch_model.safetensors"
VAE = "Wan2.1_VAE.safetensors"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.safetensors"
TOKENIZER = GOLDENS / "umt5" / "tokenizer" / "tokenizer.json"
Tensors = Mapping[str, torch.Tensor]


def transformer(seed: int = 0) -> dict[str, torch.Tensor]:
    """Official names, float32, values of the size of a trained network's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = WanDiT(CONFIG)
        for name, parameter in network.named_parameters():
            torch.nn.init.normal_(parameter, mean="norm" in name and "weight" in name, std=0.05)
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def vae() -> dict[str, torch.Tensor]:
    """Official names, float32: the goldens' VAE of base width 6."""
    return load_file(GOLDENS / "wan_vae" / "official" / VAE)


def text_encoder(layout: str = "official") -> dict[str, torch.Tensor]:
    """The goldens' UMT5 of width 32, under official or Hugging Face's ("hf") names."""
    folder, file = ("official", "models_t5_tiny") if layout == "official" else ("hf/text_encoder", "model")
    return load_file(GOLDENS / "umt5" / folder / f"{file}.safetensors")


def official(folder: Path) -> Path:
    """The official layout."""
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    save_file(transformer(), folder / TRANSFORMER)
    save_file(vae(), folder / VAE)
    save_file(text_encoder(), folder / TEXT_ENCODER)
    shutil.copy(TOKENIZER, folder / "google" / "umt5-xxl")
    sizes = {"_class_name": "WanModel", "model_type": "t2v", **dataclasses.asdict(CONFIG)}
    del sizes["inject_sample_info"]  # which SkyReels-V2 alone says
    (folder / "config.json").write_text(json.dumps(sizes))
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
