"""Triton kernels against the float64 oracle: interpreted on the CPU, or on the GPU where there is one."""

import pytest
import torch

from miga_engine.ops import reference as oracle

triton = pytest.importorskip("triton", reason="Triton is for Linux only")

from miga_engine.kernels import consistency_score  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    n, k, m, *frame = shape
    generator = torch.Generator().manual_seed(sum(shape))
    common = torch.randn(frame, generator=generator)
    reference = common + torch.randn(n, *frame, generator=generator)
    candidates = common + torch.randn(k, m, *frame, generator=generator)
    return _guarded(reference.to(dtype)), _guarded(candidates.to(dtype))


def _guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with NaN before and behind them in memory."""
    band = 2048
    memory = torch.full((tensor.numel() + 2 * band,), torch.nan, dtype=tensor.dtype, device=DEVICE)
    view = memory[band : band + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("channels", ["mean", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 1, 3, 5, 7), (1, 1, 3, 4, 1, 1), (2, 2, 2, 2, 61, 103)])
def test_consistency_score_is_within_the_error_budget(
    shape: tuple[int, ...], dtype: torch.dtype, channels: str
) -> None:
    reference, candidates = _inputs(shape, dtype)
    exact = oracle.consistency_score(reference.double(), candidates.double(), channels)
    eager = oracle.consistency_score(reference, candidates, channels)
    result = consistency_score.launch(reference, candidates, channels)
    assert result.dtype == torch.float32
    budget = float((eager - exact).abs().max()) + torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert float((result - exact).abs().max()) <= 2 * budget


def test_consistency_score_of_zero_nan_and_no_candidates() -> None:
    frames = torch.randn(2, 4, 3, 3, device=DEVICE)
    assert consistency_score.launch(torch.zeros_like(frames), frames[None], "mean").tolist() == [0.0]
    bad = torch.stack([frames, frames.clone()])
    bad[1, 0, 0, 0, 0] = torch.nan
    assert consistency_score.launch(frames, bad, "mean").isnan().tolist() == [False, True]
    assert consistency_score.launch(frames, frames.new_empty(0, 2, 4, 3, 3), "all").shape == (0,)
