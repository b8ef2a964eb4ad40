"""Eager oracles of the ops: any device, any float dtype, float64 included. No validation, no dispatch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.noise import FrameNoise
from miga_engine.schedule import COLUMNS


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
    noise_counters: Tensor | None = None,
    noise_seed: int = 0,
) -> None:
    """One solver step of n frames in place; formula in `miga_engine.schedule`, contract in `miga_engine.ops`.

    A term whose coefficient is 0 is left out rather than multiplied, so NaN in memory that a row does not use never
    spreads. Frames without a slot take part as copies of the first frame that has one: equal values written twice, no
    host sync.
    """
    count = slots.shape[0]
    if count == 0:
        return
    if noise_counters is not None:
        noise = FrameNoise(noise_seed, noise_counters).draw(tuple(sample.shape[1:]))
    dtype = sample.dtype
    has_slot = slots >= 0
    source = torch.where(has_slot, torch.arange(count, device=slots.device), has_slot.to(torch.int8).argmax())
    is_used = has_slot[source]  # [n], all equal: False only if no frame has a slot
    slot = torch.where(is_used, slots[source], 0)
    steps = torch.where(is_used, step_index[source], 0)
    lengths = torch.where(is_used, history_length[source], 0).clamp(max=coefficients.shape[1] - 1)
    columns = coefficients[steps, lengths].to(dtype).view(count, -1, 1, 1, 1).unbind(1)
    weights = dict(zip(COLUMNS, columns, strict=True))

    def term(column: str, value: Tensor) -> Tensor:
        weight = weights[column]
        return torch.where(weight == 0, 0, weight * value)

    x, y, m1, m2 = (state[slot] for state in (sample, last_sample, x0, x0_previous))  # [n,C,H,W]
    v = velocity_cond[source].to(dtype)
    if velocity_uncond is not None:
        v_uncond = velocity_uncond[source].to(dtype)
        v = v_uncond + guidance_scale * (v - v_uncond)

    m = term("m_x", x) + term("m_v", v)
    corrected = term("c_x", x) + term("c_y", y) + term("c_m", m) + term("c_m1", m1) + term("c_m2", m2)
    following = term("p_x", corrected) + term("p_v", v) + term("p_m", m) + term("p_m1", m1)
    if noise is not None:
        following = following + term("p_n", noise[source].to(dtype))

    is_written = is_used.view(-1, 1, 1, 1)
    kept_m1 = torch.where(lengths.view(-1, 1, 1, 1) > 0, m1, 0)
    results = ((x0_previous, m2, kept_m1), (x0, m1, m), (last_sample, y, corrected), (sample, x, following))
    for state, old, new in results:
        state[slot] = torch.where(is_written, new, old)


def consistency_score(reference: Tensor, candidates: Tensor, channels: str = "mean") -> Tensor:
    """⟨mean û_E, mean û_R⟩ per candidate group, [k] in at least float32; contract in `miga_engine.ops`."""
    reference_mean = _frame_directions(reference, channels).mean(0)  # [P]
    return _frame_directions(candidates, channels).mean(1) @ reference_mean


def _frame_directions(frames: Tensor, channels: str) -> Tensor:
    """[..., C,H,W] → unit vectors [..., P], P = H·W (channel mean) or C·H·W (all); the zero vector stays zero."""
    frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
    vectors = (frames.mean(-3) if channels == "mean" else frames).flatten(frames.ndim - 3)
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, 1)


def norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """layer_norm(x)·weight[row] + bias[row] in `dtype`; contract in `miga_engine.ops`."""
    if weight is None or bias is None:
        return x.to(dtype, copy=True)
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(_by_frame(bias, rows), normed, _by_frame(weight, rows)).to(dtype)


def residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """x ← x + gate[row]·y, then norm_modulate; contract in `miga_engine.ops`."""
    if gate is None:
        x.add_(y)
    else:
        x.addcmul_(y.to(x.dtype), _by_frame(gate, rows))
    return norm_modulate(x, weight, bias, rows, eps, dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    temporal: Tensor | None,
    spatial: Tensor | None,
    positions: Tensor | None,
    num_heads: int,
    eps: float,
) -> None:
    """RMSNorm over the width and rotation of channel pairs, in place; contract in `miga_engine.ops`."""
    table = None
    if temporal is not None and spatial is not None and positions is not None:
        table = _rotary_table(temporal, spatial, positions)
    for tensor, weight in ((q, weight_q), (k, weight_k)):
        if tensor is None:
            continue
        x = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if weight is not None:
            x = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
        if table is not None:
            cos, sin = (part.to(x.dtype) for part in table)
            even, odd = x.unflatten(2, (num_heads, -1, 2)).unbind(-1)  # [B,N,H,D/H/2]
            x = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(2)
        tensor.copy_(x)


def frame_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_rows: Tensor | None, scale: float | None
) -> Tensor:
    """softmax(scale·q kᵀ + bias) v, one head and at most 1,024 queries at a time; contract in `miga_engine.ops`."""
    k, v, bias, q_frames = by_key_rows(q, k, v, bias, key_rows)
    dtype = torch.promote_types(q.dtype, torch.float32)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    batch, num_queries, num_heads, _ = q_frames.shape
    out = torch.empty_like(q_frames, memory_format=torch.contiguous_format)
    shape = (batch, num_heads, num_queries, k.shape[1])
    bias = None if bias is None else bias.to(dtype).expand(shape)
    for head in range(num_heads):
        keys, values = k[:, :, head].to(dtype), v[:, :, head].to(dtype)
        for start in range(0, num_queries, 1024):
            part = slice(start, start + 1024)
            scores = q_frames[:, part, head].to(dtype) @ keys.mT * factor
            if bias is not None:
                scores = scores + bias[:, head, part]
            out[:, part, head] = (scores.softmax(-1) @ values).to(q.dtype)
    return out.view(q.shape)


def by_key_rows(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(k, v, bias, q) with one row of keys a batch entry; with rows [B,F], q becomes [B·F,N/F,H,D]."""
    if key_rows is None:
        if k.shape[0] != q.shape[0]:
            k, v = k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1)
        return k, v, bias, q
    rows = key_rows.flatten()
    if bias is not None and bias.shape[0] > 1:
        bias = bias.index_select(0, rows)
    frames = q.reshape(rows.shape[0], -1, *q.shape[2:])
    return k.index_select(0, rows), v.index_select(0, rows), bias, frames


def _by_frame(table: Tensor, rows: Tensor | None) -> Tensor:
    """[R,D] → [B,F,1,D], or [D] where one row serves every frame."""
    return table[0] if rows is None or table.shape[0] == 1 else table[rows].unsqueeze(2)


def _rotary_table(temporal: Tensor, spatial: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B,F·S,1,pairs] of every token."""
    batch, num_frames = positions.shape
    grid = (batch, num_frames, spatial.shape[0])
    in_time = temporal[positions][:, :, None].expand(*grid, -1, -1)
    table = torch.cat([in_time, spatial.expand(*grid, -1, -1)], dim=-1).flatten(1, 2)  # [B,N,2,pairs]
    return table[:, :, :1], table[:, :, 1:]
