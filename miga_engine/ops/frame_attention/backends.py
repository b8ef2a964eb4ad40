"""Who may compute attention: what each backend refuses, how it is called, and the memory it needs for a while."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.ops._registry import has_triton
from miga_engine.ops.linear import HAS_ONEDNN, IS_MKL_FASTER, linear

_TRITON_HEAD_DIMS = (64, 128)

# Measured on one and two threads. Where MKL has no AVX-512 code: 1.3 to 2.2 times as fast as SDPA from 300 keys on,
# slower at 24. On Intel processors SDPA is 2 to 2.6 times as fast in float32, 3.8 to 5.3 in bfloat16, 96 to 3,120 keys.
_ONEDNN_LEAST_KEYS, _ONEDNN_MOST_THREADS = 64, 4
_SCORES_IN_CACHE = 1 << 18


@dataclass(frozen=True)
class Call:
    """The arguments of `frame_attention`, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    key_rows: Tensor | None
    scale: float | None

    def gathered(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(q, k, v, bias) with one row of keys for each entry of q's batch; with key_rows [B,F], q is [B·F,N/F,H,D]."""
        q, k, v, bias = self.q, self.k, self.v, self.bias
        if self.key_rows is None:
            if k.shape[0] != q.shape[0]:
                k, v = k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1)
            return q, k, v, bias
        rows = self.key_rows.flatten()
        if bias is not None and bias.shape[0] > 1:
            bias = bias.index_select(0, rows)
        frames = q.reshape(rows.shape[0], -1, *q.shape[2:])
        return frames, k.index_select(0, rows), v.index_select(0, rows), bias

    @property
    def kind(self) -> str:
        """Of calls that share one choice: the batch and the number of queries change from pass to pass of one run."""
        keys, heads, head_dim = self.k.shape[1:]
        bias = ""
        if self.bias is not None:
            bias = ", a bias for each key" if self.bias.shape[1:3] == (1, 1) else ", a bias for each pair"
        return f"{str(self.q.dtype).removeprefix('torch.')}, {keys} keys, {heads} heads of {head_dim}{bias}"

    def is_captured(self) -> bool:
        """Whether a graph is being captured, in which nothing can be looked at or timed."""
        return self.q.is_cuda and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Backend:
    """Who may compute attention."""

    refuses: Callable[[Call], str | None]
    """Why it cannot run this call, or None."""
    run: Callable[[Call], Tensor]
    is_exact: bool = True
    """Rounds like attention in q's dtype; a quantised one does not, and auto never takes it."""


def frame_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_rows: Tensor | None, scale: float | None
) -> Tensor:
    """The oracle, one head and at most 1,024 queries at a time: any device, any float dtype; no checks."""
    q_frames, k, v, bias = Call(q, k, v, bias, key_rows, scale).gathered()
    dtype = torch.promote_types(q.dtype, torch.float32)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    batch, num_queries, num_heads, _ = q_frames.shape
    out = torch.empty_like(q_frames, memory_format=torch.contiguous_format)
    shape = (batch, num_heads, num_queries, k.shape[1])
    bias = None if bias is None else bias.to(dtype).expand(shape)
    for head in range(num_heads):
        keys, values = k[:, :, head].to(dtype), v[:, :, head].to(dtype)
        for start in range(0, num_queries, 1024):
            part = slice(start, start + 1024)
            scores = q_frames[:, part, head].to(dtype) @ keys.mT * factor
            if bias is not None:
                scores = scores + bias[:, head, part]
            out[:, part, head] = (scores.softmax(-1) @ values).to(q.dtype)
    return out.view(q.shape)


def _run_sdpa(call: Call) -> Tensor:
    q, k, v, bias = call.gathered()
    if bias is not None:
        bias = bias.to(q.dtype)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=call.scale).transpose(1, 2)


def _run_cudnn(call: Call) -> Tensor:
    """The operator itself: torch's switch between SDPA's backends is one for all threads, and others use SDPA too."""
    q, k, v = (tensor.transpose(1, 2) for tensor in call.gathered()[:3])
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=call.scale)[0]
    return out.transpose(1, 2)


def _run_onednn(call: Call) -> Tensor:
    """A head at a time: scores and their softmax in float32, their product with the values in the values' dtype."""
    q, k, v, bias = call.gathered()
    batch, num_queries, num_heads, head_dim = q.shape
    num_keys = k.shape[1]
    scale = head_dim**-0.5 if call.scale is None else call.scale
    rows = _onednn_queries(num_keys)
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


def _run_triton(call: Call) -> Tensor:
    bias = None if call.bias is None else call.bias[:, 0, 0]
    kernel = importlib.import_module("miga_engine.kernels.frame_attention")
    return kernel.launch(call.q, call.k, call.v, bias, call.key_rows, call.scale)


def _run_xformers(call: Call) -> Tensor:
    import xformers.ops

    q, k, v, bias = call.gathered()
    if bias is not None:
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        padded = q.new_empty(*shape[:3], -(-shape[3] // 8) * 8)  # its kernels read rows of eight
        bias = padded[..., : shape[3]].copy_(bias.expand(shape))
    return xformers.ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=call.scale)


def _run_flash(call: Call) -> Tensor:
    if importlib.util.find_spec("flash_attn_interface"):  # version 3, for Hopper
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func
    q, k, v, _ = call.gathered()
    out = flash_attn_func(q, k, v, softmax_scale=call.scale)
    return out[0] if isinstance(out, tuple) else out


def _run_sage(call: Call) -> Tensor:
    from sageattention import sageattn

    q, k, v, _ = call.gathered()
    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=call.scale)


def _run_reference(call: Call) -> Tensor:
    return frame_attention_reference(call.q, call.k, call.v, call.bias, call.key_rows, call.scale)


def _always(call: Call) -> None:
    return None


def _refuses_onednn(call: Call) -> str | None:
    if call.q.device.type != "cpu" or not HAS_ONEDNN:
        return f"it is for CPUs with oneDNN, and the tensors are on {call.q.device.type}"
    if call.k.shape[1] < _ONEDNN_LEAST_KEYS:
        return f"it is for {_ONEDNN_LEAST_KEYS} keys and more, and there are {call.k.shape[1]}"
    return _dtype_refusal(call, (torch.float32, torch.bfloat16)) or _pair_bias_refusal(call)


def _refuses_triton(call: Call) -> str | None:
    if not has_triton():
        return "the triton package is not installed"
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (call.q.is_cuda or is_interpreted):
        return f"its kernels need a GPU, and the tensors are on {call.q.device.type}"
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if is_interpreted else (torch.bfloat16, torch.float16)
    return _dtype_refusal(call, dtypes) or _head_refusal(call, _TRITON_HEAD_DIMS) or _pair_bias_refusal(call)


def _refuses_cudnn(call: Call) -> str | None:
    if not call.q.is_cuda or torch.version.hip or not torch.backends.cudnn.is_available():
        return "it needs an NVIDIA GPU with cuDNN"
    return _dtype_refusal(call, (torch.bfloat16, torch.float16)) or _no_bias(call)


def _needs_package(
    *packages: str, takes_bias: bool, head_dims: tuple[int, ...] | None = None
) -> Callable[[Call], str | None]:
    def refuses(call: Call) -> str | None:
        if not any(importlib.util.find_spec(package) for package in packages):
            return f"the {packages[0]} package is not installed"
        if not call.q.is_cuda:
            return f"it needs a GPU, and the tensors are on {call.q.device.type}"
        refusal = _dtype_refusal(call, (torch.bfloat16, torch.float16)) or (None if takes_bias else _no_bias(call))
        return refusal or (_head_refusal(call, head_dims) if head_dims else None)

    return refuses


def _dtype_refusal(call: Call, dtypes: tuple[torch.dtype, ...]) -> str | None:
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return None if call.q.dtype in dtypes else f"it takes {names}, and the tensors are {call.q.dtype}"


def _head_refusal(call: Call, sizes: tuple[int, ...]) -> str | None:
    size = call.q.shape[3]
    return None if size in sizes else f"it takes heads of {' or '.join(map(str, sizes))}, and these have {size}"


def _pair_bias_refusal(call: Call) -> str | None:
    is_for_keys = call.bias is None or call.bias.shape[1:3] == (1, 1)
    return None if is_for_keys else "it takes a bias for each key, not for each pair of query and key"


def _no_bias(call: Call) -> str | None:
    return None if call.bias is None else "it takes no bias"


BACKENDS = {
    "triton": Backend(_refuses_triton, _run_triton),
    "sdpa": Backend(_always, _run_sdpa),
    "onednn": Backend(_refuses_onednn, _run_onednn),
    "cudnn": Backend(_refuses_cudnn, _run_cudnn),
    "xformers": Backend(_needs_package("xformers", takes_bias=True), _run_xformers),
    "flash": Backend(_needs_package("flash_attn", "flash_attn_interface", takes_bias=False), _run_flash),
    "sage": Backend(_needs_package("sageattention", takes_bias=False, head_dims=(64, 96, 128)), _run_sage, False),
    "reference": Backend(_always, _run_reference),
}
SELF_ATTENTION_ONLY = ("onednn", "cudnn", "flash", "sage")
"""Backends that refuse cross-attention, for its bias or its few keys."""
TIMED = ("triton", "sdpa", "cudnn", "flash", "xformers")  # what auto chooses from on a GPU


def by_rule(call: Call) -> str:
    """Who computes on a CPU, where one machine always rounds the same way."""
    is_faster = not (IS_MKL_FASTER or _is_intel()) and torch.get_num_threads() <= _ONEDNN_MOST_THREADS
    return "onednn" if is_faster and BACKENDS["onednn"].refuses(call) is None else "sdpa"


@functools.cache
def _is_intel() -> bool:
    """MKL, which SDPA multiplies with on CPUs, has AVX-512 code for Intel's processors alone."""
    try:
        name = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        name = platform.processor()
    return "GenuineIntel" in name


def workspace_bytes(q: Tensor, k: Tensor, *, has_rows: bool, is_cpu: bool) -> int:
    """What a call needs for a while, its result included.

    The comparison of a backend's first call with the oracle (one head of all keys in float64, scores of 64 queries) or,
    on CPUs, oneDNN's head of one window and blocks of scores, whichever is more. Kernels on GPUs keep theirs on chip.
    """
    (batch, num_queries, num_heads, head_dim), num_keys = q.shape, k.shape[1]
    is_gathered = has_rows and k.shape[0] != batch
    gathered = 2 * batch * num_keys * num_heads * head_dim * q.element_size() if is_gathered else 0
    check = 8 * batch * (2 * num_keys * head_dim + 3 * min(num_queries, 64) * num_keys)
    rows = min(num_queries, _onednn_queries(num_keys))
    head = 4 * (num_queries + num_keys) * head_dim + k.element_size() * num_keys * head_dim
    blocks = (8 + (k.element_size() if k.element_size() < 4 else 0)) * rows * num_keys
    return q.nbytes + gathered + max(check, head + blocks if is_cpu else 0)


def _onednn_queries(num_keys: int) -> int:
    """Of a block, whose scores stay in the cache."""
    return max(64, _SCORES_IN_CACHE // num_keys)
