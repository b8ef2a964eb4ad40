"""What a frame begins as that enters the queue: noise, with a share of what the queue shows (docs/method.md §2)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from miga_engine.device import to_device
from miga_engine.noise import Purpose
from miga_engine.runtime.denoise import NoiseSource
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.schedule import Schedule, add_signal


class Tail:
    """Draws new frames; `share` is `MigaConfig.tail_signal`, and 0 gives the noise alone."""

    def __init__(self, store: FrameStore, schedule: Schedule, noise: NoiseSource, share: float) -> None:
        self.store = store
        self.schedule = schedule
        self.noise = noise
        self.share = share

    def __call__(
        self, purpose: Purpose, numbers: np.ndarray, prompt_rows: np.ndarray, *, head: int, series: int = 0
    ) -> Tensor:
        """`[n,C,H,W]` float32 for the frames `numbers` of these prompts, behind a queue that begins with frame `head`.

        The signal is the head as predicted clean: it is the cleanest frame of the queue. A frame of another prompt
        than the head's begins as noise.
        """
        noise = self.noise(purpose, numbers, series=series)
        slot = self.store.slots([head])
        is_alike = prompt_rows == self.store.prompt_row[slot]
        if self.share == 0 or not is_alike.any():
            return noise
        mixed = add_signal(self.schedule, self.store.x0[self.store.index(slot)], noise, self.share)
        if is_alike.all():
            return mixed
        chosen = to_device(torch.from_numpy(is_alike), noise.device)
        return torch.where(chosen.view(-1, 1, 1, 1), mixed, noise)
