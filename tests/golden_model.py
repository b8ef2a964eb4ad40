"""A whole model folder made of the goldens' tiny networks: the engine's line without trained weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from miga_engine.config import MigaConfig

GOLDENS = Path(__file__).parent / "goldens"
OPTIONS = {"height": 32, "width": 48, "num_inference_steps": 10}
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
