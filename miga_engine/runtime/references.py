"""Frames that are only read: what a video begins with, and the anchor, the prompt's first frame (docs/method.md §2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from miga_engine.noise import Purpose
from miga_engine.runtime.denoise import NoiseSource
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.schedule import Schedule


class References:
    """Writes clean frames into a store, for windows to read and no pass to change.

    With a `reference_sigma` of the schedule they are read with so much noise, which belongs to the frame's number.
    """

    def __init__(
        self,
        store: FrameStore,
        schedule: Schedule,
        noise: NoiseSource,
        prompt_row: Callable[[int], int],
        anchor: np.ndarray,
    ) -> None:
        self.store = store
        self.schedule = schedule
        self.noise = noise
        self.prompt_row = prompt_row
        self.anchor = anchor
        """Its slots; none where there is no anchor."""

    def shown(self, clean: Tensor, numbers: Sequence[int] | range | np.ndarray) -> Tensor:
        """Clean frames `[n,C,H,W]` of these numbers as windows read them."""
        sigma = self.schedule.reference_sigma
        if not sigma or not len(numbers):
            return clean
        return (1 - sigma) * clean + sigma * self.noise(Purpose.REFERENCE, np.asarray(numbers, np.int64))

    def put(self, slots: np.ndarray, sample: Tensor, clean: Tensor, numbers: Sequence[int] | range) -> None:
        """Write frames that are clean and shown as `sample`, both `[n,C,H,W]`."""
        with self.store.changing():
            self.store.put(slots, sample, step_index=self.schedule.num_steps, numbers=numbers)
            self.store.x0[self.store.index(slots)] = clean
            self.store.prompt_row[slots] = [self.prompt_row(max(number, 0)) for number in numbers]

    def set_anchor(self, sample: Tensor, number: int) -> None:
        """Keep what `shown` gave of a frame `[1,C,H,W]` as the farthest guidance frame of windows of its prompt."""
        with self.store.changing():
            self.store.put(self.anchor, sample, step_index=self.schedule.num_steps, numbers=[number])
            self.store.prompt_row[self.anchor] = self.prompt_row(number)

    def newer_anchor(self, popped: np.ndarray) -> tuple[Tensor, int] | None:
        """What is to become the anchor, and its number, as these frames leave the queue: the first of another prompt,
        as predicted clean; None where the anchor stays."""
        if not len(self.anchor):
            return None
        is_other = self.store.prompt_row[popped] != self.store.prompt_row[self.anchor]
        if not is_other.any():
            return None
        first = popped[is_other][:1]
        number = int(self.store.frame_number[first[0]])
        return self.shown(self.store.x0[self.store.index(first)], [number]), number


def cat_clean(store: FrameStore, slots: np.ndarray, num_given: int) -> torch.Tensor:
    """Clean frames `[n,C,H,W]` of a clip that begins with given ones, which `sample` may hold with noise."""
    index = store.index(slots)
    return torch.cat([store.x0[index[:num_given]], store.sample[index[num_given:]]])
