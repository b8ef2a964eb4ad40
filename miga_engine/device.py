"""What torch asks of its guests: modes of their own, copies that nobody waits for, the current device, "full"."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode

from miga_engine.errors import DeviceError

_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory: you tried to allocate"  # torch on CPUs
    r"|(CUDA|HIP)( driver)? error: out of memory|Triton Error \[(CUDA|HIP)\]: out of memory|hipErrorOutOfMemory"
    r"|(CU|HIP|ROC)BLAS_STATUS_ALLOC_FAILED|rocblas_status_memory_error"
    r"|CU(DNN|SOLVER|FFT|SPARSE)_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_(DEVICE|HOST)_ALLOCATION_FAILED"
    r"|miopenStatusAllocFailed",
    re.IGNORECASE,
)


_products_lock = threading.Lock()
_num_exact = 0
_products_before: list[tuple[Any, str]] = []


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """float32 products and convolutions are of float32, whatever `torch.set_float32_matmul_precision` allows."""
    global _num_exact
    with _products_lock:
        _num_exact += 1
        backends: Any = torch.backends  # whose attributes mypy does not know
        for backend in (backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul):
            allowed = {backends.fp32_precision, backend.fp32_precision} - {"none", "ieee"}
            if allowed and backend.fp32_precision != "ieee":
                _products_before.append((backend, backend.fp32_precision))
                backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _products_lock:
            _num_exact -= 1
            while _products_before and not _num_exact:
                backend, precision = _products_before.pop()
                backend.fp32_precision = precision


@contextlib.contextmanager
def own_modes() -> Iterator[None]:
    """torch as a new thread finds it, without gradients, whatever modes the caller is in; his are back afterwards.

    Left out are function modes (`torch.set_default_device` is one), transforms of `torch.func`, fake tensors, autocast,
    inference mode, and float32 products that are allowed to round more: this switch alone is one for all threads, and
    is back with the last that leaves. Modes that watch operators are the caller's business and stay. Also a decorator
    of an entry; never to be open between two frames of a generator.
    """
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    fake = torch._C._unset_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_exact_products())
            stack.enter_context(temporarily_clear_interpreter_stack())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        if fake is not None:
            torch._C._set_dispatch_mode(fake)
        for mode in reversed(modes):
            _push_mode(mode)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The host's tensor on a device; to a GPU through pinned memory, so that neither waits for the other."""
    target = torch.device(device)
    if target.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)


def total_bytes(device: torch.device) -> int:
    """Memory of the machine, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def give_back(device: torch.device) -> None:
    """Return to the system what was freed and is held back: by Python's collector, the GPU's allocator, glibc."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def amount(size: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, with its number; None: the GPU where there is one. DeviceError where it is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
        return indexed(target)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"device {str(device)!r} is not available here: use 'cpu' or leave the option out") from error


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
