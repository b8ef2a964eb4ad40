"""sampler_update: one solver step of n frames in place, each with its own coefficient row, in one launch.

    v  = v_u + guidance_scale·(v_c − v_u), or with weights of each frame w_d·(v_c − v_u) + w_u·v_u + w_x·x
    m  = m_x·x + m_v·v
    xc = c_x·x + c_y·y + c_m·m + c_m1·m1 + c_m2·m2
    x' = p_x·xc + p_v·v + p_m·m + p_m1·m1 + p_n·noise
    sample ← x', last_sample ← xc, x0_previous ← m1 (0 where the history is empty), x0 ← m

State (x, y, m1, m2) [L,C,H,W] float32, velocities [n,C,H,W] any float, rows [T,3,12] as in `miga_engine.schedule`,
arithmetic in float32 in the oracle's order without contraction, so the results are its bits. State of weight 0 is not
read. Noise is a tensor [n,C,H,W] or drawn here where p_n ≠ 0: four normals a Philox counter, the bits of
`miga_engine.noise`. Memory bandwidth bounds it: four states written, and read where the row uses them. Grid: frame ×
block of its elements; a frame without a slot ends at once. On an H100 it moves 40 to 54 % of what a copy does; several
blocks a program were slower.
Sources: UniPC (Zhao et al. 2023), DPM-Solver++ (Lu et al. 2022), DDIM (Song et al. 2021); Philox (Salmon et al. 2011).
"""

import triton
import triton.language as tl
from torch import Tensor

from miga_engine.schedule import NUM_COEFFICIENTS

# (elements of a block, warps). Eight elements a thread: 128-bit accesses of bfloat16 velocities too, and two Philox
# counters, whose float64 normals spill on no GPU compiled for. The others are for tuning.
CONFIGS = ((1024, 4), (2048, 8), (512, 4))

_NUM_COEFFICIENTS = tl.constexpr(NUM_COEFFICIENTS)
# As miga_engine.schedule.COLUMNS has them.
_M_X, _M_V, _C_X, _C_Y, _C_M, _C_M1, _C_M2, _P_X, _P_V, _P_M, _P_M1, _P_N = map(tl.constexpr, range(NUM_COEFFICIENTS))
_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
_TWO_PI = tl.constexpr(6.283185307179586)
# π/2 in two parts: 33 bits, so that up to four times the first is exact, and the rest.
_HALF_PI_HIGH = tl.constexpr(1.5707963267341256)
_HALF_PI_LOW = tl.constexpr(6.077100506506192e-11)


@triton.jit
def _term(coefficient, b_value):
    """A term of weight 0 is left out, so that NaN in memory the row does not use never spreads."""
    return tl.where(coefficient == 0.0, 0.0, coefficient * b_value)


@triton.jit
def _is_used(coefficient):
    return tl.where(coefficient == 0.0, 0, 1) != 0  # the interpreter combines comparisons of integers only


@triton.jit
def _uniform(word):
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2⁻³², exact


@triton.jit
def _box_muller(word_radius, word_angle):
    """√(−2 ln u₀)·(cos 2πu₁, sin 2πu₁), in float64 and rounded once to float32.

    Cosine and sine from the angle less its nearest multiple of π/2, Taylor sums accurate to float64 on [−π/4, π/4]: a
    library's sine has a path for large arguments that takes local memory.
    """
    radius = tl.sqrt(tl.log(_uniform(word_radius)) * -2.0)
    angle = _uniform(word_angle) * _TWO_PI
    quarter = tl.floor(angle * _TWO_OVER_PI + 0.5)  # 0 … 4
    r = (angle - quarter * _HALF_PI_HIGH) - quarter * _HALF_PI_LOW
    z = r * r
    sine, cosine = z * 0.0 + 1.0, z * 0.0 + 1.0
    for i in tl.static_range(8):
        sine = 1.0 - sine * z * (1.0 / ((16 - 2 * i) * (17 - 2 * i)))
        cosine = 1.0 - cosine * z * (1.0 / ((15 - 2 * i) * (16 - 2 * i)))
    sine *= r
    quadrant = quarter.to(tl.int32)
    is_odd = (quadrant & 1) == 1
    cos_angle, sin_angle = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    cos_angle = tl.where(((quadrant + 1) & 2) == 2, -cos_angle, cos_angle)
    sin_angle = tl.where((quadrant & 2) == 2, -sin_angle, sin_angle)
    return (radius * cos_angle).to(tl.float32), (radius * sin_angle).to(tl.float32)


@triton.jit
def _frame_noise(seed, p_words, i_block, BLOCK: tl.constexpr):
    """Normals [BLOCK] of one block of a frame; p_words: the last three words of its counters."""
    o_counter = (i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    frame = tl.load(p_words).to(tl.uint32)
    series = tl.load(p_words + 1).to(tl.uint32)
    high = tl.load(p_words + 2).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, o_counter, frame, series, high)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(BLOCK)


@triton.jit(do_not_specialize=["noise_seed", "num_slots", "num_steps"])
def _sampler_update_kernel(
    p_sample,  # [L,C·H·W]
    p_last_sample,  # [L,C·H·W]
    p_x0,  # [L,C·H·W]
    p_x0_previous,  # [L,C·H·W]
    p_velocity_cond,  # [n,C·H·W]
    p_velocity_uncond,  # [n,C·H·W] or None: no guidance
    p_guidance_weights,  # [n,3] or None: guidance_scale
    p_noise,  # [n,C·H·W] or None
    p_noise_counters,  # [n,3] or None
    p_slots,  # [n]
    p_coefficients,  # [T,3,12]
    p_step_index,  # [n]
    p_history_length,  # [n]
    frame_size,  # C·H·W
    num_slots,  # L
    num_steps,  # T
    guidance_scale,
    noise_seed: tl.int64,
    NUM_HISTORY_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks_per_frame = tl.cdiv(frame_size, BLOCK)
    i_frame = (tl.program_id(0) // blocks_per_frame).to(tl.int64)
    i_block = tl.program_id(0) % blocks_per_frame
    slot = tl.load(p_slots + i_frame)
    if slot < 0:
        return
    if slot >= num_slots:  # never behind the state, nor below behind the rows
        return
    length = tl.minimum(tl.maximum(tl.load(p_history_length + i_frame), 0), NUM_HISTORY_LENGTHS - 1)
    step = tl.minimum(tl.maximum(tl.load(p_step_index + i_frame), 0), num_steps - 1)
    p_row = p_coefficients + (step * NUM_HISTORY_LENGTHS + length) * _NUM_COEFFICIENTS
    m_x = tl.load(p_row + _M_X).to(tl.float32)
    m_v = tl.load(p_row + _M_V).to(tl.float32)
    c_x = tl.load(p_row + _C_X).to(tl.float32)
    c_y = tl.load(p_row + _C_Y).to(tl.float32)
    c_m = tl.load(p_row + _C_M).to(tl.float32)
    c_m1 = tl.load(p_row + _C_M1).to(tl.float32)
    c_m2 = tl.load(p_row + _C_M2).to(tl.float32)
    p_x = tl.load(p_row + _P_X).to(tl.float32)
    p_v = tl.load(p_row + _P_V).to(tl.float32)
    p_m = tl.load(p_row + _P_M).to(tl.float32)
    p_m1 = tl.load(p_row + _P_M1).to(tl.float32)
    p_n = tl.load(p_row + _P_N).to(tl.float32)

    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < frame_size
    o_state = slot * frame_size + o
    o_frame = i_frame * frame_size + o
    b_x = tl.load(p_sample + o_state, mask=m, other=0.0)
    b_y = tl.load(p_last_sample + o_state, mask=m & _is_used(c_y), other=0.0)
    uses_m1 = (length > 0) | _is_used(c_m1) | _is_used(p_m1)
    b_m1 = tl.load(p_x0 + o_state, mask=m & uses_m1, other=0.0)
    b_m2 = tl.load(p_x0_previous + o_state, mask=m & _is_used(c_m2), other=0.0)
    b_v = tl.load(p_velocity_cond + o_frame, mask=m, other=0.0).to(tl.float32)
    if p_velocity_uncond is not None:
        b_uncond = tl.load(p_velocity_uncond + o_frame, mask=m, other=0.0).to(tl.float32)
        if p_guidance_weights is None:
            b_v = b_uncond + guidance_scale * (b_v - b_uncond)
        else:
            p_weights = p_guidance_weights + i_frame * 3
            b_v = _term(tl.load(p_weights).to(tl.float32), b_v - b_uncond)
            b_v += _term(tl.load(p_weights + 1).to(tl.float32), b_uncond)
            b_v += _term(tl.load(p_weights + 2).to(tl.float32), b_x)

    tl.store(p_x0_previous + o_state, tl.where(length > 0, b_m1, 0.0), mask=m)
    b_m = _term(m_x, b_x) + _term(m_v, b_v)
    b_xc = _term(c_x, b_x) + _term(c_y, b_y) + _term(c_m, b_m) + _term(c_m1, b_m1) + _term(c_m2, b_m2)
    b_next = _term(p_x, b_xc) + _term(p_v, b_v) + _term(p_m, b_m) + _term(p_m1, b_m1)
    if p_noise is not None:
        b_noise = tl.load(p_noise + o_frame, mask=m & _is_used(p_n), other=0.0).to(tl.float32)
        b_next += _term(p_n, b_noise)
    if p_noise_counters is not None:
        b_noise = tl.zeros([BLOCK], tl.float32)
        if p_n != 0.0:
            b_noise = _frame_noise(noise_seed, p_noise_counters + i_frame * 3, i_block, BLOCK)
        b_next += _term(p_n, b_noise)
    tl.store(p_x0 + o_state, b_m, mask=m)
    tl.store(p_last_sample + o_state, b_xc, mask=m)
    tl.store(p_sample + o_state, b_next, mask=m)


def launch(
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
    guidance_weights: Tensor | None = None,
    noise: Tensor | None = None,
    noise_counters: Tensor | None = None,
    noise_seed: int = 0,
    config: tuple[int, int] = CONFIGS[0],
) -> None:
    """In place; arguments as checked by `miga_engine.ops.sampler_update`. Strided state is updated in a copy."""
    frame_size = sample[0].numel() if sample.shape[0] else 0
    if slots.shape[0] == 0 or frame_size == 0:
        return
    block, num_warps = config
    states = (sample, last_sample, x0, x0_previous)
    dense = [state.contiguous() for state in states]
    arguments = (
        velocity_cond, velocity_uncond, guidance_weights, noise, noise_counters, slots, coefficients, step_index,
        history_length,
    )  # fmt: skip
    _sampler_update_kernel[(slots.shape[0] * triton.cdiv(frame_size, block),)](
        *dense,
        *(None if argument is None else argument.contiguous() for argument in arguments),
        frame_size,
        sample.shape[0],
        coefficients.shape[0],
        guidance_scale,
        noise_seed,
        NUM_HISTORY_LENGTHS=coefficients.shape[1],
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    for state, updated in zip(states, dense, strict=True):
        if updated is not state:
            state.copy_(updated)


def bytes_moved(num_frames: int, frame_size: int, velocity_size: int, num_velocities: int, num_states_read: int) -> int:
    """Global memory of frames that have a slot: four float32 states written and num_states_read of them read (UniPC 4,
    the other solvers 2, the sample and the history they shift), and the velocities; noise drawn here moves none."""
    return num_frames * frame_size * (4 * (4 + num_states_read) + velocity_size * num_velocities)
