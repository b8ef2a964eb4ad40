"""consistency_score: mean over frame pairs of ⟨û_E, û_R⟩ = ⟨mean û_E, mean û_R⟩, for k candidate groups in one call.

reference [n,C,H,W], candidates [k,m,C,H,W] → [k]; P = H·W positions. u is a frame's mean over channels, [P], or with
channels="all" the frame itself, [C·P], which is the same with one channel and C·P positions; û = u/‖u‖, 0 for u = 0.
dtypes: any float in, float32 accumulated and out. Two kernels: u and partial sums of its squares (a program per frame
and block of positions, reference and candidates together), then partial dot products (a program per candidate and block
of positions), summed in a fixed order. Every frame is read once and its u, 1/C of it, written once and read once a use;
two operations per element, so memory bandwidth bounds it. Source: MIGA (arXiv 2605.18233), consistency score.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Safe everywhere: tiles of 8192 float32 values on 8 warps, 32 registers a thread, all loaded before the first is used.
# One configuration is enough for an op that runs once per pass on a few megabytes.
TILE, NUM_WARPS = 8192, 8
GROUP = 8  # frames whose u is read at once


@triton.jit
def _frame_mean(p_frame, o_p, num_positions, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean over channels of one frame at a block of positions, float32."""
    o_c = tl.arange(0, BLOCK_C)
    o_frame = o_c[:, None].to(tl.int64) * num_positions + o_p[None, :]
    m_frame = (o_c < CHANNELS)[:, None] & (o_p < num_positions)[None, :]
    return tl.sum(tl.load(p_frame + o_frame, mask=m_frame, other=0.0).to(tl.float32), axis=0) / CHANNELS


@triton.jit(do_not_specialize=["num_reference"])
def _consistency_mean_kernel(
    p_means,  # [n+k·m,P]
    p_squares,  # [n+k·m,blocks]
    p_reference,  # [n,C,P]
    p_candidates,  # [k·m,C,P]
    num_reference,  # n
    num_positions,  # P
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_blocks = tl.cdiv(num_positions, BLOCK)
    i_frame = (tl.program_id(0) // num_blocks).to(tl.int64)
    i_block = tl.program_id(0) % num_blocks
    o_p = i_block * BLOCK + tl.arange(0, BLOCK)
    if i_frame < num_reference:
        p_frame = p_reference + i_frame * CHANNELS * num_positions
        b_u = _frame_mean(p_frame, o_p, num_positions, CHANNELS, BLOCK_C)
    else:
        p_candidate = p_candidates + (i_frame - num_reference) * CHANNELS * num_positions
        b_u = _frame_mean(p_candidate, o_p, num_positions, CHANNELS, BLOCK_C)
    tl.store(p_means + i_frame * num_positions + o_p, b_u, mask=o_p < num_positions)
    tl.store(p_squares + i_frame * num_blocks + i_block, tl.sum(b_u * b_u))


@triton.jit
def _mean_direction(
    p_means, p_squares, first, count, o_p, num_positions, num_squares, GROUP: tl.constexpr, BLOCK_SQUARES: tl.constexpr
):
    """Mean of û over `count` frames from the `first` on, at a block of positions."""
    o_squares = tl.arange(0, BLOCK_SQUARES)
    b_sum = tl.zeros(o_p.shape, tl.float32)
    for start in range(0, count, GROUP):
        o_group = start + tl.arange(0, GROUP)
        m_group = o_group < count
        o_frame = (first + o_group)[:, None]  # int64
        m_squares = m_group[:, None] & (o_squares < num_squares)[None, :]
        b_squares = tl.load(p_squares + o_frame * num_squares + o_squares[None, :], mask=m_squares, other=0.0)
        b_norm = tl.sqrt(tl.sum(b_squares, axis=1))
        b_norm = tl.where(b_norm == 0.0, 1.0, b_norm)  # NaN stays NaN
        m_u = m_group[:, None] & (o_p < num_positions)[None, :]
        b_u = tl.load(p_means + o_frame * num_positions + o_p[None, :], mask=m_u, other=0.0)
        b_sum += tl.sum(b_u / b_norm[:, None], axis=0)
    return b_sum / count


@triton.jit(do_not_specialize=["num_reference", "num_frames"])
def _consistency_score_kernel(
    p_partials,  # [k,blocks]
    p_means,  # [n+k·m,P]
    p_squares,  # [n+k·m,num_squares]
    num_reference,  # n
    num_frames,  # m
    num_positions,  # P
    num_squares,
    GROUP: tl.constexpr,
    BLOCK_SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_blocks = tl.cdiv(num_positions, BLOCK)
    i_k = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_p = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    b_reference = _mean_direction(
        p_means, p_squares, i_k * 0, num_reference, o_p, num_positions, num_squares, GROUP, BLOCK_SQUARES
    )
    b_candidate = _mean_direction(
        p_means,
        p_squares,
        num_reference + i_k * num_frames,
        num_frames,
        o_p,
        num_positions,
        num_squares,
        GROUP,
        BLOCK_SQUARES,
    )
    tl.store(p_partials + tl.program_id(0), tl.sum(b_reference * b_candidate))


def launch(reference: Tensor, candidates: Tensor, channels: str = "mean") -> Tensor:
    """Scores [k] float32; arguments as checked by `miga_engine.ops.consistency_score`."""
    reference, candidates = reference.contiguous(), candidates.contiguous()
    n, num_channels, height, width = reference.shape
    k, m = candidates.shape[:2]
    num_positions = height * width
    if channels == "all":
        num_channels, num_positions = 1, num_channels * num_positions
    block_c = triton.next_power_of_2(num_channels)
    block_means, block_dots = max(128, TILE // block_c), TILE // GROUP
    num_squares, num_dots = triton.cdiv(num_positions, block_means), triton.cdiv(num_positions, block_dots)

    means, squares, partials = (
        torch.empty(shape, dtype=torch.float32, device=reference.device)
        for shape in ((n + k * m, num_positions), (n + k * m, num_squares), (k, num_dots))
    )
    if partials.numel() == 0:
        return partials.sum(1)
    _consistency_mean_kernel[((n + k * m) * num_squares,)](
        means,
        squares,
        reference,
        candidates,
        n,
        num_positions,
        CHANNELS=num_channels,
        BLOCK_C=block_c,
        BLOCK=block_means,
        num_warps=NUM_WARPS,
    )
    _consistency_score_kernel[(k * num_dots,)](
        partials,
        means,
        squares,
        n,
        m,
        num_positions,
        num_squares,
        GROUP=GROUP,
        BLOCK_SQUARES=triton.next_power_of_2(num_squares),
        BLOCK=block_dots,
        num_warps=NUM_WARPS,
    )
    return partials.sum(1)


def bytes_moved(n: int, k: int, m: int, frame_numel: int, element_size: int) -> int:
    """Global memory read from the frames; channel means, norms and partial sums stay in cache and are left out."""
    return (n + k * m) * frame_numel * element_size
