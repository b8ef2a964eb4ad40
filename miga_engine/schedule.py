"""Noise levels, network timesteps and solver coefficients, one row per (step_index, history length).

Every solver here is linear in what a frame carries: one update form serves them all (`miga_engine.ops.sampler_update`):

    v  = v_u + guidance_scale·(v_c − v_u)
    m  = m_x·x + m_v·v                                     x0 prediction, from the uncorrected x
    xc = c_x·x + c_y·y + c_m·m + c_m1·m1 + c_m2·m2         corrector; y last corrected sample, m1, m2 older predictions
    x' = p_x·xc + p_v·v + p_m·m + p_m1·m1 + p_n·noise      predictor
    history: y ← xc, m2 ← m1, m1 ← m

step_index s counts completed steps: 0 is pure noise, num_steps is clean, for every solver. The history length h is the
number of consecutive earlier predictions a frame holds (0, 1, or 2 and more). Arithmetic is float64 (for flow models on
the float32 sigmas that the released samplers store); tables are handed out as float32.

Sources: UniPC (Zhao et al. 2023; B₂(h), order 2, x0 prediction), DPM-Solver++ 2M (Lu et al. 2022), DDIM (Song et al.
2021), flow matching with resolution shift (Esser et al. 2024), multistep sampling of consistency models (Song et al.
2023), which distribution matching distillation (Yin et al. 2024) samples by too.
"""

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from miga_engine.device import own_modes
from miga_engine.errors import ConfigError
from miga_engine.fields import descending

COLUMNS = ("m_x", "m_v", "c_x", "c_y", "c_m", "c_m1", "c_m2", "p_x", "p_v", "p_m", "p_m1", "p_n")
NUM_COEFFICIENTS = len(COLUMNS)
NUM_HISTORY_LENGTHS = 3

_SOLVER_NAMES = {
    "unipc": "unipc",
    "dpmpp_2m": "dpmpp_2m",
    "dpm++": "dpmpp_2m",
    "dpmpp": "dpmpp_2m",
    "euler": "euler",
    "lcm": "lcm",
    "dmd": "lcm",
    "ddim": "ddim",
}
_DDIM_TRAIN_STEPS = 1000
_DDIM_SCALE_STEPS = 400
_DDIM_SCALE_LAST = 0.7

CoefficientRow = dict[str, float]


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The update of one solver as data.

    rows [num_steps,3,12] float32: by step_index and history length, columns as in `COLUMNS`. A history longer than
    the steps behind a level cannot occur; such rows repeat the longest possible one, so every entry is finite.
    rows64: the same in float64, for oracles. alphas [num_steps + 1] float32: share of the clean sample at a step_index.
    """

    rows: Tensor
    rows64: Tensor
    alphas: Tensor
    solver: str
    prediction_type: str
    reference_sigma: float | None = None
    """Noise level of frames that are only read, where the network is to be told it."""


class Schedule(NamedTuple):
    """sigmas [T+1] float32 (last 0), timesteps [T] as the network embeds them (int64; of explicit levels float32), and
    the coefficient table."""

    sigmas: Tensor
    timesteps: Tensor
    coefficients: Coefficients

    @property
    def num_steps(self) -> int:
        return self.timesteps.shape[0]

    @property
    def reference_sigma(self) -> float | None:
        """Noise level of frames that are only read, where the network is to be told it."""
        return self.coefficients.reference_sigma

    @property
    def network_timesteps(self) -> Tensor:
        """[T], or [T+1] with that of `reference_sigma` behind: what the network is told of a clean frame."""
        if self.reference_sigma is None:
            return self.timesteps
        return torch.cat([self.timesteps.float(), torch.tensor([1000 * self.reference_sigma])])

    @property
    def alphas(self) -> Tensor:
        """[T+1] float32: x = alphas·x0 + sigmas·noise (1 − sigma for flow models, sqrt(alpha_bar) for DDIM)."""
        return self.coefficients.alphas

    def num_steps_from(self, timestep: float) -> int:
        """Steps whose timestep is this one or noisier, which is the first step_index below it."""
        return int((self.timesteps >= timestep).sum())

    @property
    def uses_noise(self) -> bool:
        """Whether any step adds fresh noise, so that `sampler_update` needs its `noise`."""
        return bool((self.coefficients.rows[..., COLUMNS.index("p_n")] != 0).any())


@own_modes()
def make_schedule(
    solver: str = "unipc",
    num_steps: int = 54,
    shift: float = 5.0,
    *,
    eta: float = 1.0,
    use_scale_array: bool = False,
    prediction_type: str | None = None,
    sigmas: Sequence[float] | str | None = None,
    denoising_steps: Sequence[float] | str | None = None,
    reference_sigma: float | None = None,
) -> Schedule:
    """Tables of a solver: unipc | dpmpp_2m (dpm++, dpmpp) | euler | lcm (dmd) for flow models, ddim for VideoCrafter2.

    Flow: u evenly spaced from 0.999 (unipc) or 1 (the others) to 0, sigma = shift·u/(1 + (shift − 1)·u),
    x = (1 − σ)x0 + σε, v = ε − x0, timestep = trunc(1000σ). `eta` and `use_scale_array` concern DDIM only.
    Explicit levels, as few-step weights have them, take the place of `num_steps` evenly spaced ones: `sigmas` as they
    are, or `denoising_steps` u in thousandths, which `shift` warps as above; timestep = 1000σ, not truncated.
    `reference_sigma`: see `Coefficients`; flow only.
    DDIM: timesteps = round(linspace(0, 999, num_steps)) from the noisiest down, sigma = sqrt(1 − ᾱ), alpha = sqrt(ᾱ);
    prediction_type "epsilon" (default) or "v"; `shift` is not used. As in the releases ᾱ_prev at t = 0 is ᾱ itself, so
    the last step is an identity; sigmas[num_steps] is 0 by contract. `use_scale_array`: x0 is divided by the level's
    scale (1 → 0.7 over 400 timesteps) and multiplied by the next level's.
    """
    name = _SOLVER_NAMES.get(solver) if isinstance(solver, str) else None
    if name is None:
        raise ConfigError(f"solver {reprlib.repr(solver)} is unknown: choose one of {', '.join(_SOLVER_NAMES)}")
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps!r}: give a whole number of at least 1")
    allowed = ("epsilon", "v") if name == "ddim" else ("flow",)
    prediction = allowed[0] if prediction_type is None else prediction_type
    if prediction not in allowed:
        raise ConfigError(f"prediction_type {prediction!r} does not fit solver {name!r}: choose {' or '.join(allowed)}")
    lists = {"sigmas": (sigmas, 1), "denoising_steps": (denoising_steps, 1000)}
    given = {key: descending(key, value, most) for key, (value, most) in lists.items() if value is not None}
    if len(given) > (name != "ddim"):
        reason = "they belong to flow models, leave them out" if name == "ddim" else "keep one of the two"
        raise ConfigError(f"{' and '.join(given)} are given for solver {name!r}: {reason}")
    if name == "ddim" and reference_sigma is not None:
        raise ConfigError(
            f"reference_sigma is {reference_sigma:g} for solver 'ddim': it belongs to flow models, leave it out"
        )
    if name == "ddim":
        return _ddim_schedule(num_steps, eta, use_scale_array, prediction)
    if use_scale_array:
        raise ConfigError(f"use_scale_array is set for solver {name!r}: it belongs to ddim only, leave it off")
    if not (math.isfinite(shift) and shift > 0):
        raise ConfigError(f"shift is {shift}: give a positive number (Wan uses 5)")
    if "sigmas" in given:
        levels = torch.tensor([*given["sigmas"], 0.0], dtype=torch.float64)
        return _flow_schedule(name, levels, reference_sigma, is_explicit=True)
    if "denoising_steps" in given:
        u = torch.tensor([*given["denoising_steps"], 0.0], dtype=torch.float64) / 1000
        return _flow_schedule(name, _shifted(u, shift), reference_sigma, is_explicit=True)
    first = 0.999 if name == "unipc" else 1.0
    # start + k·step, as numpy.linspace rounds: torch.linspace differs in the last bit, and trunc() shows it.
    u = first + torch.arange(num_steps + 1, dtype=torch.float64) * (-first / num_steps)
    u[-1] = 0.0
    return _flow_schedule(name, _shifted(u, shift), reference_sigma, is_explicit=False)


def add_noise(schedule: Schedule, x0: Tensor, noise: Tensor, step_index: Tensor | int) -> Tensor:
    """alphas[s]·x0 + sigmas[s]·noise per frame: x0, noise [n,…] any float dtype, step_index [n] int64 or an int."""
    if isinstance(step_index, int):
        if not 0 <= step_index <= schedule.num_steps:
            raise ConfigError(f"step_index is {step_index}: give one between 0 and {schedule.num_steps} (clean)")
        step_index = torch.full((x0.shape[0],), step_index, dtype=torch.int64, device=x0.device)
    if noise.shape != x0.shape or step_index.shape != x0.shape[:1]:
        raise ConfigError(
            f"noise has shape {tuple(noise.shape)} and step_index {tuple(step_index.shape)}: "
            f"x0 of shape {tuple(x0.shape)} needs {tuple(x0.shape)} and {tuple(x0.shape[:1])}"
        )
    dtype = torch.promote_types(x0.dtype, torch.float32)
    index = step_index.to(x0.device)
    view = (-1,) + (1,) * (x0.ndim - 1)
    alpha, sigma = (t.to(x0.device, dtype)[index].view(view) for t in (schedule.alphas, schedule.sigmas))
    return (alpha * x0 + sigma * noise).to(x0.dtype)


def add_signal(schedule: Schedule, x0: Tensor, noise: Tensor, share: float) -> Tensor:
    """Noise `[n,…]` that carries a share of x0 (broadcastable to it), as a frame noised to that share would: share·x0 +
    (1 − share)·noise for flow models, share·x0 + √(1 − share²)·noise for DDIM."""
    is_flow = schedule.coefficients.prediction_type == "flow"
    return share * x0 + (1 - share if is_flow else math.sqrt(1 - share * share)) * noise


def _shifted(u: Tensor, shift: float) -> Tensor:
    return shift * u / (1 + (shift - 1) * u)


def _flow_schedule(solver: str, sigmas64: Tensor, reference_sigma: float | None, *, is_explicit: bool) -> Schedule:
    """Of levels `[T+1]` float64, the last 0."""
    sigmas = sigmas64.to(torch.float32)
    num_steps = len(sigmas) - 1
    if not (sigmas[:-1] > sigmas[1:]).all():
        remedy = "move the levels apart" if is_explicit else "lower num_steps"
        raise ConfigError(
            f"neighbouring sigmas of these {num_steps} steps are equal in float32: bring shift nearer to 1, or {remedy}"
        )
    timesteps = (sigmas64[:-1] * 1000).to(torch.float32 if is_explicit else torch.int64)
    rows64 = _fill_table(num_steps, sigmas.tolist(), _FLOW_ROWS[solver])
    return _assemble(sigmas, 1 - sigmas, timesteps, rows64, solver, "flow", reference_sigma)


def _ddim_schedule(num_steps: int, eta: float, use_scale_array: bool, prediction: str) -> Schedule:
    if not 2 <= num_steps <= _DDIM_TRAIN_STEPS:
        raise ConfigError(f"num_steps is {num_steps}: ddim needs between 2 and {_DDIM_TRAIN_STEPS}")
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta is {eta}: give a number between 0 (deterministic) and 1")
    timesteps = torch.linspace(0, _DDIM_TRAIN_STEPS - 1, num_steps, dtype=torch.float64).round().to(torch.int64).flip(0)
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), _DDIM_TRAIN_STEPS, dtype=torch.float64).square()
    alpha_bars = (1 - betas).cumprod(0)[timesteps]
    scale_ramp = torch.linspace(1.0, _DDIM_SCALE_LAST, _DDIM_SCALE_STEPS, dtype=torch.float64)
    scales = scale_ramp[timesteps.clamp(max=_DDIM_SCALE_STEPS - 1)] if use_scale_array else torch.ones_like(alpha_bars)
    # One level past the end repeats the last: the identity step at t = 0.
    levels = [(*pair,) for pair in zip(alpha_bars.tolist(), scales.tolist(), strict=True)]
    levels.append((levels[-1][0], scales[-1].item()))

    def coefficient_row(levels: Sequence[tuple[float, float]], step_index: int, history_length: int) -> CoefficientRow:
        return _ddim_row(levels[step_index], levels[step_index + 1], eta, prediction)

    rows64 = _fill_table(num_steps, levels, coefficient_row)
    clean = torch.ones(1, dtype=torch.float64)
    alphas = torch.cat((alpha_bars.sqrt(), clean)).to(torch.float32)
    sigmas = torch.cat(((1 - alpha_bars).sqrt(), 0 * clean)).to(torch.float32)
    return _assemble(sigmas, alphas, timesteps, rows64, "ddim", prediction)


def _assemble(
    sigmas: Tensor,
    alphas: Tensor,
    timesteps: Tensor,
    rows64: Tensor,
    solver: str,
    prediction_type: str,
    reference_sigma: float | None = None,
) -> Schedule:
    rows = rows64.to(torch.float32)
    return Schedule(sigmas, timesteps, Coefficients(rows, rows64, alphas, solver, prediction_type, reference_sigma))


def _fill_table(num_steps: int, levels: Sequence, row: Callable[[Sequence, int, int], CoefficientRow]) -> Tensor:
    """[num_steps,3,12] float64 from row(levels, step_index, history_length); columns left out are 0."""
    table = [
        [[row(levels, s, min(h, s)).get(column, 0.0) for column in COLUMNS] for h in range(NUM_HISTORY_LENGTHS)]
        for s in range(num_steps)
    ]
    return torch.tensor(table, dtype=torch.float64)


def _log_snr(sigma: float) -> float:
    """λ = ln(1 − σ) − ln σ; −inf at pure noise, +inf at clean."""
    if sigma >= 1:
        return -math.inf
    if sigma <= 0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma)


def _flow_x0(sigma: float) -> CoefficientRow:
    """m = x − σ·v, no corrector."""
    return {"m_x": 1.0, "m_v": -sigma, "c_x": 1.0}


def _euler_row(sigmas: Sequence[float], step_index: int, history_length: int) -> CoefficientRow:
    """x' = x + (σ_{s+1} − σ_s)·v."""
    sigma, sigma_next = sigmas[step_index : step_index + 2]
    return {**_flow_x0(sigma), "p_x": 1.0, "p_v": sigma_next - sigma}


def _lcm_row(sigmas: Sequence[float], step_index: int, history_length: int) -> CoefficientRow:
    """x' = (1 − σ_{s+1})·m + σ_{s+1}·noise: the prediction, noised anew to the next level."""
    sigma, sigma_next = sigmas[step_index : step_index + 2]
    return {**_flow_x0(sigma), "p_m": 1 - sigma_next, "p_n": sigma_next}


def _exponential_predictor(sigmas: Sequence[float], step_index: int, history_length: int) -> CoefficientRow:
    """x' = (σ'/σ)·xc − α'·φ·(m + (m − m1)/(2q)), φ = e^{−h} − 1, h = λ_{s+1} − λ_s, q = (λ_s − λ_{s−1})/h.

    First order without history and at the last step. UniPC's second-order predictor (bh2, ρ = ½) and DPM-Solver++ 2M
    are this same formula.
    """
    sigma, sigma_next = sigmas[step_index : step_index + 2]
    step = _log_snr(sigma_next) - _log_snr(sigma)
    weight = -(1 - sigma_next) * math.expm1(-step)
    row = {"p_x": sigma_next / sigma, "p_m": weight}
    if history_length >= 1 and step_index < len(sigmas) - 2:
        slope = 0.5 * weight * step / (_log_snr(sigma) - _log_snr(sigmas[step_index - 1]))
        row |= {"p_m": weight + slope, "p_m1": -slope}
    return row


def _dpmpp_row(sigmas: Sequence[float], step_index: int, history_length: int) -> CoefficientRow:
    return _flow_x0(sigmas[step_index]) | _exponential_predictor(sigmas, step_index, history_length)


def _unipc_row(sigmas: Sequence[float], step_index: int, history_length: int) -> CoefficientRow:
    predictor = _exponential_predictor(sigmas, step_index, history_length)
    corrector = _unipc_corrector(sigmas, step_index, history_length) if history_length else {}
    return _flow_x0(sigmas[step_index]) | corrector | predictor


def _unipc_corrector(sigmas: Sequence[float], step_index: int, history_length: int) -> CoefficientRow:
    """xc = (σ/σ₋)·y − α·φ·m1 − α·φ·(ρ₁·D + ρ₂·(m − m1)), D = (m2 − m1)/r, with the order of the frame's previous step.

    Order 1: ρ₁ = 0, ρ₂ = ½. Order 2: [[1,1], [r,1]]·ρ = (k/φ, 2(k/(−h) − ½)/φ), k = φ/(−h) − 1, r = (λ₋₋ − λ₋)/h.
    """
    sigma, sigma_last = sigmas[step_index], sigmas[step_index - 1]
    log_snr_last = _log_snr(sigma_last)
    step = _log_snr(sigma) - log_snr_last
    phi = math.expm1(-step)
    weight = -(1 - sigma) * phi
    rho_m, slope_m2 = 0.5, 0.0
    if history_length >= 2:
        ratio = (_log_snr(sigmas[step_index - 2]) - log_snr_last) / step
        k = phi / -step - 1
        b1, b2 = k / phi, 2 * (k / -step - 0.5) / phi
        rho_d = (b1 - b2) / (1 - ratio)
        rho_m, slope_m2 = b1 - rho_d, weight * rho_d / ratio
    return {
        "c_x": 0.0,
        "c_y": sigma / sigma_last,
        "c_m": weight * rho_m,
        "c_m1": weight * (1 - rho_m) - slope_m2,
        "c_m2": slope_m2,
    }


_FLOW_ROWS: dict[str, Callable[[Sequence[float], int, int], CoefficientRow]] = {
    "unipc": _unipc_row,
    "dpmpp_2m": _dpmpp_row,
    "euler": _euler_row,
    "lcm": _lcm_row,
}


def _ddim_row(
    level: tuple[float, float], level_next: tuple[float, float], eta: float, prediction: str
) -> CoefficientRow:
    """x' = scale'·√ᾱ'·m + √(1 − ᾱ' − s²)·e + s·noise, s = η·√((1 − ᾱ')/(1 − ᾱ)·(1 − ᾱ/ᾱ')); levels are (ᾱ, scale).

    epsilon: m = (x − √(1−ᾱ)·e)/√ᾱ/scale, e = v. "v": m = (√ᾱ·x − √(1−ᾱ)·v)/scale, e = √ᾱ·v + √(1−ᾱ)·x.
    """
    (alpha_bar, scale), (alpha_bar_next, scale_next) = level, level_next
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    spread = eta * math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))
    direction = math.sqrt(max(0.0, 1 - alpha_bar_next - spread * spread))
    if prediction == "epsilon":
        row = {"m_x": 1 / (alpha * scale), "m_v": -sigma / (alpha * scale), "p_v": direction}
    else:
        row = {"m_x": alpha / scale, "m_v": -sigma / scale, "p_x": sigma * direction, "p_v": alpha * direction}
    return row | {"c_x": 1.0, "p_m": scale_next * math.sqrt(alpha_bar_next), "p_n": spread}
