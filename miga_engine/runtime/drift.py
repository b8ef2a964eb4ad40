"""Drift telemetry: how far colour and brightness have moved since the video began."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from miga_engine.colour import LUMA
from miga_engine.errors import DriftError
from miga_engine.runtime.events import Chunk, Events

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


class DriftWatch:
    """One meter a prompt: colours are compared with those of the first chunk that shows the same prompt.

    starts: the first frame of each prompt, in order. Where colours have moved by more than `warn`, once a prompt it is
    said, and by more than `stop`, it is an error. `warned` holds the prompts, by their place, of which it was said.
    """

    def __init__(self, starts: Sequence[int], stop: float | None = None, warn: float | None = None) -> None:
        self.starts = starts
        self.warned: set[int] = set()
        self._stop, self._warn = stop, warn
        self._meters: dict[int, DriftMeter] = {}

    def watch(self, chunk: Chunk, events: Events) -> DriftError | None:
        """Measure a chunk and tell of it; the error of one that has moved too far."""
        if events.on_event is None and self._stop is None and self._warn is None:
            return None
        entry = bisect_right(self.starts, chunk.first_frame) - 1
        drift = self._meters.setdefault(entry, DriftMeter()).measure(chunk.frames)
        if events.on_event is not None:
            where = {"index": chunk.index, "first_frame": chunk.first_frame, "num_frames": len(chunk.frames)}
            events("drift", **where, **drift)
        moved = (
            f"the colours of frames {chunk.first_frame} to {chunk.first_frame + len(chunk.frames) - 1} have moved "
            f"by {drift['drift']:.3f} from the beginning"
        )
        remedy = "try another seed, more guidance frames, or a lower guidance scale"
        if self._warn is not None and drift["drift"] > self._warn and entry not in self.warned:
            events.warn(f"{moved}, more than warn_on_drift {self._warn:g}, and the run goes on: {remedy}")
            self.warned.add(entry)
        if self._stop is not None and drift["drift"] > self._stop:
            return DriftError(f"{moved}, more than stop_on_drift {self._stop:g}: {remedy}")
        return None

    def references(self) -> dict[str, list[list[float]] | None]:
        """What a session file must know."""
        return {str(entry): meter.reference for entry, meter in self._meters.items()}

    def load_references(self, references: Mapping[str, list[list[float]]]) -> None:
        """Go on from `references`."""
        self._meters = {int(entry): DriftMeter(reference) for entry, reference in references.items()}
