"""The C++ and Triton kernels of sampler_update against the oracle, bit for bit, the noise they draw included."""

import re

import pytest
import torch
from op_inputs import DEVICE, DTYPES, Kernel, assert_within_budget, guarded, needs_cpp, on_threads, outside, randn
from places import ROOT

from miga_engine import ops
from miga_engine.noise import FrameNoise, Purpose, frame_noise
from miga_engine.schedule import COLUMNS, NUM_COEFFICIENTS, NUM_HISTORY_LENGTHS, make_schedule

kernel = Kernel("sampler_update")
GUIDANCE = ("none", "scale", "weights")


def _weights(count: int) -> torch.Tensor:
    """guidance_weights of frames, in guarded memory; the last frame's are 0."""
    weights = randn(count, 3, seed=40)
    weights[-1] = 0
    return guarded(weights)


def test_columns_have_one_order() -> None:
    """The kernels name the columns that schedule.py lays out."""
    source = (ROOT / "csrc" / "sampler_update.h").read_text()
    *names, last = re.search(r"enum Column : int64_t {(.*?)}", source)[1].replace(" ", "").split(",")
    assert names == ["k" + name.replace("_", "").upper() for name in COLUMNS]
    assert last == "kNumCoefficients"
    assert [getattr(kernel, f"_{name.upper()}").value for name in COLUMNS] == list(range(len(COLUMNS)))


def _cpu_queue(dtype: torch.dtype, velocity: torch.dtype, shape: tuple[int, ...] = (7, 3, 5, 11)) -> tuple:
    """A queue of 7 frames, 5 of them updated, at every history length; memory that no row may read is NaN."""
    generator = torch.Generator().manual_seed(3)
    schedule = make_schedule("unipc", 6, 3.0)
    state = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    slots = torch.tensor([4, -1, 0, 6, 2])
    lengths = torch.tensor([0, 2, 1, 2, 5])
    for tensor, needed in ((state[1], 1), (state[2], 1), (state[3], 2)):
        tensor[slots[(slots >= 0) & (lengths < needed)]] = torch.nan
    frames = [torch.randn(5, *shape[1:], generator=generator).to(velocity) for _ in range(3)]
    frames[0][1] = torch.nan  # the frame without a slot
    keywords = {
        "slots": slots, "coefficients": schedule.coefficients.rows, "step_index": torch.tensor([0, 3, 1, 5, 4]),
        "history_length": lengths, "guidance_scale": 4.5,
    }  # fmt: skip
    return state, frames, keywords


@needs_cpp
@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("with_noise", [True, False])
def test_cpp_equals_the_oracle_bit_for_bit(dtype, velocity, guidance, with_noise) -> None:
    """Same operations in the same order, without contraction: not even rounding differs."""
    state, frames, keywords = _cpu_queue(dtype, velocity)
    keywords["noise"] = frames[2] if with_noise else None
    keywords["guidance_weights"] = _weights(5) if guidance == "weights" else None
    expected = [tensor.clone() for tensor in state]
    velocities = (frames[0], frames[1] if guidance != "none" else None)
    ops.sampler_update_reference(*expected, *velocities, **keywords)
    ops.sampler_update(*state, *velocities, **keywords)
    for ours, theirs in zip(state, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@needs_cpp
def test_cpp_in_strided_memory_and_on_several_threads() -> None:
    state, frames, keywords = _cpu_queue(torch.float32, torch.float32, (7, 16, 60, 104))
    expected = [tensor.clone() for tensor in state]
    ops.sampler_update_reference(*expected, frames[0], frames[1], **keywords)
    strided = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in state]
    velocities = frames[0].transpose(2, 3).contiguous().transpose(2, 3), frames[1]
    on_threads(2, lambda: ops.sampler_update(*strided, *velocities, **keywords))
    for ours, theirs in zip(strided, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@needs_cpp
def test_cpp_meets_its_contract() -> None:
    state, frames, keywords = _cpu_queue(torch.float32, torch.bfloat16)
    clean = [tensor.nan_to_num() for tensor in (*state, frames[0], frames[1])]
    torch.library.opcheck(torch.ops.miga.sampler_update.default, tuple(clean), keywords)


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 3, 5, 7), (7, 16, 60, 104)])
def test_cpp_draws_the_noise_of_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit, in several runs of a frame or in part of a block, and only where the row uses noise."""
    state, frames, keywords = _cpu_queue(dtype, torch.bfloat16, shape)
    generator = torch.Generator().manual_seed(4)
    keywords["coefficients"] = keywords["coefficients"].clone()
    p_n = keywords["coefficients"][..., COLUMNS.index("p_n")]
    p_n.copy_(torch.rand(p_n.shape, generator=generator))
    p_n[0, 0] = p_n[4, 2] = 0
    noise = frame_noise(-3, Purpose.SOLVER, [7, -1, 2**40 + 5, 0, 9], series=[3, 0, 2**32 - 1, 4, 1])
    drawn = noise.draw(shape[1:])
    drawn[[0, 4]] = torch.nan
    expected = [tensor.clone() for tensor in state]
    ops.sampler_update_reference(*expected, *frames[:2], **keywords, noise=drawn)
    given = [tensor.clone() for tensor in state]
    ops.sampler_update(*given, *frames[:2], **keywords, noise=drawn)
    ops.sampler_update(*state, *frames[:2], **keywords, noise=noise)
    for ours, read, theirs in zip(state, given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(read, theirs, rtol=0, atol=0, equal_nan=True)


def _only_noise(noise: FrameNoise, shape: tuple[int, ...]) -> torch.Tensor:
    """What sampler_update adds to x where every coefficient but the noise's is 0."""
    count = noise.counters.shape[0]
    state = [torch.full((count, *shape), torch.nan) for _ in range(4)]
    coefficients = torch.zeros(1, NUM_HISTORY_LENGTHS, NUM_COEFFICIENTS)
    coefficients[..., COLUMNS.index("p_n")] = 1
    index = torch.zeros(count, dtype=torch.int64)
    ops.sampler_update(
        *state, torch.full((count, *shape), torch.nan), None, slots=torch.arange(count), coefficients=coefficients,
        step_index=index, history_length=index, guidance_scale=1.0, noise=noise,
    )  # fmt: skip
    return state[0]


@needs_cpp
def test_drawn_normals_are_those_of_noise_py() -> None:
    """float64 functions of two libraries may round a float32 differently: by one ulp, at most one value in 2²⁴."""
    shape = (16, 120, 131)
    noise = frame_noise(0x1234_5678_9ABC_DEF0, Purpose.CANDIDATE, range(-5, 5), series=77)
    ours, theirs = _only_noise(noise, shape), noise.draw(shape)
    assert ours.numel() > 2_000_000
    differ = ours != theirs
    assert int(differ.sum()) <= ours.numel() / 2**24
    steps = ours.view(torch.int32).long() - theirs.view(torch.int32).long()
    assert int(steps.abs().max()) <= 1


@pytest.mark.slow
@needs_cpp
def test_cpp_with_drawn_noise_meets_its_contract_on_any_number_of_threads() -> None:
    state, frames, keywords = _cpu_queue(torch.float32, torch.float32, (7, 16, 30, 52))
    keywords["coefficients"] = keywords["coefficients"] + 0.5
    clean = [tensor.nan_to_num() for tensor in (*state, frames[0], frames[1])]
    noise = frame_noise(1, Purpose.SOLVER, range(5))
    drawing = keywords | {"noise_counters": noise.counters, "noise_seed": noise.seed}
    torch.library.opcheck(torch.ops.miga.sampler_update.default, tuple(clean), drawing)

    def update() -> list[torch.Tensor]:
        arguments = [tensor.clone() for tensor in clean]
        torch.ops.miga.sampler_update(*arguments, **drawing)
        return arguments

    for one, two in zip(on_threads(1, update), on_threads(2, update), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("update", ["eager", "cpp", "triton"])
def test_weights_of_a_scale_give_its_bits_and_those_of_zero_read_nothing(update: str) -> None:
    """(w, 1, 0) is classifier-free guidance; at (0, 0, 0) the velocities may be anything, and are as if 0."""
    function = {"eager": ops.sampler_update_reference, "cpp": ops.sampler_update, "triton": kernel.launch}[update]
    state, frames, keywords = _queue(torch.float32)
    weights = guarded(torch.tensor([[4.5, 1.0, 0.0]], device=DEVICE).repeat(6, 1))
    nothing, anything = ([torch.full_like(frame, fill) for frame in frames[:2]] for fill in (0.0, torch.nan))
    for like, given, rule in ((frames[:2], frames[:2], weights), (nothing, anything, guarded(0 * weights))):
        expected, ours = ([tensor.clone() for tensor in state] for _ in range(2))
        ops.sampler_update_reference(*expected, *like, **keywords)
        function(*ours, *given, **keywords, guidance_weights=rule)
        for result, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


SLOTS, LENGTHS, STEPS = [4, -1, 0, 6, 2, -1], [0, 2, 1, 2, 5, 0], [0, 3, 1, 5, 4, 0]


def _queue(velocity: torch.dtype, fill: float = torch.nan, frame: tuple[int, ...] = (3, 5, 11)) -> tuple:
    """A queue of 7 frames, 4 of them updated, at every history length; memory that no row may read is NaN."""
    state = [guarded(randn(7, *frame, seed=i), fill) for i in range(4)]
    for tensor, needed in ((state[1], 1), (state[2], 1), (state[3], 2)):
        for slot, length in zip(SLOTS, LENGTHS, strict=True):
            if slot >= 0 and length < needed:
                tensor[slot] = torch.nan
    frames = [guarded(randn(6, *frame, seed=10 + i).to(velocity)) for i in range(3)]
    frames[0][1] = torch.nan  # the frame without a slot
    names = ("slots", "history_length", "step_index")
    values = (SLOTS, LENGTHS, STEPS)
    keywords = {name: torch.tensor(value, device=DEVICE) for name, value in zip(names, values, strict=True)}
    rows = make_schedule("unipc", 6, 3.0).coefficients.rows.clone()
    noise = torch.tensor([0.0, 0.7])[torch.arange(6) % 2]  # at every other step
    rows[..., COLUMNS.index("p_n")] = noise[:, None]
    keywords |= {"coefficients": guarded(rows.to(DEVICE)), "guidance_scale": 4.5}
    return state, frames, keywords


@pytest.mark.slow
@pytest.mark.parametrize("velocity", DTYPES)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("noise", ["none", "tensor", "counters"])
def test_triton_equals_the_oracle_bit_for_bit(velocity: torch.dtype, guidance: str, noise: str) -> None:
    """Same operations in the same order, without contraction: not even rounding differs."""
    state, frames, keywords = _queue(velocity)
    if noise == "tensor":
        keywords["noise"] = frames[2]
    elif noise == "counters":
        drawn = frame_noise(7, Purpose.SOLVER, torch.arange(6), device=DEVICE)
        keywords |= {"noise_counters": _guarded_counters(drawn.counters), "noise_seed": drawn.seed}
    keywords["guidance_weights"] = _weights(6) if guidance == "weights" else None
    expected = [tensor.clone() for tensor in state]
    velocities = (frames[0], frames[1] if guidance != "none" else None)
    ops.sampler_update_reference(*expected, *velocities, **keywords)
    kernel.launch(*state, *velocities, **keywords)
    for ours, theirs in zip(state, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def _guarded_counters(counters: torch.Tensor) -> torch.Tensor:
    memory = torch.full((counters.shape[0] + 2, 3), -1, device=DEVICE)
    memory[1:-1] = counters
    return memory[1:-1]


def test_triton_writes_only_the_frames_of_its_slots() -> None:
    state, frames, keywords = _queue(torch.float32, fill=1.5)
    kept = [i for i in range(7) if i not in SLOTS]
    before = [tensor[kept].clone() for tensor in state]
    kernel.launch(*state, frames[0], None, **keywords)
    for tensor, old in zip(state, before, strict=True):
        assert torch.equal(tensor[kept], old)
        assert bool((outside(tensor) == 1.5).all())


def test_triton_of_strided_memory_and_of_nothing() -> None:
    state, frames, keywords = _queue(torch.float32)
    expected = [tensor.clone() for tensor in state]
    ops.sampler_update_reference(*expected, frames[0], frames[1], **keywords)
    strided = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in state]
    arguments = (*strided, frames[0].transpose(2, 3).contiguous().transpose(2, 3), frames[1])
    nothing = {name: value[:0] if name != "guidance_scale" else value for name, value in keywords.items()}
    nothing["coefficients"] = keywords["coefficients"]
    for run in (keywords, nothing, keywords | {"slots": torch.full_like(keywords["slots"], -1)}):
        kernel.launch(*arguments, **run)
        for ours, theirs in zip(strided, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler", "ddim"])
def test_triton_over_every_solver_stays_within_the_error_budget_over_its_steps(solver: str) -> None:
    """Frames at different steps of one schedule, from uninitialised history to the end, as a queue moves."""
    num_frames, num_steps, frame = 3, 5, (2, 5, 7)
    schedule = make_schedule(solver, num_steps, 3.0, eta=0.8)
    coefficients = schedule.coefficients
    slots = torch.tensor([2, 0, 1], device=DEVICE)
    start = randn(num_frames, *frame)
    unset = torch.full_like(start, torch.nan)
    ours, eager, exact = (
        [tensor.to(dtype, copy=True) for tensor in (start, unset, unset, unset)]
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    for step in range(num_steps + num_frames - 1):
        steps = torch.arange(step, step - num_frames, -1)
        is_active = ((steps >= 0) & (steps < num_steps)).to(DEVICE)
        steps = steps.clamp(0, num_steps - 1).to(DEVICE)
        noise = frame_noise(-3, Purpose.SOLVER, torch.arange(num_frames) - 1, series=step, device=DEVICE)
        v = [randn(num_frames, *frame, seed=step + 100 * i).to(torch.bfloat16) for i in range(2)]
        keywords = {
            "slots": torch.where(is_active, slots, -1), "step_index": steps, "history_length": steps,
            "guidance_scale": 3.0, "noise_counters": noise.counters, "noise_seed": noise.seed,
        }  # fmt: skip
        rows, rows64 = coefficients.rows.to(DEVICE), coefficients.rows64.to(DEVICE)
        kernel.launch(*ours, *v, coefficients=rows, **keywords)
        ops.sampler_update_reference(*eager, *v, coefficients=rows, **keywords)
        ops.sampler_update_reference(*exact, *v, coefficients=rows64, **keywords)
    for result, rounded, truth in zip(ours, eager, exact, strict=True):
        assert_within_budget(result, rounded, truth)


@pytest.mark.slow
def test_triton_draws_noise_that_has_the_bits_of_the_noise_module() -> None:
    """A row that is the noise alone, over 20,000 normals of an odd frame; frame numbers beyond 32 bits and below 0."""
    frame, numbers = (3, 37, 37), [0, 1, -1, (1 << 40) + 3, -(1 << 55)]
    rows = torch.zeros(1, NUM_HISTORY_LENGTHS, NUM_COEFFICIENTS, device=DEVICE)
    rows[..., COLUMNS.index("p_n")] = 1
    zeros = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    for seed, series in ((-2, 0), (0x123456789ABCDEF, 0xFFFFFFFF)):
        state = [torch.full((5, *frame), torch.nan, device=DEVICE) for _ in range(4)]
        noise = frame_noise(seed, Purpose.SOLVER, numbers, series=series, device=DEVICE)
        kernel.launch(
            *state, state[0].clone(), None, slots=torch.arange(5, device=DEVICE), coefficients=rows, step_index=zeros,
            history_length=zeros, guidance_scale=1.0, noise_counters=noise.counters, noise_seed=noise.seed,
        )  # fmt: skip
        assert torch.equal(state[0], noise.draw(frame))


def test_triton_touches_nothing_beside_its_state_and_rows() -> None:
    """A slot that is none is left out; a step or a history length that is none becomes the nearest."""
    state, frames, keywords = _queue(torch.float32, fill=1.5)
    for tensor in state:
        tensor.nan_to_num_()
    expected = [tensor.clone() for tensor in state]
    slots = torch.tensor([4, 7, 0, 6, 2**40, -9], device=DEVICE)
    steps = torch.tensor([-1, 0, 99, 5, 0, 0], device=DEVICE)
    lengths = torch.tensor([0, 0, 9, -7, 0, 0], device=DEVICE)
    kernel.launch(
        *state, frames[0], None, **(keywords | {"slots": slots, "step_index": steps, "history_length": lengths})
    )
    nearest = {"slots": torch.tensor([4, -1, 0, 6, -1, -1], device=DEVICE), "step_index": steps.clamp(0, 5)}
    nearest["history_length"] = lengths.clamp(min=0)
    ops.sampler_update_reference(*expected, frames[0], None, **keywords | nearest)
    for ours, theirs in zip(state, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert bool((outside(ours) == 1.5).all())
