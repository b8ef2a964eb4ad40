"""linear against float64, by each library that may compute it."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from miga_engine import ops


@pytest.mark.parametrize("is_mkl_faster", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_is_within_the_error_budget(monkeypatch, dtype, gelu, is_mkl_faster):
    """By oneDNN and by MKL, whichever this processor would take."""
    monkeypatch.setattr(importlib.import_module("miga_engine.ops.linear"), "IS_MKL_FASTER", is_mkl_faster)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 5, 7, 24), (33, 24), (33,)))
    for offset in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
        eager = F.linear(x, weight, offset)
        if gelu:
            exact, eager = F.gelu(exact, approximate="tanh"), F.gelu(eager, approximate="tanh")
        result = ops.linear(x, weight, offset, gelu=gelu)
        assert result.dtype == dtype
        error, allowed = ((each.double() - exact).abs().max().item() for each in (result, eager))
        assert error <= 2 * (allowed + torch.finfo(dtype).eps * exact.abs().max().item())
