"""What the op files share: argument checks, and the registration of kernels that are imported when called."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miga_engine.device import current_device


def require(condition: bool, name: str, trait: str, received: object, expected: object) -> None:
    """ValueError "<name> has <trait> <received>, expected <expected>" unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} has {trait} {received}, expected {expected}")


def require_like(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """The tensor has this shape and a floating point dtype."""
    require(tuple(tensor.shape) == shape, name, "shape", tuple(tensor.shape), f"{shape} {meaning}")
    require(tensor.dtype.is_floating_point, name, "dtype", tensor.dtype, "a floating point type")


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def register(op: str, eager: Callable[..., Any], kernel: str, launch: str = "launch") -> None:
    """Eager PyTorch for every device; on GPUs `launch` of miga_engine.kernels.<kernel>, where Triton is installed.

    A device's own implementation (csrc, for the CPU) takes precedence over the eager one.
    """
    torch.library.impl(f"miga::{op}", "CompositeExplicitAutograd", eager)
    if has_triton():
        torch.library.impl(f"miga::{op}", "CUDA", functools.partial(run_kernel, eager, kernel, launch))


def run_kernel(eager: Callable[..., Any], kernel: str, launch: str, /, *args: Any, **kwargs: Any) -> Any:
    """`launch` of miga_engine.kernels.<kernel> on the device of the first tensor.

    The kernels compute in float32: a call with float64, which is for checking, stays eager.
    """
    if args[0].dtype == torch.float64:
        return eager(*args, **kwargs)
    with current_device(args[0].device):  # Triton launches on the current device, whatever the tensors'
        return getattr(importlib.import_module(f"miga_engine.kernels.{kernel}"), launch)(*args, **kwargs)
