"""What the saved state of a run must be, checked before anything is built from it: a session file is a stranger's.

All integers of a state but the solver's history follow from a few counters, so that they are compared and not trusted:
no index out of them can lie outside a table, and no loop can run on one that does not come to an end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miga_engine.config import MAX_OPTION
from miga_engine.errors import SessionError
from miga_engine.prompts import MAX_FRAME
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.layout import RunLayout
from miga_engine.runtime.stages import DONE, FLUSH, JUDGE, POP, PUSH, QUEUE, SEED_CLIP, STAGE1, UNIFIED, WARMUP

_NEXT = {
    SEED_CLIP: (PUSH, QUEUE),
    WARMUP: (PUSH, QUEUE, JUDGE),
    STAGE1: (QUEUE, JUDGE, POP, UNIFIED),
    FLUSH: (UNIFIED,),
    DONE: (PUSH, QUEUE, UNIFIED),
}
_MOST_FRAMES = 2 * MAX_FRAME
_MOST_FORWARDS = _MOST_TICKS = 2**53


def check_run_state(
    layout: RunLayout,
    frame_shape: tuple[int, int, int],
    prompt_row: Callable[[int], int],
    uses_noise: bool,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    num_changes: int = 0,
) -> None:
    """SessionError unless `(tensors, numbers)` is what `VideoRun.state` may give of a run of this layout.

    `uses_noise`: whether the solver is stochastic; `frame_shape`, `prompt_row`: as of `VideoRun` once it has
    taken up its changes, of which there are `num_changes` at most. The content of the latents is free: it may be
    anything that a network can have made.
    """
    _Check(layout, uses_noise, numbers, num_changes).all_of(frame_shape, prompt_row, tensors)


def check_stream_state(
    numbers: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    frame_shape: tuple[int, int, int],
    picture_shape: tuple[int, int],
    num_prompts: int,
    num_video_frames: Callable[[int], int],
) -> None:
    """SessionError unless what a stream keeps beside its run fits it, and no frame is missing or there twice.

    `picture_shape` is (H, W) of the video, `num_video_frames` what a number of latent frames decodes to.
    """
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    lengths = {name: len(tensors[name]) for name in ("undecoded", "frames", "output_frames") if name in tensors}
    for name, length in lengths.items():
        shape = frame_shape if name == "undecoded" else (*picture_shape, 3)
        wanted[name] = (length, *shape), torch.float32 if name == "undecoded" else torch.uint8
    known = ("run/", "decoder/")
    check_tensors({name: tensor for name, tensor in tensors.items() if not name.startswith(known)}, wanted)
    num_decoded = numbers["run"]["emitted"] - lengths.get("undecoded", 0)
    made = num_video_frames(num_decoded) if num_decoded else 0
    out = numbers["num_frames_out"]
    if num_decoded < 0 or out + lengths.get("frames", 0) != made:
        raise _unfit("num_frames_out", out)
    _whole(numbers, "num_chunks", 0, out)
    if any(int(entry) >= num_prompts for entry in numbers["drift"]):
        raise _unfit("drift", sorted(numbers["drift"]))
    if any(entry >= num_prompts for entry in numbers["drift_warned"]):
        raise _unfit("drift_warned", numbers["drift_warned"])
    if (numbers["output"] is None) != ("output_frames" not in lengths):
        raise _unfit("output", numbers["output"])
    if numbers["output"] is not None and numbers["output"]["num_frames"] + lengths["output_frames"] != out:
        raise _unfit("output", numbers["output"]["num_frames"])


class _Check:
    def __init__(self, layout: RunLayout, uses_noise: bool, numbers: Mapping[str, Any], num_changes: int) -> None:
        self.layout, self.uses_noise = layout, uses_noise
        self.stage = _one_of(numbers, "stage", tuple(_NEXT))
        self.next = _one_of(numbers, "next", _NEXT[self.stage])
        self.head = _whole(numbers, "head", -_MOST_FRAMES, _MOST_FRAMES)
        self.tail = _whole(numbers, "tail", self.head, self.head + layout.capacity)
        self.has_parted = numbers.get("has_parted")
        self._check_end()  # before what follows from it
        self.num_passes = _whole(numbers, "num_passes", 0, _MOST_FRAMES)
        self.num_changes = _whole(numbers, "num_changes", 0, num_changes)
        _whole(numbers, "num_ticks", 0, _MOST_TICKS)
        self.num_still = layout.num_given if self.stage == SEED_CLIP else layout.num_still
        through = max(self.head, self.num_still)
        delivered = through if layout.num_frames is None else min(through, layout.num_frames)
        self.emitted = _whole(numbers, "emitted", 0, delivered)
        self.parts_done = _whole(numbers, "parts_done", 0, MAX_OPTION)
        self.done = self._levels(numbers)
        through = self.done[-1] if self.done else self.head
        self.first = min(self.emitted, through, layout.first_read(self.head))
        _whole(numbers, "first", self.first, self.first)
        _whole(numbers, "num_forwards", 0, _MOST_FORWARDS)
        batch = _whole(numbers, "share_windows", 1, layout.config.window_batch or MAX_OPTION)
        _whole(numbers, "window_batch", 1, batch)
        self._searches(numbers)

    def all_of(
        self, frame_shape: tuple[int, int, int], prompt_row: Callable[[int], int], tensors: Mapping[str, Tensor]
    ) -> None:
        layout = self.layout
        if self.tail - self.first > layout.capacity:
            raise _unfit("tail", self.tail)
        self._parting()
        groups = self._num_groups()
        first_head = layout.first_head if self.stage != SEED_CLIP else 0
        advances, self.passes_done = divmod(self.num_passes, layout.config.passes_per_advance)
        if self.head != first_head + advances * layout.config.zigzag_width:
            raise _unfit("num_passes", self.num_passes)
        passes = layout.unified_passes()
        again = [(level, frame) for level, done in enumerate(self.done) for frame in passes.read_again(done)]
        count, num_others = self.tail - self.first, layout.num_anchors + len(again)
        integers = self._integers(tensors, frame_shape, count + num_others)
        frames = np.arange(self.first, self.tail)
        known = frames >= 0 if self.stage == SEED_CLIP else np.ones(count, bool)  # before that: nothing is there yet
        expected_rows = np.array([prompt_row(max(int(frame), 0)) for frame in frames[known]], np.int64)
        self._equal("frame_number", integers["frame_number"][:count][known], frames[known])
        self._equal("prompt_row", integers["prompt_row"][:count][known], expected_rows)
        self._steps(frames, known, groups, integers["step_index"][:count])
        for name, most in (("history_length", 2), ("step_index", layout.num_steps)):
            if not ((integers[name] >= 0) & (integers[name] <= most)).all():
                raise _unfit(name, integers[name].tolist()[:8])
        if layout.num_anchors:
            for place in range(count, count + layout.num_anchors):
                self._anchor({name: int(values[place]) for name, values in integers.items()}, prompt_row)
        behind = {name: values[count + layout.num_anchors :] for name, values in integers.items()}
        for name, expected in (
            ("frame_number", [frame for _, frame in again]),
            ("prompt_row", [prompt_row(frame) for _, frame in again]),
            ("step_index", [layout.step_behind(level, frame) for level, frame in again]),
        ):
            self._equal(name, behind[name], np.array(expected, np.int64))

    @property
    def _is_ending(self) -> bool:
        return self.stage in (FLUSH, DONE)

    def _check_end(self) -> None:
        """A run that the end had not begun to shape has not come to the end that is asked for now."""
        if (self._is_ending or self.layout.has_parted(self.head)) and not self.has_parted:
            raise SessionError("the saved run has gone past the end that is asked for now: give a larger --num-frames")

    def _parting(self) -> None:
        """A run is at its end only where there is one, and where it has come there."""
        end, is_ending = self.layout.end, self._is_ending
        if self.has_parted and not (is_ending or self.layout.has_parted(self.head)):
            raise _unfit("has_parted", True)
        if is_ending and end is None:
            raise _unfit("stage", self.stage)
        if end is not None and (self.head >= end) != (self.stage == FLUSH) and self.stage != DONE:
            raise _unfit("head", self.head)
        if self.stage == DONE and self.emitted != self.layout.num_frames:
            raise _unfit("emitted", self.emitted)

    def _levels(self, numbers: Mapping[str, Any]) -> list[int]:
        done = numbers.get("unified")
        if not isinstance(done, list) or len(done) != self.layout.num_levels:
            raise _unfit("unified", done)
        most = self.layout.num_available(max(self.head, 0))
        for level in range(len(done)):
            most = _whole({"unified": done[level]}, "unified", 0, most)
        if self.stage == SEED_CLIP and any(done):
            raise _unfit("unified", done)
        if done and self.emitted > max(done[-1], self.num_still):
            raise _unfit("emitted", self.emitted)
        return done

    def _searches(self, numbers: Mapping[str, Any]) -> None:
        """At most one search a pass."""
        score = numbers.get("previous_score")
        if score is not None and not (isinstance(score, float | int) and math.isfinite(score) and abs(score) < 2):
            raise _unfit("previous_score", score)
        again = (1 + self.num_changes) * (self.layout.handoff_step + 1)  # of each queue that was grown
        passes = self.num_passes + again if self.layout.config.self_reflection else 0
        _whole(numbers, "num_searches", 0, passes)

    def _num_groups(self) -> int:
        """Groups of the queue; SessionError where the stage has other numbers of them."""
        layout, length = self.layout, self.tail - self.head
        if self.stage == SEED_CLIP:
            if length != (layout.num_given if self.next == PUSH else layout.window_frames):
                raise _unfit("tail", self.tail)
            return 0
        groups, rest = divmod(length, layout.config.zigzag_width)
        if self.stage == WARMUP:
            fits = layout.num_first_groups + (self.next != PUSH) <= groups <= layout.num_groups - 1
        elif self.stage == DONE and self.next == PUSH:  # all that was asked for was in the seed clip
            fits = groups == layout.num_first_groups and self.emitted <= layout.num_still
        else:
            fits = groups == layout.num_groups - (self.next == UNIFIED)
        if rest or not fits:
            raise _unfit("tail", self.tail)
        return groups

    def _steps(self, frames: np.ndarray, known: np.ndarray, groups: int, steps: np.ndarray) -> None:
        """The step index of every frame, but that of the seed clip, follows from the counters."""
        layout = self.layout
        if self.stage == SEED_CLIP:
            clip = steps[known]
            self._equal("step_index", clip[: layout.num_given], np.full(layout.num_given, layout.num_steps))
            clip = clip[layout.num_given :]
            if len(clip) and (clip[0] < 0 or clip[0] > layout.num_steps or (clip != clip[0]).any()):
                raise _unfit("step_index", clip.tolist()[:8])
            if self.parts_done:
                raise _unfit("parts_done", self.parts_done)
            return
        self.newest = lowest = self._lowest(steps)
        levels = sum((np.asarray(frames < done, np.int64) for done in self.done), np.zeros(len(frames), np.int64))
        expected = np.array([layout.step_before(level) for level in range(layout.num_levels + 1)], np.int64)[levels]
        expected[frames < layout.first_head] = layout.num_steps
        is_queued = frames >= self.head
        group = (frames - self.head) // layout.config.zigzag_width
        expected = np.where(is_queued, (groups - 1 - group) * layout.config.passes_per_advance + lowest, expected)
        if layout.num_still:  # and what stands before them
            expected[frames < layout.num_still] = layout.num_steps
        if any(np.array_equal(steps, expected + is_ahead) for is_ahead in self._parts_ahead(frames)):
            return
        raise _unfit("step_index", steps.tolist()[:8])

    def _lowest(self, steps: np.ndarray) -> int:
        """The step of the newest group of the queue."""
        apart = self.layout.config.passes_per_advance
        if self.next not in (QUEUE, JUDGE):
            return apart
        is_ahead = self.next == JUDGE
        if self.stage == WARMUP:  # how many passes of an advance are done is told by nothing else
            newest = int(steps[-1]) if len(steps) else 0
            return min(max(newest, is_ahead), apart - 1 + is_ahead) if apart > 1 else int(is_ahead)
        return self.passes_done + is_ahead

    def _parts_ahead(self, frames: np.ndarray) -> Iterator[np.ndarray]:
        """Which frames a sequential pass that was broken off has advanced already; several answers may be right."""
        none = np.zeros(len(frames), np.int64)
        if self.parts_done == 0:
            yield none
        elif self.layout.config.window_order == "sequential":
            for ranges in self._parts():
                if self.parts_done < len(ranges):
                    ahead = none.copy()
                    for start, stop in ranges[: self.parts_done]:
                        ahead[(frames >= start) & (frames < stop)] = 1
                    yield ahead

    def _parts(self) -> Iterator[list[tuple[int, int]]]:
        """The frames that each window of the pass at hand commits, in order."""
        layout = self.layout
        if self.next == QUEUE:
            num_passes = None if self.stage == WARMUP else self.num_passes
            plan = layout.queue_plan(self.head, self.tail, num_passes, self.newest)
            yield [(cut.commit_start, cut.commit_stop) for cut in plan]
        elif self.next == JUDGE:  # of a search, which begins anew
            yield [(0, 0)] * (self.parts_done + 1)
        elif self.next == UNIFIED:
            passes = layout.unified_passes()
            passes.done = list(self.done)
            blocks = passes.ready(layout.num_available(self.head))
            changed = [(layout.first_changed(block.commit_start), block.commit_stop) for block in blocks]
            num_stage2 = sum(level < layout.config.stage2_steps for level, *_ in blocks)
            for ranges in (changed[:num_stage2], changed[num_stage2:]) if self.uses_noise else (changed,):
                yield [(start, stop) for start, stop in ranges if start < stop]

    def _anchor(self, anchor: Mapping[str, int], prompt_row: Callable[[int], int]) -> None:
        has_clip = self.layout.config.warmup != "noise" or self.layout.num_given > 0
        if self.stage == SEED_CLIP or (self.head == 0 and not has_clip):
            fits = not any(anchor.values())
        else:
            fits = (
                0 <= anchor["frame_number"] <= max(self.head, self.layout.num_anchors - 1)
                and anchor["step_index"] == self.layout.num_steps
                and anchor["history_length"] == 0
                and anchor["prompt_row"] == prompt_row(anchor["frame_number"])
            )
        if not fits:
            raise _unfit("guidance_anchor", dict(anchor))

    def _integers(
        self, tensors: Mapping[str, Tensor], frame_shape: tuple[int, int, int], count: int
    ) -> dict[str, np.ndarray]:
        """The integers by name, once all tensors have the shape and dtype that a state has."""
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        wanted |= dict.fromkeys(FrameStore.TENSORS, ((count, *frame_shape), torch.float32))
        wanted |= dict.fromkeys(FrameStore.INTEGERS, ((count,), torch.int64))
        check_tensors(tensors, wanted)
        return {name: tensors[name].numpy() for name in FrameStore.INTEGERS}

    def _equal(self, name: str, saved: np.ndarray, expected: np.ndarray) -> None:
        if not np.array_equal(saved, expected):
            raise _unfit(name, saved.tolist()[:8])


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """SessionError unless there are just the wanted tensors, of the wanted shapes and dtypes."""
    if set(tensors) != set(wanted):
        raise _unfit("tensors", sorted(set(tensors) ^ set(wanted))[:3])
    for name, (shape, dtype) in wanted.items():
        if tuple(tensors[name].shape) != shape or tensors[name].dtype != dtype:
            raise _unfit(name, (tuple(tensors[name].shape), str(tensors[name].dtype)))


def _whole(numbers: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = numbers.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _unfit(name, value)
    return value


def _one_of(numbers: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    value = numbers.get(name)
    if not isinstance(value, str) or value not in choices:
        raise _unfit(name, value)
    return value


def _unfit(name: str, value: object) -> SessionError:
    return SessionError(f"the saved run does not fit its own options: {name} is {value!r:.200}")
