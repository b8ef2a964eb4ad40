"""Whether a backend is right, at its first call of a kind, and which of several is the fastest on this GPU."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.errors import DeviceError
from miga_engine.ops.frame_attention.backends import BACKENDS, TIMED, Call, frame_attention_reference

_log = logging.getLogger(__name__)

_tested: set[tuple[object, ...]] = set()
_fastest: dict[tuple[str, str], str] = {}


def checked(name: str, call: Call) -> Tensor:
    """The backend's result, compared with the oracle on a sample of the queries at the first call of its kind."""
    out = BACKENDS[name].run(call).reshape(call.q.shape).contiguous()
    kind = (name, call.q.device, call.q.dtype, call.q.shape[3], call.bias is not None, call.key_rows is not None)
    if kind in _tested or name == "reference" or call.q.numel() == 0 or call.is_captured():
        return out
    if fault := _disagreement(call, out, is_exact=BACKENDS[name].is_exact):
        raise DeviceError(f"attention={name!r} gives wrong results on {call.q.device} ({fault}): choose another")
    _tested.add(kind)
    return out


def fastest(call: Call) -> str | None:
    """The fastest backend for calls of this kind, timed once on each GPU; None while a graph is captured."""
    known = (torch.cuda.get_device_name(call.q.device), call.kind)
    if known not in _fastest:
        if call.is_captured():
            return None
        times = {name: _milliseconds(name, call) for name in TIMED if BACKENDS[name].refuses(call) is None}
        _fastest[known] = min(times, key=lambda name: times[name])
        said = ", ".join(f"{name} {time:.3f} ms" for name, time in times.items())
        _log.info("attention of %s queries, %s: %s", call.q.shape[1], call.kind, said)
    return _fastest[known]


def _disagreement(call: Call, out: Tensor, *, is_exact: bool) -> str | None:
    """How the result is wrong, beyond any rounding, on at most 64 queries of each window, or None."""
    q, k, v, bias = call.gathered()
    out = out.reshape(q.shape)
    index = torch.linspace(0, q.shape[1] - 1, min(q.shape[1], 64), device=q.device).long()
    if bias is not None and bias.shape[2] > 1:
        bias = bias[:, :, index]
    sampled = q[:, index]
    exact = frame_attention_reference(sampled.double(), k, v, bias, None, call.scale)
    result = out[:, index].double()
    if not bool(exact.isfinite().all()):
        return None  # the input's fault, found elsewhere
    if not bool(result.isfinite().all()):
        return "values that are not finite"
    if not is_exact:
        cosine = F.cosine_similarity(result.flatten(), exact.flatten(), dim=0).item()
        return None if cosine >= 0.999 else f"cosine similarity {cosine:.4f} to the oracle"
    eager = frame_attention_reference(sampled, k, v, bias, None, call.scale)
    eps = torch.finfo(q.dtype).eps
    budget = 8 * ((eager - exact).abs().max() + eps * exact.abs().max()).item()
    error = (result - exact).abs().max().item()
    return None if error <= budget else f"error {error:.2g} against the oracle, where {budget:.2g} is rounding"


def _milliseconds(name: str, call: Call) -> float:
    """Median of five runs after two; infinite for a backend that fails or is wrong, which is reported."""
    try:
        checked(name, call)
        checked(name, call)
        times = []
        for _ in range(5):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            BACKENDS[name].run(call)
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    except Exception as error:
        _log.warning("attention backend %s is left out: %s", name, error)
        return float("inf")
    return sorted(times)[2]
