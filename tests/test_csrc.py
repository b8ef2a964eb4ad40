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
