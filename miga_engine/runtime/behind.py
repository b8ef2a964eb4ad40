"""What happens to frames behind the queue: Stage 2 and refine, run as the wavefront has their blocks ready."""

from __future__ import annotations

import numpy as np
import torch

from miga_engine.noise import Purpose
from miga_engine.runtime.denoise import Denoiser, Window
from miga_engine.runtime.layout import RunLayout
from miga_engine.runtime.wavefront import Block
from miga_engine.schedule import add_noise

NOISE_SERIES = {"seed_clip": 0, "warmup": 1, "stage1": 2, "stage2": 3, "refine": 4}
"""Of the solver's noise: stages that visit the same (frame, step) twice must not draw the same."""


class BehindQueue:
    """Advances the frames that have left the queue; `passes` says how far each level has come."""

    def __init__(self, denoiser: Denoiser, layout: RunLayout) -> None:
        self.denoiser = denoiser
        self.layout = layout
        self.config = layout.config
        self.store = denoiser.store
        self.passes = layout.unified_passes()

    def advance(self, head: int) -> bool:
        """One pass over the blocks that are ready, at most one a level, behind a queue that begins with frame `head`;
        False where there is none."""
        blocks = self.passes.ready(self.layout.num_available(head))
        windows = [self._window(block) for block in blocks]
        if self.denoiser.schedule.uses_noise:
            num_stage2 = sum(level < self.config.stage2_steps for level, *_ in blocks)
            self._run(blocks[:num_stage2], windows[:num_stage2], "stage2")
            self._run(blocks[num_stage2:], windows[num_stage2:], "refine")
        else:
            self._run(blocks, windows, "stage2")
        return bool(blocks)

    def refine_noise(self, slots: np.ndarray) -> torch.Tensor:
        """The noise of `renoise`: it belongs to the frames' numbers."""
        if not len(slots):
            return self.store.sample[:0]
        return self.denoiser.noise(Purpose.REFINE, self.store.frame_number[slots])

    def renoise(self, slots: np.ndarray, noise: torch.Tensor) -> None:
        """Refine: noise clean latents to step T − refine_steps."""
        if not len(slots):
            return
        store, schedule = self.store, self.denoiser.schedule
        step = schedule.num_steps - self.config.refine_steps
        index = store.index(slots)
        store.sample[index] = add_noise(schedule, store.sample[index], noise, step)
        store.step_index[slots] = step
        store.history_length[slots] = 0

    def _window(self, block: Block) -> Window:
        """What a block reads and commits; nothing of given frames is committed, and of them alone nothing at all."""
        level, start, stop, first, commit_stop = block
        behind = self.layout.slots_behind(level, range(start, first))
        slots = np.concatenate([behind, self.store.slots(range(first, stop))])
        commit_start = min(self.layout.first_changed(first), commit_stop) - start
        return Window(slots, commit_start, commit_stop - start, self.config.num_past(0, commit_start))

    def _run(self, blocks: list[Block], windows: list[Window], stage: str) -> None:
        last = self.config.stage2_steps - 1 if self.config.refine_steps else None
        refined = [window.committed for (level, *_), window in zip(blocks, windows, strict=True) if level == last]
        noises = [self.refine_noise(slots) for slots in refined]

        def finish() -> None:
            for block in blocks:
                self.passes.done[block.level] = block.commit_stop
            for slots, noise in zip(refined, noises, strict=True):
                self.renoise(slots, noise)

        if self.passes.commit_offset:
            self._keep_behind(blocks)
        changing = [window for window in windows if len(window.committed)]
        self.denoiser.run(changing, noise_series=NOISE_SERIES[stage], then=finish)

    def _keep_behind(self, blocks: list[Block]) -> None:
        """Keep of the frames that these blocks will advance those that the next window of their level reads again."""
        with self.store.changing():
            for level, _, _, start, stop in blocks:
                again = [frame for frame in self.passes.read_again(stop) if frame >= start]
                self.store.copy(self.store.slots(again), self.layout.slots_behind(level, again))
