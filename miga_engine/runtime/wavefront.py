"""Stage 2 and refine as a wavefront: which blocks may run now, in integers only (docs/method.md §6)."""

from __future__ import annotations

from typing import NamedTuple

from miga_engine.runtime.window_plan import next_commit_stop


class Block(NamedTuple):
    """Frames `start … stop − 1` that a unified pass reads at its level, of which `commit_start … commit_stop − 1`
    advance. It reads those before `commit_start` as they were before an earlier block advanced them."""

    level: int
    start: int
    stop: int
    commit_start: int
    commit_stop: int


class UnifiedPasses:
    """Stage 2 and refine, over frames that all stand at the hand-off step.

    Level j is the j-th unified pass. `done[j]` is how far it has come: frames before it have finished level j.
    A block of level j may run as soon as level j − 1 has finished the frames its window reads, which yields exactly
    what passes over the whole video yield.
    """

    def __init__(
        self,
        stage2_steps: int,
        refine_steps: int,
        window: int,
        stride: int,
        moving_phase: bool,
        num_frames: int | None,
        commit_offset: int = 0,
    ) -> None:
        self.stage2_steps = stage2_steps
        self.num_levels = stage2_steps + refine_steps
        self.window = window
        self.stride = stride
        self.moving_phase = moving_phase
        self.num_frames = num_frames
        self.commit_offset = commit_offset
        self.done = [0] * self.num_levels

    def phase(self, level: int) -> int:
        """The refine pass counts its passes from 0 again."""
        number = level if level < self.stage2_steps else level - self.stage2_steps
        return number % self.stride if self.moving_phase else 0

    def read_again(self, done: int) -> range:
        """Of the `done` frames that a level has finished those that its next window still reads, as they were."""
        return range(0) if done == self.num_frames else range(max(done - self.commit_offset, 0), done)

    def ready(self, num_available: int) -> list[Block]:
        """The blocks that can run now, of `num_available` frames that have been handed over.

        At most one block a level, and none reads what another writes, so they form one pass.
        """
        blocks = []
        for level in range(self.num_levels):
            finished = num_available if level == 0 else self.done[level - 1]
            done = self.done[level]
            if done == self.num_frames:
                continue
            start = max(done - self.commit_offset, 0)
            stop = start + self.window if self.num_frames is None else min(start + self.window, self.num_frames)
            if stop <= finished:
                commit_stop = next_commit_stop(
                    start, self.num_frames, self.window, self.stride, self.phase(level), self.commit_offset
                )
                blocks.append(Block(level, start, stop, done, commit_stop))
        return blocks
