"""Frames that are only read: what a video begins with, and the anchor, the prompt's first frame (docs/method.md §2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from miga_engine.noise import Purpose
from miga_engine.runtime.denoise import NoiseSource, Window
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.layout import QueueWindow, RunLayout
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

    def clean(self, slots: np.ndarray, num_given: int) -> Tensor:
        """A clip `[n,C,H,W]` that is clean and begins with given frames, which `sample` may hold with noise."""
        index = self.store.index(slots)
        return torch.cat([self.store.x0[index[:num_given]], self.store.sample[index[num_given:]]])

    def put(self, slots: np.ndarray, sample: Tensor, clean: Tensor, numbers: Sequence[int] | range) -> None:
        """Write frames that are clean and shown as `sample`, both `[n,C,H,W]`."""
        with self.store.changing():
            self.store.put(slots, sample, step_index=self.schedule.num_steps, numbers=numbers)
            self.store.x0[self.store.index(slots)] = clean
            self.store.prompt_row[slots] = [self.prompt_row(max(number, 0)) for number in numbers]

    def anchor_numbers(self, frames: range) -> list[int]:
        """Of frames in a row the first of one prompt, as many as the anchor has, the last of them again where there are
        fewer."""
        row = self.prompt_row(frames.start)
        alike = [frame for frame in frames[: len(self.anchor)] if self.prompt_row(frame) == row]
        return [*alike, *alike[-1:] * (len(self.anchor) - len(alike))]

    def set_anchor(self, sample: Tensor, numbers: Sequence[int]) -> None:
        """Keep what `shown` gave of frames `[n,C,H,W]` as the farthest guidance frames of windows of their prompt."""
        with self.store.changing():
            self.store.put(self.anchor, sample, step_index=self.schedule.num_steps, numbers=numbers)
            self.store.prompt_row[self.anchor] = [self.prompt_row(max(number, 0)) for number in numbers]

    def newer_anchor(self, popped: range) -> tuple[Tensor, list[int]] | None:
        """What is to become the anchor, and its numbers, as these frames leave the queue: the first of another prompt,
        as predicted clean; None where the anchor stays."""
        if not len(self.anchor):
            return None
        row = int(self.store.prompt_row[self.anchor[0]])
        others = [number for number in popped if self.prompt_row(max(number, 0)) != row]
        if not others:
            return None
        numbers = self.anchor_numbers(range(others[0], popped.stop))
        return self.shown(self.store.x0[self.store.index(self.store.slots(numbers))], numbers), numbers

    def windows(self, cuts: Sequence[QueueWindow], layout: RunLayout) -> list[Window]:
        """The windows of a pass over the queue, the anchor in those that read it."""
        windows = []
        for frames, num_guidance, commit_start, commit_stop in cuts:
            most = layout.num_in_front(len(frames), num_guidance)
            slots, in_front = self.anchored(self.store.slots(frames), num_guidance, most)
            commit_start, commit_stop = commit_start + in_front, commit_stop + in_front
            num_past = layout.config.num_past(num_guidance + in_front, commit_start)
            windows.append(Window(slots, commit_start, commit_stop, num_past))
        return windows

    def anchored(self, slots: np.ndarray, num_guidance: int, num_in_front: int) -> tuple[np.ndarray, int]:
        """The slots of a window with the anchor in the place of its farthest guidance frames or, as `num_in_front` has
        it, before it; and how many frames that puts in front. Only where all frames are of its prompt."""
        count = len(self.anchor)
        if not count:
            return slots, 0
        if (self.store.prompt_row[slots[num_guidance:]] != self.store.prompt_row[self.anchor[:1]]).any():
            return slots, 0
        if num_guidance:
            return np.concatenate([self.anchor, slots[count:]]), 0
        is_there = np.isin(self.store.frame_number[self.anchor], self.store.frame_number[slots]).any()
        if is_there or not num_in_front:
            return slots, 0
        return np.concatenate([self.anchor, slots]), count
