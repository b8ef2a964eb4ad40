"""qk_norm_rope: q ← rope(rms_norm(q)·weight_q), k likewise, in place; also rms_norm alone (no tables, k None).

q, k [B,N,D], N = F·S tokens, D = H·d; the norm is over the full width D: x / sqrt(mean x² + eps). RoPE turns the
channel pair (2c, 2c+1) of every head by an angle of the token: pairs c < t by temporal[positions[b,f]] [2,t], the
others by spatial[s] [2,d/2−t], (cos, sin) both. dtypes: q, k any float, weights and tables float32, arithmetic float32,
rounded once. Each element is read and written once (8 B for q and k together in bfloat16): memory bandwidth bounds it.
A program takes a few tokens whole, q and then k, so that their angles are gathered once.
Source: Wan2.1 (arXiv 2503.20314), full-width QK norm and 3-D rotary positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# (elements of a tile, tokens at most, warps). 8192 values on 8 warps are 32 registers a thread, and the pairs of the
# rotation live beside them: four tokens of width 1536 or one of 5120, without a spill on any GPU compiled for. The
# others are for tuning at a given width.
CONFIGS = ((8192, 16, 8), (4096, 16, 4), (16384, 16, 16))


@triton.jit
def _norm_rotate(
    p_x,
    o_x,
    m_x,
    p_weight,
    o_hc,
    m_hc,
    b_cos,
    b_sin,
    eps,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
):
    """One tile [ROWS,HEADS,BLOCK_D] of q or k, in place."""
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    if p_weight is not None:
        mean_square = tl.sum(tl.sum(b_x * b_x, axis=2), axis=1) / (NUM_HEADS * HEAD_DIM)  # [ROWS]
        b_weight = tl.load(p_weight + o_hc, mask=m_hc, other=0.0, eviction_policy="evict_last")
        b_x = b_x * tl.rsqrt(mean_square + eps)[:, None, None] * b_weight[None, :, :]
    if HAS_ROPE:
        b_even, b_odd = tl.split(b_x.reshape(b_x.shape[0], b_x.shape[1], b_x.shape[2] // 2, 2))
        b_x = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos).reshape(b_x.shape)
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def _rotary(p_time, p_place, m_n, o_c, PAIRS: tl.constexpr, TIME_PAIRS: tl.constexpr):
    """Cosines or sines [ROWS,1,BLOCK_D/2] of a few tokens, from their rows [ROWS] of the two tables."""
    m_time = m_n[:, None] & (o_c < TIME_PAIRS)[None, :]
    m_place = m_n[:, None] & ((o_c >= TIME_PAIRS) & (o_c < PAIRS))[None, :]
    b_time = tl.load(p_time[:, None] + o_c[None, :], mask=m_time, other=0.0)
    b_place = tl.load(p_place[:, None] + (o_c - TIME_PAIRS)[None, :], mask=m_place, other=0.0)
    return tl.where(m_time, b_time, b_place)[:, None, :]


@triton.jit(do_not_specialize=["num_positions"])
def _qk_norm_rope_kernel(
    p_q,  # [B,N,D]
    p_k,  # [B,N,D] or None
    p_weight_q,  # [D] or None: no norm
    p_weight_k,  # [D] or None
    p_temporal,  # [P,2,t] or None: no rotation
    p_spatial,  # [S,2,d/2−t]
    p_positions,  # [B,F]
    stride_q_batch,
    stride_q_token,
    stride_k_batch,
    stride_k_token,
    num_positions,  # P
    tokens_per_window,  # N
    tokens_per_frame,  # S
    eps,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TIME_PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PAIRS: tl.constexpr = HEAD_DIM // 2
    HAS_ROPE: tl.constexpr = p_temporal is not None
    chunks_per_window = tl.cdiv(tokens_per_window, ROWS)
    i_batch = (tl.program_id(0) // chunks_per_window).to(tl.int64)
    o_n = (tl.program_id(0) % chunks_per_window) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < tokens_per_window
    o_h = tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    o_hc = o_h[:, None] * HEAD_DIM + o_d[None, :]
    m_hc = (o_h < NUM_HEADS)[:, None] & (o_d < HEAD_DIM)[None, :]
    m_x = m_n[:, None, None] & m_hc[None, :, :]
    b_cos, b_sin = 1.0, 0.0
    if HAS_ROPE:
        o_c = tl.arange(0, BLOCK_D // 2)
        frames_per_window = tokens_per_window // tokens_per_frame
        o_frame = i_batch * frames_per_window + o_n // tokens_per_frame
        position = tl.load(p_positions + o_frame, mask=m_n, other=0)  # [ROWS] int64
        position = tl.minimum(tl.maximum(position, 0), num_positions - 1)  # never behind the table
        o_s = (o_n % tokens_per_frame).to(tl.int64)
        p_time = p_temporal + position * (2 * TIME_PAIRS)
        p_place = p_spatial + o_s * (2 * (PAIRS - TIME_PAIRS))
        b_cos = _rotary(p_time, p_place, m_n, o_c, PAIRS, TIME_PAIRS)
        b_sin = _rotary(p_time + TIME_PAIRS, p_place + (PAIRS - TIME_PAIRS), m_n, o_c, PAIRS, TIME_PAIRS)

    o_q = i_batch * stride_q_batch + o_n.to(tl.int64) * stride_q_token
    o_q = o_q[:, None, None] + o_hc[None, :, :]
    _norm_rotate(p_q, o_q, m_x, p_weight_q, o_hc, m_hc, b_cos, b_sin, eps, NUM_HEADS, HEAD_DIM, HAS_ROPE)
    if p_k is not None:
        o_k = i_batch * stride_k_batch + o_n.to(tl.int64) * stride_k_token
        o_k = o_k[:, None, None] + o_hc[None, :, :]
        _norm_rotate(p_k, o_k, m_x, p_weight_k, o_hc, m_hc, b_cos, b_sin, eps, NUM_HEADS, HEAD_DIM, HAS_ROPE)


def launch(
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    temporal: Tensor | None,
    spatial: Tensor | None,
    positions: Tensor | None,
    num_heads: int,
    eps: float,
    config: tuple[int, int, int] = CONFIGS[0],
) -> None:
    """In place; arguments as checked by `miga_engine.ops.qk_norm_rope` and `rms_norm_`."""
    if q.numel() == 0:
        return
    batch, num_tokens, width = q.shape
    head_dim = width // num_heads
    tile, most_tokens, num_warps = config
    block_h, block_d = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim)
    tokens_per_program = max(1, min(tile // (block_h * block_d), most_tokens))
    _qk_norm_rope_kernel[(batch * triton.cdiv(num_tokens, tokens_per_program),)](
        q,
        k,
        _table(weight_q),
        _table(weight_k),
        _table(temporal),
        _table(spatial),
        None if positions is None else positions.contiguous(),
        q.stride(0),
        q.stride(1),
        0 if k is None else k.stride(0),
        0 if k is None else k.stride(1),
        0 if temporal is None else temporal.shape[0],
        num_tokens,
        num_tokens if spatial is None else spatial.shape[0],
        eps,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        TIME_PAIRS=0 if temporal is None else temporal.shape[2],
        ROWS=tokens_per_program,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=num_warps,
    )


def _table(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.to(torch.float32).contiguous()


def bytes_moved(num_tokens: int, width: int, element_size: int, num_tensors: int = 2) -> int:
    """Global memory: q, and k if num_tensors is 2, read and written; weights and tables stay in cache."""
    return 2 * num_tensors * num_tokens * width * element_size
