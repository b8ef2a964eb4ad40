"""Eager oracles of the ops: any device, any float dtype, float64 included. No validation, no dispatch."""

import torch
from torch import Tensor


def sampler_update(
    sample: Tensor,
    last_sample: Tensor,
    x0: Tensor,
    x0_previous: Tensor,
    velocity_cond: Tensor,
    velocity_uncond: Tensor | None,
    *,
    slots: Tensor,
    coefficients: Tensor,
    step_index: Tensor,
    history_length: Tensor,
    guidance_scale: float,
    noise: Tensor | None = None,
) -> None:
    """One solver step of n frames in place; formula in `miga_engine.schedule`, contract in `miga_engine.ops`.

    A term whose coefficient is 0 is left out rather than multiplied, so NaN in memory that a row does not use never
    spreads. Frames without a slot take part as copies of the first frame that has one: equal values written twice, no
    host sync.
    """
    count = slots.shape[0]
    if count == 0:
        return
    dtype = sample.dtype
    has_slot = slots >= 0
    source = torch.where(has_slot, torch.arange(count, device=slots.device), has_slot.to(torch.int8).argmax())
    is_used = has_slot[source]  # [n], all equal: False only if no frame has a slot
    slot = torch.where(is_used, slots[source], 0)
    steps = torch.where(is_used, step_index[source], 0)
    lengths = torch.where(is_used, history_length[source], 0).clamp(max=coefficients.shape[1] - 1)
    columns = coefficients[steps, lengths].to(dtype).view(count, -1, 1, 1, 1).unbind(1)
    m_x, m_v, c_x, c_y, c_m, c_m1, c_m2, p_x, p_v, p_m, p_m1, p_n = columns

    x, y, m1, m2 = (state[slot] for state in (sample, last_sample, x0, x0_previous))  # [n,C,H,W]
    v = velocity_cond[source].to(dtype)
    if velocity_uncond is not None:
        v_uncond = velocity_uncond[source].to(dtype)
        v = v_uncond + guidance_scale * (v - v_uncond)

    m = _term(m_x, x) + _term(m_v, v)
    corrected = _term(c_x, x) + _term(c_y, y) + _term(c_m, m) + _term(c_m1, m1) + _term(c_m2, m2)
    following = _term(p_x, corrected) + _term(p_v, v) + _term(p_m, m) + _term(p_m1, m1)
    if noise is not None:
        following = following + _term(p_n, noise[source].to(dtype))

    is_written = is_used.view(-1, 1, 1, 1)
    kept_m1 = torch.where(lengths.view(-1, 1, 1, 1) > 0, m1, 0)
    results = ((x0_previous, m2, kept_m1), (x0, m1, m), (last_sample, y, corrected), (sample, x, following))
    for state, old, new in results:
        state[slot] = torch.where(is_written, new, old)


def consistency_score(reference: Tensor, candidates: Tensor, channels: str = "mean") -> Tensor:
    """⟨mean û_E, mean û_R⟩ per candidate group, [k] in at least float32; contract in `miga_engine.ops`."""
    reference_mean = _frame_directions(reference, channels).mean(0)  # [P]
    return _frame_directions(candidates, channels).mean(1) @ reference_mean


def _term(coefficient: Tensor, value: Tensor) -> Tensor:
    return torch.where(coefficient == 0, 0, coefficient * value)


def _frame_directions(frames: Tensor, channels: str) -> Tensor:
    """[..., C,H,W] → unit vectors [..., P], P = H·W (channel mean) or C·H·W (all); the zero vector stays zero."""
    frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
    vectors = (frames.mean(-3) if channels == "mean" else frames).flatten(frames.ndim - 3)
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, 1)
