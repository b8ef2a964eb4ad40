"""How a queue begins: an ordinary clip, re-noised to the noisiest levels, one a group (docs/method.md §3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from miga_engine.noise import Purpose
from miga_engine.runtime.behind import NOISE_SERIES
from miga_engine.runtime.denoise import Denoiser, Window
from miga_engine.runtime.layout import RunLayout
from miga_engine.runtime.references import References
from miga_engine.schedule import add_noise


class Seeds(NamedTuple):
    """The frames of a queue that begins: their numbers, `[n,C,H,W]` as windows read them and clean, and their steps."""

    numbers: range
    sample: Tensor
    clean: Tensor
    steps: np.ndarray


class Seeding:
    """Denoises the seed clip, frames 0 … window_frames − 1, behind those that are given; makes queues of clips."""

    def __init__(self, denoiser: Denoiser, layout: RunLayout, references: References) -> None:
        self.denoiser = denoiser
        self.layout = layout
        self.references = references
        self.store = denoiser.store
        self._slots = self.store.slots(range(layout.window_frames))

    def noise(self) -> tuple[Tensor, Callable[[], None]]:
        """What the clip begins as, `[n,C,H,W]` of the frames that are not given; and what shows those that are."""
        given, fresh = range(self.layout.num_given), range(self.layout.num_given, self.layout.window_frames)
        index = self.store.index(self._slots[: given.stop])
        shown = self.references.shown(self.store.x0[index], given)

        def show() -> None:
            self.store.sample[index] = shown

        return self.denoiser.noise(Purpose.SEED_CLIP, np.asarray(fresh, np.int64)), show

    @property
    def num_steps_left(self) -> int:
        """Of the clip, once it is there."""
        return self.denoiser.schedule.num_steps - int(self.store.step_index[self._slots[-1]])

    def step(self, then: Callable[[], None]) -> None:
        """Advance the clip by one step; `then` notes it, as one with that."""
        num_given, count = self.layout.num_given, len(self._slots)
        window = Window(self._slots, num_given, count, self.layout.config.num_past(0, num_given))
        self.denoiser.run([window], noise_series=NOISE_SERIES["seed_clip"], then=then)

    def clip(self) -> Tensor:
        """The clip `[window_frames,C,H,W]`, once it is clean."""
        return self.references.clean(self._slots, self.layout.num_given)

    def first_queue(self, clip: Tensor, begin: Callable[[Seeds], None]) -> None:
        """Give `begin` the first queue, of a clean clip, of which frames that are to be shown stay as they are; and, as
        one with that, set the anchor and the frames that stand before the queue."""
        layout, head = self.layout, self.layout.first_head
        numbers = np.arange(head, head + layout.num_first_groups * layout.config.zigzag_width)
        sources = numbers.clip(0, layout.window_frames - 1)
        seeds = self._noised(clip[torch.from_numpy(sources).to(clip.device)], numbers, series=0)
        if layout.num_still:
            still = slice(0, layout.num_still - head)
            seeds.sample[still] = self.references.shown(seeds.clean[still], numbers[still])
            seeds.steps[still] = self.denoiser.schedule.num_steps
        anchor_numbers = self.references.anchor_numbers(range(layout.window_frames))
        first = self.store.index(np.asarray(anchor_numbers, dtype=np.int64))
        anchor = self.references.shown(clip[first], anchor_numbers)
        padding = range(head - layout.padding, head)
        before = clip[torch.from_numpy(np.asarray(padding, dtype=np.int64).clip(0, None)).to(clip.device)]
        with self.store.changing():
            if layout.config.guidance_anchor:
                self.references.set_anchor(anchor, anchor_numbers)
            self.references.put(self.store.slots(padding), before, before, padding)
            begin(seeds)

    def queue_anew(self, head: int, series: int) -> Seeds:
        """A queue grown anew behind frame `head`, of the frames there as they are predicted clean, the first alone
        where queues begin as copies. `series` tells its noise from that of the queues before."""
        numbers = np.arange(head, head + self.layout.num_first_groups * self.layout.config.zigzag_width)
        sources = np.full_like(numbers, head) if self.layout.config.warmup == "copies" else numbers
        return self._noised(self.store.x0[self.store.index(self.store.slots(sources))], numbers, series)

    def _noised(self, clean: Tensor, numbers: np.ndarray, series: int) -> Seeds:
        """Groups of frames a level apart, the last of them at the first level, or the next where one is yet to come."""
        config, count = self.layout.config, self.layout.num_first_groups
        last = 0 if config.warmup == "copies" else 1
        steps = np.arange(count - 1 + last, last - 1, -1).repeat(config.zigzag_width) * config.passes_per_advance
        noise = self.denoiser.noise(Purpose.WARMUP, numbers, series=series)
        sample = add_noise(self.denoiser.schedule, clean, noise, torch.from_numpy(steps))
        return Seeds(range(int(numbers[0]), int(numbers[-1]) + 1), sample, clean, steps)
