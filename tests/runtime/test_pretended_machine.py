"""The pretended GPU itself: it sees what a real one would do wrong without an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pretended_cuda import Machine, Stream, pretended_cuda
from pretended_runs import CAN_PRETEND

pytestmark = CAN_PRETEND


def _hazards(do: Callable[[Machine], object]) -> str:
    with pretended_cuda() as here:
        kept = do(here)  # what is given back here is not freed before the look
        found = " | ".join(here.hazards)
        del kept
    return found


def test_the_machine_sees_unordered_work() -> None:
    def read(here: Machine) -> object:
        x = torch.ones(4, device="cuda")
        with torch.cuda.stream(Stream()):
            return x + 1

    def write(here: Machine) -> object:
        x = torch.ones(4, device="cuda")
        side = Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x + 1
        return x.add_(1), y

    def ordered(here: Machine) -> object:
        x = torch.ones(4, device="cuda")
        side = Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x + 1
        torch.cuda.current_stream().wait_stream(side)
        return x.add_(1), y

    assert "reads what" in _hazards(read)
    assert "writes over" in _hazards(write)
    assert _hazards(ordered) == ""


def test_the_machine_sees_memory_that_is_freed_too_early() -> None:
    def work(here: Machine, is_recorded: bool) -> None:
        x = torch.ones(4, device="cuda")
        side = Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x + 1
        if is_recorded:
            x.record_stream(side)
        del x
        del y

    assert "memory is freed to default" in _hazards(lambda here: work(here, False))
    assert _hazards(lambda here: work(here, True)) == ""


def test_the_machine_sees_mixed_devices() -> None:
    assert "tensors of CPU and CUDA" in _hazards(lambda here: torch.ones(4, device="cuda") + torch.ones(4))
    mixed = lambda here: torch.ones(4, device="cuda:0") + torch.ones(4, device="cuda:1")  # noqa: E731
    assert "tensors of two devices" in _hazards(mixed)


def test_the_machine_replays_graphs_and_sees_what_a_capture_forbids() -> None:
    with pretended_cuda() as here:
        x, y = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            z = x * 2
            y.add_(z)
        assert y.tolist() == [0] * 4  # a capture runs nothing
        assert z.isnan().tolist() == [True] * 4
        x.fill_(3)
        graph.replay()
        assert (y.tolist(), z.tolist()) == ([6] * 4, [6] * 4)
        assert not here.hazards
        del x
        graph.replay()
        assert "freed since its capture" in " ".join(here.hazards)
        here.hazards.clear()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            y.tolist()
        assert "a capture forbids" in " ".join(here.hazards)
        here.hazards.clear()
        pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            y.add_(1)
        del graph
        with (
            pytest.raises(RuntimeError, match="use_count"),
            torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool, capture_error_mode="thread_local"),
        ):
            y.add_(1)
