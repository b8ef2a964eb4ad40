"""consistency_score: mean over frame pairs of ⟨û_E, û_R⟩ = ⟨mean û_E, mean û_R⟩, for k candidate groups in one call.

reference [n,C,H,W], candidates [k,m,C,H,W] → [k]; P = H·W positions. u is a frame's mean over channels, [P], or with
channels="all" the frame itself, [C·P], which is the same with one channel and C·P positions; û = u/‖u‖, 0 for u = 0.
dtypes: any float in, float32 accumulated and out. Two kernels: norms (a program per frame), then partial dot products
(a program per candidate and split of the positions), summed in a fixed order. Every frame is read twice, the reference
once more per candidate; two operations per element read, so memory bandwidth bounds it. Source: ALGORITHM.md §4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Safe everywhere: a block of 1024 positions in float32 is 8 registers a thread. One configuration is enough for an op
# that runs once per pass on a few megabytes.
BLOCK, NUM_WARPS = 1024, 4
POSITIONS_PER_SPLIT = 4 * BLOCK


@triton.jit
def _frame_mean(p_frame, o_p, m_p, num_channels, num_positions, BLOCK: tl.constexpr):
    """Mean over channels of one frame at a block of positions, float32."""
    b_sum = tl.zeros([BLOCK], tl.float32)
    for c in range(num_channels):
        b_sum += tl.load(p_frame + c * num_positions + o_p, mask=m_p, other=0.0).to(tl.float32)
    return b_sum / num_channels


@triton.jit
def _consistency_norms_kernel(p_norms, p_frames, num_channels, num_positions, BLOCK: tl.constexpr):
    i_frame = tl.program_id(0).to(tl.int64)
    p_frame = p_frames + i_frame * num_channels * num_positions
    b_squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_positions, BLOCK):
        o_p = start + tl.arange(0, BLOCK)
        b_u = _frame_mean(p_frame, o_p, o_p < num_positions, num_channels, num_positions, BLOCK)
        b_squares += b_u * b_u
    norm = tl.sqrt(tl.sum(b_squares))
    tl.store(p_norms + i_frame, tl.where(norm == 0.0, 1.0, norm))  # NaN stays NaN


@triton.jit
def _consistency_score_kernel(
    p_partials,
    p_reference,
    p_candidates,
    p_reference_norms,
    p_candidate_norms,
    num_reference,
    num_frames,
    num_channels,
    num_positions,
    positions_per_split,
    BLOCK: tl.constexpr,
):
    i_k, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_first_frame = i_k * num_frames
    frame_size = num_channels * num_positions
    first = i_split * positions_per_split
    last = tl.minimum(first + positions_per_split, num_positions)
    b_dot = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        o_p = start + tl.arange(0, BLOCK)
        m_p = o_p < last
        b_reference = tl.zeros([BLOCK], tl.float32)
        o_frame = tl.full([], 0, tl.int64)
        for f in range(num_reference):
            b_u = _frame_mean(p_reference + o_frame, o_p, m_p, num_channels, num_positions, BLOCK)
            b_reference += b_u / tl.load(p_reference_norms + f)
            o_frame += frame_size
        b_candidate = tl.zeros([BLOCK], tl.float32)
        for f in range(num_frames):
            i_frame = o_first_frame + f  # int64
            b_u = _frame_mean(p_candidates + i_frame * frame_size, o_p, m_p, num_channels, num_positions, BLOCK)
            b_candidate += b_u / tl.load(p_candidate_norms + i_frame)
        b_dot += (b_reference / num_reference) * (b_candidate / num_frames)
    tl.store(p_partials + i_k * tl.num_programs(1) + i_split, tl.sum(b_dot))


def launch(reference: Tensor, candidates: Tensor, channels: str) -> Tensor:
    """Scores [k] float32; arguments as checked by `miga_engine.ops.consistency_score`."""
    reference, candidates = reference.contiguous(), candidates.contiguous()
    n, num_channels, height, width = reference.shape
    k, m = candidates.shape[:2]
    num_positions = height * width
    if channels == "all":
        num_channels, num_positions = 1, num_channels * num_positions
    num_splits = triton.cdiv(num_positions, POSITIONS_PER_SPLIT)
    norms = torch.empty(n + k * m, dtype=torch.float32, device=reference.device)
    partials = torch.empty(k, num_splits, dtype=torch.float32, device=reference.device)
    if k == 0:
        return partials.sum(1)
    reference_norms, candidate_norms = norms[:n], norms[n:]
    sizes = (num_channels, num_positions)
    _consistency_norms_kernel[(n,)](reference_norms, reference, *sizes, BLOCK=BLOCK, num_warps=NUM_WARPS)
    _consistency_norms_kernel[(k * m,)](candidate_norms, candidates, *sizes, BLOCK=BLOCK, num_warps=NUM_WARPS)
    _consistency_score_kernel[(k, num_splits)](
        partials,
        reference,
        candidates,
        reference_norms,
        candidate_norms,
        n,
        m,
        *sizes,
        POSITIONS_PER_SPLIT,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return partials.sum(1)


def bytes_moved(n: int, k: int, m: int, frame_numel: int, element_size: int) -> int:
    """Global memory read if no cache holds the reference between candidates; norms and partial sums are left out."""
    return (n + k * m + k * (n + m)) * frame_numel * element_size
