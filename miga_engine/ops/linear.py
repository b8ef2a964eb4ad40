"""linear: the matrix products, by the library that is fastest where they run."""

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_ONEDNN = torch.backends.mkldnn.is_available()
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16) if HAS_ONEDNN else ()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x weightᵀ + bias, and with `gelu` its tanh-approximated GELU: [..., N] in the dtype of x.

    x [..., K]; weight [N,K] and bias [N] in the dtype of x. On CPUs oneDNN computes float32 and bfloat16, GELU
    included: on processors for which MKL has no AVX-512 code it is twice as fast as `F.linear` in float32.
    """
    is_cpu = x.device.type == "cpu" and x.dtype in _ONEDNN_DTYPES and weight.dtype == x.dtype
    if is_cpu and not torch.compiler.is_compiling():  # inductor chooses for itself
        activation, algorithm = ("gelu", "tanh") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    out = F.linear(x, weight, bias)
    return torch.ops.aten.gelu_(out, approximate="tanh") if gelu else out
