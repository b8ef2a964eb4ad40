"""linear: the matrix products, by the library that is fastest where they run."""

import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.ops._registry import require, require_tensors
from miga_engine.ops.gelu import gelu_, gelu_reference

HAS_ONEDNN = torch.backends.mkldnn.is_available()
IS_MKL_FASTER = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
"""MKL's products and torch's attention are faster than oneDNN's on a CPU that has AVX2 and no AVX-512, slower above."""
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16) if HAS_ONEDNN else ()
# oneDNN has no bfloat16 products for processors without AVX-512 (or its like on other architectures), and refuses them.
_HAS_BFLOAT16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x weightᵀ + bias, and with `gelu` its tanh-approximated GELU: [..., N] in the dtype of x.

    x [..., K]; weight [N,K] and bias [N] in the dtype of x. On CPUs with AVX-512 oneDNN computes float32 and bfloat16,
    GELU included: where MKL has no AVX-512 code it is twice as fast as `F.linear` in float32. With AVX2 alone MKL is
    faster, and GELU is a pass of its own. Where oneDNN lacks bfloat16 the product is computed in float32 and rounded
    once, 3 to 10 times as fast as `F.linear` there. On NVIDIA GPUs GELU is the product's epilogue (cuBLASLt's, of the
    float32 sums), which saves writing and reading the result once more: predicted 6 % of a forward of Wan2.1 1.3B.
    """
    require_tensors("x weight bias", x, weight, optional=(bias,))
    require(weight.ndim == 2, "weight", "shape", weight.shape, "[N,K]")
    is_row = x.ndim > 0 and x.shape[-1] == weight.shape[1]
    require(is_row, "x", "shape", x.shape, "a last dimension as that of weight")
    require(x.dtype.is_floating_point, "x", "dtype", x.dtype, "a floating point type")
    require(weight.dtype == x.dtype, "weight", "dtype", weight.dtype, "that of x")
    if bias is not None:
        require(bias.ndim == 1 and bias.shape[0] == weight.shape[0], "bias", "shape", bias.shape, "[N]")
        require(bias.dtype == x.dtype, "bias", "dtype", bias.dtype, "that of x")
    is_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()  # inductor chooses for itself
    if is_cpu and x.dtype in _ONEDNN_DTYPES and weight.dtype == x.dtype:
        if x.dtype == torch.bfloat16 and not _HAS_BFLOAT16:
            wide = None if bias is None else bias.float()
            return linear(x.float(), weight.float(), wide, gelu=gelu).to(x.dtype)
        if not IS_MKL_FASTER:
            activation, algorithm = ("gelu", "tanh") if gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    if gelu and bias is not None and _has_epilogue(x):
        rows = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
        return rows.unflatten(0, x.shape[:-1])
    out = F.linear(x, weight, bias)
    if gelu and is_cpu and out.dtype == torch.float32:
        gelu_(out)
    elif gelu:
        gelu_reference(out)
    return out


def _has_epilogue(x: Tensor) -> bool:
    """Whether `torch._addmm_activation` is a product with tanh GELU here: on CPUs its GELU is the exact one."""
    if not x.is_cuda or torch.version.hip or x.numel() == 0:
        return False
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())
