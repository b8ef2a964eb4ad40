"""norm_modulate, residual_norm_modulate: the norms of a transformer block whose frames sit at different timesteps.

Tokens are [B,F,S,D]: B windows of F latent frames of S tokens. What depends on a frame's noise level is a row of a
small table [R,D] that the frame names by its index in `rows` [B,F]; it is never written out per token.
Source: Wan2.1 (arXiv 2503.20314), the diffusion transformer's block; one row a frame as FIFO-Diffusion (arXiv
2405.11473) and MIGA (arXiv 2605.18233) need.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.ops._registry import register, require, require_indices, require_like, require_tensors

torch.library.define(
    "miga::norm_modulate",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? rows, float eps, ScalarType dtype) -> Tensor",
)
torch.library.define(
    "miga::residual_norm_modulate",
    "(Tensor(a!) x, Tensor y, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? rows, float eps, ScalarType dtype) "
    "-> Tensor",
)


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
    _check_dtype(dtype)
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
    _check_dtype(dtype)
    return torch.ops.miga.residual_norm_modulate(x, y, gate, weight, bias, rows, eps, dtype)


def _check_tokens(x: Tensor) -> None:
    require_tensors("x", x)
    require(x.ndim == 4, "x", "shape", tuple(x.shape), "[B,F,S,D]")
    require(x.dtype in (torch.float32, torch.float64), "x", "dtype", x.dtype, "float32 or float64")
    require(x.is_contiguous(), "x", "strides", x.stride(), "a contiguous tensor")


def _check_dtype(dtype: torch.dtype) -> None:
    known = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    require(dtype in known, "dtype", "value", dtype, "float32, float64, float16 or bfloat16")


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


def norm_modulate_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """The oracle: any device, any float dtype; no checks."""
    if weight is None or bias is None:
        return x.to(dtype, copy=True)
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(_by_frame(bias, rows), normed, _by_frame(weight, rows)).to(dtype)


def residual_norm_modulate_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The oracle: any device, any float dtype; no checks."""
    if gate is None:
        x.add_(y)
    else:
        x.addcmul_(y.to(x.dtype), _by_frame(gate, rows))
    return norm_modulate_reference(x, weight, bias, rows, eps, dtype)


def _by_frame(table: Tensor, rows: Tensor | None) -> Tensor:
    """[R,D] → [B,F,1,D], or [D] where one row serves every frame."""
    return table[0] if rows is None or table.shape[0] == 1 else table[rows].unsqueeze(2)


register("norm_modulate", norm_modulate_reference, kernel="norm_modulate")
register("residual_norm_modulate", residual_norm_modulate_reference, kernel="norm_modulate", launch="launch_residual")
