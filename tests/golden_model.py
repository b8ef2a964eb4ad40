"""Whole model folders made of the goldens' tiny networks: the engine's line without trained weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from miga_engine.config import MigaConfig
from miga_engine.models.videocrafter2.clip_text import CLIPTextConfig, CLIPTextEncoder
from miga_engine.models.videocrafter2.unet import VideoUNet, unet_config

GOLDENS = Path(__file__).parent / "goldens"
OPTIONS = {"height": 32, "width": 48, "num_inference_steps": 8}
MIGA = MigaConfig(zigzag_width=2, stage2_steps=3, guidance_frames=1, stride=2, judge_step=3)


def build(folder: Path) -> Path:
    """The official Wan layout: a DiT of width 96, a VAE of base width 6, a UMT5 of width 32; window of 5 latents."""
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    for source in (
        "wan_dit/official/config.json",
        "wan_dit/official/diffusion_pytorch_model.safetensors",
        "wan_vae/official/Wan2.1_VAE.safetensors",
        "umt5/official/models_t5_umt5-xxl-enc-bf16.pth",
    ):
        shutil.copy(GOLDENS / source, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDENS / "umt5" / "tokenizer" / name, tokenizer)
    (folder / "miga.json").write_text(json.dumps({"window_frames": 5, "default_negative_prompt": "blurry"}))
    return folder


def build_diffusers(folder: Path) -> Path:
    """The same model as a Diffusers folder."""
    shutil.copytree(GOLDENS / "wan_dit" / "diffusers" / "transformer", folder / "transformer")
    shutil.copytree(GOLDENS / "wan_vae" / "diffusers", folder / "vae")
    shutil.copytree(GOLDENS / "umt5" / "hf" / "text_encoder", folder / "text_encoder")
    shutil.copytree(GOLDENS / "umt5" / "tokenizer", folder / "tokenizer")
    return folder


def build_videocrafter2(folder: Path, window_frames: int = 5) -> Path:
    """VideoCrafter2's keys in one file: the goldens' VAE, a random UNet of their widths and text tower, a small BPE."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "model.diffusion_model."
    golden = {key.removeprefix(prefix): t for key, t in load_file(GOLDENS / "vc2" / "unet.safetensors").items()}
    config = dataclasses.replace(unet_config({key: tuple(t.shape) for key, t in golden.items()}), context_dim=64)
    tensors = load_file(GOLDENS / "vc2" / "vae.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = VideoUNet(config)
        text = CLIPTextEncoder(CLIPTextConfig(vocab_size=516, dim=64, dim_ffn=128, num_heads=1, num_layers=2))
        for name, parameter in [*unet.named_parameters(), *text.named_parameters()]:
            torch.nn.init.normal_(parameter, mean="norm" in name and "weight" in name, std=0.1)
    tensors |= {prefix + key: value for key, value in unet.state_dict().items()}
    tensors |= {f"cond_stage_model.model.{key}": value for key, value in text.state_dict().items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\nc d\n")
    (folder / "miga.json").write_text(json.dumps({"window_frames": window_frames}))
    return folder


class Family(NamedTuple):
    """A family of models in small, and a short run of it in which every stage has its turn."""

    build: Callable[[Path], Path]
    options: dict[str, Any]
    num_frames: int


FAMILIES = {
    "wan": Family(build, {**OPTIONS, "miga": MIGA}, 30),
    "videocrafter2": Family(
        build_videocrafter2,
        {
            "height": 8,
            "width": 16,
            "num_inference_steps": 5,
            "miga": dataclasses.replace(
                MIGA, stage2_steps=2, judge_step=2, reference_groups=1, candidates=2, score_drop=0.0, refine_steps=1
            ),
        },
        9,
    ),
}
