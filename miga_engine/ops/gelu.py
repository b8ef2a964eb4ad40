"""gelu_: GELU in its tanh form, in place, behind a product that has no epilogue for it."""

import torch
from torch import Tensor

torch.library.define("miga::gelu_", "(Tensor(a!) x) -> ()")
torch.library.register_fake("miga::gelu_", lambda x: None)


def gelu_(x: Tensor) -> None:
    """x ← ½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))) (Hendrycks and Gimpel 2016); x float32 on a CPU, contiguous."""
    torch.ops.miga.gelu_(x)


def gelu_reference(x: Tensor) -> None:
    """The oracle, which is torch's own."""
    torch.ops.aten.gelu_(x, approximate="tanh")


torch.library.impl("miga::gelu_", "CompositeExplicitAutograd", gelu_reference)
