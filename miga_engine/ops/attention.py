"""frame_attention: attention behind one face, by whichever backend is fastest here or was asked for by name."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.config import ATTENTION_BACKENDS
from miga_engine.device import current_device
from miga_engine.errors import ConfigError, DeviceError
from miga_engine.ops import reference as _reference
from miga_engine.ops._registry import has_triton, require, require_indices, require_tensors
from miga_engine.ops.linear import HAS_ONEDNN, IS_MKL_FASTER, linear

_log = logging.getLogger(__name__)

TRITON_HEAD_DIMS = (64, 128)

# Measured with AVX-512 on one and two threads: 1.3 to 2.2 times as fast as SDPA from 300 keys on, slower at 24.
_ONEDNN_LEAST_KEYS, _ONEDNN_MOST_THREADS = 64, 4
_SCORES_IN_CACHE = 1 << 18

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
    heads, bias), or what `attention_choices` says (on CPUs by rule: oneDNN for many keys where there is AVX-512, else
    SDPA). Any other of ATTENTION_BACKENDS is obeyed or refused with
    DeviceError, and never replaced. A backend must agree with the oracle on a sample of its first call's queries before
    its result is used. Where a gradient is wanted, SDPA alone gives it.
    """
    require_tensors("q k v", q, k, v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        _check_call(q, k, v, bias, key_rows, backend)
        if backend not in ("auto", "sdpa"):
            raise ConfigError(f"attention={backend!r} has no gradient: train with auto or sdpa")
        return _run_sdpa(_Call(q, k, v, bias, key_rows, scale)).reshape(q.shape).contiguous()
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
    return {name: backend.refuses(_Call(keys, keys, keys, None, None, None)) for name, backend in _BACKENDS.items()}


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


@dataclass(frozen=True)
class _Call:
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    key_rows: Tensor | None
    scale: float | None

    def gathered(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(q, k, v, bias) with one row of keys and values for each entry of q's batch."""
        k, v, bias, q = _reference.by_key_rows(self.q, self.k, self.v, self.bias, self.key_rows)
        return q, k, v, bias


@dataclass(frozen=True)
class _Backend:
    refuses: Callable[[_Call], str | None]
    """Why it cannot run this call, or None."""
    run: Callable[[_Call], Tensor]
    is_exact: bool = True
    """Rounds like attention in q's dtype; a quantised one does not, and auto never takes it."""


def _run_sdpa(call: _Call) -> Tensor:
    q, k, v, bias = call.gathered()
    if bias is not None:
        bias = bias.to(q.dtype)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=call.scale).transpose(1, 2)


def _run_cudnn(call: _Call) -> Tensor:
    """The operator itself: torch's switch between SDPA's backends is one for all threads, and others use SDPA too."""
    q, k, v = (tensor.transpose(1, 2) for tensor in call.gathered()[:3])
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=call.scale)[0]
    return out.transpose(1, 2)


def _run_onednn(call: _Call) -> Tensor:
    """A head at a time: scores and their softmax in float32, their product with the values in the values' dtype."""
    q, k, v, bias = call.gathered()
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys = k.shape[1]
    scale = head_dim**-0.5 if call.scale is None else call.scale
    rows = max(64, _SCORES_IN_CACHE // num_keys)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for b in range(batch):
        key_bias = None if bias is None else bias[b % bias.shape[0], 0, 0].expand(num_keys).float().contiguous()
        for head in range(num_heads):
            queries = q[b, :, head].float() * scale
            keys, values = k[b, :, head].float().contiguous(), v[b, :, head].t().contiguous()
            for start in range(0, num_queries, rows):
                scores = linear(queries[start : start + rows], keys, key_bias)
                out[b, start : start + rows, head] = linear(scores.softmax(-1).to(v.dtype), values)
    return out


def _run_triton(call: _Call) -> Tensor:
    bias = None if call.bias is None else call.bias[:, 0, 0]
    kernel = importlib.import_module("miga_engine.kernels.frame_attention")
    return kernel.launch(call.q, call.k, call.v, bias, call.key_rows, call.scale)


def _run_xformers(call: _Call) -> Tensor:
    import xformers.ops

    q, k, v, bias = call.gathered()
    if bias is not None:
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        padded = q.new_empty(*shape[:3], -(-shape[3] // 8) * 8)  # its kernels read rows of eight
        bias = padded[..., : shape[3]].copy_(bias.expand(shape))
    return xformers.ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=call.scale)


def _run_flash(call: _Call) -> Tensor:
    if importlib.util.find_spec("flash_attn_interface"):  # version 3, for Hopper
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func
    q, k, v, _ = call.gathered()
    out = flash_attn_func(q, k, v, softmax_scale=call.scale)
    return out[0] if isinstance(out, tuple) else out


def _run_sage(call: _Call) -> Tensor:
    from sageattention import sageattn

    q, k, v, _ = call.gathered()
    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=call.scale)


def _run_reference(call: _Call) -> Tensor:
    return _reference.frame_attention(call.q, call.k, call.v, call.bias, call.key_rows, call.scale)


def _always(call: _Call) -> None:
    return None


def _refuses_onednn(call: _Call) -> str | None:
    if call.q.device.type != "cpu" or not HAS_ONEDNN:
        return f"it is for CPUs with oneDNN, and the tensors are on {call.q.device.type}"
    if call.k.shape[1] < _ONEDNN_LEAST_KEYS:
        return f"it is for {_ONEDNN_LEAST_KEYS} keys and more, and there are {call.k.shape[1]}"
    return _dtype_refusal(call, (torch.float32, torch.bfloat16)) or _pair_bias_refusal(call)


def _refuses_triton(call: _Call) -> str | None:
    if not has_triton():
        return "the triton package is not installed"
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (call.q.is_cuda or is_interpreted):
        return f"its kernels need a GPU, and the tensors are on {call.q.device.type}"
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if is_interpreted else (torch.bfloat16, torch.float16)
    return _dtype_refusal(call, dtypes) or _head_refusal(call, TRITON_HEAD_DIMS) or _pair_bias_refusal(call)


def _refuses_cudnn(call: _Call) -> str | None:
    if not call.q.is_cuda or torch.version.hip or not torch.backends.cudnn.is_available():
        return "it needs an NVIDIA GPU with cuDNN"
    return _dtype_refusal(call, (torch.bfloat16, torch.float16)) or _no_bias(call)


def _needs_package(
    *packages: str, takes_bias: bool, head_dims: tuple[int, ...] | None = None
) -> Callable[[_Call], str | None]:
    def refuses(call: _Call) -> str | None:
        if not any(importlib.util.find_spec(package) for package in packages):
            return f"the {packages[0]} package is not installed"
        if not call.q.is_cuda:
            return f"it needs a GPU, and the tensors are on {call.q.device.type}"
        refusal = _dtype_refusal(call, (torch.bfloat16, torch.float16)) or (None if takes_bias else _no_bias(call))
        return refusal or (_head_refusal(call, head_dims) if head_dims else None)

    return refuses


def _dtype_refusal(call: _Call, dtypes: tuple[torch.dtype, ...]) -> str | None:
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return None if call.q.dtype in dtypes else f"it takes {names}, and the tensors are {call.q.dtype}"


def _head_refusal(call: _Call, sizes: tuple[int, ...]) -> str | None:
    size = call.q.shape[3]
    return None if size in sizes else f"it takes heads of {' or '.join(map(str, sizes))}, and these have {size}"


def _pair_bias_refusal(call: _Call) -> str | None:
    is_for_keys = call.bias is None or call.bias.shape[1:3] == (1, 1)
    return None if is_for_keys else "it takes a bias for each key, not for each pair of query and key"


def _no_bias(call: _Call) -> str | None:
    return None if call.bias is None else "it takes no bias"


_BACKENDS = {
    "triton": _Backend(_refuses_triton, _run_triton),
    "sdpa": _Backend(_always, _run_sdpa),
    "onednn": _Backend(_refuses_onednn, _run_onednn),
    "cudnn": _Backend(_refuses_cudnn, _run_cudnn),
    "xformers": _Backend(_needs_package("xformers", takes_bias=True), _run_xformers),
    "flash": _Backend(_needs_package("flash_attn", "flash_attn_interface", takes_bias=False), _run_flash),
    "sage": _Backend(_needs_package("sageattention", takes_bias=False, head_dims=(64, 96, 128)), _run_sage, False),
    "reference": _Backend(_always, _run_reference),
}
SELF_ATTENTION_ONLY = ("onednn", "cudnn", "flash", "sage")
"""Backends that refuse cross-attention, for its bias or its few keys."""
_TIMED = ("triton", "sdpa", "cudnn", "flash", "xformers")  # what auto chooses from on a GPU

_tested: set[tuple[object, ...]] = set()
_fastest: dict[tuple[str, str], str] = {}
_chosen: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("attention choices")


def _dispatch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_rows: Tensor | None, scale: float | None, backend: str
) -> Tensor:
    _check_call(q, k, v, bias, key_rows, backend)
    call = _Call(q, k, v, bias, key_rows, scale)
    with current_device(q.device):
        name = _choose(call) if backend == "auto" else backend
        if refusal := _BACKENDS[name].refuses(call):
            raise DeviceError(f"attention={name!r} cannot be used here, for {refusal}: choose auto or another backend")
        return _checked(name, call)


def _checked(name: str, call: _Call) -> Tensor:
    """The backend's result, compared with the oracle on a sample of the queries at the first call of its kind."""
    out = _BACKENDS[name].run(call).reshape(call.q.shape).contiguous()
    kind = (name, call.q.device, call.q.dtype, call.q.shape[3], call.bias is not None, call.key_rows is not None)
    if kind in _tested or name == "reference" or call.q.numel() == 0 or _is_capturing(call):
        return out
    if fault := _disagreement(call, out, is_exact=_BACKENDS[name].is_exact):
        raise DeviceError(f"attention={name!r} gives wrong results on {call.q.device} ({fault}); choose another.")
    _tested.add(kind)
    return out


def _disagreement(call: _Call, out: Tensor, *, is_exact: bool) -> str | None:
    """How the result is wrong, beyond any rounding, on at most 64 queries of each window, or None."""
    q, k, v, bias = call.gathered()
    out = out.reshape(q.shape)
    index = torch.linspace(0, q.shape[1] - 1, min(q.shape[1], 64), device=q.device).long()
    if bias is not None and bias.shape[2] > 1:
        bias = bias[:, :, index]
    sampled = q[:, index]
    exact = _reference.frame_attention(sampled.double(), k, v, bias, None, call.scale)
    result = out[:, index].double()
    if not bool(exact.isfinite().all()):
        return None  # the input's fault, found elsewhere
    if not bool(result.isfinite().all()):
        return "values that are not finite"
    if not is_exact:
        cosine = F.cosine_similarity(result.flatten(), exact.flatten(), dim=0).item()
        return None if cosine >= 0.999 else f"cosine similarity {cosine:.4f} to the oracle"
    eager = _reference.frame_attention(sampled, k, v, bias, None, call.scale)
    eps = torch.finfo(q.dtype).eps
    budget = 8 * ((eager - exact).abs().max() + eps * exact.abs().max()).item()
    error = (result - exact).abs().max().item()
    return None if error <= budget else f"error {error:.2g} against the oracle, where {budget:.2g} is rounding"


def _choose(call: _Call) -> str:
    if not call.q.is_cuda:  # by rule, so that one machine always rounds the same way
        is_faster = not IS_MKL_FASTER and torch.get_num_threads() <= _ONEDNN_MOST_THREADS
        return "onednn" if is_faster and _BACKENDS["onednn"].refuses(call) is None else "sdpa"
    chosen = _chosen.get({})
    key = _kind(call)
    if key in chosen:
        return chosen[key]
    known = (torch.cuda.get_device_name(call.q.device), key)
    if known not in _fastest:
        if _is_capturing(call):
            return "sdpa"  # nothing can be timed now; a caller that wants the fastest runs once before it captures
        times = {name: _milliseconds(name, call) for name in _TIMED if _BACKENDS[name].refuses(call) is None}
        _fastest[known] = min(times, key=lambda name: times[name])
        said = ", ".join(f"{name} {time:.3f} ms" for name, time in times.items())
        _log.info("attention of %s queries, %s: %s", call.q.shape[1], key, said)
    chosen[key] = _fastest[known]
    return chosen[key]


def _kind(call: _Call) -> str:
    """Calls that share one choice: the batch and the number of queries change from pass to pass of one run."""
    keys, heads, head_dim = call.k.shape[1:]
    bias = (
        ""
        if call.bias is None
        else ", a bias for each key"
        if call.bias.shape[1:3] == (1, 1)
        else ", a bias for each pair"
    )
    return f"{str(call.q.dtype).removeprefix('torch.')}, {keys} keys, {heads} heads of {head_dim}{bias}"


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


def _milliseconds(name: str, call: _Call) -> float:
    """Median of five runs after two; infinite for a backend that fails or is wrong, which is reported."""
    try:
        _checked(name, call)
        _checked(name, call)
        times = []
        for _ in range(5):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            _BACKENDS[name].run(call)
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    except Exception as error:
        _log.warning("attention backend %s is left out: %s", name, error)
        return float("inf")
    return sorted(times)[2]


def _is_capturing(call: _Call) -> bool:
    return call.q.is_cuda and torch.cuda.is_current_stream_capturing()


torch.library.impl("miga::frame_attention", "CompositeExplicitAutograd", _dispatch)
