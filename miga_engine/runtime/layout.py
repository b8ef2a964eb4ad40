"""Where the frames of a run lie, and when its end begins to shape it: integers only, from its options alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from miga_engine.config import MigaConfig
from miga_engine.runtime.wavefront import UnifiedPasses
from miga_engine.runtime.window_plan import guidance_indices, plan_windows


class Cut(NamedTuple):
    """A window of the queue before its guidance frames are chosen: it reads from frame `start` on, commits frames
    `commit_start … commit_stop − 1`, and reads nothing of the queue outside of `first … end − 1`."""

    first: int
    end: int
    start: int
    commit_start: int
    commit_stop: int


class QueueWindow(NamedTuple):
    """The frames that a window of the queue reads, by number, the first `num_guidance` of them for guidance alone, and
    the half-open range of positions that it commits."""

    frames: np.ndarray
    num_guidance: int
    commit_start: int
    commit_stop: int


class Reading(NamedTuple):
    """Windows that go through the network for each latent frame made, and the latent frames in them; both branches of
    guidance count once."""

    windows: float
    frames: float


@dataclass(frozen=True)
class RunLayout:
    """Where the frames of a run lie, in integers that follow from its options alone.

    `num_steps` of the schedule, `window_frames` that the network takes at once, `num_frames` latent frames to
    deliver, None = endless, `num_given` that the video begins with: they are clean from the beginning, and only read.
    `boundary_step` is the first that a second network denoises, None where there is one: no window of the queue reads
    frames on both sides of it.
    """

    config: MigaConfig
    num_steps: int
    window_frames: int
    num_frames: int | None
    num_given: int = 0
    boundary_step: int | None = None

    @property
    def end(self) -> int | None:
        """Frames of the unified passes: a request shorter than the clip the network was trained on is denoised as a
        full clip and cut afterwards."""
        return None if self.num_frames is None else max(self.num_frames, self.window_frames)

    @property
    def handoff_step(self) -> int:
        """Step at which a frame leaves the queue for the unified passes."""
        return self.num_steps - self.config.stage2_steps

    @property
    def num_groups(self) -> int:
        """Groups of the full queue, neighbours of which are `passes_per_advance` steps apart."""
        return self.handoff_step // self.config.passes_per_advance

    @property
    def num_levels(self) -> int:
        """Unified passes a frame goes through, those of refine included."""
        return self.config.stage2_steps + self.config.refine_steps

    def step_before(self, level: int) -> int:
        """Step of a frame that has so many of the `num_levels` unified passes behind it."""
        refined = level - self.config.stage2_steps
        if self.config.refine_steps and refined >= 0:
            return self.num_steps - self.config.refine_steps + refined
        return self.handoff_step + level

    def step_behind(self, level: int, frame: int) -> int:
        """Step of a frame before the pass of a level advances it, which one that is still never is."""
        return self.num_steps if frame < self.num_still else self.step_before(level)

    @cached_property
    def stride(self) -> int:
        """Frames between two windows of a pass."""
        return self.config.stride_of(self.window_frames)

    @cached_property
    def commit_offset(self) -> int:
        """First frames of a window that it only reads."""
        return self.config.commit_offset_of(self.window_frames)

    @property
    def padding(self) -> int:
        """Frames before the queue that its windows read."""
        if self.config.commit == "trailing":
            return self.window_frames - self.stride
        return self.commit_offset if self.config.past_context else 0

    def first_read(self, head: int) -> int:
        """The first frame that windows of a queue that begins with `head` read, guidance frames aside."""
        has_seed_clip = self.config.warmup != "noise" or self.num_given > 0
        return head - self.padding if has_seed_clip else max(head - self.padding, 0)

    @property
    def num_first_groups(self) -> int:
        """Groups of the first queue."""
        if self.config.warmup == "copies":
            return self.num_groups
        if self.config.warmup == "noise" and not self.num_given:
            return 0
        return min(self.window_frames // self.config.zigzag_width, self.num_groups - 1)

    @property
    def first_head(self) -> int:
        """Number of the frame at the head of the first queue; below 0 where it holds copies of frame 0."""
        if self.config.warmup != "copies":
            return 0
        return min(0, self.window_frames - self.num_first_groups * self.config.zigzag_width)

    @property
    def most_given(self) -> int:
        """Latent frames that a video may begin with: those of the seed clip that the first queue holds."""
        return min(self.window_frames, self.first_head + self.num_first_groups * self.config.zigzag_width)

    @property
    def num_still(self) -> int:
        """First frames that no pass changes once there is a queue: those given, and of `warmup` "clip" the seed clip's
        that the first queue holds."""
        return self.most_given if self.config.warmup == "clip" else self.num_given

    @property
    def capacity(self) -> int:
        """Slots of the ring: the queue, the wavefront behind it, and the padding."""
        width, window = self.config.zigzag_width, self.window_frames
        wavefront = self.num_levels * (window + self.stride) + window + width
        return width * (self.num_groups + 1) + wavefront + self.padding

    @property
    def num_remembered(self) -> int:
        """Frames in a row, back from the newest, of which any may be read once more."""
        return self.capacity + self.commit_offset

    @property
    def num_slots(self) -> int:
        """Of the ring and the scratch behind it."""
        return self.capacity + self.num_search_slots + self.num_anchors + self.num_levels * self.num_behind

    @property
    def num_search_slots(self) -> int:
        """Scratch slots of a reflection search: every candidate ends with judge_step groups."""
        config = self.config
        length = config.judge_step // config.passes_per_advance * config.zigzag_width
        return config.num_continuations * length if config.self_reflection else 0

    @property
    def num_anchors(self) -> int:
        """Scratch slots, behind those of the searches, that a state includes."""
        return self.config.anchor_frames if self.config.guidance_anchor else 0

    @property
    def num_behind(self) -> int:
        """Scratch slots of each unified pass, behind the anchors, for frames as they were before it advanced them: its
        next window still reads the last `commit_offset` of them."""
        return self.commit_offset + self.stride if self.commit_offset else 0

    def slots_behind(self, level: int, frames: Sequence[int]) -> np.ndarray:
        """Slots of frames as they were before a unified pass advanced them, see `num_behind`."""
        first = self.num_slots - (self.num_levels - level) * self.num_behind
        return first + np.asarray(frames, np.int64) % max(self.num_behind, 1)

    def queue_plan(self, head: int, tail: int, num_passes: int | None, newest: int = 0) -> list[Cut]:
        """How a pass cuts the queue `head … tail − 1` and the padding before it; still frames are not committed.

        `num_passes` of Stage 1 before it, None in warm-up; `newest` is the step of the newest group, of noise.
        """
        first = self.first_read(head)
        border = first if self.boundary_step is None else self._border(tail, newest)
        parts = [(first, border), (border, tail)] if max(first, head) < border < tail else [(first, tail)]
        cuts = [cut for part in parts for cut in self._cuts(*part, num_passes)]
        cuts = [cut._replace(commit_start=self.first_changed(max(cut.commit_start, head))) for cut in cuts]
        return [cut for cut in cuts if cut.commit_start < cut.commit_stop]

    def _border(self, tail: int, newest: int) -> int:
        """The first frame of the queue that has not come to `boundary_step`."""
        assert self.boundary_step is not None
        num_groups = -(-(self.boundary_step - newest) // self.config.passes_per_advance)
        return tail - max(num_groups, 0) * self.config.zigzag_width

    def _cuts(self, first: int, end: int, num_passes: int | None) -> list[Cut]:
        """The windows over the frames `first … end − 1`, of which none before `first` is read."""
        length, local = end - first, self.window_frames - self.config.guidance_frames
        if self.config.commit == "trailing":
            plan = plan_windows(length, self.window_frames, self.stride, 0, "trailing")
        else:
            if num_passes is None:
                phase = (length - local) % self.stride if length >= local else 0
            else:
                phase = num_passes % self.stride if self.config.moving_phase else 0
            plan = plan_windows(length, local, self.stride, phase, offset=self.commit_offset)
        return [Cut(first, end, first + start, first + begin, first + stop) for start, begin, stop in plan]

    def first_changed(self, frame: int) -> int:
        """The first frame from this one on that a pass may change: still ones, and what is before them, are read."""
        return max(frame, self.num_still) if self.num_still else frame

    def queue_windows(self, head: int, tail: int, num_passes: int | None, newest: int = 0) -> list[QueueWindow]:
        """The windows of a pass over the queue `head … tail − 1`, guidance frames included; the rest as above."""
        config, windows = self.config, []
        for first, end, start, commit_start, commit_stop in self.queue_plan(head, tail, num_passes, newest):
            guidance = guidance_indices(
                start - first, config.guidance_frames, config.zigzag_width, config.guidance_offset,
                config.guidance_spacing,
            )  # fmt: skip
            stop = min(start + self.window_frames - len(guidance), end)
            frames = np.array([*(first + index for index in guidance), *range(start, stop)], np.int64)
            offset = len(guidance) - start
            windows.append(QueueWindow(frames, len(guidance), commit_start + offset, commit_stop + offset))
        return windows

    def num_in_front(self, num_read: int, num_guidance: int) -> int:
        """Anchor frames that stand before a window that reads so many frames: where it has no guidance frames, whose
        places they would take, and there is room."""
        return self.num_anchors if not num_guidance and num_read + self.num_anchors <= self.window_frames else 0

    @cached_property
    def reading(self) -> Reading:
        """Of a long run between its beginning and its end, without searches.

        In so many passes as the cuts take to come back, each advance of the queue makes a group, and each level of the
        unified passes a window of every `stride` frames.
        """
        config, length = self.config, self.config.zigzag_width * self.num_groups
        head, num_passes = self.num_still + self.padding, self.stride if config.moving_phase else 1
        passes = [self.queue_windows(head, head + length, number) for number in range(num_passes)]
        in_queue = [
            len(window.frames) + self.num_in_front(len(window.frames), window.num_guidance)
            for windows in passes
            for window in windows
        ]
        num_made = num_passes * config.zigzag_width / config.passes_per_advance
        in_unified = self.num_levels / self.stride
        return Reading(
            len(in_queue) / num_made + in_unified, sum(in_queue) / num_made + in_unified * self.window_frames
        )

    def unified_passes(self) -> UnifiedPasses:
        """Stage 2 and refine, before their first pass."""
        config = self.config
        return UnifiedPasses(
            config.stage2_steps, config.refine_steps, self.window_frames, self.stride, config.moving_phase, self.end,
            self.commit_offset,
        )  # fmt: skip

    def num_available(self, head: int) -> int:
        """Frames that the unified passes may read, of a queue that has come so far."""
        return head if self.end is None else min(head, self.end)

    def has_parted(self, head: int) -> bool:
        """Whether the end has begun to shape a run whose queue has come so far. Until then it is a longer run.

        A unified window that ends at the head may commit up to `stride` frames, and no cut lies beyond the last
        window; frames beyond the last are not delivered.
        """
        return (
            self.end is not None
            and self.num_frames is not None
            and head > min(self.end - self.stride, self.num_frames - 1)
        )
