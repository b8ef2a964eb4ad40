"""What the steps of the recipe share: sizes, names of files, a log with the time, states to go on from."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from miga_engine.files import written_whole

HEIGHT, WIDTH = 64, 96
DIT_FILE = "diffusion_pytorch_model.safetensors"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.safetensors"
VAE_FILE = "Wan2.1_VAE.safetensors"


def log(message: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def save_state(path: Path, state: object) -> None:
    """Write what a step goes on from, whole or not at all."""
    with written_whole(path) as file:
        torch.save(state, file)


def stable_then_falling(share: float, fall: float = 0.25) -> float:
    """The learning rate's factor after this share of the time: 1, then over the last quarter linearly to 0.01, so that
    a run can be made longer from any point before its fall."""
    return min(1.0, max(0.01, (1 - share) / fall))
