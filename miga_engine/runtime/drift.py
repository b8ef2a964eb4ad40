"""Drift telemetry: how far colour and brightness have moved since the video began."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from miga_engine.colour import LUMA

NUM_LEVELS = 256


class DriftMeter:
    """Compares each chunk's colours with those of the first chunk.

    `drift` is the mean over the three colour channels of the Wasserstein-1 distance between the two histograms: by
    how many levels, as a share of the whole range, a value has moved on average; 0 is unchanged, 1 black turned white.
    `reference` is the first chunk's cumulative histogram `[3,256]`, None before it; it goes into session files.
    """

    def __init__(self, reference: list[list[float]] | None = None) -> None:
        self.reference = reference

    def measure(self, frames: Tensor) -> dict[str, Any]:
        """Statistics of frames uint8 `[n,H,W,3]`: luminance and saturation (means, 0 … 1), contrast (standard
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


class DriftMeters:
    """One meter a prompt: colours are compared with those of the first chunk that shows the same prompt.

    `starts`: the first frame of each prompt, in order. `warned` holds the prompts, by their place in that order, of
    whose drift somebody was told.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self._starts = starts
        self._meters: dict[int, DriftMeter] = {}
        self.warned: set[int] = set()

    def entry(self, first_frame: int) -> int:
        """Which prompt shows at a frame of this number."""
        return bisect_right(self._starts, first_frame) - 1

    def measure(self, first_frame: int, frames: Tensor) -> dict[str, Any]:
        """What `DriftMeter.measure` says of frames, the first of which is number `first_frame` of the video."""
        return self._meters.setdefault(self.entry(first_frame), DriftMeter()).measure(frames)

    def references(self) -> dict[str, list[list[float]] | None]:
        """What a session file must know."""
        return {str(entry): meter.reference for entry, meter in self._meters.items()}

    def load_references(self, references: Mapping[str, list[list[float]]]) -> None:
        """Go on from `references`."""
        self._meters = {int(entry): DriftMeter(reference) for entry, reference in references.items()}
