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


def require_tensors(names: str, *tensors: object, optional: tuple[object, ...] = ()) -> None:
    """TypeError unless each is a tensor laid out by strides, ValueError unless all are on the device of the first.

    `names` are those of the tensors, then of the optional ones, with blanks between; of the latter any may be None.
    """
    device = None
    for i, tensor in enumerate((*tensors, *optional)):
        if tensor is None and i >= len(tensors):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{names.split()[i]} is {type(tensor).__name__}, expected a tensor")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{names.split()[i]} has layout {tensor.layout}, expected torch.strided")
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{names.split()[i]} has device {tensor.device}, expected {device} as {names.split()[0]}")


def require_indices(name: str, indices: Tensor, least: int, most: int) -> None:
    """ValueError unless all int64 indices lie in least … most, where nobody need wait to know it.

    Not on a GPU, where kernels bound what they are given, nor in a graph that is being traced.
    """
    if indices.device.type != "cpu" or not indices.numel() or torch.compiler.is_compiling():
        return
    lowest, highest = map(int, indices.aminmax())
    if lowest < least or highest > most:
        raise ValueError(f"{name} has indices {lowest} to {highest}, expected {least} to {most}")


def is_written_once(tensor: Tensor) -> bool:
    """Whether no two elements share memory: each stride steps over all that lies within it."""
    if tensor.is_contiguous():
        return True
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return False
            reach += stride * (size - 1)
    return True


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
