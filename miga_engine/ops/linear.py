"""linear: the matrix products, by the library that is fastest where they run."""

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_ONEDNN = torch.backends.mkldnn.is_available()
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16) if HAS_ONEDNN else ()
# oneDNN has no bfloat16 products for processors without AVX-512 (or its like on other architectures), and refuses them.
_HAS_BFLOAT16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x weightᵀ + bias, and with `gelu` its tanh-approximated GELU: [..., N] in the dtype of x.

    x [..., K]; weight [N,K] and bias [N] in the dtype of x. On CPUs oneDNN computes float32 and bfloat16, GELU
    included: on processors for which MKL has no AVX-512 code it is twice as fast as `F.linear` in float32. Where oneDNN
    lacks bfloat16 the product is computed in float32 and rounded once, 3 to 10 times as fast as `F.linear` there.
    """
    is_cpu = x.device.type == "cpu" and x.dtype in _ONEDNN_DTYPES and weight.dtype == x.dtype
    if is_cpu and not torch.compiler.is_compiling():  # inductor chooses for itself
        if x.dtype == torch.bfloat16 and not _HAS_BFLOAT16:
            return _onednn(x.float(), weight.float(), None if bias is None else bias.float(), gelu).to(x.dtype)
        return _onednn(x, weight, bias, gelu)
    out = F.linear(x, weight, bias)
    return torch.ops.aten.gelu_(out, approximate="tanh") if gelu else out


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    activation, algorithm = ("gelu", "tanh") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
