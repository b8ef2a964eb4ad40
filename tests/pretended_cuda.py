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

What is ordered is known by vector clocks: a stream's clock says which work of every stream is finished when its own
next work begins. Host threads count as one: whatever one of them has waited for is done for all. There are no times.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import importlib
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # before anything of torch is replaced: it keeps tables of it
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miga_engine.ops import _registry, frame_attention_reference
from miga_engine.ops.frame_attention import dispatch, probe
from miga_engine.runtime import decode

_ROOT = f"{Path(__file__).parents[1]}/"
_PRODUCT = (f"{_ROOT}miga_engine/", f"{_ROOT}kernels/")
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


class Stream:
    """A queue of work on one device. `clock`: how much work of every stream is finished when its next begins."""

    def __init__(self, device: Any = None, priority: int = 0, *, name: str = "") -> None:
        self.device = machine().device(device)
        self.name = name or f"stream {len(machine().streams)} of {self.device}"
        self.clock: collections.Counter[str] = collections.Counter(machine().host_clock)
        machine().streams.append(self)

    def tick(self) -> int:
        self.clock[self.name] += 1
        return self.clock[self.name]

    def wait_event(self, event: Event) -> None:
        self.clock |= event.clock

    def wait_stream(self, stream: Stream) -> None:
        self.clock |= stream.clock

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        machine().host_waits_for(self.clock)

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self.clock: collections.Counter[str] = collections.Counter()

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or machine().current_stream()
        stream.tick()
        self.clock = collections.Counter(stream.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or machine().current_stream()).wait_event(self)

    def synchronize(self) -> None:
        machine().host_waits_for(self.clock)

    def elapsed_time(self, stop: Event) -> float:
        return 1.0

    def query(self) -> bool:
        return True


class OnDevice:
    """Stands for torch.cuda.device, a class that torch asks for by isinstance."""

    def __init__(self, device: Any) -> None:
        self.idx = machine().device(device).index

    def __enter__(self) -> None:
        self._before = machine().guard.current_device()
        machine().guard.set_current_device(self.idx)

    def __exit__(self, *_: Any) -> None:
        machine().guard.set_current_device(self._before)


class Graph:
    """Records what runs while it captures, without effect; replays it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.pool_handle: int | None = None
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.outside: dict[Block, bool] = {}
        """Memory that is not the graph's: whether it is written."""
        self.num_replays = 0
        machine().graphs.append(weakref.ref(self))

    def pool(self) -> int | None:
        return self.pool_handle

    def replay(self) -> None:
        self.num_replays += 1
        here, stream = machine(), machine().current_stream()
        with here.lock:
            time = stream.tick()
            for block, is_write in self.outside.items():
                if not block.tensors:
                    here.report("a graph uses memory that was freed since its capture", f"allocated at {block.born}")
                here.note_use(block, stream, time, is_write=is_write, what="a replay")
            for func, args, kwargs, results in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(_leaves(results), _leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


class CudaTensor(torch.Tensor):
    """A tensor of device cuda over a tensor of the host."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device) -> CudaTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
        )
        tensor.host = host
        machine().block_of(host.untyped_storage(), device).tensors.add(tensor)
        return tensor

    def __repr__(self) -> str:
        return f"CudaTensor({self.host!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaTensor:
        return self.clone()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def record_stream(self, stream: Stream) -> None:
        machine().block_of(self.host.untyped_storage()).recorded.add(stream.name)

    def tolist(self) -> Any:
        machine().note_wait("tolist")
        machine().host_waits_for(machine().current_stream(self.device).clock)
        return self.host.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return machine().run(func, args, kwargs or {})


class OnMachine(TorchDispatchMode):
    """Sends operators that make tensors of device cuda to the machine."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return machine().run(func, args, kwargs or {})


class Block:
    """A piece of memory, freed to the stream it was allocated on."""

    def __init__(self, stream: Stream, graph: Graph | None, size: int, born: str) -> None:
        self.stream, self.size, self.born = stream, size, born
        self.graph = None if graph is None else weakref.ref(graph)  # which holds the memory, and not the other way
        self.tensors: weakref.WeakSet[CudaTensor] = weakref.WeakSet()
        self.uses: dict[str, int] = {}
        self.recorded: set[str] = set()
        self.writer: tuple[str, int] | None = None


class Machine:
    """What was seen. `hazards` are faults; `waits` of the host may be meant."""

    def __init__(self, guard: ctypes.CDLL) -> None:
        self.guard = guard
        self.lock = threading.RLock()
        self.hazards: collections.Counter[str] = collections.Counter()
        self.traces: dict[str, str] = {}
        self.waits: collections.Counter[str] = collections.Counter()
        self.host_clock: collections.Counter[str] = collections.Counter()
        self.streams: list[Stream] = []
        self.graphs: list[weakref.ref[Graph]] = []
        self.pools: collections.Counter[int] = collections.Counter()
        self.live_bytes = self.peak_bytes = 0
        self.live_at_empty_cache: list[int] = []
        self.before: Callable[[str, tuple[Any, ...]], None] = lambda name, args: None
        """Called before every operator with its name and arguments; what it raises is the operator's failure."""
        self._blocks: weakref.WeakKeyDictionary[torch.UntypedStorage, Block] = weakref.WeakKeyDictionary()
        self._thread = threading.local()
        self._defaults: dict[int, Stream] = {}
        self._capture_stream: Stream | None = None

    # Devices, streams and the host ---------------------------------------------------------------------------------

    def device(self, device: Any = None) -> torch.device:
        """With its index; the current one where none is named."""
        device = torch.device("cuda" if device is None else device if not isinstance(device, int) else f"cuda:{device}")
        return torch.device("cuda", self.guard.current_device() if device.index is None else device.index)

    def current_stream(self, device: Any = None) -> Stream:
        index = self.device(device).index
        chosen = getattr(self._thread, "streams", {}).get(index)
        if chosen is None and index not in self._defaults:
            self._defaults[index] = Stream(torch.device("cuda", index), name=f"default of cuda:{index}")
        return chosen or self._defaults[index]

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before = dict(getattr(self._thread, "streams", {}))
        self._thread.streams = {**before, stream.device.index: stream}
        try:
            with OnDevice(stream.device):
                yield
        finally:
            self._thread.streams = before

    def set_stream(self, stream: Stream) -> None:
        self._thread.streams = {**getattr(self._thread, "streams", {}), stream.device.index: stream}

    def host_waits_for(self, clock: collections.Counter[str]) -> None:
        with self.lock:
            self.host_clock |= clock
            for stream in self.streams:
                stream.clock |= self.host_clock

    def synchronize(self, device: Any = None) -> None:
        for stream in list(self.streams):
            self.host_waits_for(stream.clock)

    # Graphs --------------------------------------------------------------------------------------------------------

    @property
    def capturing(self) -> Graph | None:
        return getattr(self._thread, "graph", None)

    @property
    def num_graphs(self) -> int:
        return sum(reference() is not None for reference in self.graphs)

    @contextlib.contextmanager
    def capture(
        self, graph: Graph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        pool = len(self.pools) + 1000 if pool is None else pool
        if pool in self.pools and self.pools[pool] == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED: the pool's last graph is gone")
        if capture_error_mode != "thread_local":
            self.report("a capture forbids what other threads do meanwhile", capture_error_mode)
        self.pools[pool] += 1
        weakref.finalize(graph, self.pools.subtract, {pool: 1})
        graph.pool_handle = pool
        if stream is None:
            self._capture_stream = self._capture_stream or Stream()
            stream = self._capture_stream
        self.synchronize()
        before = self.current_stream(stream.device)
        self.set_stream(stream)
        self._thread.graph = graph
        try:
            yield
        except BaseException:  # torch then leaves the stream of the capture behind
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
        else:
            self.set_stream(before)
        finally:
            self._thread.graph = None

    # Memory --------------------------------------------------------------------------------------------------------

    def block_of(self, storage: torch.UntypedStorage, device: torch.device | None = None) -> Block:
        block = self._blocks.get(storage)
        if block is None:
            block = Block(self.current_stream(device), self.capturing, storage.nbytes(), _where())
            self._blocks[storage] = block
            self.live_bytes += block.size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._freed, block)
        return block

    def _freed(self, block: Block) -> None:
        with self.lock:
            self.live_bytes -= block.size
            for name, time in block.uses.items():
                if name not in (block.stream.name, *block.recorded) and block.stream.clock[name] < time:
                    self.report(
                        f"memory is freed to {block.stream.name} while {name} may still use it",
                        f"allocated at {block.born}",
                    )

    def reset_peak(self, device: Any = None) -> None:
        self.peak_bytes = self.live_bytes

    def empty_cache(self) -> None:
        self.live_at_empty_cache.append(self.live_bytes)

    def note_use(self, block: Block, stream: Stream, time: int, *, is_write: bool, what: str) -> None:
        if block.writer is not None and stream.clock[block.writer[0]] < block.writer[1]:
            self.report(f"{what} on {stream.name} reads what {block.writer[0]} may not have written", block.born)
        if is_write:
            for name, used in block.uses.items():
                if stream.clock[name] < used:
                    self.report(f"{what} on {stream.name} writes over what {name} may still use", block.born)
            block.writer = (stream.name, time)
        block.uses[stream.name] = time

    # Reports -------------------------------------------------------------------------------------------------------

    def report(self, what: str, detail: str) -> None:
        key = f"{what} | {detail} | {_where()}"
        self.hazards[key] += 1
        self.traces.setdefault(key, "".join(traceback.format_stack(limit=16)))

    def note_wait(self, what: str) -> None:
        self.waits[f"{what} | {_where()}"] += 1
        if self.capturing is not None:
            self.report("a capture forbids", what)

    # Operators -----------------------------------------------------------------------------------------------------

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [value for value in _leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_device = [tensor for tensor in given if isinstance(tensor, CudaTensor)]
        asked = kwargs.get("device")
        if asked is None:
            asked = next((value for value in _leaves(args) if isinstance(value, torch.device)), None)
        asked = None if asked is None else torch.device(asked)
        if not on_device and (asked is None or asked.type != "cuda"):
            return func(*args, **kwargs)
        name = func._schema.name
        if asked is not None and asked.type == "meta":
            host_args, host_kwargs = _on_host((args, kwargs))
            return func(*host_args, **({**host_kwargs, "device": asked} if "device" in kwargs else host_kwargs))
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
        return self.execute(func, args, kwargs, asked)

    def _dispatch(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is registered for GPUs; the kernel that it launches comes back to `launch`."""
        if op in KERNELS:
            return _registry.run_kernel(_no_eager, *KERNELS[op], *args, **kwargs)
        if op == "frame_attention":
            return dispatch(*args, **kwargs)
        raise AssertionError(f"{op} has no form for GPUs that is known here")

    def launch(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """What stands for a Triton kernel: the op's CPU form, on the device that is current."""
        on_device = [value for value in _leaves((args, kwargs)) if isinstance(value, CudaTensor)]
        if on_device[0].device != self.device():
            self.report(
                "a kernel is launched on another device than its tensors'", f"{op._schema.name} on {self.device()}"
            )
        return self.execute(op, args, kwargs)

    def execute(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], asked: torch.device | None = None
    ) -> Any:
        """Run on the host's memory, watched."""
        name = func._schema.name
        given = [value for value in _leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_device = [tensor for tensor in given if isinstance(tensor, CudaTensor)]
        on_host = [tensor for tensor in given if not isinstance(tensor, CudaTensor)]
        to_host = asked is not None and asked.type == "cpu"
        device = on_device[0].device if on_device and (asked is None or to_host) else self.device(asked)
        stream = self.current_stream(device)
        with self.lock:
            is_copy = name in ("aten::copy_", "aten::_to_copy")
            if len({tensor.device for tensor in on_device}) > 1 and not is_copy:
                self.report("tensors of two devices", name)
            if on_device and [t for t in on_host if t.ndim] and name not in INDEXING and not is_copy:
                self.report("tensors of CPU and CUDA", name)
            time = stream.tick()
            self._note_waits(name, args, kwargs, on_device, on_host, asked, stream)
            host_args, host_kwargs = _on_host((args, kwargs))
            if host_kwargs.get("device") is not None:
                host_kwargs["device"] = HOST
            host_kwargs.pop("pin_memory", None)
            written = list(_written(func, args, kwargs))
            graph = self.capturing
            for tensor in on_device if graph is None else ():  # what is captured runs in replays alone
                is_write = any(tensor is other for other in written)
                block = self.block_of(tensor.host.untyped_storage(), tensor.device)
                self.note_use(block, stream, time, is_write=is_write, what=name)
            kept = [tensor.host.clone() for tensor in written if isinstance(tensor, CudaTensor)] if graph else []
            result = func(*host_args, **host_kwargs)
            if to_host or (name == "aten::copy_" and not isinstance(args[0], CudaTensor)):
                return args[0] if name == "aten::copy_" else result
            if graph is not None:
                self._record(graph, func, host_args, host_kwargs, result, on_device, written, kept)
            hosts = {id(tensor.host): tensor for tensor in on_device}

            def on_machine(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                if id(value) in hosts:
                    return hosts[id(value)]
                block = self.block_of(value.untyped_storage(), device)
                if graph is None:
                    block.writer = block.writer or (stream.name, time)
                    block.uses[stream.name] = time
                return CudaTensor(value, device)

            return _mapped(on_machine, result)

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
        self,
        graph: Graph,
        func: Any,
        args: Any,
        kwargs: Any,
        result: Any,
        on_device: list[CudaTensor],
        written: list[Tensor],
        kept: list[Tensor],
    ) -> None:
        """A capture computes nothing: what was written is put back, and new results are NaN."""
        graph.operations.append((func, args, kwargs, result))
        for tensor in on_device:
            block = self.block_of(tensor.host.untyped_storage())
            if block.graph is None or block.graph() is not graph:
                graph.outside[block] = graph.outside.get(block, False) or any(tensor is other for other in written)
        for tensor, before in zip(written, kept, strict=True):
            tensor.host.copy_(before)
        known = {tensor.host.untyped_storage().data_ptr() for tensor in on_device}
        for value in _leaves(result):
            is_new = isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known
            if is_new and value.is_floating_point():
                value.fill_(float("nan"))


def _no_eager(*_: Any, **__: Any) -> Any:
    raise AssertionError("float64 on a GPU: no op of a run computes in it")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors that the operator's schema says it writes into."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[i] if i < len(args) else None)
            yield from (tensor for tensor in _leaves(value) if isinstance(tensor, Tensor))


def _leaves(tree: Any) -> Iterator[Any]:
    """What lies in lists, tuples and dictionaries."""
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from _leaves(part)
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))
    else:
        yield tree


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same with every leaf changed."""
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return type(tree)(_mapped(change, part) for part in tree)
    if isinstance(tree, dict):
        return {name: _mapped(change, part) for name, part in tree.items()}
    return change(tree)


def _host(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.host
    return HOST if isinstance(value, torch.device) else value


def _on_host(arguments: Any) -> Any:
    return _mapped(_host, arguments)


def _where() -> str:
    """The two innermost lines of the product."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(lines) < 2:
        if frame.f_code.co_filename.startswith(_PRODUCT):
            lines.append(f"{frame.f_code.co_filename.removeprefix(_ROOT)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)


_machines: list[Machine] = []


def machine() -> Machine:
    return _machines[-1]


@contextlib.contextmanager
def pretended_cuda() -> Iterator[Machine]:
    """A machine of its own; afterwards torch is as it was, but for a device guard that finds no CUDA operators."""
    guard = guard_library()
    assert guard is not None
    here = Machine(guard)
    _machines.append(here)
    decode._decode_stream.cache_clear()

    def pinned(tensor: Tensor, *_: Any) -> Tensor:
        copy = tensor.clone()
        copy.is_pretended_pinned = True
        return copy

    run_decoding = decode.Decoding._run

    def decoding(self: Any) -> None:
        with OnMachine():
            run_decoding(self)

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
            "default_stream": here.current_stream,
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
        decode.Decoding: {"_run": decoding},
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
            decode._decode_stream.cache_clear()
            _machines.pop()
            guard.set_current_device(0)
