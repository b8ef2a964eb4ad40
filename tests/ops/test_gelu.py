"""gelu_ in C++ against float64."""

import pytest
import torch
import torch.nn.functional as F
from op_inputs import assert_within_budget, bands_are_untouched, guarded, needs_cpp, on_threads

from miga_engine import ops


@needs_cpp
@pytest.mark.parametrize("shape", [(1,), (63,), (2, 64), (3, 5, 129), (2, 13, 24, 768)])
def test_cpp_is_within_the_error_budget_on_any_number_of_threads(shape: tuple[int, ...]) -> None:
    drawn = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact, eager = (F.gelu(x, approximate="tanh") for x in (drawn.double(), drawn))
    one, two = guarded(drawn), guarded(drawn)
    on_threads(1, lambda: ops.gelu_(one))
    on_threads(2, lambda: ops.gelu_(two))
    assert_within_budget(one, eager, exact)
    assert bands_are_untouched(one)
    assert torch.equal(one, two)


@needs_cpp
def test_cpp_of_values_of_any_size() -> None:
    sizes = torch.logspace(-44, 38, 4001)
    x = torch.cat([torch.zeros(1), sizes, -sizes])
    expected = F.gelu(x.double(), approximate="tanh")
    ops.gelu_(result := x.clone())
    assert bool(((result - expected).abs() <= 3e-7 * x.abs() + 3e-45).all())
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    ops.gelu_(special)
    assert special.isfinite().tolist() == [False] * 3
    ops.gelu_(torch.empty(0, 3))
