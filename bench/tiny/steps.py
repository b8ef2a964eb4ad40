"""What the steps of the recipe share: the size of the pictures, a log with the time, files to go on from."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from miga_engine.files import written_whole

HEIGHT, WIDTH = 64, 96


def log(message: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def save_state(path: Path, state: object) -> None:
    """Write what a step goes on from, whole or not at all."""
    with written_whole(path) as file:
        torch.save(state, file)
