"""A small clip, and how it is written and compared."""

from pathlib import Path
from typing import Any

import numpy as np

from miga_engine.video.outputs import open_sink

WIDTH, HEIGHT, FPS = 96, 64, 24
METADATA = {"prompt": 'a "red" balloon — über hills', "seed": 7, "config": {"zigzag_width": 4}, "version": "0.1.0"}


def moving_square(n: int, width: int = WIDTH, height: int = HEIGHT) -> "np.ndarray[Any, Any]":
    """A bright square that moves over a gradient, with the frame number in its colour."""
    y, x = np.mgrid[:height, :width]
    frames = np.empty((n, height, width, 3), np.uint8)
    for i in range(n):
        frames[i] = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 100 + i % 100)], -1)
        frames[i, 8:24, (2 * i) % (width - 16) :][:, :16] = (250, 40, 30)
    return frames


def psnr(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]") -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9)))


def write_clip(path: Path | str, frames: "np.ndarray[Any, Any]", **options: Any) -> None:
    with open_sink(path, FPS, frames.shape[2], frames.shape[1], METADATA, **options) as sink:
        for start in range(0, len(frames), 7):
            sink.write(frames[start : start + 7])
