"""qk_norm_rope, rms_norm_: the norm of queries and keys, and their rotary positions in time and space."""

import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.ops._registry import is_written_once, register, require, require_indices, require_tensors

torch.library.define(
    "miga::qk_norm_rope",
    "(Tensor(a!) q, Tensor(b!)? k, Tensor? weight_q, Tensor? weight_k, Tensor? temporal, Tensor? spatial, "
    "Tensor? positions, int num_heads, float eps) -> ()",
)


@torch.library.register_fake("miga::qk_norm_rope")
def _fake(*args: Tensor | float | None) -> None:
    return None


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    *,
    temporal: Tensor,
    spatial: Tensor,
    positions: Tensor,
    num_heads: int,
    eps: float,
) -> None:
    """q ← rope(rms_norm(q)·weight_q), k likewise if given, in place and rounded once.

    The norm is over the full width D, before the heads are split. RoPE turns neighbouring channel pairs of each head:
    the first pairs by the angles of the frame's position in time, the others by those of the token's place in it.

    q, k [B,F·S,D], one floating point dtype, last dimension contiguous; weights [D] float32 or float64, None for no
    norm; temporal [P,2,t] and spatial [S,2,D/num_heads/2 − t]: cosines and sines, float32 or float64; positions [B,F]
    int64 rows of temporal, on a GPU the nearest where one is none. Arithmetic in float32 at least. Source: Wan2.1, 3-D
    rotary positions.
    """
    _check_heads("q", q, weight_q, num_heads)
    require_tensors("q temporal spatial positions k", q, temporal, spatial, positions, optional=(k,))
    if k is not None:
        _check_heads("k", k, weight_k, num_heads)
        require(k.shape == q.shape, "k", "shape", tuple(k.shape), f"{tuple(q.shape)} as q")
        require(k.dtype == q.dtype, "k", "dtype", k.dtype, f"{q.dtype} as q")
    width = q.shape[2] // num_heads
    require(width % 2 == 0, "q", "channels a head", width, "an even number, for they turn in pairs")
    for name, table in (("temporal", temporal), ("spatial", spatial)):
        require(table.ndim == 3 and table.shape[1] == 2, name, "shape", tuple(table.shape), "[rows,2,pairs]")
        require(table.dtype.is_floating_point, name, "dtype", table.dtype, "a floating point type")
    pairs = temporal.shape[2] + spatial.shape[2]
    require(pairs == width // 2, "temporal and spatial", "pairs", pairs, f"{width // 2}, half of a head's channels")
    require(positions.ndim == 2, "positions", "shape", tuple(positions.shape), "[B,F]")
    require(positions.dtype == torch.int64, "positions", "dtype", positions.dtype, "int64")
    tokens = (positions.shape[0], positions.shape[1] * spatial.shape[0])
    require(q.shape[:2] == tokens, "q", "shape", tuple(q.shape), f"({tokens[0]}, {tokens[1]} = F·S, D)")
    require_indices("positions", positions, 0, temporal.shape[0] - 1)
    torch.ops.miga.qk_norm_rope(q, k, weight_q, weight_k, temporal, spatial, positions, num_heads, eps)


def rms_norm_(q: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """q ← rms_norm(q)·weight over the last dimension, in place, in float32 at least and rounded once; returns q.

    q [B,N,D], any floating point dtype, last dimension contiguous; weight [D] float32 or float64.
    """
    require_tensors("q weight", q, weight)
    _check_heads("q", q, weight, 1)
    torch.ops.miga.qk_norm_rope(q, None, weight, None, None, None, None, 1, eps)
    return q


def _check_heads(name: str, tensor: Tensor, weight: Tensor | None, num_heads: int) -> None:
    require_tensors(f"{name} weight_{name}", tensor, optional=(weight,))
    require(tensor.ndim == 3, name, "shape", tuple(tensor.shape), "[B,N,D]")
    require(tensor.dtype.is_floating_point, name, "dtype", tensor.dtype, "a floating point type")
    require(tensor.stride(2) == 1, name, "strides", tensor.stride(), "a contiguous last dimension")
    require(is_written_once(tensor), name, "strides", tensor.stride(), "memory of its own for each element")
    width = tensor.shape[2]
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads is {num_heads!r}, expected a whole number of at least 1")
    require(width % num_heads == 0, name, "width", width, f"a multiple of {num_heads} heads")
    if weight is not None:
        require(weight.shape == (width,), f"weight_{name}", "shape", tuple(weight.shape), f"({width},)")
        is_wide = weight.dtype in (torch.float32, torch.float64)
        require(is_wide, f"weight_{name}", "dtype", weight.dtype, "float32 or float64")


def qk_norm_rope_reference(
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
    """The oracle: any device, any float dtype; no checks."""
    import einops

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
            even, odd = einops.rearrange(x, "b n (h pair two) -> b n h pair two", h=num_heads, two=2).unbind(-1)
            turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
            x = einops.rearrange(turned, "b n h pair two -> b n (h pair two)")
        tensor.copy_(x)


def _rotary_table(temporal: Tensor, spatial: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B,F·S,1,pairs] of every token."""
    import einops

    batch, num_frames = positions.shape
    in_time = einops.repeat(temporal[positions], "b f part pair -> b f s part pair", s=spatial.shape[0])
    in_space = einops.repeat(spatial, "s part pair -> b f s part pair", b=batch, f=num_frames)
    table = einops.rearrange(torch.cat([in_time, in_space], dim=-1), "b f s part pair -> part b (f s) 1 pair")
    return table[0], table[1]


register("qk_norm_rope", qk_norm_rope_reference, kernel="qk_norm_rope")
