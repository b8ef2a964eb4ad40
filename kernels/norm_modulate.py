"""norm_modulate: out = layer_norm(x)·weight[row] + bias[row]; with a residual, x ← x + gate[row]·y first, in place.

x, y, out [B,F,S,D]; weight, bias, gate [R,D]; row = rows[B,F], one a frame (R = 1 serves every frame). Statistics over
D, taken from registers in two passes: the mean, then the variance of the centred values, to which eps is added.
dtypes: x and tables float32, y any float, arithmetic float32, out rounded once. Each element is read and written once
(6 B from float32 to bfloat16; 12 B with a bfloat16 y): memory bandwidth bounds it. A program takes a few tokens of one
frame, so that the rows of the tables are read once for all of them.
Source: Wan2.1 (arXiv 2503.20314), modulated norms and gated residuals of its block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# (elements of a tile, tokens at most, warps). 8192 float32 values on 8 warps are 32 registers a thread, which with y,
# weight and bias beside them spill on no GPU compiled for: four tokens of width 1536 or one of 5120. Narrow widths stop
# at 16 tokens: more of them spilled. The others are for tuning at a given width.
CONFIGS = ((8192, 16, 8), (4096, 16, 4), (16384, 16, 16))


@triton.jit(do_not_specialize=["num_rows"])
def _norm_modulate_kernel(
    p_out,  # [B·F,S,D]
    p_x,  # [B·F,S,D]
    p_y,  # [B·F,S,D] or None
    p_gate,  # [R,D] or None
    p_weight,  # [R,D] or None: no norm
    p_bias,  # [R,D]
    p_rows,  # [B·F] or None
    stride_gate,
    stride_weight,
    stride_bias,
    num_rows,  # R
    num_tokens,  # S
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunks_per_frame = tl.cdiv(num_tokens, ROWS)
    i_frame = tl.program_id(0) // chunks_per_frame
    i_chunk = tl.program_id(0) % chunks_per_frame
    o_s = i_chunk * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_x = (o_s < num_tokens)[:, None] & m_d[None, :]
    o_token = i_frame.to(tl.int64) * num_tokens + o_s
    o_x = o_token[:, None] * D + o_d[None, :]
    row = tl.full([], 0, tl.int64)
    if p_rows is not None:
        row = tl.minimum(tl.maximum(tl.load(p_rows + i_frame), 0), num_rows - 1)  # never behind a table

    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)  # [ROWS,BLOCK_D]
    if p_y is not None:
        b_y = tl.load(p_y + o_x, mask=m_x, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if p_gate is not None:
            b_gate = tl.load(p_gate + row * stride_gate + o_d, mask=m_d, other=0.0, eviction_policy="evict_last")
            b_y *= b_gate[None, :]
        b_x += b_y
        tl.store(p_x + o_x, b_x, mask=m_x)
    if p_weight is not None:
        b_weight = tl.load(p_weight + row * stride_weight + o_d, mask=m_d, other=0.0, eviction_policy="evict_last")
        b_bias = tl.load(p_bias + row * stride_bias + o_d, mask=m_d, other=0.0, eviction_policy="evict_last")
        mean = tl.sum(b_x, axis=1) / D  # [ROWS]
        b_x = tl.where(m_d[None, :], b_x - mean[:, None], 0.0)
        variance = tl.sum(b_x * b_x, axis=1) / D
        b_x = b_x * tl.rsqrt(variance + eps)[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(p_out + o_x, b_x.to(p_out.dtype.element_ty), mask=m_x)


def launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    config: tuple[int, int, int] = CONFIGS[0],
) -> Tensor:
    """[B,F,S,D] of `dtype`; arguments as checked by `miga_engine.ops.norm_modulate`."""
    return launch_residual(x, None, None, weight, bias, rows, eps, dtype, config)


def launch_residual(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    config: tuple[int, int, int] = CONFIGS[0],
) -> Tensor:
    """The same after x ← x + gate·y in place; arguments as checked by `miga_engine.ops.residual_norm_modulate`."""
    out = torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return out
    batch, num_frames, num_tokens, width = x.shape
    tile, most_tokens, num_warps = config
    block = triton.next_power_of_2(width)
    tokens_per_program = max(1, min(tile // block, most_tokens))
    _norm_modulate_kernel[(batch * num_frames * triton.cdiv(num_tokens, tokens_per_program),)](
        out,
        x,
        None if y is None else y.contiguous(),
        gate,
        weight,
        bias,
        None if rows is None else rows.contiguous(),
        _row_stride(gate),
        _row_stride(weight),
        _row_stride(bias),
        min((t.shape[0] for t in (gate, weight, bias) if _row_stride(t)), default=1),
        num_tokens,
        eps,
        D=width,
        ROWS=tokens_per_program,
        BLOCK_D=block,
        num_warps=num_warps,
    )
    return out


def _row_stride(table: Tensor | None) -> int:
    """0 for a table of one row, which every frame then reads whatever `rows` says."""
    return 0 if table is None or table.shape[0] == 1 else table.stride(0)


def bytes_moved(num_tokens: int, width: int, out_size: int, y_size: int = 0) -> int:
    """Global memory: float32 x read and out written, and with a residual y read and x written; sizes in bytes an
    element, tables left out, which are small and stay in cache."""
    return num_tokens * width * (4 + out_size + (4 + y_size if y_size else 0))
