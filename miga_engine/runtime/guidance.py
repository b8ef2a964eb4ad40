"""Guidance rules: how the network's two branches become the output that a step goes on with (docs/method.md §2).

Each latent frame has a noise level of its own, so each has its own scale, and whatever a rule measures it measures over
one latent frame. Every rule is linear in what a frame has: v = w_d·(v_c − v_u) + w_u·v_u + w_x·x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from miga_engine import ops
from miga_engine.schedule import COLUMNS, Schedule

APG_RMS = 15 / 256
"""Root mean square to which `_apg` shortens the difference of two x0: the published norm of 15 over SDXL's latents of
65,536 values (arXiv 2410.02416; the default of public code), said so that it is the same at every size of frame."""


class Levels(NamedTuple):
    """What a rule knows of n frames, each `[n]`."""

    scale: Tensor
    m_x: Tensor  # x0 = m_x·x + m_v·v
    m_v: Tensor
    moves: Tensor  # 0 at the first step of a flow model, 1 elsewhere


Weights: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""w_d, w_u, w_x of n frames, each `[n]`."""

Measure: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Weights of x, v_c and v_u in a direction b → ⟨d,b⟩/‖b‖², 0 where b is 0, and mean d², of d = v_c − v_u; all `[n]`."""

Rule: TypeAlias = Callable[[Levels, Measure], Weights]


def _cfg(levels: Levels, measure: Measure) -> Weights:
    """v = v_u + w·d (Ho and Salimans 2022)."""
    one = torch.ones_like(levels.scale)
    return levels.scale, one, 0 * one


def _cfg_zero(levels: Levels, measure: Measure) -> Weights:
    """CFG-Zero* (arXiv 2503.18886): v = s·v_u + w·(v_c − s·v_u), s = ⟨v_c,v_u⟩/‖v_u‖²; v = 0 at a first step.

    With p = ⟨d,v_u⟩/‖v_u‖² s is 1 + p, which loses nothing where the branches are alike. Published code zeroes one step
    too; the velocity alone may be 0: an epsilon of 0 would say that the noise is the picture.
    """
    scale, one = levels.scale, torch.ones_like(levels.scale)
    share, _ = measure(0 * one, 0 * one, one)
    return levels.moves * scale, levels.moves * (1 + (1 - scale) * share), 0 * one


def _apg(levels: Levels, measure: Measure) -> Weights:
    """Adaptive projected guidance (arXiv 2410.02416): x0 = x0_c + (w − 1)·k·(δ − x0_c·⟨δ,x0_c⟩/‖x0_c‖²).

    δ = x0_c − x0_u = m_v·d, of which the part along x0_c is dropped (the paper's η = 0); k shortens δ to `APG_RMS`. No
    momentum (β = 0): it would be one more tensor that each frame carries.
    """
    scale, m_x, m_v, _ = levels
    share, square = measure(m_x, m_v, torch.zeros_like(m_v))
    push = (scale - 1) * (APG_RMS / (m_v.abs() * square.sqrt())).clamp(max=1)
    v_part = 1 - push * share * m_v
    return push + v_part, v_part, -push * share * m_x


RULES: dict[str, Rule] = {"cfg": _cfg, "cfg-zero": _cfg_zero, "apg": _apg}
"""By their name in `Request.guidance`."""


class Guidance:
    """The rule of a run over its schedule.

    scale: at the first step, None for no guidance; scale_end: at the last, None for the same; linear in sigma between.
    scale_low: from `boundary_step` on, None for the same as before it.
    `is_on`: whether there is an unconditional branch, which a scale of 1 throughout, with any rule, is not.
    While the run goes on, `changed` gives latent frames from one on another `scale`.
    """

    def __init__(
        self,
        schedule: Schedule,
        device: torch.device,
        rule: str,
        scale: float | None,
        scale_end: float | None,
        scale_low: float | None = None,
        boundary_step: int | None = None,
    ) -> None:
        self.scale = 1.0 if scale is None else float(scale)
        self._schedule, self._device, self._boundary_step = schedule, device, boundary_step
        self._scale_end = None if scale_end is None else float(scale_end)
        self._scale_low = None if scale_low is None or boundary_step is None else float(scale_low)
        last = self.scale if self._scale_end is None else self._scale_end
        low = self.scale if self._scale_low is None else self._scale_low
        self.is_on = (self.scale, last, low) != (1.0, 1.0, 1.0)
        self._rule = RULES[rule]
        self._scales: Mapping[int, float] = {0: self.scale}  # by the first latent frame that has it
        self._levels: Tensor | None = None  # [E·T,4], of each of the scales
        if self.is_on and (rule != "cfg" or not self.scale == last == low):
            self._levels = self._table([self.scale])

    def changed(self, scales: Mapping[int, float]) -> Callable[[], None]:
        """What gives latent frames these scales, each from one frame on up to the next that has another. All that can
        fail is done here."""
        merged = dict(sorted({**self._scales, **scales}.items()))
        table = self._table(merged.values())

        def change() -> None:
            self._scales, self._levels = merged, table

        return change

    def level_rows(self, frame_numbers: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Rows of the table of scales for latent frames at these steps, int64 `[n]`."""
        if len(self._scales) == 1:
            return steps
        entries = np.searchsorted(np.fromiter(self._scales, np.int64), frame_numbers, side="right") - 1
        return steps + self._schedule.num_steps * entries.clip(min=0)

    def _table(self, scales: Iterable[float]) -> Tensor:
        return torch.cat([self._levels_at(scale) for scale in scales]).to(self._device)

    def _levels_at(self, scale: float) -> Tensor:
        """`[T,4]`, the columns of `Levels`, of a run with this scale at its first step."""
        sigmas = self._schedule.sigmas[:-1].double()
        last = scale if self._scale_end is None else self._scale_end
        scales = last + (scale - last) * (sigmas - sigmas[-1]) / (sigmas[0] - sigmas[-1])
        if self._scale_low is not None and self._scale_low != scale:
            scales[self._boundary_step :] = self._scale_low
        rows, moves = self._schedule.coefficients.rows64[:, 0], torch.ones_like(sigmas)
        if self._schedule.coefficients.prediction_type == "flow":
            moves[0] = 0
        columns = Levels(scales, rows[:, COLUMNS.index("m_x")], rows[:, COLUMNS.index("m_v")], moves)
        return torch.stack(columns, 1)

    def weights(
        self, sample: Tensor, velocity_cond: Tensor, velocity_uncond: Tensor, *, slots: Tensor, step_index: Tensor
    ) -> Tensor | None:
        """`guidance_weights` of `ops.sampler_update`, `[n,3]`; None where `scale` alone says it. Tensors as there;
        `step_index` is `level_rows` of it, which are the steps themselves while there is one scale."""
        if self._levels is None:
            return None
        levels = Levels(*self._levels.index_select(0, step_index).to(sample.dtype).unbind(1))

        def measure(*direction: Tensor) -> tuple[Tensor, Tensor]:
            dots = ops.guidance_dots(
                sample, velocity_cond, velocity_uncond, slots=slots, direction=torch.stack(direction, 1)
            )
            along, square, difference = dots.unbind(1)
            return torch.where(square > 0, along / square, 0), difference / sample[0].numel()

        return torch.stack(self._rule(levels, measure), 1)
