"""conv2d: torch's convolution, whose precision on GPUs is the call's own and not a switch of the process."""

import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.ops._registry import require_tensors


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...] = (1, 1),
    padding: str | tuple[int, ...] = (0, 0),
    allow_tf32: bool = False,
) -> Tensor:
    """`F.conv2d`: x [B,C,H,W], weight [C',C,h,w], bias [C'] → [B,C',H',W'] in their dtype.

    On NVIDIA GPUs cuDNN computes float32 convolutions in TF32, inputs rounded to 10 bits, unless told otherwise, and
    chooses among algorithms by timing them if a host asked for that: `torch.backends.cudnn`, one for all threads. Here
    float32 is float32 unless `allow_tf32`, and the algorithm is cuDNN's rule. Sizes are checked by torch.
    """
    require_tensors("x weight bias", x, weight, optional=(bias,))
    if not x.is_cuda or torch.version.hip or torch.is_grad_enabled() or isinstance(padding, str):
        return F.conv2d(x, weight, bias, stride, padding)
    return torch._convolution(
        x, weight, bias, stride, padding, dilation=(1, 1), transposed=False, output_padding=(0, 0), groups=1,
        benchmark=False, deterministic=False, cudnn_enabled=True, allow_tf32=allow_tf32,
    )  # fmt: skip
