"""What the tests of the ops share: guarded memory, error budgets, and one small set of arguments for every op."""

import importlib
import math
import shutil
import sysconfig
from typing import Any

import numpy as np
import pytest
import torch

from miga_engine import _extension

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BAND = 2048  # elements
COMPILER = shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0])

needs_cpp = pytest.mark.skipif(not _extension.LIBRARY.is_file() and COMPILER is None, reason="no C++ compiler here")


class Kernel:
    """A file of Triton kernels, imported when it is used; where there is no Triton, who uses it is skipped."""

    def __init__(self, op: str) -> None:
        self.op = op

    def __getattr__(self, name: str) -> Any:
        pytest.importorskip("triton", reason="Triton is for Linux only")
        return getattr(importlib.import_module(f"miga_engine.kernels.{self.op}"), name)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def guarded(tensor: torch.Tensor, fill: float = torch.nan) -> torch.Tensor:
    """The same values with NaN, or `fill`, before and behind them in memory."""
    memory = torch.full((tensor.numel() + 2 * BAND,), fill, dtype=tensor.dtype, device=tensor.device)
    view = memory[BAND : BAND + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def outside(view: torch.Tensor) -> torch.Tensor:
    """What lies in the view's memory and is not the view's."""
    memory = view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
    is_outside = torch.ones_like(memory, dtype=torch.bool)
    is_outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return memory[is_outside]


def bands_are_untouched(view: torch.Tensor) -> bool:
    return bool(outside(view).isnan().all() and view.isfinite().all())


def assert_within_budget(result: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor | np.ndarray) -> None:
    """At most twice eager's error and the dtype's rounding; exact: float64, of a float64 result long double."""
    assert (result.dtype, tuple(result.shape)) == (eager.dtype, tuple(exact.shape))
    wide = exact if isinstance(exact, np.ndarray) else exact.cpu().numpy()
    error, allowed = (float(abs(tensor.double().cpu().numpy() - wide).max()) for tensor in (result, eager))
    budget = 2 * (allowed + torch.finfo(result.dtype).eps * float(abs(wide).max()))
    assert math.isfinite(budget)
    assert error <= budget  # False for NaN


def in_float64(tensors: list) -> list:
    return [tensor.double() if tensor is not None and tensor.dtype.is_floating_point else tensor for tensor in tensors]


def in_long_double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy().astype(np.longdouble)


def on_threads(count: int, function):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return function()
    finally:
        torch.set_num_threads(before)


def each_with_the_first(shapes: list, sets: list) -> list:
    """Each width is a kernel of its own to compile, and each set of tables: every shape takes the first set, the last
    but one takes every set."""
    return [(shape, *sets[0]) for shape in shapes] + [(shapes[-2], *others) for others in sets[1:]]


OUT_OF_BOUNDS = [-1, -3, 9, 20]  # one or a few rows beside a table of at most nine rows, where the bands are


def misnamed(indices: torch.Tensor, wrong: list[int]) -> torch.Tensor:
    """The same with the wrong ones in the first places."""
    indices = indices.clone()
    indices.view(-1)[: len(wrong)] = torch.tensor(wrong, device=indices.device)
    return indices


B, F, S, D, NUM_HEADS = 2, 3, 5, 24, 2
NUM_TOKENS = F * S


def small_arguments(dtype=torch.float32):
    """By name, of every op on tokens; `frames` for those on latent frames."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    table = draw(4, 6, D)
    rows = torch.tensor([[0, 3, 1], [2, 2, 0]], device=DEVICE)
    angles = draw(9, 4), draw(S, 2)
    return {
        "x": draw(B, F, S, D),
        "y": draw(B, F, S, D).to(dtype),
        "weight": table[:, 1],
        "bias": table[:, 0],
        "gate": table[:, 2],
        "rows": rows,
        "q": draw(B, NUM_TOKENS, D).to(dtype),
        "k": draw(B, NUM_TOKENS, D).to(dtype),
        "norm": draw(D),
        "temporal": torch.stack([angles[0].cos(), angles[0].sin()], 1),
        "spatial": torch.stack([angles[1].cos(), angles[1].sin()], 1),
        "positions": torch.tensor([[0, 1, 2], [5, 6, 8]], device=DEVICE),
        "frames": draw(4, 2, 3, 5),
    }
