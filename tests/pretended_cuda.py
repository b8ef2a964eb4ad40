"""A pretended CUDA machine of two devices on any CPU: its tensors are of device cuda, and their data lie on the host.

Whole runs of the engine go through it on ordinary torch, and every operator is watched for what a real device would
do wrong without an error:

- tensors of CPU and CUDA, or of two devices, mixed in one operator; kernels of ours launched while another device is
  current;
- reads and writes that are not ordered after other streams' work on the same memory, and memory given back to its
  stream while another stream's work on it may still run: the caching allocator would hand it out again;
- waits of the host and copies from memory that is not pinned, counted everywhere and forbidden under graph capture;
- graphs: a capture runs nothing, its results are NaN until it is replayed, memory from outside must outlive it, a pool
  whose last graph is gone cannot be used again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo  # before anything of torch is replaced: it keeps tables of it
from pretended_device import CudaTensor, Devices, Event, Graph, OnDevice, OnMachine, Stream, machines
from torch import Tensor
from trees import leaves, mapped

from miga_engine.ops import _registry, frame_attention_reference
from miga_engine.ops.frame_attention import dispatch, probe
from miga_engine.runtime import decode, sharing

HOST = torch.device("cpu")

HOST_WAITS = {
    f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "bincount")
}
INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}
KERNELS = {
    "norm_modulate": ("norm_modulate", "launch"),
    "residual_norm_modulate": ("norm_modulate", "launch_residual"),
    "qk_norm_rope": ("qk_norm_rope", "launch"),
    "sampler_update": ("sampler_update", "launch"),
    "guidance_dots": ("guidance_dots", "launch"),
    "consistency_score": ("consistency_score", "launch"),
}
"""Ops of ours with a Triton kernel: its module and the function in it that launches it."""

torch.library.define(
    "pretended::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_rows, float? scale) -> Tensor",
)


@torch.library.impl("pretended::attention", "CompositeExplicitAutograd")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_rows: Tensor | None, scale: float | None
) -> Tensor:
    bias = None if bias is None or bias.ndim == 4 else bias[:, None, None]
    return frame_attention_reference(q, k, v, bias, key_rows, scale)


@functools.cache
def guard_library() -> ctypes.CDLL | None:
    """The device guard, built once; None where there is no compiler."""
    base, source = Path(torch.__file__).parent, Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "guard.so"
        command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{base}/include", str(source)]
        try:
            subprocess.run([*command, f"-L{base}/lib", "-lc10", "-o", str(target)], check=True, capture_output=True)
        except FileNotFoundError:
            return None
        library = ctypes.CDLL(str(target))
    library.register_guard()
    return library


class Machine(Devices):
    """Runs every operator on the host's memory, watched."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = Given(args, kwargs)
        asked = kwargs.get("device") or given.device
        asked = torch.device(asked) if isinstance(asked, str) else asked
        if not given.on_device and (asked is None or asked.type != "cuda"):
            return func(*args, **kwargs)
        name = _facts(func).name
        if asked is not None and asked.type == "meta":
            return func(*given.args, **({**given.kwargs, "device": asked} if "device" in kwargs else given.kwargs))
        self.before(name, args)
        if name.startswith("miga::"):
            with OnMachine():
                return self._dispatch(name.removeprefix("miga::"), args, kwargs)
        if name == "aten::_scaled_dot_product_cudnn_attention":
            q, k, v = (tensor.transpose(1, 2) for tensor in args[:3])
            out = self.execute(torch.ops.pretended.attention.default, (q, k, v, None, None, kwargs.get("scale")), {})
            nothing = torch.empty(0)
            return (out.transpose(1, 2), nothing, nothing, nothing, 0, 0, nothing, nothing, nothing)
        if name == "aten::_addmm_activation":  # whose GELU is the exact one on a CPU
            product = self.execute(torch.ops.aten.addmm.default, args, {})
            return self.execute(torch.ops.aten.gelu.default, (product,), {"approximate": "tanh"})
        return self.execute(func, args, kwargs, asked, given)

    def _dispatch(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is registered for GPUs; the kernel that it launches comes back to `launch`."""
        if op in KERNELS:
            return _registry.run_kernel(_no_eager, *KERNELS[op], *args, **kwargs)
        if op == "frame_attention":
            return dispatch(*args, **kwargs)
        raise AssertionError(f"{op} has no form for GPUs that is known here")

    def launch(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """What stands for a Triton kernel: the op's CPU form, on the device that is current."""
        on_device = [value for value in leaves((args, kwargs)) if isinstance(value, CudaTensor)]
        if on_device[0].device != self.device():
            self.report(
                "a kernel is launched on another device than its tensors'", f"{op._schema.name} on {self.device()}"
            )
        return self.execute(op, args, kwargs)

    def execute(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        asked: torch.device | None = None,
        given: Given | None = None,
    ) -> Any:
        """Run on the host's memory, watched."""
        facts, given = _facts(func), given or Given(args, kwargs)
        name, on_device, on_host = facts.name, given.on_device, given.on_host
        to_host = asked is not None and asked.type == "cpu"
        device = on_device[0].device if on_device and (asked is None or to_host) else self.device(asked)
        stream = self.current_stream(device)
        with self.lock:
            if len(on_device) > 1 and not facts.is_copy and any(tensor.device != device for tensor in on_device):
                self.report("tensors of two devices", name)
            if on_host and on_device and not facts.may_mix and any(tensor.ndim for tensor in on_host):
                self.report("tensors of CPU and CUDA", name)
            time = stream.tick()
            if facts.may_wait:
                self._note_waits(name, args, kwargs, on_device, on_host, asked, stream)
            if given.kwargs.get("device") is not None:
                given.kwargs["device"] = HOST
            given.kwargs.pop("pin_memory", None)
            written = list(_written(facts, args, kwargs)) if facts.written else []
            graph = self.capturing
            for tensor in on_device if graph is None else ():  # what is captured runs in replays alone
                is_write = any(tensor is other for other in written)
                self.note_use(tensor.hold.block, stream, time, is_write=is_write, what=name)
            kept = [tensor.host.clone() for tensor in written if isinstance(tensor, CudaTensor)] if graph else []
            result = func(*given.args, **given.kwargs)
            if to_host or (name == "aten::copy_" and not isinstance(args[0], CudaTensor)):
                return args[0] if name == "aten::copy_" else result
            if graph is not None:
                self._record(graph, func, given, result, written, kept)

            def on_machine(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                for tensor in on_device:
                    if tensor.host is value:
                        return tensor
                block = self.block_of(value.untyped_storage(), device)
                if graph is None:
                    block.writer = block.writer or (stream.name, time)
                    block.uses[stream.name] = time
                return CudaTensor(value, device, block)

            return on_machine(result) if isinstance(result, Tensor) else mapped(on_machine, result)

    def _note_waits(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_device: list[CudaTensor],
        on_host: list[Tensor],
        asked: torch.device | None,
        stream: Stream,
    ) -> None:
        if name in HOST_WAITS:
            self.note_wait(name)
            self.host_waits_for(stream.clock)
        elif name in INDEXING and [tensor for tensor in on_host if tensor.ndim]:
            self.note_wait(f"{name} by an index on the host")
        elif name in ("aten::copy_", "aten::_to_copy"):
            is_async = bool(kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
            source, target_is_host = args[1 if name == "aten::copy_" else 0], asked is not None and asked.type == "cpu"
            if name == "aten::copy_":
                target_is_host = not isinstance(args[0], CudaTensor)
            if target_is_host and not is_async:
                self.note_wait(f"{name} to the host")
                self.host_waits_for(stream.clock)
            elif isinstance(source, Tensor) and not isinstance(source, CudaTensor) and source.ndim:
                if is_async and getattr(source, "is_pretended_pinned", False):
                    return
                self.note_wait(f"{name} from memory that is not pinned")
                if self.capturing is None:
                    self.host_waits_for(stream.clock)

    def _record(
        self, graph: Graph, func: Any, given: Given, result: Any, written: list[Tensor], kept: list[Tensor]
    ) -> None:
        """A capture computes nothing: what was written is put back, and new results are NaN."""
        for tensor in given.on_device:
            block = tensor.hold.block
            if block.graph is None or block.graph() is not graph:
                graph.outside[block] = graph.outside.get(block, False) or any(tensor is other for other in written)
        for tensor, before in zip(written, kept, strict=True):
            tensor.host.copy_(before)
        known = {tensor.host.untyped_storage().data_ptr() for tensor in given.on_device}
        results: list[Tensor | None] = []
        for value in leaves(result):
            is_new = isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known
            results.append(value if is_new else None)
            if is_new and value.is_floating_point():
                value.fill_(float("nan"))
        graph.operations.append((func, given.args, given.kwargs, results))


def _no_eager(*_: Any, **__: Any) -> Any:
    raise AssertionError("float64 on a GPU: no op of a run computes in it")


class Given:
    """The arguments of an operator on the host, and what is among them."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        self.on_device: list[CudaTensor] = []
        self.on_host: list[Tensor] = []
        self.device: torch.device | None = None
        """The first that is not named."""
        self.args = self._listed(args)
        device = self.device
        self.kwargs = {name: self._host(value) for name, value in kwargs.items()} if kwargs else {}
        self.device = device

    def _listed(self, values: Any) -> list[Any]:
        return [value if type(value) in _PLAIN else self._host(value) for value in values]

    def _host(self, value: Any) -> Any:
        if isinstance(value, CudaTensor):
            self.on_device.append(value)
            return value.host
        if isinstance(value, Tensor):
            self.on_host.append(value)
        elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return type(value)(self._listed(value))
        elif isinstance(value, dict):
            return {name: self._host(part) for name, part in value.items()}
        elif isinstance(value, torch.device):
            self.device = self.device or value
            return HOST
        return value


_PLAIN = {int, float, bool, type(None), str, torch.dtype}


class Facts(NamedTuple):
    """What an operator is."""

    name: str
    written: list[tuple[int, str]]
    """Arguments, by place and name, that its schema says it writes into."""
    is_copy: bool
    may_mix: bool
    """Tensors of the host are no fault beside the device's."""
    may_wait: bool


@functools.cache
def _facts(func: Any) -> Facts:
    name, arguments = func._schema.name, enumerate(func._schema.arguments)
    written = [(i, given.name) for i, given in arguments if given.alias_info is not None and given.alias_info.is_write]
    is_copy = name in ("aten::copy_", "aten::_to_copy")
    may_mix = is_copy or name in INDEXING
    return Facts(name, written, is_copy, may_mix, may_wait=may_mix or name in HOST_WAITS)


def _written(facts: Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for i, name in facts.written:
        value = kwargs.get(name, args[i] if i < len(args) else None)
        yield from (tensor for tensor in leaves(value) if isinstance(tensor, Tensor))


@contextlib.contextmanager
def pretended_cuda() -> Iterator[Machine]:
    """A machine of its own; afterwards torch is as it was, but for a device guard that finds no CUDA operators."""
    guard = guard_library()
    assert guard is not None
    here = Machine(guard)
    machines.append(here)
    decode._side_stream.cache_clear()

    def pinned(tensor: Tensor, *_: Any) -> Tensor:
        copy = tensor.clone()
        copy.is_pretended_pinned = True
        return copy

    def on_machine(run: Any) -> Any:
        """A thread of the engine's on this machine."""

        def runs(self: Any) -> None:
            with OnMachine():
                run(self)

        return runs

    changes: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "current_device": guard.current_device,
            "set_device": lambda device: guard.set_current_device(here.device(device).index),
            "device": OnDevice,
            "Stream": Stream,
            "Event": Event,
            "stream": here.on_stream,
            "set_stream": here.set_stream,
            "current_stream": here.current_stream,
            "default_stream": here.default_stream,
            "synchronize": here.synchronize,
            "CUDAGraph": Graph,
            "graph": here.capture,
            "graph_pool_handle": lambda: len(here.graphs) + 1,
            "is_current_stream_capturing": lambda: here.capturing is not None,
            "get_device_name": lambda device=None: "a pretended GPU",
            "get_device_capability": lambda device=None: (9, 0),
            "empty_cache": here.empty_cache,
            "memory_allocated": lambda device=None: here.live_bytes,
            "memory_reserved": lambda device=None: here.live_bytes,
            "max_memory_allocated": lambda device=None: here.peak_bytes,
            "max_memory_reserved": lambda device=None: here.peak_bytes,
            "reset_peak_memory_stats": here.reset_peak,
            "mem_get_info": lambda device=None: ((80 << 30) - here.live_bytes, 80 << 30),
        },
        torch.backends.cudnn: {"is_available": lambda: True},
        probe: {"_fastest": {}, "_tested": set()},
        torch.Tensor: {"pin_memory": pinned},
        decode.Decoding: {"_run": on_machine(decode.Decoding._run)},
        sharing.Sharing: {"_run": on_machine(sharing.Sharing._run)},
    }
    with pytest.MonkeyPatch.context() as patch:
        for owner, entries in changes.items():
            for name, value in entries.items():
                patch.setattr(owner, name, value)
        for op, (module, function) in KERNELS.items():
            overload = getattr(torch.ops.miga, op).default
            kernels = importlib.import_module(f"miga_engine.kernels.{module}")
            patch.setattr(kernels, function, functools.partial(here.launch, overload))
        kernels = importlib.import_module("miga_engine.kernels.frame_attention")
        patch.setattr(kernels, "launch", functools.partial(here.launch, torch.ops.pretended.attention.default))
        try:
            with OnMachine():
                yield here
        finally:
            decode._side_stream.cache_clear()
            machines.pop()
            guard.set_current_device(0)
