"""What a GPU asks of the host: copies that nobody waits for, the device that is current, the ways of saying "full"."""

from __future__ import annotations

import contextlib
import re
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory: you tried to allocate"  # torch on CPUs
    r"|(CUDA|HIP)( driver)? error: out of memory|Triton Error \[(CUDA|HIP)\]: out of memory|hipErrorOutOfMemory"
    r"|(CU|HIP|ROC)BLAS_STATUS_ALLOC_FAILED|rocblas_status_memory_error"
    r"|CU(DNN|SOLVER|FFT|SPARSE)_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_(DEVICE|HOST)_ALLOCATION_FAILED"
    r"|miopenStatusAllocFailed",
    re.IGNORECASE,
)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The host's tensor on a device; to a GPU through pinned memory, so that neither waits for the other."""
    target = torch.device(device)
    if target.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)


def indexed(device: torch.device) -> torch.device:
    """The device with its number: "cuda" is the GPU that is current now, whichever is so later."""
    is_open = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if is_open else device


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: Triton's launches, new streams, events and graphs go there and nowhere else."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is memory that ran out, by whichever library said so.

    A capture that is broken off ends with an error of its own, raised during the one that broke it off.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if _OUT_OF_MEMORY.search(str(error)):
        return True
    broken_by = error.__context__ if "capture" in str(error) else None
    return broken_by is not None and is_out_of_memory(broken_by)
