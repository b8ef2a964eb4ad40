"""guidance_dots: ⟨d,b⟩, ⟨b,b⟩, ⟨d,d⟩ of n latent frames, d = v_c − v_u, b = b_x·x + b_c·v_c + b_u·v_u, in one launch.

sample (x) [L,C,H,W] float32, velocities [n,C,H,W] any float, direction (b_x, b_c, b_u) [n,3] → [n,3] float32,
accumulated in float32. The sample is not read where its weight is 0. Each frame is one program's, whatever else is in
the pass, so the order of its sums depends on its size alone. Memory bandwidth bounds it: both velocities are read once,
and the sample where the rule uses it. Sources: CFG-Zero* (arXiv 2503.18886), APG (arXiv 2410.02416).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# (elements of a block, warps). Sixteen elements a thread: four 128-bit loads of each float32 input under way at once.
CONFIGS = ((4096, 8),)


@triton.jit
def _term(coefficient, b_value):
    """A term of weight 0 is left out, so that NaN in memory the direction does not use never spreads."""
    return tl.where(coefficient == 0.0, 0.0, coefficient * b_value)


@triton.jit(do_not_specialize=["num_slots"])
def _guidance_dots_kernel(
    p_dots,  # [n,3]
    p_sample,  # [L,C·H·W]
    p_velocity_cond,  # [n,C·H·W]
    p_velocity_uncond,  # [n,C·H·W]
    p_slots,  # [n]
    p_direction,  # [n,3]
    frame_size,  # C·H·W
    num_slots,  # L
    BLOCK: tl.constexpr,
):
    i_frame = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + i_frame)
    w_x = tl.load(p_direction + i_frame * 3).to(tl.float32)
    w_cond = tl.load(p_direction + i_frame * 3 + 1).to(tl.float32)
    w_uncond = tl.load(p_direction + i_frame * 3 + 2).to(tl.float32)
    uses_x = tl.where(w_x == 0.0, 0, 1) != 0  # the interpreter combines comparisons of integers only
    b_along = tl.zeros([BLOCK], tl.float32)
    b_direction = tl.zeros([BLOCK], tl.float32)
    b_difference = tl.zeros([BLOCK], tl.float32)
    for start in range(0, frame_size, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = (o < frame_size) & (slot >= 0) & (slot < num_slots)  # never beside the state
        o_frame = i_frame * frame_size + o
        b_x = tl.load(p_sample + slot * frame_size + o, mask=m & uses_x, other=0.0)
        b_cond = tl.load(p_velocity_cond + o_frame, mask=m, other=0.0).to(tl.float32)
        b_uncond = tl.load(p_velocity_uncond + o_frame, mask=m, other=0.0).to(tl.float32)
        b_b = _term(w_x, b_x) + _term(w_cond, b_cond) + _term(w_uncond, b_uncond)
        b_d = b_cond - b_uncond
        b_along += b_d * b_b
        b_direction += b_b * b_b
        b_difference += b_d * b_d
    tl.store(p_dots + i_frame * 3, tl.sum(b_along))
    tl.store(p_dots + i_frame * 3 + 1, tl.sum(b_direction))
    tl.store(p_dots + i_frame * 3 + 2, tl.sum(b_difference))


def launch(
    sample: Tensor,
    velocity_cond: Tensor,
    velocity_uncond: Tensor,
    *,
    slots: Tensor,
    direction: Tensor,
    config: tuple[int, int] = CONFIGS[0],
) -> Tensor:
    """[n,3]; arguments as checked by `miga_engine.ops.guidance_dots`."""
    num_frames, (block, num_warps) = slots.shape[0], config
    dots = torch.empty((num_frames, 3), dtype=torch.float32, device=sample.device)
    if num_frames == 0:
        return dots
    arguments = (sample, velocity_cond, velocity_uncond, slots, direction)
    _guidance_dots_kernel[(num_frames,)](
        dots,
        *(argument.contiguous() for argument in arguments),
        velocity_cond[0].numel(),
        sample.shape[0],
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return dots


def bytes_moved(num_frames: int, frame_size: int, velocity_size: int, uses_sample: bool) -> int:
    """Global memory of frames that have a slot: two velocities, and the float32 sample where the direction has it."""
    return num_frames * frame_size * (2 * velocity_size + 4 * uses_sample)
