"""The stages of a run: seed clip → warm-up → Stage 1 (zigzag queue) → Stage 2 and refine as a wavefront → clean.

Everything lives in one ring of latent frames and advances by one kind of pass (denoise.Denoiser). One `tick` is one
step of the seed clip, one warm-up pass, or one Stage-1 pass together with whatever unified windows became ready;
it returns the latent frames that became clean. Memory does not depend on the length of the video (docs/method.md §3,
§6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from miga_engine.config import MigaConfig
from miga_engine.errors import SessionError
from miga_engine.noise import Purpose
from miga_engine.runtime.behind import NOISE_SERIES, BehindQueue
from miga_engine.runtime.denoise import Denoiser, NoiseSource, Window
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.layout import RunLayout
from miga_engine.runtime.network import WindowNetwork
from miga_engine.runtime.ranks import Ranks
from miga_engine.runtime.references import References
from miga_engine.runtime.reflection import Reflection
from miga_engine.runtime.tail import Tail
from miga_engine.schedule import Schedule, add_noise

SEED_CLIP, WARMUP, STAGE1, FLUSH, DONE = "seed_clip", "warmup", "stage1", "flush", "done"
PUSH, QUEUE, JUDGE, POP, UNIFIED = "push", "queue", "judge", "pop", "unified"
"""What a tick does next; it moves on as one with the change of the state that it names."""


class CleanLatents(NamedTuple):
    """Finished latent frames `[n,C,H,W]` float32, the first of them number `first_frame` of the video."""

    first_frame: int
    latents: torch.Tensor


class VideoRun:
    """One endless or finite run over a network, as a sequence of ticks.

    schedule, config: how frames are denoised and how windows become a video.
    window_frames: latent frames the network takes at once (its native clip).
    frame_shape: `(C, H, W)` of a latent frame.
    num_frames: latent frames to deliver; None = endless.
    num_given: latent frames that the video begins with, and `given` these, clean, `[n,C,H,W]` float32; None in a run
    whose state is loaded. The first tick gives them as they are.
    boundary_step: see `RunLayout`.
    guidance_scale, guidance, guidance_scale_end, guidance_scale_low: see `guidance.Guidance`.
    prompt_row: maps a latent frame number to the prompt row the network is given for it.
    emit: receives events as `emit(kind, **fields)`.
    capture: replay forwards as CUDA graphs; without effect on CPUs.
    ranks: the processes that share the windows of each pass; None = this one alone.
    """

    def __init__(
        self,
        network: WindowNetwork,
        schedule: Schedule,
        config: MigaConfig,
        *,
        window_frames: int,
        frame_shape: tuple[int, int, int],
        noise: NoiseSource,
        num_frames: int | None,
        boundary_step: int | None = None,
        num_given: int = 0,
        given: torch.Tensor | None = None,
        guidance_scale: float | None,
        device: torch.device,
        prompt_row: Callable[[int], int] = lambda frame: 1,
        guidance: str = "cfg",
        guidance_scale_end: float | None = None,
        guidance_scale_low: float | None = None,
        emit: Callable[..., None] = lambda kind, **fields: None,
        capture: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        config.check(schedule.num_steps, window_frames)
        self.layout = layout = RunLayout(
            config, schedule.num_steps, window_frames, num_frames, num_given, boundary_step
        )
        self.schedule = schedule
        self.config = config
        self.window_frames = window_frames
        self.noise = noise
        self.prompt_row = prompt_row
        self.emit = emit
        self.num_frames = num_frames
        self.handoff_step, self.stride, self.padding = layout.handoff_step, layout.stride, layout.padding
        self.store = FrameStore(layout.capacity, frame_shape, device, scratch=layout.num_slots - layout.capacity)
        anchor = self.store.scratch_slots(layout.num_search_slots, layout.num_anchors)
        self.references = References(self.store, schedule, noise, prompt_row, anchor)
        self.denoiser = Denoiser(
            network, self.store, schedule, noise, guidance=guidance, guidance_scale=guidance_scale,
            guidance_scale_end=guidance_scale_end, guidance_scale_low=guidance_scale_low, boundary_step=boundary_step,
            num_past=config.num_past(config.guidance_frames, window_frames),
            window_batch=config.window_batch or 1, order=config.window_order, capture=capture, ranks=ranks, emit=emit,
        )  # fmt: skip
        self._behind = BehindQueue(self.denoiser, layout)
        self.unified = self._behind.passes
        self._tail_noise = Tail(self.store, schedule, noise, config.tail_signal)
        self.reflection = None
        if config.self_reflection:
            self.reflection = Reflection(self.denoiser, config, window_frames, self.stride, emit, anchor, num_given)
        self.stage = SEED_CLIP
        self._next = PUSH
        self._announced = ""
        self.head = 0
        self.tail = 0
        self.num_passes = 0
        self.emitted = 0
        self.newest: CleanLatents | None = None
        """What the last tick that gave any gave: nothing is lost where its caller was interrupted."""
        if given is not None:
            self.references.put(self.store.slots(range(num_given)), given, given, range(num_given))
            self.tail = num_given

    def __iter__(self) -> Iterator[CleanLatents]:
        while self.stage != DONE:
            clean = self.tick()
            if clean is not None:
                yield clean

    def tick(self) -> CleanLatents | None:
        """One unit of work; the latent frames that became clean by it, or None.

        Raises NumericsError where the network gave NaN or infinity; those frames never become clean. After any other
        error, an interrupt or one of `emit` included, the tick can be gone on with, here or where `state` was loaded;
        SessionError where it cannot, for a change of the state itself was broken off.
        """
        if not self.store.is_intact:
            raise SessionError(
                "the run stopped in the middle of an update and cannot go on: resume it from its last session file"
            )
        if self.tail < self.layout.num_given:
            raise SessionError("the run begins with frames that it was not given: give them, or load its state")
        if self._num_finished > self.emitted:  # by a tick that was interrupted just before its end
            self.denoiser.check_finite()
            return self._take_clean()
        if self.stage != self._announced:
            self._announced = self.stage
            self.emit("stage", stage=self.stage, head=self.head, tail=self.tail)
        what_a_tick_does = {
            SEED_CLIP: self._denoise_seed_clip,  # one step of an ordinary clip, which then starts the queue
            WARMUP: self._fill_queue,  # a group of noise into the queue and a pass over it, until it is full
            STAGE1: self._advance_queue,  # a pass over the queue, a group out of it and one into it; ready blocks
            FLUSH: self._finish,  # the blocks of Stage 2 and refine that are left
            DONE: lambda: None,
        }
        what_a_tick_does[self.stage]()
        self.denoiser.check_finite()
        return self._take_clean()

    @property
    def parts_next(self) -> bool:
        """Whether the next tick is the first that a longer run, or an endless one, may do otherwise."""
        next_head = self.head + self.config.zigzag_width
        is_popping = (self.num_passes + 1) % self.config.passes_per_advance == 0
        return self.stage == STAGE1 and is_popping and not self.has_parted and self.layout.has_parted(next_head)

    @property
    def has_parted(self) -> bool:
        """Whether the end of the run has begun to shape it: it can be finished from here, and not made longer."""
        return self.stage in (FLUSH, DONE) or self.layout.has_parted(self.head)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, numbers) that the following ticks depend on, beside what the run was made from.

        The tensors are those of `FrameStore` for the frames that are still needed, float32 `[n,C,H,W]` and int64
        `[n]`; the numbers go through JSON unchanged.
        """
        first = min(self.emitted, self._num_through, self.layout.first_read(self.head))
        reflection = self.reflection
        numbers = {
            "stage": self.stage,
            "next": self._next,
            "has_parted": self.has_parted,
            "head": self.head,
            "tail": self.tail,
            "first": first,
            "num_passes": self.num_passes,
            "emitted": self.emitted,
            "unified": list(self.unified.done),
            "previous_score": None if reflection is None else reflection.previous_score,
            "num_searches": 0 if reflection is None else reflection.num_searches,
            **self.denoiser.progress(),
        }
        return self.store.state(self._kept_slots(range(first, self.tail))), numbers

    def load_state(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from `state` of a run made alike, but for `num_frames` where that run had not parted from a longer.

        What comes out of a file is first to go through `run_state.check_run_state`.
        """
        self.unified.done = list(numbers["unified"])
        self.store.load_state(self._kept_slots(range(numbers["first"], numbers["tail"])), tensors)
        self.stage, self._next = numbers["stage"], numbers["next"]
        self.head, self.tail = numbers["head"], numbers["tail"]
        self.num_passes, self.emitted = numbers["num_passes"], numbers["emitted"]
        if self.reflection is not None:
            self.reflection.previous_score = numbers["previous_score"]
            self.reflection.num_searches = numbers["num_searches"]
        self.denoiser.load_progress(numbers)

    def _kept_slots(self, frames: range) -> np.ndarray:
        """Slots whose content a state holds: these frames, the anchor, and what the unified passes read again."""
        again = map(self.unified.read_again, self.unified.done)
        behind = [self.layout.slots_behind(level, frames) for level, frames in enumerate(again)]
        return np.concatenate([self.store.slots(frames), self.references.anchor, *behind])

    def _denoise_seed_clip(self) -> None:
        """An ordinary clip of `window_frames` frames, behind those that are given; clean, it starts the queue."""
        num_given, slots = self.layout.num_given, self.store.slots(range(self.window_frames))
        if self.config.warmup == "noise" and not num_given:
            self.stage = WARMUP  # which begins with its first group
            return
        if self._next == PUSH:
            given, fresh = range(num_given), range(num_given, self.window_frames)
            shown = self.references.shown(self.store.x0[self.store.index(slots[:num_given])], given)
            noise = self.noise(Purpose.SEED_CLIP, np.asarray(fresh, np.int64))
            with self.store.changing():
                self.store.sample[self.store.index(slots[:num_given])] = shown
                self._push(fresh, noise, then=QUEUE)
        if self.store.step_index[slots[-1]] < self.schedule.num_steps:
            window = Window(slots, num_given, len(slots), self.config.num_past(0, num_given))
            self.denoiser.run([window], noise_series=NOISE_SERIES[SEED_CLIP])
        if self.store.step_index[slots[-1]] == self.schedule.num_steps:
            self._start_queue(self.references.clean(slots, num_given))

    def _start_queue(self, clip: torch.Tensor) -> None:
        """Re-noise the seed clip to the noisiest levels, one a group of zigzag_width frames; what is given stays."""
        width, head, num_groups = self.config.zigzag_width, self.layout.first_head, self.layout.num_first_groups
        if self.config.warmup == "copies":
            steps = np.arange(num_groups - 1, -1, -1).repeat(width)
            stage, then = STAGE1, QUEUE
        else:
            steps = np.arange(num_groups, 0, -1).repeat(width)
            stage, then = WARMUP, PUSH
        steps *= self.config.passes_per_advance
        numbers = np.arange(head, head + num_groups * width)
        sources = torch.from_numpy(numbers.clip(0, self.window_frames - 1)).to(clip.device)
        noise = self.noise(Purpose.WARMUP, numbers)
        noised = add_noise(self.schedule, clip[sources], noise, torch.from_numpy(steps))
        if self.layout.num_given:
            still = slice(0, self.layout.num_given - head)
            noised[still] = self.references.shown(clip[sources[still]], numbers[still])
            steps[still] = self.schedule.num_steps
        anchor_numbers = self.references.anchor_numbers(range(self.window_frames))
        first = self.store.index(np.asarray(anchor_numbers, dtype=np.int64))
        anchor = self.references.shown(clip[first], anchor_numbers)
        padding = range(head - self.padding, head)
        before = clip[torch.from_numpy(np.asarray(padding, dtype=np.int64).clip(0, None)).to(clip.device)]
        with self.store.changing():
            if self.config.guidance_anchor:
                self.references.set_anchor(anchor, anchor_numbers)
            self.references.put(self.store.slots(padding), before, before, padding)
            self._push(range(head, head + num_groups * width), noised, step_index=steps, then=then)
            self.store.x0[self.store.index(self.store.slots(numbers))] = clip[sources]
            self.head, self.stage = head, stage

    def _fill_queue(self) -> None:
        """Push one group of noise; unless the queue now holds every level once, advance all of it by one step."""
        if self._next == PUSH:
            is_full = self.tail - self.head == self.config.zigzag_width * (self.layout.num_groups - 1)
            self._push_noise(STAGE1 if is_full else WARMUP)
            if is_full:
                return
        self._queue_pass(WARMUP, then=PUSH)

    @property
    def _passes_done(self) -> int:
        """Of the `passes_per_advance` passes over the queue that make an advance, those before the next."""
        if self.stage == STAGE1:
            return self.num_passes % self.config.passes_per_advance
        return int(self.store.step_index[self.store.slots([self.tail - 1])[0]]) - (self._next != QUEUE)

    def _advance_queue(self) -> None:
        """One pass over the queue, pop the head group, push a group of noise, and the unified windows now ready."""
        if self._next in (QUEUE, JUDGE):
            self._queue_pass(STAGE1, then=POP)
        if self._next == QUEUE:
            return
        if self._next == POP:
            self._pop_group()
        if self.stage == FLUSH:
            return
        while self._behind.advance(self.head):
            pass
        self._push_noise(STAGE1)

    def _pop_group(self) -> None:
        """Hand the cleanest group of the queue over to the unified passes."""
        frames = range(self.head, self.head + self.config.zigzag_width)
        popped = self.store.slots(frames)
        is_refined = self.unified.num_levels and self.unified.stage2_steps == 0
        refined = self.store.slots(range(self.layout.first_changed(frames.start), frames.stop) if is_refined else ())
        noise = self._behind.refine_noise(refined)
        anchor = self.references.newer_anchor(frames)
        with self.store.changing():
            if anchor is not None:  # another prompt has come through
                self.references.set_anchor(*anchor)
            self.store.history_length[popped] = 0
            self._behind.renoise(refined, noise)
            self.num_passes += 1
            self.head += self.config.zigzag_width
            self._next = UNIFIED
            if self.unified.num_frames is not None and self.head >= self.unified.num_frames:
                self.stage = FLUSH

    def _queue_pass(self, stage: str, *, then: str) -> None:
        if self._next == QUEUE:
            windows = self._queue_windows(None if stage == WARMUP else self.num_passes)
            self.denoiser.run(windows, noise_series=NOISE_SERIES[stage], then=lambda: self._go_to(JUDGE))
        if self.reflection is None:
            self._end_pass(stage, then)
        else:
            self.reflection.after_pass(self.head, self.tail, then=lambda: self._end_pass(stage, then))

    def _end_pass(self, stage: str, then: str) -> None:
        """On to what follows an advance, or to its next pass."""
        is_advance = self._passes_done + 1 == self.config.passes_per_advance
        with self.store.changing():
            self.num_passes += stage == STAGE1 and not is_advance
            self._next = then if is_advance else QUEUE

    def _go_to(self, then: str) -> None:
        self._next = then

    def _queue_windows(self, num_passes: int | None) -> list[Window]:
        windows = []
        for frames, num_guidance, commit_start, commit_stop in self.layout.queue_windows(
            self.head, self.tail, num_passes, self._passes_done
        ):
            most = self.layout.num_in_front(len(frames), num_guidance)
            slots, in_front = self.references.anchored(self.store.slots(frames), num_guidance, most)
            commit_start, commit_stop = commit_start + in_front, commit_stop + in_front
            num_past = self.config.num_past(num_guidance + in_front, commit_start)
            windows.append(Window(slots, commit_start, commit_stop, num_past))
        return windows

    def _push_noise(self, stage: str) -> None:
        numbers = range(self.tail, self.tail + self.config.zigzag_width)
        rows = np.array([self.prompt_row(number) for number in numbers])
        noise = self._tail_noise(Purpose.PUSH, np.asarray(numbers), rows, head=self.head)
        with self.store.changing():
            self._push(numbers, noise, then=QUEUE)
            self.stage = stage

    def _push(self, numbers: range, sample: torch.Tensor, step_index: int | np.ndarray = 0, *, then: str) -> None:
        slots = self.store.slots(numbers)
        prompt_rows = [self.prompt_row(max(number, 0)) for number in numbers]
        with self.store.changing():
            self.store.put(slots, sample, step_index=step_index, numbers=numbers)
            self.store.prompt_row[slots] = prompt_rows
            self.tail, self._next = numbers.stop, then

    def _finish(self) -> None:
        """The unified blocks that are ready; the run is done where there are none."""
        if not self._behind.advance(self.head):
            self.stage = DONE

    @property
    def _num_through(self) -> int:
        """Frames that have been through all passes."""
        return self.unified.done[-1] if self.unified.num_levels else self.head

    @property
    def _num_finished(self) -> int:
        """Frames that are clean, the given ones from the beginning, cut to the length asked for."""
        through = 0 if self.stage in (SEED_CLIP, WARMUP) else self._num_through
        finished = max(through, self.layout.num_given)
        return finished if self.num_frames is None else min(finished, self.num_frames)

    def _take_clean(self) -> CleanLatents | None:
        """Frames that finished the last level since the previous tick."""
        first, finished = self.emitted, self._num_finished
        if finished <= first:
            return None
        index = self.store.index(self.store.slots(range(first, finished)))
        clean = CleanLatents(first, self.store.sample[index])
        with self.store.changing():
            self.newest, self.emitted = clean, finished
            if finished == self.num_frames:
                self.stage = DONE
        return clean
