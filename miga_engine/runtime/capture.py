"""Forwards of small batches as CUDA graphs: what a forward of one shape costs in launches is paid once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miga_engine.device import indexed, is_out_of_memory

CAPTURE_POSITIONS = 1 << 15
"""Latent positions (of all frames, windows and guidance branches of a batch) up to which a forward is captured on CUDA.

Above, the device is busy for longer than its launches take, and a graph would only hold memory. Predicted and not yet
measured: a block of Wan2.1 1.3B is about 14 launches of 10 µs, and 0.1 µs of work a token of four positions.
"""


def is_worth_capturing(num_positions: int) -> bool:
    """Whether a forward of so many latent positions is one that a GPU captures."""
    return num_positions <= CAPTURE_POSITIONS


class BatchShape(NamedTuple):
    """What a captured forward depends on; everything else is data."""

    windows: int
    frames: int
    kept: int
    has_prompt_per_frame: bool
    parts_branches: bool
    expert: int = 0


_one_capture = threading.Lock()
"""torch allows one capture at a time in a process; two engines may run in two threads."""


class CapturedForwards:
    """Forwards of small batches as CUDA graphs, one for each shape that comes again.

    The first forward of a shape runs as it is, which compiles kernels and chooses attention; the second is captured.
    All share one CUDA stream and one pool of memory: only one of them runs at a time. Where the pool cannot be had,
    forwards run as they are from then on, once reported through `emit`.
    """

    def __init__(self, device: torch.device, emit: Callable[..., None]) -> None:
        self._emit = emit
        self._is_on = True
        self._side_stream = torch.cuda.Stream(indexed(device))  # torch's own is of the device that was current first
        self._seen: set[BatchShape] = set()
        self._captured: dict[BatchShape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None

    def run(self, forward: Callable[[Tensor, BatchShape], None], tables: Tensor, shape: BatchShape) -> None:
        """The forward of these tables; it is not kept, for who owns this would then not be freed with its last user."""
        if self._is_on and shape in self._seen:
            self._is_on = shape in self._captured or self._capture(forward, tables, shape)
        if shape in self._captured:
            graph, static = self._captured[shape]
            static.copy_(tables)
            graph.replay()
        else:
            forward(tables, shape)
            self._seen.add(shape)

    def clear(self) -> None:
        """Give back the memory of all graphs."""
        self._captured.clear()
        self._pool = None

    def _capture(self, forward: Callable[[Tensor, BatchShape], None], tables: Tensor, shape: BatchShape) -> bool:
        """Keep the graph of this shape, and the tables that it reads; False where there is no memory for it."""
        if not self._captured:  # a pool is gone with the last graph that used it, also with one that failed
            self._pool = torch.cuda.graph_pool_handle()
        static, graph, cuda_stream = tables.clone(), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # Other threads decode and encode meanwhile, which a capture of all threads' calls would forbid.
        try:
            with (
                _one_capture,
                torch.cuda.graph(graph, pool=self._pool, stream=self._side_stream, capture_error_mode="thread_local"),
            ):
                forward(static, shape)
        except RuntimeError as error:
            torch.cuda.set_stream(cuda_stream)  # a capture that fails to end leaves its own behind
            if not is_out_of_memory(error):
                raise
        else:
            self._captured[shape] = graph, static
            return True
        self.clear()
        torch.cuda.empty_cache()
        self._emit("capture", is_on=False, reason="out of memory")
        return False
