"""The C++ CPU kernels against the float64 oracle, and how they are found."""

import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from places import ROOT

from miga_engine import _extension, ops
from miga_engine.noise import FrameNoise, Purpose, frame_noise
from miga_engine.schedule import COLUMNS, NUM_COEFFICIENTS, NUM_HISTORY_LENGTHS, make_schedule

COMPILER = shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0])

needs_kernels = pytest.mark.skipif(not _extension.LIBRARY.is_file() and COMPILER is None, reason="no C++ compiler here")


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> None:
    _extension.load()


def _guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with NaN before and behind them in memory."""
    band = 256
    memory = torch.full((tensor.numel() + 2 * band,), torch.nan, dtype=tensor.dtype)
    view = memory[band : band + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def _bands_are_untouched(view: torch.Tensor) -> bool:
    memory = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    return int(memory.isnan().sum()) == memory.numel() - view.numel() and bool(view.isfinite().all())


def _assert_within_budget(result: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor | np.ndarray) -> None:
    """exact: float64, or long double where the result is float64."""
    assert (result.shape, result.dtype) == (exact.shape, eager.dtype)
    wide = exact if isinstance(exact, np.ndarray) else exact.numpy()
    error, allowed = (float(abs(tensor.double().numpy() - wide).max()) for tensor in (result, eager))
    assert error <= 2 * (allowed + torch.finfo(result.dtype).eps * float(abs(wide).max()))  # False for NaN


def _on_threads(count: int, function):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return function()
    finally:
        torch.set_num_threads(before)


def _err(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).abs().max())


@needs_kernels
def test_kernels_are_built_and_registered() -> None:
    assert _extension.load(), "a C++ compiler is here: run `python setup.py build_ext --inplace`"
    assert torch._C._dispatch_has_kernel_for_dispatch_key("miga::consistency_score", "CPU")
    assert _extension.status() == f"C++ CPU kernels are loaded from {_extension.LIBRARY}."


@needs_kernels
@pytest.mark.parametrize("channels", ["mean", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(2, 3, 1, 3, 5, 7), (1, 1, 4, 16, 13, 11), (14, 3, 7, 16, 60, 104), (1, 2, 1, 1, 1, 1)]
)
def test_consistency_score_is_within_the_error_budget(
    shape: tuple[int, ...], dtype: torch.dtype, channels: str
) -> None:
    n, k, m, *frame = shape
    generator = torch.Generator().manual_seed(sum(shape))
    common = torch.randn(frame, generator=generator)
    reference = (common + torch.randn(n, *frame, generator=generator)).to(dtype)
    candidates = (common + torch.randn(k, m, *frame, generator=generator)).to(dtype)
    exact = ops.consistency_score_reference(reference.double(), candidates.double(), channels)
    eager = ops.consistency_score_reference(reference, candidates, channels).float()
    result = ops.consistency_score(reference, candidates, channels)
    assert result.dtype == torch.float32
    assert _err(result, exact) <= 2 * (_err(eager, exact) + torch.finfo(torch.float32).eps * float(exact.abs().max()))


@needs_kernels
def test_consistency_score_takes_strides_and_mixed_types() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(3, 5, 9, 4, generator=generator).permute(0, 3, 1, 2)  # channels last
    poisoned = torch.full((2, 6, 8, 7, 11), torch.nan)  # what lies between the candidates' elements
    candidates = poisoned[:, 1::2, ::2, 1:6, 1:10]
    candidates.copy_(torch.randn(candidates.shape, generator=generator))
    exact = ops.consistency_score_reference(reference.double(), candidates.bfloat16().double())
    result = ops.consistency_score(reference, candidates.bfloat16())
    torch.testing.assert_close(result.double(), exact, atol=1e-6, rtol=0)


@needs_kernels
def test_consistency_score_of_zero_nan_and_no_candidates() -> None:
    frames = torch.randn(2, 4, 3, 3)
    assert ops.consistency_score(torch.zeros(2, 4, 3, 3), frames[None]).tolist() == [0.0]
    bad = torch.stack([frames, frames.masked_fill(torch.arange(3) == 1, torch.nan)])
    assert ops.consistency_score(frames, bad).isnan().tolist() == [False, True]
    assert ops.consistency_score(frames, frames.new_empty(0, 2, 4, 3, 3)).shape == (0,)


@needs_kernels
def test_consistency_score_does_not_depend_on_threads() -> None:
    reference, candidates = torch.randn(4, 16, 30, 52), torch.randn(5, 4, 16, 30, 52)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.consistency_score(reference, candidates)
        torch.set_num_threads(2)
        assert torch.equal(one, ops.consistency_score(reference, candidates))
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_consistency_score_meets_its_contract() -> None:
    arguments = (torch.randn(2, 4, 3, 5), torch.randn(3, 2, 4, 3, 5), "all")
    torch.library.opcheck(torch.ops.miga.consistency_score.default, arguments)


def test_missing_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_extension, "LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(_extension, "load", _extension.load.__wrapped__)
    assert _extension.status().startswith("C++ CPU kernels were not built, because no working C++ compiler")
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert _extension.status().startswith("C++ CPU kernels do not load (")


def _setup(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path / "t"),
    ]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_broken_compiler_is_reported_and_survived(tmp_path: Path) -> None:
    run = _setup(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert run.returncode == 0, run.stderr
    assert "miga_engine: the C++ CPU kernels could not be built and are left out" in run.stderr
    assert not list(tmp_path.rglob("_C.so"))


def test_demanded_kernels_must_build(tmp_path: Path) -> None:
    assert _setup(tmp_path, CC="/bin/false", CXX="/bin/false", MIGA_BUILD_EXT="1").returncode != 0
    run = _setup(tmp_path, MIGA_BUILD_EXT="yes")
    assert run.returncode != 0
    assert "MIGA_BUILD_EXT is 'yes': choose auto, 1 or 0" in run.stderr


def _update_arguments(dtype: torch.dtype, velocity: torch.dtype, shape: tuple[int, ...] = (7, 3, 5, 11)) -> tuple:
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


@needs_kernels
@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_guided", [True, False])
@pytest.mark.parametrize("with_noise", [True, False])
def test_sampler_update_equals_the_oracle_bit_for_bit(dtype, velocity, is_guided, with_noise) -> None:
    """Same operations in the same order, without contraction: not even rounding differs."""
    state, frames, keywords = _update_arguments(dtype, velocity)
    keywords["noise"] = frames[2] if with_noise else None
    expected = [tensor.clone() for tensor in state]
    velocities = (frames[0], frames[1] if is_guided else None)
    ops.sampler_update_reference(*expected, *velocities, **keywords)
    ops.sampler_update(*state, *velocities, **keywords)
    for ours, theirs in zip(state, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@needs_kernels
def test_sampler_update_in_strided_memory_and_on_several_threads() -> None:
    state, frames, keywords = _update_arguments(torch.float32, torch.float32, (7, 16, 60, 104))
    expected = [tensor.clone() for tensor in state]
    ops.sampler_update_reference(*expected, frames[0], frames[1], **keywords)
    strided = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in state]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ops.sampler_update(*strided, frames[0].transpose(2, 3).contiguous().transpose(2, 3), frames[1], **keywords)
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(strided, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@needs_kernels
def test_sampler_update_meets_its_contract() -> None:
    state, frames, keywords = _update_arguments(torch.float32, torch.bfloat16)
    clean = [tensor.nan_to_num() for tensor in (*state, frames[0], frames[1])]
    torch.library.opcheck(torch.ops.miga.sampler_update.default, tuple(clean), keywords)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 3, 5, 7), (7, 16, 60, 104)])
def test_sampler_update_draws_the_noise_of_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit, in several runs of a frame or in part of a block, and only where the row uses noise."""
    state, frames, keywords = _update_arguments(dtype, torch.bfloat16, shape)
    generator = torch.Generator().manual_seed(4)
    keywords["coefficients"] = keywords["coefficients"].clone()
    p_n = keywords["coefficients"][..., COLUMNS.index("p_n")]
    p_n.copy_(torch.rand(p_n.shape, generator=generator))
    p_n[0, 0] = p_n[4, 2] = 0
    noise = frame_noise(-3, Purpose.SOLVER, [7, -1, 2**40 + 5, 0, 9], stream=[3, 0, 2**32 - 1, 4, 1])
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


def test_columns_have_one_order() -> None:
    """The kernels name the columns that schedule.py lays out."""
    source = (ROOT / "csrc" / "sampler_update.h").read_text()
    *names, last = re.search(r"enum Column : int64_t {(.*?)}", source)[1].replace(" ", "").split(",")
    assert names == ["k" + name.replace("_", "").upper() for name in COLUMNS]
    assert last == "kNumCoefficients"
    kernel = pytest.importorskip("miga_engine.kernels.sampler_update", reason="Triton is for Linux only")
    assert [getattr(kernel, f"_{name.upper()}").value for name in COLUMNS] == list(range(len(COLUMNS)))


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


@needs_kernels
def test_drawn_normals_are_those_of_noise_py() -> None:
    """float64 functions of two libraries may round a float32 differently: by one ulp, at most one value in 2²⁴."""
    shape = (16, 120, 131)
    noise = frame_noise(0x1234_5678_9ABC_DEF0, Purpose.CANDIDATE, range(-5, 5), stream=77)
    ours, theirs = _only_noise(noise, shape), noise.draw(shape)
    assert ours.numel() > 2_000_000
    differ = ours != theirs
    assert int(differ.sum()) <= ours.numel() / 2**24
    steps = ours.view(torch.int32).long() - theirs.view(torch.int32).long()
    assert int(steps.abs().max()) <= 1


@needs_kernels
def test_sampler_update_with_drawn_noise_meets_its_contract_on_any_number_of_threads() -> None:
    state, frames, keywords = _update_arguments(torch.float32, torch.float32, (7, 16, 30, 52))
    keywords["coefficients"] = keywords["coefficients"] + 0.5
    clean = [tensor.nan_to_num() for tensor in (*state, frames[0], frames[1])]
    noise = frame_noise(1, Purpose.SOLVER, range(5))
    drawing = keywords | {"noise_counters": noise.counters, "noise_seed": noise.seed}
    torch.library.opcheck(torch.ops.miga.sampler_update.default, tuple(clean), drawing)

    def update() -> list[torch.Tensor]:
        arguments = [tensor.clone() for tensor in clean]
        torch.ops.miga.sampler_update(*arguments, **drawing)
        return arguments

    for one, two in zip(_on_threads(1, update), _on_threads(2, update), strict=True):
        assert torch.equal(one, two)


# Tables of R rows of a block's [R,6,D], and whether frames are indexed: one row serves every frame in any case.
TABLES = {"many": (5, True), "one": (1, False), "one_indexed": (1, True)}


def _modulation(shape: tuple[int, ...], dtype: torch.dtype, table: str, seed: int = 0) -> tuple:
    """x, gate, weight, bias, rows; memory that no kernel may read is NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, has_rows = TABLES[table]
    x = _guarded((torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype))
    tables = torch.full((num_rows, 6, shape[3]), torch.nan, dtype=dtype)
    for index in (0, 2, 5):
        tables[:, index] = torch.randn(num_rows, shape[3], generator=generator) + 1
    rows = torch.randint(0, num_rows + 3 * (table == "one_indexed"), shape[:2], generator=generator)
    return x, tables[:, 0], tables[:, 2], tables[:, 5], rows if has_rows else None


SHAPES = [(1, 2, 1, 7), (2, 3, 5, 24), (1, 4, 5, 192), (2, 2, 3, 1536), (1, 3, 5, 77)]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_modulate_is_within_the_error_budget(shape, table, state, dtype) -> None:
    x, _, weight, bias, rows = _modulation(shape, state, table)
    before = x.clone()
    exact = ops.norm_modulate_reference(x.double(), weight.double(), bias.double(), rows, 1e-6, torch.float64)
    eager = ops.norm_modulate_reference(x, weight, bias, rows, 1e-6, dtype)
    result = ops.norm_modulate(x, weight, bias, rows, eps=1e-6, dtype=dtype)
    _assert_within_budget(result, eager, exact)
    assert torch.equal(x, before)
    assert result.is_contiguous()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("table", [*TABLES, "no_gate", "no_norm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_norm_modulate_is_within_the_error_budget(shape, table, state, dtype) -> None:
    x, gate, weight, bias, rows = _modulation(shape, state, table if table in TABLES else "many", seed=1)
    gate = None if table == "no_gate" else gate
    weight, bias = (None, None) if table == "no_norm" else (weight, bias)
    y = _guarded(torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    exact_x, eager_x = x.to(torch.float64, copy=True), x.clone()
    tables = [None if part is None else part.double() for part in (gate, weight, bias)]
    exact = ops.residual_norm_modulate_reference(exact_x, y.double(), *tables, rows, 1e-6, torch.float64)
    eager = ops.residual_norm_modulate_reference(eager_x, y, gate, weight, bias, rows, 1e-6, dtype)
    result = ops.residual_norm_modulate(x, y, gate, weight, bias, rows, eps=1e-6, dtype=dtype)
    _assert_within_budget(x, eager_x, exact_x)
    _assert_within_budget(result, eager, exact)
    assert _bands_are_untouched(x)
    assert _bands_are_untouched(y)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_types_are_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 2, 4, -1)
    x = torch.zeros(every.shape)
    ops.residual_norm_modulate(x, every, None, None, None, eps=0.0, dtype=torch.float32)
    torch.testing.assert_close(x, every.float(), rtol=0, atol=0, equal_nan=True)
    # Each value, the middles between neighbours and the floats beside those: both roundings, all ties, overflow.
    bits = every.float().view(torch.int32).flatten()
    half_step = 1 << (15 if dtype == torch.bfloat16 else 12)
    near = torch.stack([bits + offset for offset in (0, 1, -1, half_step - 1, half_step, half_step + 1)])
    subnormal = torch.arange(-4096, 4096).mul(2.0**-26)
    values = torch.cat([near.flatten().view(torch.float32), subnormal]).reshape(1, 1, 8, -1)
    rounded = ops.norm_modulate(values, None, None, eps=0.0, dtype=dtype)
    torch.testing.assert_close(rounded, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rounded.signbit()[values.isfinite()], values.signbit()[values.isfinite()])


@needs_kernels
def test_modulation_of_nothing_and_of_large_means() -> None:
    for shape in ((1, 0, 3, 8), (0, 2, 3, 8), (1, 2, 0, 8)):
        x, _, weight, bias, rows = _modulation(shape, torch.float32, "many")
        assert ops.norm_modulate(x, weight, bias, rows, eps=1e-6, dtype=torch.bfloat16).shape == shape
    x, _, weight, bias, rows = _modulation((1, 2, 3, 1536), torch.float32, "many")
    x += 1000  # statistics in two passes: no cancellation
    exact = ops.norm_modulate_reference(x.double(), weight.double(), bias.double(), rows, 1e-6, torch.float64)
    eager = ops.norm_modulate_reference(x, weight, bias, rows, 1e-6, torch.float32)
    _assert_within_budget(ops.norm_modulate(x, weight, bias, rows, eps=1e-6, dtype=torch.float32), eager, exact)


def _heads(num_heads, head_width, batch, num_frames, tokens_per_frame, dtype, table_dtype) -> dict:
    """Queries and keys as slices of one projection whose values (the third slice) and margins are NaN."""
    generator = torch.Generator().manual_seed(head_width)
    num_tokens, width = num_frames * tokens_per_frame, num_heads * head_width
    fused = torch.full((batch, num_tokens, 3 * width + 5), torch.nan, dtype=dtype)
    q, k = fused[..., :width], fused[..., width : 2 * width]
    for tensor in (q, k):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    time_pairs = head_width // 2 - 2 * (head_width // 6)
    angles = torch.randn(num_frames + 4, time_pairs, generator=generator, dtype=torch.float64) * 3
    places = torch.randn(tokens_per_frame, head_width // 2 - time_pairs, generator=generator, dtype=torch.float64) * 3
    tables = [torch.stack([part.cos(), part.sin()], 1).to(table_dtype) for part in (angles, places)]
    positions = torch.randint(0, num_frames + 4, (batch, num_frames), generator=generator)
    weights = torch.rand(2, width, generator=generator, dtype=torch.float64).add(0.5).to(table_dtype)
    return {
        "fused": fused, "q": q, "k": k, "weights": weights.unbind(), "temporal": tables[0], "spatial": tables[1],
        "positions": positions,
    }  # fmt: skip


def _rotate(implementation, case: dict, dtype: torch.dtype, num_heads: int, parts: str) -> list[torch.Tensor]:
    """The op on contiguous copies of q and k in `dtype`: parts names what is given, of norm and rope."""
    wide = torch.float64 if dtype == torch.float64 else None
    q, k = case["q"].to(dtype, copy=True), case["k"].to(dtype, copy=True)
    weights = [weight.to(wide) for weight in case["weights"]] if "norm" in parts else [None, None]
    tables = [case["temporal"].to(wide), case["spatial"].to(wide), case["positions"]] if "rope" in parts else [None] * 3
    implementation(q, k, *weights, *tables, num_heads, 1e-6)
    return [q, k]


HEADS = [(1, 8, 2, 3, 1), (2, 12, 2, 3, 5), (4, 48, 1, 4, 5), (12, 128, 1, 2, 3), (3, 26, 1, 2, 5)]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parts", ["norm and rope", "rope", "norm"])
@pytest.mark.parametrize("shape", HEADS)
def test_qk_norm_rope_is_within_the_error_budget(shape, parts, table_dtype, dtype) -> None:
    num_heads = shape[0]
    case = _heads(*shape, dtype, table_dtype)
    exact = _rotate(ops.qk_norm_rope_reference, case, torch.float64, num_heads, parts)
    eager = _rotate(ops.qk_norm_rope_reference, case, dtype, num_heads, parts)
    weights = case["weights"] if "norm" in parts else [None, None]
    tables = [case["temporal"], case["spatial"], case["positions"]] if "rope" in parts else [None] * 3
    given = [tensor.clone() for tensor in (*case["weights"], *case["temporal"], *case["spatial"])]
    torch.ops.miga.qk_norm_rope(case["q"], case["k"], *weights, *tables, num_heads, 1e-6)
    for result, other, truth in zip((case["q"], case["k"]), eager, exact, strict=True):
        _assert_within_budget(result, other, truth)
    assert case["fused"][..., 2 * case["q"].shape[2] :].isnan().all()
    for old, new in zip(given, (*case["weights"], *case["temporal"], *case["spatial"]), strict=True):
        assert torch.equal(old, new)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [7, 24, 192, 1536])
def test_rms_norm_is_within_the_error_budget(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    q = _guarded(torch.randn(2, 5, width, generator=generator).to(dtype))
    weight = _guarded(torch.rand(width, generator=generator) + 0.5)
    exact, eager = q.to(torch.float64, copy=True), q.clone()
    for tensor, factor in ((exact, weight.double()), (eager, weight)):
        ops.qk_norm_rope_reference(tensor, None, factor, None, None, None, None, 1, 1e-6)
    assert ops.rms_norm_(q, weight, eps=1e-6) is q
    _assert_within_budget(q, eager, exact)
    assert _bands_are_untouched(q)


def _long(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy().astype(np.longdouble)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_modulation_in_float64_is_within_the_error_budget_of_long_double(shape: tuple[int, ...]) -> None:
    x, gate, weight, bias, rows = _modulation(shape, torch.float64, "many", seed=1)
    y = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gates, weights, biases = (_long(table[rows])[:, :, None] for table in (gate, weight, bias))
    exact_x = _long(x) + gates * _long(y)
    centered = exact_x - exact_x.mean(-1, keepdims=True)
    exact = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * weights + biases
    eager_x = x.clone()
    eager = ops.residual_norm_modulate_reference(eager_x, y, gate, weight, bias, rows, 1e-6, torch.float64)
    result = ops.residual_norm_modulate(x, y, gate, weight, bias, rows, eps=1e-6, dtype=torch.float64)
    _assert_within_budget(x, eager_x, exact_x)
    _assert_within_budget(result, eager, exact)
    assert torch.equal(result, ops.norm_modulate(x, weight, bias, rows, eps=1e-6, dtype=torch.float64))


@needs_kernels
@pytest.mark.parametrize("shape", HEADS)
def test_qk_norm_rope_in_float64_is_within_the_error_budget_of_long_double(shape: tuple[int, ...]) -> None:
    num_heads, head_width, batch, num_frames, tokens_per_frame = shape
    case = _heads(*shape, torch.float64, torch.float64)
    in_time = _long(case["temporal"][case["positions"]]).repeat(tokens_per_frame, axis=1)  # [B,N,2,t]
    in_space = np.tile(_long(case["spatial"]), (batch, num_frames, 1, 1))
    cos, sin = np.moveaxis(np.concatenate([in_time, in_space], axis=-1)[:, :, :, None], 2, 0)  # [B,N,1,pairs]
    eager = _rotate(ops.qk_norm_rope_reference, case, torch.float64, num_heads, "norm and rope")
    results = _rotate(torch.ops.miga.qk_norm_rope, case, torch.float64, num_heads, "norm and rope")
    for name, weight, other, result in zip("qk", case["weights"], eager, results, strict=True):
        x = _long(case[name])
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * _long(weight)
        pairs = x.reshape(*x.shape[:2], num_heads, head_width // 2, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        exact = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
        _assert_within_budget(result, other, exact)


@needs_kernels
def test_qk_norm_rope_takes_tables_in_strided_memory() -> None:
    case, strided = (_heads(2, 12, 2, 3, 5, torch.float32, torch.float32) for _ in range(2))
    for name in ("temporal", "spatial", "positions"):
        spread = torch.full((*case[name].shape, 2), -1 if name == "positions" else torch.nan, dtype=case[name].dtype)
        strided[name] = spread[..., 0].copy_(case[name])
    for each in (case, strided):
        tables = {name: each[name] for name in ("temporal", "spatial", "positions")}
        ops.qk_norm_rope(each["q"], each["k"], *each["weights"], **tables, num_heads=2, eps=1e-6)
    assert torch.equal(case["q"], strided["q"])
    assert torch.equal(case["k"], strided["k"])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_on_tokens_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    x, gate, weight, bias, rows = _modulation((2, 3, 37, 192), torch.float32, "many")
    y = torch.randn(x.shape).to(dtype)

    def modulate() -> list[torch.Tensor]:
        state = x.clone()
        out = torch.ops.miga.residual_norm_modulate(state, y, gate, weight, bias, rows, 1e-6, dtype)
        return [state, out, torch.ops.miga.norm_modulate(x, weight, bias, rows, 1e-6, dtype)]

    def rotate() -> list[torch.Tensor]:
        case = _heads(4, 48, 2, 3, 37, dtype, torch.float32)
        return _rotate(torch.ops.miga.qk_norm_rope, case, dtype, 4, "norm and rope")

    for function in (modulate, rotate):
        for one, two in zip(_on_threads(1, function), _on_threads(2, function), strict=True):
            assert torch.equal(one, two)


@needs_kernels
def test_ops_on_tokens_meet_their_contracts() -> None:
    x, gate, weight, bias, rows = _modulation((2, 3, 5, 24), torch.float32, "many")
    y = torch.randn(x.shape).bfloat16()
    ops_ = torch.ops.miga
    gate, weight, bias = (table.contiguous() for table in (gate, weight, bias))
    for table in ((weight, bias, rows), (None, None, None)):
        torch.library.opcheck(ops_.norm_modulate.default, (x.clone(), *table, 1e-6, torch.bfloat16))
        arguments = (x.clone(), y, gate if rows is table[2] else None, *table, 1e-6, torch.float32)
        torch.library.opcheck(ops_.residual_norm_modulate.default, arguments)
    case = _heads(2, 12, 2, 3, 5, torch.bfloat16, torch.float32)
    q, k = case["q"].contiguous(), case["k"].contiguous()
    tables = (case["temporal"], case["spatial"], case["positions"])
    torch.library.opcheck(ops_.qk_norm_rope.default, (q, k, *case["weights"], *tables, 2, 1e-6))
    torch.library.opcheck(ops_.qk_norm_rope.default, (q, None, case["weights"][0], None, None, None, None, 1, 1e-6))


@needs_kernels
@pytest.mark.parametrize("shape", [(1,), (63,), (2, 64), (3, 5, 129), (2, 13, 24, 768)])
def test_gelu_is_within_the_error_budget_on_any_number_of_threads(shape: tuple[int, ...]) -> None:
    drawn = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, eager = (F.gelu(x, approximate="tanh") for x in (drawn.double(), drawn))
    one, two = _guarded(drawn), _guarded(drawn)
    _on_threads(1, lambda: torch.ops.miga.gelu_(one))
    _on_threads(2, lambda: torch.ops.miga.gelu_(two))
    _assert_within_budget(one, eager, exact)
    assert _bands_are_untouched(one)
    assert torch.equal(one, two)


@needs_kernels
def test_gelu_of_values_of_any_size() -> None:
    sizes = torch.logspace(-44, 38, 4001)
    x = torch.cat([torch.zeros(1), sizes, -sizes])
    expected = F.gelu(x.double(), approximate="tanh")
    torch.ops.miga.gelu_(result := x.clone())
    assert bool(((result - expected).abs() <= 3e-7 * x.abs() + 3e-45).all())
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    torch.ops.miga.gelu_(special)
    assert special.isfinite().tolist() == [False] * 3
    torch.ops.miga.gelu_(torch.empty(0, 3))


# Every kernel on the same numbers, what it wrote (with a margin behind it) as bytes on the standard output.
CLONES_PROGRAM = """
#include <cstdio>
#include <vector>
#include "consistency_score.h"
#include "gelu.h"
#include "norm_modulate.h"
#include "core/normal_noise.h"
#include "qk_norm_rope.h"
#include "sampler_update.h"
using namespace miga;

template <typename T> std::vector<T> numbers(int size, unsigned state) {
  std::vector<T> values(size);
  for (T& value : values) value = T(int((state = state * 1664525u + 1013904223u) >> 8) - (1 << 23)) / T(1 << 22);
  return values;
}
template <typename V> void print(const V& values) { fwrite(values.data(), sizeof(values[0]), values.size(), stdout); }

template <typename T, typename E> void tokens(int width, int heads, ElementType type) {
  auto x = numbers<T>(width + 9, 1), gate = numbers<T>(width, 2);
  auto weight = numbers<T>(width, 3), bias = numbers<T>(width, 4);
  std::vector<T> scratch(2 * width);
  std::vector<E> y(width), out(width + 9);
  auto bits = numbers<float>(width, 5);
  for (int i = 0; i < width; ++i) y[i] = narrow<E>(bits[i]);
  add_gated(x.data(), {y.data(), type}, gate.data(), width, scratch.data());
  norm_modulate(x.data(), weight.data(), bias.data(), T(1e-6), width, {out.data(), type});
  print(x);
  print(out);
  const int head_width = width / heads, pairs = head_width / 2;
  std::vector<T> cos(head_width), sin(head_width);
  expand_pairs(gate.data(), bias.data(), pairs, cos.data(), sin.data());
  for (int form = 0; form < 3; ++form) {
    const bool has_rotation = form != 2 && head_width % 2 == 0;
    norm_rotate({out.data(), type}, form == 1 ? nullptr : weight.data(), has_rotation ? cos.data() : nullptr,
                sin.data(), heads, head_width, T(1e-6), scratch.data());
    print(out);
  }
}

template <typename T> void update() {
  std::vector<T> state[4];
  for (int i = 0; i < 4; ++i) state[i] = numbers<T>(1503, 11 + i);
  auto velocity = numbers<float>(2000, 20), uncond = numbers<float>(2000, 21);
  auto row = numbers<T>(kNumCoefficients, 22);
  const NoiseStream stream{{1, 2}, {3, 4, 5}};
  const SamplerRun<T> run{state[0].data(), state[1].data(), state[2].data(), state[3].data(),
                          {velocity.data(), ElementType::kFloat}, {uncond.data(), ElementType::kFloat},
                          {nullptr, ElementType::kFloat}, 7, &stream, 20};
  update_run(run, row.data(), true, T(4.5), 1500);
  for (const auto& values : state) print(values);
}

int main() {
  for (int width : {7, 24, 192, 1536}) {
    const int heads = width == 7 ? 1 : width == 1536 ? 12 : 2;
    tokens<float, float>(width, heads, ElementType::kFloat);
    tokens<float, BFloat16>(width, heads, ElementType::kBFloat16);
    tokens<float, Half>(width, heads, ElementType::kHalf);
    tokens<double, double>(width, heads, ElementType::kDouble);
  }
  update<float>();
  update<double>();
  std::vector<float> normals(100003);
  draw_normals({{1, 2}, {3, 4, 5}}, 8, 99999, normals.data());
  print(normals);
  auto frames = numbers<float>(3 * 4 * 35, 30);
  std::vector<float> sum(4 * 35), scratch(35);
  add_mean_direction(frames.data(), 3, 4, 35, true, sum.data(), scratch.data());
  add_mean_direction(frames.data(), 3, 4, 35, false, sum.data(), scratch.data());
  print(sum);
  gelu(normals.data(), 99999);
  print(normals);
}
"""


@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="no C++ compiler for x86-64 here")
def test_every_clone_gives_the_same_bits(tmp_path: Path) -> None:
    """The clones differ in their instructions only, so each is compiled as a program of its own."""
    processor = Path("/proc/cpuinfo").read_text()
    targets = ["x86-64"] + ["x86-64-v3"] * (" avx2 " in processor) + ["x86-64-v4"] * (" avx512vl " in processor)
    program = tmp_path / "clones.cpp"
    program.write_text(CLONES_PROGRAM)
    sources = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "core").glob("*.cpp")]
    flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-DMIGA_ONE_TARGET"]
    outputs = []
    for target in targets:
        binary = tmp_path / target
        command = [COMPILER, *flags, f"-march={target}", f"-I{ROOT / 'csrc'}", program, *sources, "-o", binary]
        subprocess.run(command, check=True)
        outputs.append(subprocess.run([binary], capture_output=True, check=True).stdout)
    assert len(outputs[0]) > 400_000
    assert all(output == outputs[0] for output in outputs[1:])
