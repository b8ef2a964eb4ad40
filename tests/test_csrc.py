"""The C++ CPU kernels against the float64 oracle, and how they are found."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from miga_engine import _extension, ops
from miga_engine.ops import reference as oracle
from miga_engine.schedule import make_schedule

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0])

needs_kernels = pytest.mark.skipif(not _extension.LIBRARY.is_file() and COMPILER is None, reason="no C++ compiler here")


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> None:
    _extension.load()


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
    exact = oracle.consistency_score(reference.double(), candidates.double(), channels)
    eager = oracle.consistency_score(reference, candidates, channels).float()
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
    exact = oracle.consistency_score(reference.double(), candidates.bfloat16().double())
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
@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_guided", [True, False])
@pytest.mark.parametrize("with_noise", [True, False])
def test_sampler_update_equals_the_oracle_bit_for_bit(dtype, velocity, is_guided, with_noise) -> None:
    """Same operations in the same order, without contraction: not even rounding differs."""
    state, frames, keywords = _update_arguments(dtype, velocity)
    keywords["noise"] = frames[2] if with_noise else None
    expected = [tensor.clone() for tensor in state]
    velocities = (frames[0], frames[1] if is_guided else None)
    oracle.sampler_update(*expected, *velocities, **keywords)
    ops.sampler_update(*state, *velocities, **keywords)
    for ours, theirs in zip(state, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@needs_kernels
def test_sampler_update_in_strided_memory_and_on_several_threads() -> None:
    state, frames, keywords = _update_arguments(torch.float32, torch.float32, (7, 16, 60, 104))
    expected = [tensor.clone() for tensor in state]
    oracle.sampler_update(*expected, frames[0], frames[1], **keywords)
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
