"""Guidance rules: how the network's two branches become the output that a step goes on with (docs/method.md §2).

Each latent frame has a noise level of its own, so each has its own scale, and whatever a rule measures it measures over
one latent frame. Every rule is linear in what a frame has: v = w_d·(v_c − v_u) + w_u·v_u + w_x·x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

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
        last = self.scale if scale_end is None else float(scale_end)
        low = self.scale if scale_low is None or boundary_step is None else float(scale_low)
        self.is_on = (self.scale, last, low) != (1.0, 1.0, 1.0)
        self._rule = RULES[rule]
        self._levels: Tensor | None = None
        if self.is_on and (rule != "cfg" or not self.scale == last == low):
            sigmas = schedule.sigmas[:-1].double()
            scales = last + (self.scale - last) * (sigmas - sigmas[-1]) / (sigmas[0] - sigmas[-1])
            if low != self.scale:
                scales[boundary_step:] = low
            rows, moves = schedule.coefficients.rows64[:, 0], torch.ones_like(sigmas)
            if schedule.coefficients.prediction_type == "flow":
                moves[0] = 0
            columns = Levels(scales, rows[:, COLUMNS.index("m_x")], rows[:, COLUMNS.index("m_v")], moves)
            self._levels = torch.stack(columns, 1).to(device)  # [T,4]

    def weights(
        self, sample: Tensor, velocity_cond: Tensor, velocity_uncond: Tensor, *, slots: Tensor, step_index: Tensor
    ) -> Tensor | None:
        """`guidance_weights` of `ops.sampler_update`, `[n,3]`; None where `scale` alone says it. Tensors as there."""
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
