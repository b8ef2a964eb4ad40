"""What the steps of the recipe share: what is trained, names of files, a log with the time, states to go on from."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miga_engine.errors import ConfigError
from miga_engine.files import write_whole, written_whole
from miga_engine.tiny import world

DIT_FILE = "diffusion_pytorch_model.safetensors"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.safetensors"
VAE_FILE = "Wan2.1_VAE.safetensors"


@dataclass(frozen=True)
class Setting:
    """What is trained: the size of the pictures, the plain world or the rich one, and the shape of the DiT."""

    height: int = 64
    width: int = 96
    rich: bool = False
    dim: int = 192
    ffn_dim: int = 768
    layers: int = 6

    @property
    def text_len(self) -> int:
        """Rows of text that the DiT reads."""
        return 32 if self.rich else 24

    @property
    def dit_config(self) -> dict[str, Any]:
        """The DiT's config.json."""
        return {
            "_class_name": "WanModel",
            "_diffusers_version": "0.30.0",
            "dim": self.dim,
            "eps": 1e-06,
            "ffn_dim": self.ffn_dim,
            "freq_dim": 64,
            "in_dim": 16,
            "model_type": "t2v",
            "num_heads": self.dim // 64,
            "num_layers": self.layers,
            "out_dim": 16,
            "text_len": self.text_len,
        }

    def sample_scene(self, rng: np.random.Generator) -> world.Scene:
        """A scene of the world that is trained on."""
        return world.sample_rich_scene(rng) if self.rich else world.sample_scene(rng)

    def render(
        self, scene: world.Scene, first_frame: int, num_frames: int, device: str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A clip as uint8 `[T,H,W,3]`, the subject's coverage `[T,H,W]` and the flow `[T,H,W,2]`."""
        frames = np.arange(first_frame, first_frame + num_frames)
        picture, cover, flow = world.render_tensors([scene] * num_frames, frames, self.height, self.width, device)
        return (picture * 255 + 0.5).byte(), cover, flow


def kept_setting(work: Path, asked: Mapping[str, Any]) -> Setting:
    """The setting of a work folder: written by its first step, read by the others. Fields that are asked for
    differently later are refused."""
    path = work / "setting.json"
    if not path.exists():
        setting = Setting(**asked)
        write_whole(path, json.dumps(dataclasses.asdict(setting)) + "\n")
        return setting
    kept = Setting(**json.loads(path.read_text()))
    for name, value in asked.items():
        if value != getattr(kept, name):
            raise ConfigError(
                f"{name} is {value}, and {path} says {getattr(kept, name)}: leave it out, or take another --work"
            )
    return kept


def to_video(pictures: Tensor) -> Tensor:
    """Clips `[B,3,T,H,W]` in [-1,1] of uint8 pictures `[B,T,H,W,3]`."""
    return pictures.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0).contiguous()


def log(message: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def save_state(path: Path, state: object) -> None:
    """Write what a step goes on from, whole or not at all."""
    with written_whole(path) as file:
        torch.save(state, file)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameters of an optimiser."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def cosine(share: float) -> float:
    """The learning rate's factor after this share of the time: from 1 by a cosine to 0.01."""
    return max(0.01, 0.5 * (1 + math.cos(math.pi * share)))


def stable_then_falling(share: float, fall: float = 0.25) -> float:
    """The learning rate's factor after this share of the time: 1, then over the last quarter linearly to 0.01, so that
    a run can be made longer from any point before its fall."""
    return min(1.0, max(0.01, (1 - share) / fall))
