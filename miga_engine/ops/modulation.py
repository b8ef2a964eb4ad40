"""Ops on the tokens of a transformer block whose latent frames sit at different timesteps.

Tokens are [B,F,S,D]: B windows of F latent frames of S tokens. What depends on a frame's noise level is a row of a
small table [R,D] that the frame names by its index in `rows` [B,F]; it is never written out per token.
Source: Wan2.1 (arXiv 2503.20314), the diffusion transformer's block; one row a frame as FIFO-Diffusion (arXiv
2405.11473) and MIGA (arXiv 2605.18233) need.
"""

import torch
from torch import Tensor

from miga_engine.ops import reference as _reference
from miga_engine.ops._registry import (
    is_written_once,
    register,
    require,
    require_indices,
    require_like,
    require_tensors,
)

torch.library.define(
    "miga::norm_modulate",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? rows, float eps, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "miga::residual_norm_modulate",
    "(Tensor(a!) x, Tensor y, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? rows, float eps, ScalarType dtype) "
    "-> Tensor",
)
torch.library.define(
    "miga::qk_norm_rope",
    "(Tensor(a!) q, Tensor(b!)? k, Tensor? weight_q, Tensor? weight_k, Tensor? temporal, Tensor? spatial, "
    "Tensor? positions, int num_heads, float eps) -> ()",
)

register("norm_modulate", _reference.norm_modulate, kernel="norm_modulate")
register(
    "residual_norm_modulate",
    _reference.residual_norm_modulate,
    kernel="norm_modulate",
    launch="launch_residual",
)
register("qk_norm_rope", _reference.qk_norm_rope, kernel="qk_norm_rope")


@torch.library.register_fake("miga::norm_modulate")
def _norm_modulate_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("miga::residual_norm_modulate")
def _residual_norm_modulate_fake(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("miga::qk_norm_rope")
def _qk_norm_rope_fake(*args: Tensor | float | None) -> None:
    return None


def norm_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """layer_norm(x)·weight[row] + bias[row], cast: [B,F,S,D] of `dtype`, in one pass.

    The modulated norm of a block, whose weight is 1 + scale and whose bias is shift, is this; so is a layer norm with
    weight and bias (R = 1). weight and bias None: no norm, the cast alone.

    x [B,F,S,D], float32 (float64 for oracles); weight, bias [R,D] in the dtype of x, rows of a larger table allowed
    (last dimension contiguous); rows [B,F] int64, the row of each frame, None if R = 1. A table of one row serves
    every frame whatever rows says; on a GPU a row that is none becomes the nearest. eps is added to the variance;
    statistics and arithmetic in the dtype of x.
    """
    _check_tokens(x)
    _check_tables(x, rows, weight=weight, bias=bias)
    return torch.ops.miga.norm_modulate(x, weight, bias, rows, eps, dtype)


def residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None = None,
    *,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """x ← x + gate[row]·y in place, then `norm_modulate` of it: what ends one part of a block and begins the next.

    y [B,F,S,D], any float dtype; gate [R,D] in the dtype of x, None for 1; the rest as in `norm_modulate`.
    """
    _check_tokens(x)
    require_tensors("x y", x, y)
    require_like("y", y, tuple(x.shape), "as x")
    _check_tables(x, rows, gate=gate, weight=weight, bias=bias)
    return torch.ops.miga.residual_norm_modulate(x, y, gate, weight, bias, rows, eps, dtype)


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
        require(table.ndim == 3 and table.shape[1] == 2, name, "shape", tuple(table.shape), "[rows, 2, pairs]")
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


def _check_tokens(x: Tensor) -> None:
    require_tensors("x", x)
    require(x.ndim == 4, "x", "shape", tuple(x.shape), "[B,F,S,D]")
    require(x.dtype in (torch.float32, torch.float64), "x", "dtype", x.dtype, "float32 or float64")
    require(x.is_contiguous(), "x", "strides", x.stride(), "a contiguous tensor")


def _check_tables(x: Tensor, rows: Tensor | None, **tables: Tensor | None) -> None:
    require((tables["weight"] is None) == (tables["bias"] is None), "bias", "value", tables["bias"], "one with weight")
    given = {name: table for name, table in tables.items() if table is not None}
    require_tensors(f"x {' '.join(tables)} rows", x, optional=(*tables.values(), rows))
    if rows is not None:
        require(rows.shape == x.shape[:2], "rows", "shape", tuple(rows.shape), f"{tuple(x.shape[:2])}, [B,F] of x")
        require(rows.dtype == torch.int64, "rows", "dtype", rows.dtype, "int64")
    for name, table in given.items():
        require(table.ndim == 2 and table.shape[1] == x.shape[3], name, "shape", tuple(table.shape), "[R,D]")
        require(table.dtype == x.dtype, name, "dtype", table.dtype, f"{x.dtype} as x")
        require(table.stride(1) == 1, name, "strides", table.stride(), "a contiguous last dimension")
        has_rows = rows is not None or table.shape[0] == 1
        require(has_rows, "rows", "value", rows, f"[B,F], for {name} has {table.shape[0]} rows")
    if rows is not None and (ends := [table.shape[0] for table in given.values() if table.shape[0] != 1]):
        require_indices("rows", rows, 0, min(ends) - 1)


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
