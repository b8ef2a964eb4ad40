"""THE denoising pass: gather → forward → one fused update → commit.

Every stage and every method is this pass over other windows. All windows read the state before the pass (Jacobi),
so they are independent and batch freely; ``order="sequential"`` lets later windows see earlier commits, as the
paper's pseudocode and parts of the release do, for parity tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from miga_engine import ops
from miga_engine.noise import CounterNoise, FrameNoise, Purpose
from miga_engine.runtime.frame_queue import FrameStore
from miga_engine.schedule import Schedule

NEGATIVE_ROW = 0
"""Prompt row of the unconditional branch; prompts of the video are rows 1, 2, …"""


class Network(Protocol):
    """What the runtime asks of a model: latents [B,C,F,H,W], timesteps [B,F], prompt rows [B] or [B,F] → output."""

    def __call__(
        self, latents: torch.Tensor, timesteps: torch.Tensor, prompt_rows: torch.Tensor, /
    ) -> torch.Tensor: ...


class NoiseSource(Protocol):
    """Where Gaussian noise comes from: ``[n,C,H,W]`` float32 for the given frames. Tests replay tapes through it."""

    def __call__(
        self, purpose: Purpose, frame_numbers: np.ndarray, *, stream: int | np.ndarray = 0
    ) -> torch.Tensor: ...


class Window(NamedTuple):
    """One forward: the slots it reads, and the half-open range of positions whose update is committed."""

    slots: np.ndarray
    commit_start: int
    commit_stop: int

    @property
    def committed(self) -> np.ndarray:
        return self.slots[self.commit_start : self.commit_stop]


class Denoiser:
    """Runs passes over a FrameStore.

    ``network`` returns the model output in the schedule's prediction type; ``guidance_scale`` None or 1 skips the
    unconditional branch. ``window_batch`` windows go through the network together (twice that with guidance).
    """

    def __init__(
        self,
        network: Network,
        store: FrameStore,
        schedule: Schedule,
        noise: NoiseSource,
        *,
        guidance_scale: float | None,
        window_batch: int = 1,
        order: str = "parallel",
    ) -> None:
        self.network = network
        self.store = store
        self.noise = noise
        self.schedule = schedule
        self.guidance_scale = 1.0 if guidance_scale is None else float(guidance_scale)
        self.window_batch = window_batch
        self.order = order
        self.num_forwards = 0
        self._coefficients = schedule.coefficients.rows.to(store.device)
        self._timesteps = schedule.timesteps.to(store.device)

    def run(self, windows: Sequence[Window], *, solver_stream: int = 0) -> None:
        """Advance every committed frame of ``windows`` by one step.

        ``solver_stream`` separates the noise of a stochastic solver between stages that visit the same level twice.
        """
        outputs: list[tuple[np.ndarray, torch.Tensor, torch.Tensor | None]] = []
        for batch in self._batches(windows):
            outputs.extend(self._forward(batch))
            if self.order == "sequential":
                self._update(outputs, solver_stream)
                outputs.clear()
        if outputs:
            self._update(outputs, solver_stream)

    def _batches(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Neighbouring windows of equal length, at most ``window_batch`` together."""
        limit = 1 if self.order == "sequential" else self.window_batch
        batch: list[Window] = []
        for window in windows:
            if batch and (len(batch) == limit or len(window.slots) != len(batch[0].slots)):
                yield batch
                batch = []
            batch.append(window)
        if batch:
            yield batch

    def _forward(self, batch: list[Window]) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor | None]]:
        store = self.store
        slots = np.stack([window.slots for window in batch])  # [B, F]
        steps = np.minimum(store.step_index[slots], self.schedule.num_steps - 1)
        rows = store.prompt_row[slots]
        if (rows == rows[:, :1]).all():
            rows = rows[:, 0]
        latents = store.sample[store.index(slots)].transpose(1, 2)  # [B, C, F, H, W]
        timesteps = self._timesteps[store.index(steps)]
        if self.guidance_scale != 1.0:
            latents = torch.cat([latents, latents])
            timesteps = torch.cat([timesteps, timesteps])
            rows = np.concatenate([rows, np.full_like(rows, NEGATIVE_ROW)])
        output = self.network(latents, timesteps, store.index(rows)).transpose(1, 2)  # [B or 2B, F, C, H, W]
        self.num_forwards += len(batch)
        for i, window in enumerate(batch):
            kept = slice(window.commit_start, window.commit_stop)
            unconditional = output[len(batch) + i, kept] if self.guidance_scale != 1.0 else None
            yield window.committed, output[i, kept], unconditional

    def _update(self, outputs: list[tuple[np.ndarray, torch.Tensor, torch.Tensor | None]], solver_stream: int) -> None:
        store = self.store
        slots = np.concatenate([out[0] for out in outputs])
        conditional = torch.cat([out[1] for out in outputs])
        unconditional = None
        if self.guidance_scale != 1.0:
            unconditional = torch.cat([out[2] for out in outputs if out[2] is not None])
        steps = store.step_index[slots]
        noise: torch.Tensor | FrameNoise | None = None
        if self.schedule.uses_noise:
            # The kernel draws counter-based noise itself; a tape is given as it is.
            draw = self.noise.undrawn if isinstance(self.noise, CounterNoise) else self.noise
            noise = draw(Purpose.SOLVER, store.frame_number[slots], stream=(solver_stream << 16) + steps)
        ops.sampler_update(
            store.sample,
            store.last_sample,
            store.x0,
            store.x0_previous,
            conditional,
            unconditional,
            slots=store.index(slots),
            coefficients=self._coefficients,
            step_index=store.index(steps),
            history_length=store.index(store.history_length[slots]),
            guidance_scale=self.guidance_scale,
            noise=noise,
        )
        store.step_index[slots] += 1
        store.history_length[slots] = np.minimum(store.history_length[slots] + 1, 2)
