"""Triton kernels against the float64 oracle: interpreted on the CPU, or on the GPU where there is one."""

import inspect
import math
from types import ModuleType

import pytest
import torch

from miga_engine import ops
from miga_engine.noise import Purpose, frame_noise
from miga_engine.schedule import COLUMNS, NUM_COEFFICIENTS, NUM_HISTORY_LENGTHS, make_schedule

triton = pytest.importorskip("triton", reason="Triton is for Linux only")

import triton.language as tl  # noqa: E402
from miga_engine.kernels import consistency_score, norm_modulate, qk_norm_rope, sampler_update  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BAND = 2048  # elements


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def _guarded(tensor: torch.Tensor, fill: float = torch.nan) -> torch.Tensor:
    """The same values with NaN, or `fill`, before and behind them in memory."""
    memory = torch.full((tensor.numel() + 2 * BAND,), fill, dtype=tensor.dtype, device=DEVICE)
    view = memory[BAND : BAND + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def _outside(view: torch.Tensor) -> torch.Tensor:
    """What lies in the view's memory and is not the view's."""
    memory = view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
    is_outside = torch.ones_like(memory, dtype=torch.bool)
    is_outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return memory[is_outside]


def _assert_within_budget(result: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    assert result.dtype == eager.dtype
    assert result.shape == exact.shape
    eps = torch.finfo(result.dtype).eps
    budget = 2 * float((eager.double() - exact).abs().max() + eps * exact.abs().max())
    assert math.isfinite(budget)
    assert float((result.double() - exact).abs().max()) <= budget  # False for NaN


@triton.jit
def _count_kernel(p_out, first, end):
    total = 0
    for i in range(first, end):
        total += i
    tl.store(p_out, total)


def test_loops_run_over_bounds_known_at_run_time() -> None:
    """As the interpreter of Triton 3.6 does not with numpy 2.5 before tests/conftest.py has mended it."""
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _count_kernel[(1,)](out, 3, 8)
    assert out.item() == 25


@pytest.fixture
def guarded_empty_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are allocated as NaN between bands of 1.5."""

    def empty_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return _guarded(torch.full(tensor.shape, torch.nan, dtype=dtype), fill=1.5)

    monkeypatch.setattr(torch, "empty_like", empty_like)


@pytest.mark.parametrize(
    ("kernel", "launch", "op"),
    [
        (norm_modulate, "launch", "norm_modulate"),
        (norm_modulate, "launch_residual", "residual_norm_modulate"),
        (qk_norm_rope, "launch", "qk_norm_rope"),
        (sampler_update, "launch", "sampler_update"),
        (consistency_score, "launch", "consistency_score"),
    ],
)
def test_launch_takes_the_arguments_of_its_op(kernel: ModuleType, launch: str, op: str) -> None:
    schema = getattr(torch.ops.miga, op).default._schema.arguments
    parameters = list(inspect.signature(getattr(kernel, launch)).parameters.values())
    for argument, parameter in zip(schema, parameters, strict=False):
        assert (parameter.name, parameter.kind is parameter.KEYWORD_ONLY) == (argument.name, argument.kwarg_only)
        if argument.has_default_value():
            assert parameter.default == argument.default_value
    assert all(parameter.default is not parameter.empty for parameter in parameters[len(schema) :])


def _modulation(x_shape: tuple[int, ...], num_rows: int, with_rows: bool) -> tuple[list, torch.Tensor | None]:
    """Weight, bias and gate as columns of a table [R,6,D] whose other columns are NaN, and the row of each frame."""
    batch, num_frames, _, width = x_shape
    table = _guarded(torch.full((num_rows, 6, width), torch.nan))
    table[:, 1:4] = _randn(num_rows, 3, width, seed=5)
    table[:, 1] += 1
    rows = torch.randint(0, num_rows, (batch, num_frames), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    if num_rows == 1:
        rows += 7  # a table of one row serves every frame whatever rows says
    return [table[:, 1], table[:, 2], table[:, 3]], rows if with_rows else None


def _wide(tensors: list) -> list:
    return [tensor.double() if tensor is not None and tensor.dtype.is_floating_point else tensor for tensor in tensors]


# The last has the width and the strides of the 1.3B model; 17 tokens are one more than a program takes. Each width is a
# kernel of its own to compile, and each set of tables: every width takes the first set, one of them every set.
TOKENS = [(2, 3, 5, 7), (1, 2, 1, 24), (1, 3, 17, 192), (1, 2, 5, 1536)]


def _each_with_the_first(shapes: list, sets: list) -> list:
    return [(shape, *sets[0]) for shape in shapes] + [(shapes[-2], *others) for others in sets[1:]]


@pytest.mark.usefixtures("guarded_empty_like")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_rows", "with_rows"), _each_with_the_first(TOKENS, [(5, True), (1, True), (1, False)])
)
def test_norm_modulate_is_within_the_error_budget(shape, num_rows, with_rows, dtype) -> None:
    x = _guarded(_randn(*shape) + 10)
    (weight, bias, _), rows = _modulation(shape, num_rows, with_rows)
    exact = ops.norm_modulate_reference(*_wide([x, weight, bias, rows]), 1e-6, torch.float64)
    eager = ops.norm_modulate_reference(x, weight, bias, rows, 1e-6, dtype)
    before = x.clone()
    out = norm_modulate.launch(x, weight, bias, rows, 1e-6, dtype)
    _assert_within_budget(out, eager, exact)
    assert bool((_outside(out) == 1.5).all())
    assert torch.equal(x, before)


@pytest.mark.usefixtures("guarded_empty_like")
@pytest.mark.parametrize(("dtype", "y_dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(
    ("shape", "num_rows", "has_gate", "has_norm"),
    _each_with_the_first(TOKENS, [(5, True, True), (1, True, False), (5, False, True)]),
)
def test_residual_norm_modulate_is_within_the_error_budget(shape, num_rows, has_gate, has_norm, dtype, y_dtype) -> None:
    x = _guarded(_randn(*shape) + 10)
    y = _guarded(_randn(*shape, seed=1).to(y_dtype))
    (weight, bias, gate), rows = _modulation(shape, num_rows, with_rows=True)
    gate = gate if has_gate else None
    weight, bias = (weight, bias) if has_norm else (None, None)
    exact_x, eager_x = x.double(), x.clone()
    tables = [y, gate, weight, bias, rows]
    exact = ops.residual_norm_modulate_reference(exact_x, *_wide(tables), 1e-6, torch.float64)
    eager = ops.residual_norm_modulate_reference(eager_x, *tables, 1e-6, dtype)
    out = norm_modulate.launch_residual(x, *tables, 1e-6, dtype)
    _assert_within_budget(out, eager, exact)
    _assert_within_budget(x, eager_x, exact_x)
    assert bool((_outside(out) == 1.5).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_modulate_without_weights_is_a_cast(dtype: torch.dtype) -> None:
    x = _guarded(_randn(1, 2, 3, 7))
    out = norm_modulate.launch(x, None, None, None, 1e-6, dtype)
    assert out.data_ptr() != x.data_ptr()
    _assert_within_budget(out, x.to(dtype), x.double())
    assert norm_modulate.launch(x[:, :0], None, None, None, 1e-6, dtype).shape == (1, 0, 3, 7)


def test_residual_takes_a_strided_y_and_writes_only_x() -> None:
    x = _guarded(_randn(2, 3, 5, 7), fill=1.5)
    y = _randn(2, 5, 3, 7, seed=1).transpose(1, 2)
    expected = x + y
    norm_modulate.launch_residual(x, y, None, None, None, None, 1e-6, torch.float32)
    assert torch.equal(x, expected)
    assert bool((_outside(x) == 1.5).all())


def _rotary(num_frames: int, tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """temporal [P,2,t] of more positions than frames, spatial [S,2,d/2−t], t as Wan splits a head's pairs."""
    pairs = (half - 2 * (half // 3), 2 * (half // 3))
    angles = [_randn(rows, 1, count, seed=3) * 9 for rows, count in zip((num_frames + 4, tokens), pairs, strict=True)]
    temporal, spatial = (torch.cat([angle.cos(), angle.sin()], dim=1) for angle in angles)
    return _guarded(temporal), _guarded(spatial)


# (B,F,S,H,d): odd sizes, head sizes that are no power of two; the last is the head layout of the 1.3B model.
HEADS = [(2, 3, 5, 2, 24), (1, 2, 7, 3, 64), (2, 1, 1, 5, 6), (1, 2, 3, 12, 128)]


def _fused_qkv(shape: tuple[int, ...], dtype: torch.dtype, fill: float = torch.nan) -> list[torch.Tensor]:
    """q and k as slices of [B,N,3,D] whose third slice holds the filling."""
    batch, num_frames, tokens, num_heads, head_dim = shape
    qkv = torch.full((batch, num_frames * tokens, 3, num_heads * head_dim), fill, dtype=dtype)
    qkv = _guarded(qkv, fill)
    qkv[:, :, :2] = _randn(*qkv[:, :, :2].shape)
    return [qkv[:, :, 0], qkv[:, :, 1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "has_weights"), _each_with_the_first(HEADS, [(True,), (False,)]))
def test_qk_norm_rope_is_within_the_error_budget(shape, has_weights, dtype) -> None:
    batch, num_frames, tokens, num_heads, head_dim = shape
    q, k = _fused_qkv(shape, dtype)
    weights = [_guarded(_randn(q.shape[2], seed=i) + 1) if has_weights else None for i in range(2)]
    tables = _rotary(num_frames, tokens, head_dim // 2)
    positions = torch.randint(0, num_frames + 4, (batch, num_frames), generator=torch.Generator().manual_seed(2))
    positions = positions.to(DEVICE)
    exact, eager = [q.double(), k.double()], [q.clone(), k.clone()]
    ops.qk_norm_rope_reference(*exact, *_wide(weights), *_wide(tables), positions, num_heads, 1e-6)
    ops.qk_norm_rope_reference(*eager, *weights, *tables, positions, num_heads, 1e-6)
    qk_norm_rope.launch(q, k, *weights, *tables, positions, num_heads, 1e-6)
    _assert_within_budget(q, eager[0], exact[0])
    _assert_within_budget(k, eager[1], exact[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 1536])
def test_rms_norm_is_within_the_error_budget(width: int, dtype: torch.dtype) -> None:
    q, weight = _guarded(_randn(2, 5, width).to(dtype)), _guarded(_randn(width) + 1)
    exact, eager = q.double(), q.clone()
    ops.qk_norm_rope_reference(exact, None, weight.double(), None, None, None, None, 1, 1e-6)
    ops.qk_norm_rope_reference(eager, None, weight, None, None, None, None, 1, 1e-6)
    qk_norm_rope.launch(q, None, weight, None, None, None, None, 1, 1e-6)
    _assert_within_budget(q, eager, exact)


def test_qk_norm_rope_writes_only_q_and_k() -> None:
    """Also with tables and weights in float64, as the contract allows, and no frames at all."""
    shape = (2, 3, 5, 2, 24)
    q, k = _fused_qkv(shape, torch.float32, fill=1.5)
    weight = (_randn(48) + 1).double()
    tables = [table.double() for table in _rotary(3, 5, 12)]
    positions = torch.arange(6, device=DEVICE).view(2, 3)
    expected = [q.clone(), k.clone()]
    ops.qk_norm_rope_reference(*expected, weight, weight, *tables, positions, 2, 1e-6)
    qk_norm_rope.launch(q, k, weight, weight, *tables, positions, 2, 1e-6)
    torch.testing.assert_close([q, k], expected)
    between = _outside(q.as_strided((2, 15, 2, 48), (15 * 144, 144, 48, 1)))  # q and k side by side
    assert bool((between == 1.5).all())
    qk_norm_rope.launch(q[:0], k[:0], weight, weight, *tables, positions[:0], 2, 1e-6)


SLOTS, LENGTHS, STEPS = [4, -1, 0, 6, 2, -1], [0, 2, 1, 2, 5, 0], [0, 3, 1, 5, 4, 0]


def _queue(velocity: torch.dtype, fill: float = torch.nan, frame: tuple[int, ...] = (3, 5, 11)) -> tuple:
    """A queue of 7 frames, 4 of them updated, at every history length; memory that no row may read is NaN."""
    state = [_guarded(_randn(7, *frame, seed=i), fill) for i in range(4)]
    for tensor, needed in ((state[1], 1), (state[2], 1), (state[3], 2)):
        for slot, length in zip(SLOTS, LENGTHS, strict=True):
            if slot >= 0 and length < needed:
                tensor[slot] = torch.nan
    frames = [_guarded(_randn(6, *frame, seed=10 + i).to(velocity)) for i in range(3)]
    frames[0][1] = torch.nan  # the frame without a slot
    names = ("slots", "history_length", "step_index")
    values = (SLOTS, LENGTHS, STEPS)
    keywords = {name: torch.tensor(value, device=DEVICE) for name, value in zip(names, values, strict=True)}
    rows = make_schedule("unipc", 6, 3.0).coefficients.rows.clone()
    noise = torch.tensor([0.0, 0.7])[torch.arange(6) % 2]  # at every other step
    rows[..., COLUMNS.index("p_n")] = noise[:, None]
    keywords |= {"coefficients": _guarded(rows), "guidance_scale": 4.5}
    return state, frames, keywords


@pytest.mark.parametrize("velocity", DTYPES)
@pytest.mark.parametrize("is_guided", [True, False])
@pytest.mark.parametrize("noise", ["none", "tensor", "counters"])
def test_sampler_update_equals_the_oracle_bit_for_bit(velocity: torch.dtype, is_guided: bool, noise: str) -> None:
    """Same operations in the same order, without contraction: not even rounding differs."""
    state, frames, keywords = _queue(velocity)
    if noise == "tensor":
        keywords["noise"] = frames[2]
    elif noise == "counters":
        drawn = frame_noise(7, Purpose.SOLVER, torch.arange(6), device=DEVICE)
        keywords |= {"noise_counters": _guarded_counters(drawn.counters), "noise_seed": drawn.seed}
    expected = [tensor.clone() for tensor in state]
    velocities = (frames[0], frames[1] if is_guided else None)
    ops.sampler_update_reference(*expected, *velocities, **keywords)
    sampler_update.launch(*state, *velocities, **keywords)
    for ours, theirs in zip(state, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def _guarded_counters(counters: torch.Tensor) -> torch.Tensor:
    memory = torch.full((counters.shape[0] + 2, 3), -1, device=DEVICE)
    memory[1:-1] = counters
    return memory[1:-1]


def test_sampler_update_writes_only_the_frames_of_its_slots() -> None:
    state, frames, keywords = _queue(torch.float32, fill=1.5)
    kept = [i for i in range(7) if i not in SLOTS]
    before = [tensor[kept].clone() for tensor in state]
    sampler_update.launch(*state, frames[0], None, **keywords)
    for tensor, old in zip(state, before, strict=True):
        assert torch.equal(tensor[kept], old)
        assert bool((_outside(tensor) == 1.5).all())


def test_sampler_update_of_strided_memory_and_of_nothing() -> None:
    state, frames, keywords = _queue(torch.float32)
    expected = [tensor.clone() for tensor in state]
    ops.sampler_update_reference(*expected, frames[0], frames[1], **keywords)
    strided = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in state]
    arguments = (*strided, frames[0].transpose(2, 3).contiguous().transpose(2, 3), frames[1])
    nothing = {name: value[:0] if name != "guidance_scale" else value for name, value in keywords.items()}
    nothing["coefficients"] = keywords["coefficients"]
    for run in (keywords, nothing, keywords | {"slots": torch.full_like(keywords["slots"], -1)}):
        sampler_update.launch(*arguments, **run)
        for ours, theirs in zip(strided, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler", "ddim"])
def test_every_solver_stays_within_the_error_budget_over_its_steps(solver: str) -> None:
    """Frames at different steps of one schedule, from uninitialised history to the end, as a queue moves."""
    num_frames, num_steps, frame = 3, 5, (2, 5, 7)
    schedule = make_schedule(solver, num_steps, 3.0, eta=0.8)
    coefficients = schedule.coefficients
    slots = torch.tensor([2, 0, 1], device=DEVICE)
    start = _randn(num_frames, *frame)
    unset = torch.full_like(start, torch.nan)
    ours, eager, exact = (
        [tensor.to(dtype, copy=True) for tensor in (start, unset, unset, unset)]
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    for step in range(num_steps + num_frames - 1):
        steps = torch.arange(step, step - num_frames, -1)
        is_active = ((steps >= 0) & (steps < num_steps)).to(DEVICE)
        steps = steps.clamp(0, num_steps - 1).to(DEVICE)
        noise = frame_noise(-3, Purpose.SOLVER, torch.arange(num_frames) - 1, stream=step, device=DEVICE)
        v = [_randn(num_frames, *frame, seed=step + 100 * i).to(torch.bfloat16) for i in range(2)]
        keywords = {
            "slots": torch.where(is_active, slots, -1), "step_index": steps, "history_length": steps,
            "guidance_scale": 3.0, "noise_counters": noise.counters, "noise_seed": noise.seed,
        }  # fmt: skip
        rows, rows64 = coefficients.rows.to(DEVICE), coefficients.rows64.to(DEVICE)
        sampler_update.launch(*ours, *v, coefficients=rows, **keywords)
        ops.sampler_update_reference(*eager, *v, coefficients=rows, **keywords)
        ops.sampler_update_reference(*exact, *v, coefficients=rows64, **keywords)
    for result, rounded, truth in zip(ours, eager, exact, strict=True):
        _assert_within_budget(result, rounded, truth)


def test_drawn_noise_has_the_bits_of_the_noise_module() -> None:
    """A row that is the noise alone, over 20,000 normals of an odd frame; frame numbers beyond 32 bits and below 0."""
    frame, numbers = (3, 37, 37), [0, 1, -1, (1 << 40) + 3, -(1 << 55)]
    rows = torch.zeros(1, NUM_HISTORY_LENGTHS, NUM_COEFFICIENTS, device=DEVICE)
    rows[..., COLUMNS.index("p_n")] = 1
    zeros = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    for seed, stream in ((-2, 0), (0x123456789ABCDEF, 0xFFFFFFFF)):
        state = [torch.full((5, *frame), torch.nan, device=DEVICE) for _ in range(4)]
        noise = frame_noise(seed, Purpose.SOLVER, numbers, stream=stream, device=DEVICE)
        sampler_update.launch(
            *state, state[0].clone(), None, slots=torch.arange(5, device=DEVICE), coefficients=rows, step_index=zeros,
            history_length=zeros, guidance_scale=1.0, noise_counters=noise.counters, noise_seed=noise.seed,
        )  # fmt: skip
        assert torch.equal(state[0], noise.draw(frame))


@pytest.mark.parametrize("channels", ["mean", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 1, 3, 5, 7), (1, 1, 3, 4, 1, 1), (9, 2, 2, 2, 61, 103)])
def test_consistency_score_is_within_the_error_budget(
    shape: tuple[int, ...], dtype: torch.dtype, channels: str
) -> None:
    n, k, m, *frame = shape
    common = _randn(*frame)
    reference = _guarded((common + _randn(n, *frame, seed=1)).to(dtype))
    candidates = _guarded((common + _randn(k, m, *frame, seed=2)).to(dtype))
    exact = ops.consistency_score_reference(reference.double(), candidates.double(), channels)
    eager = ops.consistency_score_reference(reference, candidates, channels)
    result = consistency_score.launch(reference, candidates, channels)
    _assert_within_budget(result, eager.float(), exact)
    assert torch.equal(result, consistency_score.launch(reference, candidates, channels))


def test_consistency_score_of_zero_nan_mixed_types_and_no_candidates() -> None:
    frames = _randn(2, 4, 3, 3)
    assert consistency_score.launch(torch.zeros_like(frames), frames[None], "mean").tolist() == [0.0]
    bad = torch.stack([frames, frames.clone()])
    bad[1, 0, 0, 0, 0] = torch.nan
    assert consistency_score.launch(frames, bad, "mean").isnan().tolist() == [False, True]
    assert consistency_score.launch(frames, frames.new_empty(0, 2, 4, 3, 3), "all").shape == (0,)
    mixed = consistency_score.launch(frames.bfloat16(), frames[None], "all")
    torch.testing.assert_close(mixed, ops.consistency_score_reference(frames.bfloat16(), frames[None], "all"))


def _misnamed(indices: torch.Tensor, wrong: list[int]) -> torch.Tensor:
    """The same with the wrong ones in the first places."""
    indices = indices.clone()
    indices.view(-1)[: len(wrong)] = torch.tensor(wrong, device=indices.device)
    return indices


OUT_OF_BOUNDS = [-1, -3, 9, 20]  # one or a few rows beside a table of at most nine rows, where the bands are


def test_norm_modulate_reads_no_row_beside_its_tables() -> None:
    x, y = _guarded(_randn(2, 3, 5, 7)), _guarded(_randn(2, 3, 5, 7, seed=1))
    gate, weight, bias = (_guarded(_randn(4, 7, seed=2 + i)) for i in range(3))
    rows = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    nearest = _misnamed(rows, [0, 0, 3, 3])
    out = norm_modulate.launch_residual(
        x.clone(), y, gate, weight, bias, _misnamed(rows, OUT_OF_BOUNDS), 1e-6, torch.float32
    )
    assert torch.equal(
        out, norm_modulate.launch_residual(x.clone(), y, gate, weight, bias, nearest, 1e-6, torch.float32)
    )


def test_qk_norm_rope_reads_no_position_beside_its_table() -> None:
    shape = (2, 3, 5, 2, 24)
    tables, weight = _rotary(3, 5, 12), _guarded(_randn(48))
    positions = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    results = []
    for wrong in (OUT_OF_BOUNDS, [0, 0, 6, 6]):
        q, k = _fused_qkv(shape, torch.float32)
        qk_norm_rope.launch(q, k, weight, weight, *tables, _misnamed(positions, wrong), 2, 1e-6)
        results.append(torch.cat([q, k]))
    assert torch.equal(*results)  # NaN would not be


def test_sampler_update_touches_nothing_beside_its_state_and_rows() -> None:
    """A slot that is none is left out; a step or a history length that is none becomes the nearest."""
    state, frames, keywords = _queue(torch.float32, fill=1.5)
    for tensor in state:
        tensor.nan_to_num_()
    expected = [tensor.clone() for tensor in state]
    slots = torch.tensor([4, 7, 0, 6, 2**40, -9], device=DEVICE)
    steps = torch.tensor([-1, 0, 99, 5, 0, 0], device=DEVICE)
    lengths = torch.tensor([0, 0, 9, -7, 0, 0], device=DEVICE)
    sampler_update.launch(
        *state, frames[0], None, **(keywords | {"slots": slots, "step_index": steps, "history_length": lengths})
    )
    nearest = {"slots": torch.tensor([4, -1, 0, 6, -1, -1]), "step_index": steps.clamp(0, 5)}
    nearest["history_length"] = lengths.clamp(min=0)
    ops.sampler_update_reference(*expected, frames[0], None, **keywords | nearest)
    for ours, theirs in zip(state, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert bool((_outside(ours) == 1.5).all())
