"""frame_attention: attention behind one face, by whichever backend is fastest here or was asked for by name."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor

from miga_engine.config import ATTENTION_BACKENDS
from miga_engine.device import current_device
from miga_engine.errors import ConfigError, DeviceError
from miga_engine.ops._registry import require, require_indices, require_tensors
from miga_engine.ops.frame_attention.backends import (
    BACKENDS,
    SELF_ATTENTION_ONLY,
    Call,
    by_rule,
    frame_attention_reference,
    workspace_bytes,
)
from miga_engine.ops.frame_attention.probe import checked, fastest

__all__ = [
    "SELF_ATTENTION_ONLY",
    "attention_backends",
    "attention_choices",
    "frame_attention",
    "frame_attention_reference",
    "require_attention",
    "untimed_backend",
    "workspace_bytes",
]

_chosen: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("attention choices")

torch.library.define(
    "miga::frame_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_rows, float? scale, str backend) -> Tensor",
)


@torch.library.register_fake("miga::frame_attention")
def _frame_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_rows: Tensor | None, scale: float | None, backend: str
) -> Tensor:
    return q.new_empty(q.shape)


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    *,
    key_rows: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale·q kᵀ + bias) v, every query seeing every key: [B,N,H,D] in the dtype of q, contiguous.

    q [B,N,H,D]; k, v [P,M,H,D], one dtype; bias broadcastable to [P,H,N,M], a key's own if [P,1,1,M]; scale D^-1/2 if
    None. key_rows int64 [B] or [B,F] names the row of k, v and bias for each window, or for each of its F equal runs of
    queries, whose number N then is in bias; without it P is B or 1. Queries may be fewer than keys (a slice of the
    window's tokens).

    backend: "auto" takes the fastest exact one installed, timed once on each GPU for each kind of call (dtype, keys,
    heads, bias), or what `attention_choices` says (on CPUs by rule: SDPA, but oneDNN for many keys where there is
    AVX-512 that MKL has no code for). Any other of ATTENTION_BACKENDS is obeyed or refused with DeviceError, and never
    replaced. A backend must agree with the oracle on a sample of its first call's queries before its result is used.
    Where a gradient is wanted, SDPA alone gives it.
    """
    require_tensors("q k v", q, k, v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        _check_call(q, k, v, bias, key_rows, backend)
        if backend not in ("auto", "sdpa"):
            raise ConfigError(f"attention={backend!r} has no gradient: train with auto or sdpa")
        return BACKENDS["sdpa"].run(Call(q, k, v, bias, key_rows, scale)).reshape(q.shape).contiguous()
    return torch.ops.miga.frame_attention(q, k, v, bias, key_rows, scale, backend)


def _check_call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_rows: Tensor | None, backend: str) -> None:
    _require_known(backend)
    require_tensors("q k v bias key_rows", q, k, v, optional=(bias, key_rows))
    require(q.ndim == 4 and q.shape[3] > 0, "q", "shape", tuple(q.shape), "[B,N,H,D], D ≥ 1")
    require(q.dtype.is_floating_point, "q", "dtype", q.dtype, "a floating point type")
    frame = q.shape[2:]
    for name, tensor in (("k", k), ("v", v)):
        is_like = (
            tensor.ndim == 4 and tensor.shape[1] > 0 and tensor.shape[2:] == frame and tensor.shape[:2] == k.shape[:2]
        )
        require(is_like, name, "shape", tuple(tensor.shape), f"[P,M,{frame[0]},{frame[1]}], as q and k")
        require(tensor.dtype == q.dtype, name, "dtype", tensor.dtype, f"{q.dtype} as q")
    num_runs, num_rows = 1, q.shape[0]
    if key_rows is None:
        require(k.shape[0] in (1, q.shape[0]), "k", "batch", k.shape[0], f"1 or {q.shape[0]}, or key_rows")
    else:
        is_index = key_rows.dtype == torch.int64 and key_rows.ndim in (1, 2) and key_rows.shape[0] == q.shape[0]
        require(is_index, "key_rows", "shape", tuple(key_rows.shape), f"int64 [{q.shape[0]}] or [{q.shape[0]},F]")
        num_runs, num_rows = key_rows.numel() // max(q.shape[0], 1), k.shape[0]
        num_runs = max(num_runs, 1)
        require(q.shape[1] % num_runs == 0, "q", "length", q.shape[1], f"a multiple of {num_runs} frames")
        require_indices("key_rows", key_rows, 0, k.shape[0] - 1)
    if bias is not None:
        whole = (num_rows, q.shape[2], q.shape[1] // num_runs, k.shape[1])
        is_bias = bias.ndim == 4 and all(size in (1, full) for size, full in zip(bias.shape, whole, strict=True))
        require(is_bias, "bias", "shape", tuple(bias.shape), f"{whole}, [P,H,N,M], or broadcastable to it")
        require(bias.dtype.is_floating_point, "bias", "dtype", bias.dtype, "a floating point type")


def attention_backends(device: torch.device | str, dtype: torch.dtype, head_dim: int = 128) -> dict[str, str | None]:
    """Every backend's name → None if it runs heads of this size on this device, else why not."""
    keys = torch.empty(1, 1024, 1, head_dim, dtype=dtype, device=device)
    return {name: backend.refuses(Call(keys, keys, keys, None, None, None)) for name, backend in BACKENDS.items()}


def require_attention(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> None:
    """DeviceError if a backend asked for by name cannot run here; ConfigError if there is none of this name."""
    _require_known(name)
    refusals = attention_backends(device, dtype, head_dim)
    if refusal := refusals.get(name):
        usable = ", ".join(other for other, reason in refusals.items() if reason is None)
        raise DeviceError(f"attention={name!r} cannot be used here, for {refusal}: choose auto, {usable}")


def _require_known(backend: str) -> None:
    if backend not in ATTENTION_BACKENDS:
        raise ConfigError(f"attention is {backend!r}: choose {', '.join(ATTENTION_BACKENDS)}")


def untimed_backend(device: torch.device) -> str:
    """For attention that is computed once, or beside the network: timing backends would cost more than it brings."""
    return "sdpa" if device.type == "cuda" else "auto"


@contextlib.contextmanager
def attention_choices(choices: dict[str, str]) -> Iterator[None]:
    """What "auto" takes on a GPU, by kind of call, as long as this is open: `choices`, and what they lack is added.

    Who computes attention decides over last bits: a run that keeps its choices can be repeated with the same.
    """
    token = _chosen.set(choices)
    try:
        yield
    finally:
        _chosen.reset(token)


def dispatch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_rows: Tensor | None, scale: float | None, backend: str
) -> Tensor:
    _check_call(q, k, v, bias, key_rows, backend)
    call = Call(q, k, v, bias, key_rows, scale)
    with current_device(q.device):
        name = _choose(call) if backend == "auto" else backend
        if refusal := BACKENDS[name].refuses(call):
            raise DeviceError(f"attention={name!r} cannot be used here, for {refusal}: choose auto or another backend")
        return checked(name, call)


def _choose(call: Call) -> str:
    if not call.q.is_cuda:
        return by_rule(call)
    chosen, kind = _chosen.get({}), call.kind
    if kind not in chosen:
        name = fastest(call)
        if name is None:
            return "sdpa"  # a caller that wants the fastest runs once before it captures
        chosen[kind] = name
    return chosen[kind]


torch.library.impl("miga::frame_attention", "CompositeExplicitAutograd", dispatch)
