"""consistency_score against the release's and float64, its kernels against the oracle, and its contract."""

import json

import pytest
import torch
from op_inputs import DTYPES, Kernel, assert_within_budget, guarded, needs_cpp, on_threads, randn
from places import GOLDENS
from safetensors.torch import load_file

from miga_engine import ops

kernel = Kernel("consistency_score")

CONSISTENCY_META = json.loads((GOLDENS / "consistency" / "meta.json").read_text())


@pytest.fixture(scope="module")
def consistency():
    return load_file(GOLDENS / "consistency" / "io.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("case", CONSISTENCY_META["cases"], ids=lambda case: str(case["case"]))
def test_matches_golden(consistency, case):
    reference, group = (consistency[f"case{case['case']}_{name}"].transpose(0, 1) for name in ("saved", "new"))
    assert ops.consistency_score(reference, group[None]).item() == pytest.approx(case["wan"], abs=1e-6)


@pytest.mark.parametrize("sequence", CONSISTENCY_META["trigger_sequences"], ids=lambda seq: str(seq["threshold"]))
def test_falls_of_the_score_trigger_as_in_golden(consistency, sequence):
    previous, flags = None, []
    for index, expected in enumerate(sequence["scores"]):
        reference, group = (
            consistency[f"seq_thr{sequence['threshold']}_{index}_{name}"].transpose(0, 1) for name in ("saved", "new")
        )
        score = ops.consistency_score(reference, group[None]).item()
        assert score == pytest.approx(expected, abs=1e-6)
        flags.append(previous is not None and previous - score > sequence["threshold"])
        previous = score  # a low score becomes the next reference
    assert flags == sequence["flags"]


@pytest.mark.parametrize("channels", ["mean", "all"])
def test_is_the_mean_of_all_cosines(channels):
    generator = torch.Generator().manual_seed(2)
    reference = torch.randn(3, 4, 5, 7, generator=generator)
    candidates = torch.randn(2, 6, 4, 5, 7, generator=generator)
    candidates[1, 2] = 0  # a zero frame counts as 0
    vectors = [
        (t.double().mean(-3) if channels == "mean" else t.double()).flatten(t.ndim - 3) for t in (reference, candidates)
    ]
    expected = torch.nn.functional.cosine_similarity(vectors[1][:, :, None], vectors[0][None, None], dim=-1).mean(
        (1, 2)
    )
    scores = ops.consistency_score(reference, candidates, channels)
    assert scores.dtype == torch.float32
    assert (scores - expected).abs().max() <= 1e-6
    assert ops.consistency_score(reference, torch.zeros_like(candidates), channels).tolist() == [0.0, 0.0]
    narrow = ops.consistency_score(reference.bfloat16(), candidates.bfloat16(), channels)
    assert torch.equal(
        narrow, ops.consistency_score(reference.bfloat16().float(), candidates.bfloat16().float(), channels)
    )


@pytest.mark.slow
@pytest.mark.parametrize("channels", ["mean", "all"])
def test_opcheck(channels):
    frames = torch.randn(5, 4, 5, 7)
    torch.library.opcheck(torch.ops.miga.consistency_score.default, (frames, frames[None] + 1, channels))


@pytest.mark.parametrize(
    ("reference", "candidates", "channels", "message"),
    [
        ((2, 4, 5, 7), (1, 2, 4, 5, 6), "mean", r"candidates has shape \(1, 2, 4, 5, 6\), expected \[k,m,4,5,7\]"),
        ((0, 4, 5, 7), (1, 2, 4, 5, 7), "mean", r"reference has shape \(0, 4, 5, 7\), expected \[n,C,H,W\], n ≥ 1"),
        ((2, 4, 5, 7), (1, 2, 4, 5, 7), "max", r"channels is 'max': choose 'mean' or 'all'"),
    ],
)
def test_refuses_what_does_not_fit(reference, candidates, channels, message):
    with pytest.raises(ValueError, match=message):
        ops.consistency_score(torch.zeros(reference), torch.zeros(candidates), channels)


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("channels", ["mean", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(2, 3, 1, 3, 5, 7), (1, 1, 4, 16, 13, 11), (14, 3, 7, 16, 60, 104), (1, 2, 1, 1, 1, 1)]
)
def test_cpp_is_within_the_error_budget(shape: tuple[int, ...], dtype: torch.dtype, channels: str) -> None:
    n, k, m, *frame = shape
    generator = torch.Generator().manual_seed(sum(shape))
    common = torch.randn(frame, generator=generator)
    reference = (common + torch.randn(n, *frame, generator=generator)).to(dtype)
    candidates = (common + torch.randn(k, m, *frame, generator=generator)).to(dtype)
    exact = ops.consistency_score_reference(reference.double(), candidates.double(), channels)
    eager = ops.consistency_score_reference(reference, candidates, channels).float()
    result = ops.consistency_score(reference, candidates, channels)
    assert result.dtype == torch.float32
    assert_within_budget(result, eager, exact)


@needs_cpp
def test_cpp_takes_strides_and_mixed_types() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(3, 5, 9, 4, generator=generator).permute(0, 3, 1, 2)  # channels last
    poisoned = torch.full((2, 6, 8, 7, 11), torch.nan)  # what lies between the candidates' elements
    candidates = poisoned[:, 1::2, ::2, 1:6, 1:10]
    candidates.copy_(torch.randn(candidates.shape, generator=generator))
    exact = ops.consistency_score_reference(reference.double(), candidates.bfloat16().double())
    result = ops.consistency_score(reference, candidates.bfloat16())
    torch.testing.assert_close(result.double(), exact, atol=1e-6, rtol=0)


@needs_cpp
def test_cpp_of_zero_nan_and_no_candidates() -> None:
    frames = torch.randn(2, 4, 3, 3)
    assert ops.consistency_score(torch.zeros(2, 4, 3, 3), frames[None]).tolist() == [0.0]
    bad = torch.stack([frames, frames.masked_fill(torch.arange(3) == 1, torch.nan)])
    assert ops.consistency_score(frames, bad).isnan().tolist() == [False, True]
    assert ops.consistency_score(frames, frames.new_empty(0, 2, 4, 3, 3)).shape == (0,)


@needs_cpp
def test_cpp_does_not_depend_on_threads() -> None:
    reference, candidates = torch.randn(4, 16, 30, 52), torch.randn(5, 4, 16, 30, 52)
    one, two = (on_threads(count, lambda: ops.consistency_score(reference, candidates)) for count in (1, 2))
    assert torch.equal(one, two)


@pytest.mark.slow
@needs_cpp
def test_cpp_meets_its_contract() -> None:
    arguments = (torch.randn(2, 4, 3, 5), torch.randn(3, 2, 4, 3, 5), "all")
    torch.library.opcheck(torch.ops.miga.consistency_score.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("channels", ["mean", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 1, 3, 5, 7), (1, 1, 3, 4, 1, 1), (9, 2, 2, 2, 61, 103)])
def test_triton_is_within_the_error_budget(shape: tuple[int, ...], dtype: torch.dtype, channels: str) -> None:
    n, k, m, *frame = shape
    common = randn(*frame)
    reference = guarded((common + randn(n, *frame, seed=1)).to(dtype))
    candidates = guarded((common + randn(k, m, *frame, seed=2)).to(dtype))
    exact = ops.consistency_score_reference(reference.double(), candidates.double(), channels)
    eager = ops.consistency_score_reference(reference, candidates, channels)
    result = kernel.launch(reference, candidates, channels)
    assert_within_budget(result, eager.float(), exact)
    assert torch.equal(result, kernel.launch(reference, candidates, channels))


@pytest.mark.slow
def test_triton_of_zero_nan_mixed_types_and_no_candidates() -> None:
    frames = randn(2, 4, 3, 3)
    assert kernel.launch(torch.zeros_like(frames), frames[None], "mean").tolist() == [0.0]
    bad = torch.stack([frames, frames.clone()])
    bad[1, 0, 0, 0, 0] = torch.nan
    assert kernel.launch(frames, bad, "mean").isnan().tolist() == [False, True]
    assert kernel.launch(frames, frames.new_empty(0, 2, 4, 3, 3), "all").shape == (0,)
    mixed = kernel.launch(frames.bfloat16(), frames[None], "all")
    torch.testing.assert_close(mixed, ops.consistency_score_reference(frames.bfloat16(), frames[None], "all"))
