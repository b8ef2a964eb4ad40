"""Drift telemetry: how far colour and brightness have moved since the video began."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miga_engine.colour import LUMA

NUM_LEVELS = 256


class DriftMeter:
    """Compares each chunk's colours with those of the first chunk.

    ``drift`` is the mean over the three colour channels of the Wasserstein-1 distance between the two histograms: by
    how many levels, as a share of the whole range, a value has moved on average; 0 is unchanged, 1 black turned white.
    ``reference`` is the first chunk's cumulative histogram ``[3, 256]``, None before it; it goes into session files.
    """

    def __init__(self, reference: list[list[float]] | None = None) -> None:
        self.reference = reference

    def measure(self, frames: Tensor) -> dict[str, Any]:
        """Statistics of frames uint8 ``[n,H,W,3]``: luminance and saturation (means, 0 … 1), contrast (standard
        deviation of luminance), and drift."""
        values = frames.reshape(-1, 3)
        counts = torch.stack([torch.bincount(values[:, c], minlength=NUM_LEVELS) for c in range(3)]).double().cpu()
        cumulative = counts.cumsum(1) / counts.sum(1, keepdim=True)
        colours = values.float() / (NUM_LEVELS - 1)
        red, green, blue = (share * colours[:, c] for c, share in enumerate(LUMA))
        luminance = red + green + blue
        highest, lowest = colours.amax(1), colours.amin(1)
        saturation = (highest - lowest) / highest.clamp(min=1 / (NUM_LEVELS - 1))
        if self.reference is None:
            self.reference = cumulative.tolist()
        moved = (cumulative - torch.tensor(self.reference, dtype=torch.float64)).abs().sum(1) / (NUM_LEVELS - 1)
        return {
            "drift": float(moved.mean()),
            "luminance": float(luminance.mean()),
            "contrast": float(luminance.std(correction=0)),
            "saturation": float(saturation.mean()),
        }
