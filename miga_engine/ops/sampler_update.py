"""sampler_update: one solver step of all latent frames of a pass, each at its own step_index."""

import torch
from torch import Tensor

from miga_engine.noise import FrameNoise
from miga_engine.ops._registry import (
    is_written_once,
    register,
    require,
    require_indices,
    require_like,
    require_tensors,
)
from miga_engine.schedule import COLUMNS, NUM_COEFFICIENTS, NUM_HISTORY_LENGTHS

torch.library.define(
    "miga::sampler_update",
    "(Tensor(a!) sample, Tensor(b!) last_sample, Tensor(c!) x0, Tensor(d!) x0_previous, Tensor velocity_cond, "
    "Tensor? velocity_uncond, *, Tensor slots, Tensor coefficients, Tensor step_index, Tensor history_length, "
    "float guidance_scale, Tensor? guidance_weights=None, Tensor? noise=None, Tensor? noise_counters=None, "
    "int noise_seed=0) -> ()",
)


@torch.library.register_fake("miga::sampler_update")
def _fake(*args: Tensor | None, **kwargs: Tensor | float | None) -> None:
    return None


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
    guidance_weights: Tensor | None = None,
    noise: Tensor | FrameNoise | None = None,
) -> None:
    """One denoising step of n frames, each at its own step_index, in place on the queue's state.

    With the row coefficients[step_index[i], history_length[i]] (`miga_engine.schedule`):
        v  = v_u + guidance_scale·(v_c − v_u), or w_d·(v_c − v_u) + w_u·v_u + w_x·x
        m  = m_x·x + m_v·v
        xc = c_x·x + c_y·y + c_m·m + c_m1·m1 + c_m2·m2
        x' = p_x·xc + p_v·v + p_m·m + p_m1·m1 + p_n·noise
    then sample ← x', last_sample ← xc, x0_previous ← m1 (0 where history_length is 0), x0 ← m.

    sample (x), last_sample (y), x0 (m1), x0_previous (m2): [L,C,H,W], all float32 or all float64, also the arithmetic.
    velocity_cond, velocity_uncond (None: no guidance): [n,C,H,W], any float dtype.
    guidance_weights [n,3], any float dtype: w_d, w_u, w_x of each frame, in the place of guidance_scale, whose bits
    (guidance_scale, 1, 0) gives; a term of weight 0 is left out.
    noise: [n,C,H,W], any float dtype, or a FrameNoise of n frames, drawn in the kernel where its row uses it; None
    leaves the noise term out. Give it when `Schedule.uses_noise`.
    slots [n] int64: frame i owns state row slots[i]; −1 leaves the state untouched; other rows must be distinct.
    coefficients [T,3,12] float32 or float64; step_index [n] int64, 0 … T − 1; history_length [n] int64, 0 or more (a
    length above 2 counts as 2); those of frames without a slot are not read. On a GPU indices are not looked at: a
    frame whose slot is none is left out, a step or length that is none becomes the nearest.
    State that a row gives weight 0 is not read: a fresh frame's history may be uninitialised memory.
    """
    drawn = counters = None
    seed = 0
    if isinstance(noise, FrameNoise):
        counters, seed = noise.counters, noise.seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"noise.seed is {seed!r}, expected a signed integer of 64 bits")
    else:
        drawn = noise
    states = {"sample": sample, "last_sample": last_sample, "x0": x0, "x0_previous": x0_previous}
    require_tensors(
        f"{' '.join(states)} velocity_cond slots coefficients step_index history_length velocity_uncond "
        "guidance_weights noise noise.counters",
        *states.values(), velocity_cond, slots, coefficients, step_index, history_length,
        optional=(velocity_uncond, guidance_weights, drawn, counters),
    )  # fmt: skip
    state_shape, state_dtype = sample.shape, sample.dtype
    require(sample.ndim == 4, "sample", "shape", tuple(state_shape), "[L,C,H,W]")
    require(state_dtype in (torch.float32, torch.float64), "sample", "dtype", state_dtype, "float32 or float64")
    for name, state in states.items():
        require(state.shape == state_shape, name, "shape", tuple(state.shape), f"{tuple(state_shape)} as sample")
        require(state.dtype == state_dtype, name, "dtype", state.dtype, f"{state_dtype} as sample")
        require(is_written_once(state), name, "strides", state.stride(), "memory of its own for each element")
        twin = next((other for other in states if states[other] is state), name)
        require(twin == name, name, "memory that is", f"{twin}'s too", "its own")
    require(slots.ndim == 1, "slots", "shape", tuple(slots.shape), "[n]")
    num_frames = slots.shape[0]
    if counters is not None:
        expected = (num_frames, 3)
        require(tuple(counters.shape) == expected, "noise.counters", "shape", tuple(counters.shape), expected)
        require(counters.dtype == torch.int64, "noise.counters", "dtype", counters.dtype, "int64")
        require_indices("noise.counters", counters, 0, 0xFFFFFFFF)
    for name, frames in (("velocity_cond", velocity_cond), ("velocity_uncond", velocity_uncond), ("noise", drawn)):
        if frames is not None:
            require_like(name, frames, (num_frames, *state_shape[1:]), "[n,C,H,W]")
    if guidance_weights is not None:
        require_like("guidance_weights", guidance_weights, (num_frames, 3), "[n,3]")
        require(velocity_uncond is not None, "velocity_uncond", "value", None, "a tensor beside guidance_weights")
    for name, indices in (("slots", slots), ("step_index", step_index), ("history_length", history_length)):
        require(indices.shape == slots.shape, name, "shape", tuple(indices.shape), f"{tuple(slots.shape)} as slots")
        require(indices.dtype == torch.int64, name, "dtype", indices.dtype, "int64")
    table = (NUM_HISTORY_LENGTHS, NUM_COEFFICIENTS)
    require(coefficients.dtype.is_floating_point, "coefficients", "dtype", coefficients.dtype, "a floating point type")
    is_table = coefficients.ndim == 3 and coefficients.shape[1:] == table
    require(is_table, "coefficients", "shape", tuple(coefficients.shape), f"(num_steps, {table[0]}, {table[1]})")
    _check_frames(slots, step_index, history_length, num_slots=state_shape[0], num_steps=coefficients.shape[0])
    torch.ops.miga.sampler_update(
        sample,
        last_sample,
        x0,
        x0_previous,
        velocity_cond,
        velocity_uncond,
        slots=slots,
        coefficients=coefficients,
        step_index=step_index,
        history_length=history_length,
        guidance_scale=float(guidance_scale),
        guidance_weights=guidance_weights,
        noise=drawn,
        noise_counters=counters,
        noise_seed=seed,
    )


def _check_frames(slots: Tensor, step_index: Tensor, history_length: Tensor, *, num_slots: int, num_steps: int) -> None:
    """The indices of frames that have a slot are in bounds and no two share one; looked at as in `require_indices`."""
    require_indices("slots", slots, -1, num_slots - 1)
    if slots.device.type != "cpu" or torch.compiler.is_compiling():
        return
    owned = slots[has_slot := slots >= 0]
    require_indices("step_index", step_index[has_slot], 0, num_steps - 1)
    require_indices("history_length", history_length[has_slot], 0, torch.iinfo(torch.int64).max)
    if owned.numel() and int(owned.bincount().max()) > 1:
        raise ValueError(f"slots names {int(owned.bincount().argmax())} twice, expected each row once")


def sampler_update_reference(
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
) -> None:
    """The oracle: any device, any float dtype; no checks.

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

    def weighted(weight: Tensor, value: Tensor) -> Tensor:
        return torch.where(weight == 0, 0, weight * value)

    def term(column: str, value: Tensor) -> Tensor:
        return weighted(weights[column], value)

    x, y, m1, m2 = (state[slot] for state in (sample, last_sample, x0, x0_previous))  # [n,C,H,W]
    v = velocity_cond[source].to(dtype)
    if velocity_uncond is not None:
        v_uncond = velocity_uncond[source].to(dtype)
        if guidance_weights is None:
            v = v_uncond + guidance_scale * (v - v_uncond)
        else:
            w_d, w_u, w_x = guidance_weights[source].to(dtype).view(count, 3, 1, 1, 1).unbind(1)
            v = weighted(w_d, v - v_uncond) + weighted(w_u, v_uncond) + weighted(w_x, x)

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


register("sampler_update", sampler_update_reference, kernel="sampler_update")
