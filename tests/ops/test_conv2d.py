"""conv2d against torch's own, within the error budget on any device, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from op_inputs import DEVICE, assert_within_budget, randn

from miga_engine import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [(1, 0), "same"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_is_within_the_error_budget(has_bias, padding, dtype) -> None:
    x, weight, bias = (randn(*shape).to(dtype) for shape in ((2, 3, 7, 5), (4, 3, 3, 3), (4,)))
    bias = bias if has_bias else None
    exact = F.conv2d(*(t if t is None else t.double() for t in (x, weight, bias)), padding=padding)
    with torch.no_grad():
        result = ops.conv2d(x, weight, bias, padding=padding)
    assert_within_budget(result, F.conv2d(x, weight, bias, padding=padding), exact)


def test_has_a_gradient() -> None:
    x, weight = randn(1, 3, 6, 6), randn(2, 3, 3, 3).requires_grad_()
    ops.conv2d(x, weight, stride=(2, 2)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_refuses_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="weight is NoneType, expected a tensor"):
        ops.conv2d(torch.zeros(1, 3, 6, 6, device=DEVICE), None)
