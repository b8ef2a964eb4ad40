"""The devices of the pretended machine: streams, events, graphs and memory, and which work is known to be finished.

What is ordered is known by vector clocks: a stream's clock says which work of every stream is finished when its own
next work begins. Host threads count as one: whatever one of them has waited for is done for all. There are no times.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from trees import leaves

_ROOT = f"{Path(__file__).parents[1]}/"
_NOTHING: dict[Any, Any] = {}
_PRODUCT = (f"{_ROOT}miga_engine/", f"{_ROOT}kernels/")


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
        self.operations: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        """Operators, what they are given on the host, and what they make in memory of its own."""
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
                if not block.is_held():
                    here.report("a graph uses memory that was freed since its capture", f"allocated at {block.born}")
                here.note_use(block, stream, time, is_write=is_write, what="a replay")
            with _disable_current_modes():  # it is all on the host, and there is nothing to watch
                self._run()

    def _run(self) -> None:
        for func, args, kwargs, results in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(results, (again,) if isinstance(again, Tensor) else leaves(again), strict=True):
                if old is not None:
                    old.copy_(new)


class CudaTensor(torch.Tensor):
    """A tensor of device cuda over a tensor of the host."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device, block: Block | None = None) -> CudaTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
        )
        tensor.host = host
        tensor.hold = (block or machine().block_of(host.untyped_storage(), device)).hold()
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
        self.hold.block.recorded.add(stream.name)

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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and torch's guard against it costs more than most operators."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return machine().run(func, args, kwargs or {})


class Hold:
    """What the tensors over one piece of memory share, and nothing else has."""

    __slots__ = ("__weakref__", "block")

    def __init__(self, block: Block) -> None:
        self.block = block


class Block:
    """A piece of memory, freed to the stream it was allocated on."""

    def __init__(self, stream: Stream, graph: Graph | None, size: int, born: str) -> None:
        self.stream, self.size, self.born = stream, size, born
        self.graph = None if graph is None else weakref.ref(graph)  # which holds the memory, and not the other way
        self._hold: Callable[[], Hold | None] = lambda: None
        self.uses: dict[str, int] = {}
        self.recorded: set[str] = set()
        self.writer: tuple[str, int] | None = None

    def hold(self) -> Hold:
        hold = self._hold()
        if hold is None:
            hold = Hold(self)
            self._hold = weakref.ref(hold)
        return hold

    def is_held(self) -> bool:
        return self._hold() is not None


class Devices:
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
        self._blocks: dict[weakref.ref[torch.UntypedStorage], Block] = {}
        self._thread = threading.local()
        self._defaults: dict[int, Stream] = {}
        self._capture_stream: Stream | None = None

    # Devices, streams and the host ---------------------------------------------------------------------------------

    def device(self, device: Any = None) -> torch.device:
        """With its index; the current one where none is named."""
        if isinstance(device, torch.device) and device.index is not None:
            return device
        device = torch.device("cuda" if device is None else device if not isinstance(device, int) else f"cuda:{device}")
        return torch.device("cuda", self.guard.current_device() if device.index is None else device.index)

    def current_stream(self, device: Any = None) -> Stream:
        index = self.device(device).index
        return (
            getattr(self._thread, "streams", _NOTHING).get(index)
            or self._defaults.get(index)
            or self.default_stream(device)
        )

    def default_stream(self, device: Any = None) -> Stream:
        index = self.device(device).index
        if index not in self._defaults:
            self._defaults[index] = Stream(torch.device("cuda", index), name=f"default of cuda:{index}")
        return self._defaults[index]

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
        block = self._blocks.get(weakref.ref(storage))
        if block is None:
            block = Block(self.current_stream(device), self.capturing, storage.nbytes(), _where())
            self._blocks[weakref.ref(storage, self._freed)] = block
            self.live_bytes += block.size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return block

    def _freed(self, storage: weakref.ref[torch.UntypedStorage]) -> None:
        with self.lock:
            block = self._blocks.pop(storage)
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


def _where() -> str:
    """The two innermost lines of the product."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(lines) < 2:
        if _is_product(frame.f_code.co_filename):
            lines.append(f"{frame.f_code.co_filename.removeprefix(_ROOT)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)


@functools.cache
def _is_product(path: str) -> bool:
    return path.startswith(_PRODUCT)


machines: list[Any] = []


def machine() -> Any:
    return machines[-1]
