"""THE denoising pass: gather → forward → scatter → one fused update → commit.

Every stage and every method is this pass over other windows. All windows read the state before the pass (Jacobi), so
they are independent: they batch freely, are captured, and are shared out over ranks. `order="sequential"` lets later
windows see earlier commits, as the paper's pseudocode and parts of the release do, for parity tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from miga_engine import ops
from miga_engine.device import current_device, is_out_of_memory
from miga_engine.errors import DeviceError, NumericsError, SessionError
from miga_engine.noise import CounterNoise, FrameNoise, Purpose
from miga_engine.runtime.capture import BatchShape, CapturedForwards, is_worth_capturing
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.guidance import Guidance
from miga_engine.runtime.network import NEGATIVE_ROW, Batch, WindowNetwork
from miga_engine.runtime.ranks import Ranks
from miga_engine.schedule import Schedule


class NoiseSource(Protocol):
    """Where Gaussian noise comes from: `[n,C,H,W]` float32 for the given frames. Tests replay tapes through it."""

    def __call__(self, purpose: Purpose, frame_numbers: np.ndarray, *, series: int | np.ndarray = 0) -> Tensor: ...


class Window(NamedTuple):
    """One forward: the slots it reads, and the half-open range of positions whose update is committed.

    The first `num_past` positions are read by the conditional branch alone, as far as they are cleaner than the first
    committed one and of its prompt: the other reads noise there.
    """

    slots: np.ndarray
    commit_start: int
    commit_stop: int
    num_past: int = 0

    @property
    def committed(self) -> np.ndarray:
        return self.slots[self.commit_start : self.commit_stop]


class _Check(NamedTuple):
    """What is kept of a pass until it is known that its output was finite."""

    sums: Tensor  # [G,n], of the output of each branch and frame
    frames: np.ndarray  # [n] numbers of the latent frames
    steps: np.ndarray  # [n]
    lengths: list[int]  # frames of each window
    first_window: int


class Denoiser:
    """Runs passes over a FrameStore.

    `guidance_scale` None or 1 skips the unconditional branch; it, `guidance`, `guidance_scale_end` and
    `guidance_scale_low` are those of `guidance.Guidance`, and `boundary_step` that of `RunLayout`. `num_past` is the
    most that a window has: history guidance (arXiv 2502.06764) with one scale for history and prompt. `window_batch`
    windows go through the network together (twice that with guidance); where memory runs out it is halved, once
    reported through `emit`, and the batch repeated. `capture` replays small forwards as CUDA graphs. `ranks` shares the
    windows of a pass out over processes.
    """

    def __init__(
        self,
        network: WindowNetwork,
        store: FrameStore,
        schedule: Schedule,
        noise: NoiseSource,
        *,
        guidance_scale: float | None,
        guidance: str = "cfg",
        guidance_scale_end: float | None = None,
        guidance_scale_low: float | None = None,
        boundary_step: int | None = None,
        num_past: int = 0,
        window_batch: int = 1,
        order: str = "parallel",
        capture: bool = False,
        ranks: Ranks | None = None,
        emit: Callable[..., None] = lambda kind, **fields: None,
    ) -> None:
        self.network = network
        self.store = store
        self.noise = noise
        self.schedule = schedule
        self.guidance = Guidance(
            schedule, store.device, guidance, guidance_scale, guidance_scale_end, guidance_scale_low, boundary_step
        )
        self.boundary_step = boundary_step
        self.window_batch = window_batch
        self.order = order
        self.emit = emit
        self.ranks = ranks
        self.num_forwards = 0
        self._parts_done = 0
        self._checks: list[_Check] = []
        self._num_branches = 2 if self.guidance.is_on else 1
        self._blanks: Tensor | None = None
        if num_past and self.guidance.is_on:
            self._blanks = store.sample.new_empty(window_batch * num_past, *store.frame_shape)
        self._coefficients = schedule.coefficients.rows.to(store.device)
        self._timesteps = schedule.network_timesteps.to(store.device)
        # No pass commits more frames than there are slots; what else a batch computes lands in the last place.
        num_outputs = store.capacity + store.scratch + 1
        self._outputs = store.sample.new_empty(self._num_branches, num_outputs, *store.frame_shape)
        self._share_windows = window_batch  # what ranks share out; unlike window_batch it never changes
        self._graphs = CapturedForwards(store.device, emit) if capture and store.device.type == "cuda" else None

    def run(self, windows: Sequence[Window], *, noise_series: int = 0, then: Callable[[], None] = lambda: None) -> None:
        """Advance every committed frame of `windows` by one step.

        `noise_series` separates the noise of a stochastic solver between stages that visit the same level twice.
        `then` notes that the pass is done, as one with its last update: broken off anywhere, the pass is either still
        to do or done, and so is each window of a sequential one.
        """
        parts = [[window] for window in windows] if self.order == "sequential" else [windows] if windows else []
        if not parts:
            then()
        with current_device(self.store.device):
            for number in range(self._parts_done, len(parts)):
                slots = np.concatenate([window.committed for window in parts[number]])
                self._forward_all(parts[number])
                self._note_finite(parts[number], slots, first_window=number)
                update = self._prepared_update(slots, noise_series)
                with self.store.changing():
                    update()
                    self._parts_done = (number + 1) % len(parts)
                    if number + 1 == len(parts):
                        then()

    def forget_parts(self) -> None:
        """Begin the next pass at its first window, whatever an earlier one left."""
        self._parts_done = 0

    def forget_graphs(self) -> None:
        """Capture forwards anew: what they read lies elsewhere."""
        if self._graphs is not None:
            self._graphs.clear()

    def progress(self) -> dict[str, int]:
        """What a resumed run must know beside its frames."""
        return {
            "num_forwards": self.num_forwards,
            "parts_done": self._parts_done,
            "window_batch": self.window_batch,
            "share_windows": self._share_windows,
        }

    def load_progress(self, numbers: Mapping[str, int]) -> None:
        self.num_forwards, self._parts_done = numbers["num_forwards"], numbers["parts_done"]
        self.window_batch, self._share_windows = numbers["window_batch"], numbers["share_windows"]

    def check_finite(self) -> None:
        """NumericsError if the network gave NaN or infinity since the last call: one wait for the device."""
        checks = list(self._checks)
        if not checks or bool((is_finite := torch.cat([check.sums for check in checks], dim=1).isfinite()).all()):
            self._checks.clear()
            return
        self.store.is_intact = False
        worst = int((~is_finite).any(0).nonzero()[0])
        frame = np.concatenate([check.frames for check in checks])[worst]
        step = np.concatenate([check.steps for check in checks])[worst]
        window = np.concatenate([check.first_window + np.arange(len(check.lengths)) for check in checks]).repeat(
            np.concatenate([check.lengths for check in checks])
        )[worst]
        raise NumericsError(
            f"the network gave NaN or infinity for latent frame {frame} at step {step} (timestep "
            f"{self.schedule.timesteps[step]:g}, window {window} of its pass): try float32, another attention backend, "
            "or a lower guidance scale"
        )

    def _note_finite(self, windows: Sequence[Window], slots: np.ndarray, first_window: int) -> None:
        """Keep a number a frame on the device: NaN and infinity stay in a sum."""
        sums = self._outputs[:, : len(slots)].sum(dim=(2, 3, 4))
        lengths = [window.commit_stop - window.commit_start for window in windows]
        self._checks.append(
            _Check(sums, self.store.frame_number[slots], self.store.step_index[slots], lengths, first_window)
        )

    def _forward_all(self, windows: Sequence[Window]) -> None:
        """Model output of all committed frames, in the windows' order, to the beginning of `_outputs`."""
        bounds = np.cumsum([0] + [window.commit_stop - window.commit_start for window in windows])
        batches = _split(windows, self._share_windows, [self._expert(window) for window in windows])
        mine = range(len(batches)) if self.ranks is None else self.ranks.share(len(batches))
        for batch in batches[mine.start : mine.stop]:
            start = batch.start
            while start < batch.stop:
                part = range(start, min(start + self.window_batch, batch.stop))
                is_done = False
                try:
                    self._forward([windows[i] for i in part], int(bounds[start]))
                    is_done = True
                except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(part) == 1:
                        frames, (_, height, width) = len(windows[start].slots), self.store.frame_shape
                        raise DeviceError(
                            f"out of memory on {self.store.device} in the network, with one window of {frames} latent "
                            f"frames of {height}×{width}: choose a smaller picture or bfloat16, or free memory"
                        ) from error
                if is_done:
                    start = part.stop
                else:  # the error's traceback, which held the forward's tensors, is gone here
                    self._shrink(len(part))
        self.num_forwards += len(windows)
        if self.ranks is not None:
            self.ranks.exchange(self._outputs, [int(bounds[batch.start]) for batch in batches] + [int(bounds[-1])])

    def _expert(self, window: Window) -> int:
        """Which of a model's networks a window is for: that of what it commits."""
        if self.boundary_step is None:
            return 0
        return int(self.store.step_index[window.slots[window.commit_start]] >= self.boundary_step)

    def _shrink(self, too_many: int) -> None:
        """Halve `window_batch`, to below what did not fit; nothing computed so far is lost."""
        while self.window_batch >= too_many:
            self.window_batch //= 2
        self.emit("window_batch", window_batch=self.window_batch, reason="out of memory")
        self.forget_graphs()  # of batches that are too large now
        if self.store.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward(self, windows: Sequence[Window], first_output: int) -> None:
        """One batch through the network; its committed frames go to `_outputs`, from `first_output` on.

        Small batches on a GPU keep all frames, so that one graph serves whatever is committed; captured or not, for the
        same bits.
        """
        store, num_windows = self.store, len(windows)
        slots = np.stack([window.slots for window in windows])  # [B,F]
        _check_table("slot", slots, len(store.step_index))
        starts = np.array([[window.commit_start] for window in windows])
        lengths = np.array([[window.commit_stop] for window in windows]) - starts
        is_small = store.device.type == "cuda" and self.is_small(*slots.shape)
        if is_small:
            keep = np.arange(slots.shape[1])[None].repeat(num_windows, axis=0)  # [B,K]
        else:
            keep = starts + np.minimum(np.arange(lengths.max())[None], lengths - 1)
        place = keep - starts
        is_committed = (place >= 0) & (place < lengths) & (np.diff(keep, prepend=-1) != 0)
        target = np.where(is_committed, first_output + np.cumsum(lengths)[:, None] - lengths + place, -1)
        target[target < 0] = self._outputs.shape[1] - 1
        prompts = store.prompt_row[slots]
        _check_table("prompt row", prompts, self.network.num_prompts)
        prompts = self.network.place_prompts(prompts)
        has_prompt_per_frame = bool((prompts != prompts[:, :1]).any())
        blanks = self._draw_blanks(slots, starts, np.array([[window.num_past] for window in windows]))
        parts_branches = bool((blanks >= 0).any())
        expert = self._expert(windows[0])
        shape = BatchShape(num_windows, slots.shape[1], keep.shape[1], has_prompt_per_frame, parts_branches, expert)
        steps = np.minimum(store.step_index[slots], len(self._timesteps) - 1)
        _check_table("step", steps, len(self._timesteps))
        tables = store.index(np.concatenate([table.ravel() for table in (slots, steps, prompts, blanks, keep, target)]))
        if self.boundary_step is not None:
            self.network.prepare(expert)
        if is_small and self._graphs is not None:
            self._graphs.run(self._run_tables, tables, shape)
        else:
            self._run_tables(tables, shape)

    def _draw_blanks(self, slots: np.ndarray, starts: np.ndarray, num_past: np.ndarray) -> np.ndarray:
        """`[B,F]`: which of `_blanks` the unconditional branch reads at a position of the windows, −1 for none.

        Each is drawn anew in every pass, by the first committed frame, its step and the position: noise that stayed the
        same would push all frames in one direction.
        """
        blanks = np.full(slots.shape, -1)
        if self._blanks is None:
            return blanks
        steps, positions = self.store.step_index[slots], np.arange(slots.shape[1])
        first = np.take_along_axis(slots, starts, 1)
        is_past = (positions < num_past) & (steps > self.store.step_index[first])
        is_past &= self.store.prompt_row[slots] == self.store.prompt_row[first]
        blanks[is_past] = np.arange(is_past.sum())
        if is_past.any():
            numbers = np.broadcast_to(self.store.frame_number[first], slots.shape)[is_past]
            series = ((self.store.step_index[first] << 16) + positions)[is_past]
            self._blanks[: len(numbers)] = self.noise(Purpose.PAST, numbers, series=series)
        return blanks

    def is_small(self, num_windows: int, num_frames: int) -> bool:
        """Whether a forward of so many windows of so many frames is one that a GPU captures."""
        _, height, width = self.store.frame_shape
        return is_worth_capturing(self._num_branches * num_windows * num_frames * height * width)

    def _run_tables(self, tables: Tensor, shape: BatchShape) -> None:
        """Gather, forward and scatter, all of whose data are the tables and the state on the device."""
        windows, frames, kept = shape.windows, shape.frames, shape.kept
        per_frame, per_kept = windows * frames, windows * kept
        slots, steps, prompts, blanks, keep, target = tables.split([per_frame] * 4 + [per_kept] * 2)
        latents = self.store.sample.index_select(0, slots).view(windows, frames, *self.store.frame_shape)
        prompts, steps, keep = prompts.view(windows, frames), steps.view(windows, frames), keep.view(windows, kept)
        if not shape.has_prompt_per_frame:
            prompts = prompts[:, 0]
        if self._num_branches == 2:
            prompts = torch.cat([prompts, torch.full_like(prompts, NEGATIVE_ROW)])
        if self._blanks is not None and shape.parts_branches:  # the branches read different windows
            is_blank = (blanks >= 0).view(windows, frames, 1, 1, 1)
            noise = self._blanks.index_select(0, blanks.clamp(min=0)).view(latents.shape)
            latents = torch.cat([latents, torch.where(is_blank, noise, latents)])
            steps = torch.cat([steps, steps.masked_fill(is_blank.view(steps.shape), 0)])
            keep = keep.repeat(2, 1)
        output = self.network(
            Batch(
                latents.transpose(1, 2),
                self._timesteps.index_select(0, steps.flatten()).view(steps.shape),
                steps,
                prompts,
                keep,
                shape.expert,
            )
        )
        output = output.transpose(1, 2).reshape(self._num_branches, per_kept, *self.store.frame_shape)
        self._outputs.index_copy_(1, target, output.to(self._outputs.dtype))

    def _prepared_update(self, slots: np.ndarray, noise_series: int) -> Callable[[], None]:
        """The update of these frames, for which nothing is left to be made."""
        store, count = self.store, len(slots)
        steps = store.step_index[slots]
        _check_table("step", steps, self.schedule.num_steps)
        _check_table("history length", store.history_length[slots], self._coefficients.shape[1])
        noise: Tensor | FrameNoise | None = None
        if self.schedule.uses_noise:
            # The kernel draws counter-based noise itself; a tape is given as it is.
            draw = self.noise.undrawn if isinstance(self.noise, CounterNoise) else self.noise
            noise = draw(Purpose.SOLVER, store.frame_number[slots], series=(noise_series << 16) + steps)
        level_rows = self.guidance.level_rows(store.frame_number[slots], steps)
        index = store.index(np.concatenate([slots, steps, store.history_length[slots], level_rows])).view(4, count)
        history_length = np.minimum(store.history_length[slots] + 1, 2)
        cond = self._outputs[0, :count]
        uncond = self._outputs[1, :count] if self._num_branches == 2 else None
        weights = None
        if uncond is not None:
            weights = self.guidance.weights(store.sample, cond, uncond, slots=index[0], step_index=index[3])

        def update() -> None:
            ops.sampler_update(
                store.sample,
                store.last_sample,
                store.x0,
                store.x0_previous,
                cond,
                uncond,
                slots=index[0],
                coefficients=self._coefficients,
                step_index=index[1],
                history_length=index[2],
                guidance_scale=self.guidance.scale,
                guidance_weights=weights,
                noise=noise,
            )
            store.step_index[slots] = steps + 1
            store.history_length[slots] = history_length

        return update


def _check_table(name: str, table: np.ndarray, end: int) -> None:
    """SessionError unless all numbers lie in 0 … end − 1: on a GPU nobody else looks at them.

    A run's own plan keeps within them, what a damaged session file says may not.
    """
    if table.size and not (table.min() >= 0 and table.max() < end):
        worst = table.min() if table.min() < 0 else table.max()
        raise SessionError(
            f"the run names {name} {worst} where there are {end}: its session is damaged, resume from another copy"
        )


def _split(windows: Sequence[Window], limit: int, experts: Sequence[int] = ()) -> list[range]:
    """Runs of neighbouring windows of equal length for one network, at most `limit` together."""
    alike = [(len(window.slots), *experts[i : i + 1]) for i, window in enumerate(windows)]
    batches: list[range] = []
    for i in range(len(windows)):
        last = batches[-1] if batches else range(0)
        if len(last) in (0, limit) or alike[last.start] != alike[i]:
            batches.append(range(i, i + 1))
        else:
            batches[-1] = range(last.start, i + 1)
    return batches
