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
from miga_engine.runtime.denoise import Denoiser, NoiseSource
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.layout import RunLayout
from miga_engine.runtime.network import WindowNetwork
from miga_engine.runtime.ranks import Ranks
from miga_engine.runtime.references import References
from miga_engine.runtime.reflection import Reflection
from miga_engine.runtime.seeding import Seeding, Seeds
from miga_engine.runtime.tail import Tail
from miga_engine.schedule import Schedule

SEED_CLIP, WARMUP, STAGE1, FLUSH, DONE = "seed_clip", "warmup", "stage1", "flush", "done"
PUSH, QUEUE, JUDGE, POP, UNIFIED = "push", "queue", "judge", "pop", "unified"
"""What a tick does next; it moves on as one with the change of the state that it names."""
_COUNTERS = ("head", "tail", "num_passes", "num_ticks", "num_changes", "emitted")


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
        num_steps = schedule.num_steps
        self.layout = layout = RunLayout(config, num_steps, window_frames, num_frames, num_given, boundary_step)
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
            still = layout.num_still
            self.reflection = Reflection(self.denoiser, config, window_frames, self.stride, emit, anchor, still)
        self._seeding = Seeding(self.denoiser, layout, self.references)
        self.stage = SEED_CLIP
        self._next = PUSH
        self.num_ticks = self.num_changes = 0
        """What the run has done, and of what it was told, see `request.Change`, has taken up."""
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
        what_a_tick_does = {SEED_CLIP: self._denoise_seed_clip, WARMUP: self._fill_queue, STAGE1: self._advance_queue,
                            FLUSH: self._finish, DONE: lambda: None}  # fmt: skip
        what_a_tick_does[self.stage]()
        self.denoiser.check_finite()
        return self._take_clean()

    @property
    def is_between_ticks(self) -> bool:
        """Whether the run stands where a tick ends, and not in one that was interrupted; `num_ticks` tells which."""
        is_begun = self.stage == STAGE1 or (self.stage == WARMUP and self._passes_done > 0)
        if self.stage == SEED_CLIP:
            is_begun = 0 < self._seeding.num_steps_left < self.schedule.num_steps
        is_at_start = self._next == PUSH or (self._next == QUEUE and is_begun)
        return is_at_start and self._num_finished == self.emitted

    def change(self, changes: Callable[[], None], *, restarts: bool = False) -> None:
        """Between two ticks, take up what changes `prompt_row` or the scale of guidance, as one with what follows.

        `restarts`: the queue begins anew behind its head; what has left it stays. See `steering.can_restart`.
        """
        seeds = self._seeding.queue_anew(self.head, series=1 + self.num_changes) if restarts else None
        with self.store.changing():
            changes()
            self.num_changes += 1
            is_set = self.store.step_index[self.references.anchor] == self.schedule.num_steps
            slots = self._kept_slots(range(self.first_kept, self.tail), self.references.anchor[is_set])
            numbers = self.store.frame_number[slots].tolist()
            self.store.prompt_row[slots] = [self.prompt_row(max(number, 0)) for number in numbers]
            if seeds is not None:
                self._begin_queue(seeds)
                if self.reflection is not None:
                    self.reflection.previous_score = None

    @property
    def parts_next(self) -> bool:
        """Whether the next tick is the first that a longer run, or an endless one, may do otherwise."""
        if self.stage == SEED_CLIP:  # of which all that is asked for may be a part
            is_last = self._next == QUEUE and self._seeding.num_steps_left <= 1
            is_last |= self.layout.num_given == self.window_frames
            return is_last and self.num_frames is not None and self.num_frames <= self.layout.num_still
        next_head = self.head + self.config.zigzag_width
        is_popping = (self.num_passes + 1) % self.config.passes_per_advance == 0
        return self.stage == STAGE1 and is_popping and not self.has_parted and self.layout.has_parted(next_head)

    @property
    def has_parted(self) -> bool:
        """Whether the end of the run has begun to shape it: it can be finished from here, and not made longer."""
        return self.stage in (FLUSH, DONE) or self.layout.has_parted(self.head)

    def predicted(self) -> torch.Tensor | None:
        """The next frame to leave the run, `[C,H,W]` float32, as it is predicted clean; None before its first step."""
        slot = self.store.slots([min(self.emitted, self.tail - 1)])[0] if self.tail else 0
        return self.store.x0[slot].clone() if self.store.step_index[slot] else None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, numbers) that the following ticks depend on, beside what the run was made from.

        The tensors are those of `FrameStore` for the frames that are still needed, float32 `[n,C,H,W]` and int64
        `[n]`; the numbers go through JSON unchanged.
        """
        first = self.first_kept
        reflection = self.reflection
        numbers = {
            "stage": self.stage,
            "next": self._next,
            "has_parted": self.has_parted,
            "first": first,
            **{name: getattr(self, name) for name in _COUNTERS},
            "unified": list(self.unified.done),
            "previous_score": None if reflection is None else reflection.previous_score,
            "num_searches": 0 if reflection is None else reflection.num_searches,
            **self.denoiser.progress(),
        }
        return self.store.state(self._kept_slots(range(first, self.tail), self.references.anchor)), numbers

    def load_state(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from `state` of a run made alike, but for `num_frames` where that run had not parted from a longer.

        What comes out of a file is first to go through `run_state.check_run_state`.
        """
        self.unified.done = list(numbers["unified"])
        kept = self._kept_slots(range(numbers["first"], numbers["tail"]), self.references.anchor)
        self.store.load_state(kept, tensors)
        self.stage, self._next = numbers["stage"], numbers["next"]
        for name in _COUNTERS:
            setattr(self, name, numbers[name])
        if self.reflection is not None:
            self.reflection.previous_score = numbers["previous_score"]
            self.reflection.num_searches = numbers["num_searches"]
        self.denoiser.load_progress(numbers)

    @property
    def first_kept(self) -> int:
        """The first frame that what follows depends on."""
        return min(self.emitted, self._num_through, self.layout.first_read(self.head))

    def _kept_slots(self, frames: range, anchor: np.ndarray) -> np.ndarray:
        """Slots whose content a state holds: these frames, the anchor, and what the unified passes read again."""
        again = map(self.unified.read_again, self.unified.done)
        behind = [self.layout.slots_behind(level, frames) for level, frames in enumerate(again)]
        return np.concatenate([self.store.slots(frames), anchor, *behind])

    def _denoise_seed_clip(self) -> None:
        """An ordinary clip of `window_frames` frames, behind those that are given; clean, it starts the queue."""
        num_given = self.layout.num_given
        if self.config.warmup == "noise" and not num_given:
            self.stage = WARMUP  # which begins with its first group
            return
        if self._next == PUSH:
            noise, show_given = self._seeding.noise()
            with self.store.changing():
                show_given()
                self._push(range(num_given, self.window_frames), noise, then=QUEUE)
        if self._seeding.num_steps_left:
            self._seeding.step(then=self._count_tick)
        if not self._seeding.num_steps_left:
            self._seeding.first_queue(self._seeding.clip(), self._begin_queue)

    def _count_tick(self) -> None:
        self.num_ticks += 1

    def _begin_queue(self, seeds: Seeds) -> None:
        is_full = self.config.warmup == "copies"
        with self.store.changing():
            self._push(seeds.numbers, seeds.sample, step_index=seeds.steps, then=QUEUE if is_full else PUSH)
            self.store.x0[self.store.index(self.store.slots(seeds.numbers))] = seeds.clean
            self.head, self.stage = seeds.numbers.start, STAGE1 if is_full else WARMUP
            self.num_ticks += self.layout.num_given == self.window_frames  # of no steps: a tick of its own

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
                self._count_tick()

    def _queue_pass(self, stage: str, *, then: str) -> None:
        if self._next == QUEUE:
            num_passes = None if stage == WARMUP else self.num_passes
            cuts = self.layout.queue_windows(self.head, self.tail, num_passes, self._passes_done)
            windows = self.references.windows(cuts, self.layout)
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
            self.num_ticks += stage == WARMUP or not is_advance
            self._next = then if is_advance else QUEUE

    def _go_to(self, then: str) -> None:
        self._next = then

    def _push_noise(self, stage: str) -> None:
        numbers = range(self.tail, self.tail + self.config.zigzag_width)
        rows = np.array([self.prompt_row(number) for number in numbers])
        noise = self._tail_noise(Purpose.PUSH, np.asarray(numbers), rows, head=self.head)
        with self.store.changing():
            self._push(numbers, noise, then=QUEUE)
            self.stage = stage
            self.num_ticks += stage == STAGE1

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
        self._count_tick()

    @property
    def _num_through(self) -> int:
        """Frames that have been through all passes."""
        return self.unified.done[-1] if self.unified.num_levels else self.head

    @property
    def _num_finished(self) -> int:
        """Frames that are clean, still ones as soon as they are there, cut to the length asked for."""
        num_still = self.layout.num_given if self.stage == SEED_CLIP else self.layout.num_still
        finished = max(self._num_through, num_still)
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
