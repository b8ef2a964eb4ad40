"""guidance_dots against float64 sums, its kernels against the oracle, and its contract."""

import numpy as np
import pytest
import torch
from op_inputs import DEVICE, DTYPES, Kernel, assert_within_budget, guarded, needs_cpp, on_threads, randn

from miga_engine import ops

kernel = Kernel("guidance_dots")
SLOTS = [4, -1, 0, 4, 2]
DIRECTIONS = [[0.0, 0.0, 1.0], [1.0, 2.0, 3.0], [1.5, -0.7, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, -1.0]]


def _arguments(velocity: torch.dtype, frame: tuple[int, ...] = (3, 37, 41)) -> tuple[list, dict]:
    """Five frames, one without a slot; the sample that no direction uses is NaN, and so is that frame."""
    sample = guarded(randn(7, *frame))
    sample[[1, 3, 5, 6]] = torch.nan
    velocities = [guarded(randn(5, *frame, seed=i).to(velocity)) for i in (1, 2)]
    velocities[0][1] = torch.nan
    slots = torch.tensor(SLOTS, device=DEVICE)
    return [sample, *velocities], {"slots": slots, "direction": guarded(torch.tensor(DIRECTIONS, device=DEVICE))}


def _exact(sample, cond, uncond, slots, direction) -> np.ndarray:
    """Frame by frame in float64, a zero for what the direction leaves out."""
    dots = np.zeros((len(slots), 3))
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            x, c, u = (t.double().cpu().numpy().ravel() for t in (sample[slot], cond[i], uncond[i]))
            terms = zip(direction[i].tolist(), (x, c, u), strict=True)
            b = sum(weight * values for weight, values in terms if weight)
            dots[i] = (c - u) @ b, b @ b, (c - u) @ (c - u)
    return dots


def test_the_oracle_is_the_sums() -> None:
    arguments, keywords = _arguments(torch.float32)
    wide = [tensor.double() for tensor in arguments]
    exact = _exact(*arguments, keywords["slots"], keywords["direction"])
    dots = ops.guidance_dots_reference(*wide, slots=keywords["slots"], direction=keywords["direction"].double())
    np.testing.assert_allclose(dots.cpu().numpy(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("velocity", DTYPES)
@pytest.mark.parametrize(("form", "frame"), [("cpp", (3, 37, 41)), ("cpp", (16, 60, 104)), ("triton", (3, 37, 41))])
def test_kernels_stay_within_the_error_budget(form: str, frame: tuple[int, ...], velocity: torch.dtype) -> None:
    arguments, keywords = _arguments(velocity, frame)
    exact = _exact(*arguments, keywords["slots"], keywords["direction"])
    eager = ops.guidance_dots_reference(*arguments, **keywords)
    result = (ops.guidance_dots if form == "cpp" else kernel.launch)(*arguments, **keywords)
    assert result[1].tolist() == [0, 0, 0]
    assert_within_budget(result, eager, exact)


@needs_cpp
def test_cpp_gives_one_result_on_any_number_of_threads_in_any_company_and_layout() -> None:
    arguments, keywords = _arguments(torch.float32, (16, 60, 104))

    def dots(frames: slice = slice(None)) -> torch.Tensor:
        sample, *velocities = arguments
        named = {name: value[frames] for name, value in keywords.items()}
        return ops.guidance_dots(sample, *(v[frames] for v in velocities), **named)

    one, two = on_threads(1, dots), on_threads(2, dots)
    assert torch.equal(one, two)
    assert torch.equal(torch.cat([dots(slice(i, i + 1)) for i in range(5)]), one)
    strided = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in arguments]
    assert torch.equal(ops.guidance_dots(*strided, **keywords), one)
    assert ops.guidance_dots(arguments[0], arguments[1][:0], arguments[2][:0], slots=keywords["slots"][:0],
                             direction=keywords["direction"][:0]).shape == (0, 3)  # fmt: skip


def test_triton_of_slots_that_are_none() -> None:
    arguments, keywords = _arguments(torch.float32)
    none = torch.tensor([7, -1, 2**40, -9, 7], device=DEVICE)
    assert not kernel.launch(*arguments, slots=none, direction=keywords["direction"]).any()
    nothing = [tensor[:0] for tensor in (*arguments[1:], *keywords.values())]
    assert kernel.launch(arguments[0], *nothing[:2], slots=nothing[2], direction=nothing[3]).shape == (0, 3)


@pytest.mark.parametrize(
    ("place", "wrong", "sentence"),
    [
        ("direction", randn(5, 2), r"direction has shape \(5, 2\), expected \(5, 3\)"),
        ("direction", torch.ones(5, 3, dtype=torch.int64, device=DEVICE), "direction has dtype torch.int64"),
        ("slots", torch.tensor([0.0] * 5, device=DEVICE), "slots has dtype torch.float32, expected int64"),
        ("velocity_uncond", None, "velocity_uncond is NoneType, expected a tensor"),
        ("velocity_cond", randn(5, 3, 2, 2), r"velocity_cond has shape \(5, 3, 2, 2\)"),
        ("sample", randn(7, 3, 37, 41).half(), "sample has dtype torch.float16, expected float32 or float64"),
    ],
)
def test_wrong_arguments_are_refused(place: str, wrong: object, sentence: str) -> None:
    arguments, keywords = _arguments(torch.float32)
    named = dict(zip(("sample", "velocity_cond", "velocity_uncond"), arguments, strict=True)) | keywords
    with pytest.raises((ValueError, TypeError), match=sentence):
        ops.guidance_dots(**(named | {place: wrong}))
