"""Memory on a pretended GPU: where it runs out, and that a run takes no more than was estimated."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import re
from typing import Any

import pytest
import torch
from pretended_cuda import Machine
from pretended_device import machine
from pretended_runs import CAN_PRETEND, PROMPT, frames_by, levels_apart, options_of

from miga_engine import Engine
from miga_engine import memory as estimates
from miga_engine.device import is_out_of_memory
from miga_engine.errors import DeviceError
from miga_engine.presets import PRESETS
from miga_engine.runtime import denoise
from miga_engine.runtime.stream import Event

pytestmark = CAN_PRETEND

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize(
    "error", OUT_OF_MEMORY, ids=lambda error: re.sub(r"\W+", " ", str(error))[:40] or "MemoryError"
)
def test_every_library_is_understood_when_memory_runs_out(error: Exception) -> None:
    assert is_out_of_memory(error)
    broken = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    broken.__context__ = error
    assert is_out_of_memory(broken)
    wrong = ValueError("wrong")
    wrong.__context__ = error  # raised while an earlier error was handled, and no consequence of it
    assert not is_out_of_memory(wrong)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
        RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_not_taken_for_a_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


class _Fault:
    """Fails once, at attention of at least `windows` windows and branches, in a capture or outside of one."""

    def __init__(self, here: Machine, error: Exception, *, in_capture: bool, windows: int = 4) -> None:
        self.here, self.error, self.in_capture, self.windows, self.is_over = here, error, in_capture, windows, False

    def __call__(self, name: str, args: tuple[Any, ...]) -> None:
        is_it = name == "miga::frame_attention" and args[0].shape[0] >= self.windows
        if is_it and not self.is_over and (self.here.capturing is not None) == self.in_capture:
            self.is_over = True
            raise type(self.error)(*self.error.args)  # a fresh one: an error that is kept holds its frames


@pytest.mark.slow
def test_memory_that_runs_out_in_the_first_forward_halves_the_batch(gpu) -> None:
    engine = Engine.from_pretrained("tiny", "cuda", "float32", capture=False)
    expected = frames_by(engine, "tiny")
    forward = denoise.Denoiser._forward
    for error in OUT_OF_MEMORY[:5:2]:
        gpu.before = fault = _Fault(gpu, error, in_capture=False)
        live: list[int] = []
        events: list[Event] = []

        def watched(self: denoise.Denoiser, *arguments: Any, fault=fault, live=live) -> None:
            if not fault.is_over:
                live.append(gpu.live_bytes)
            forward(self, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(denoise.Denoiser, "_forward", watched)
            frames = engine.generate(PROMPT, **options_of("tiny"), on_event=events.append).frames
        assert fault.is_over
        assert [event.data["window_batch"] for event in events if event.kind == "window_batch"] == [1]
        assert levels_apart(frames, expected) <= 1
        # Nothing of the failed forward was held, by its error's traceback say, when the cache was emptied.
        assert gpu.live_at_empty_cache[-1] <= live[-1]


@pytest.mark.slow
def test_memory_that_runs_out_in_the_first_capture_ends_capturing_alone(gpu) -> None:
    engine, events = Engine.from_pretrained("tiny", "cuda", "float32"), []
    expected = frames_by(engine, "tiny")
    num_captures = len(gpu.graphs)
    gpu.before = fault = _Fault(gpu, OUT_OF_MEMORY[0], in_capture=True, windows=1)
    stream = torch.cuda.current_stream()
    frames = engine.generate(PROMPT, **options_of("tiny"), on_event=events.append).frames
    assert fault.is_over
    assert torch.cuda.current_stream() is stream
    assert torch.equal(frames, expected)
    assert [event.data for event in events if event.kind == "capture"] == [{"is_on": False, "reason": "out of memory"}]
    assert len(gpu.graphs) == num_captures + 1


@pytest.mark.slow
def test_memory_that_runs_out_in_a_later_forward_leaves_graphs_usable(gpu) -> None:
    """Graphs of a batch that is halved are given up with their pool, and smaller ones are captured anew."""
    engine, events = Engine.from_pretrained("tiny", "cuda", "float32"), []
    expected = frames_by(engine, "tiny")
    num_captures = len(gpu.graphs)
    count = itertools.count()

    def fail(name: str, args: tuple[Any, ...]) -> None:
        # Between replays nothing but eager forwards passes here: those of two windows, after graphs of one.
        is_it = name == "miga::frame_attention" and args[0].shape[0] >= 4 and gpu.capturing is None
        if is_it and next(count) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.before = fail
    frames = engine.generate(PROMPT, **options_of("tiny"), on_event=events.append).frames
    assert [event.kind for event in events if event.kind in ("window_batch", "capture")] == ["window_batch"]
    assert levels_apart(frames, expected) <= 1
    assert len(gpu.graphs) > num_captures + 1  # one before, one after


def test_another_error_in_a_capture_is_not_hidden(gpu) -> None:
    gpu.before = _Fault(gpu, RuntimeError("no kernel image"), in_capture=True, windows=1)
    with pytest.raises(RuntimeError, match="during capture") as raised:
        frames_by(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny")
    assert str(raised.value.__context__) == "no kernel image"


@pytest.mark.slow
def test_memory_that_runs_out_in_the_decoder_is_given_back(gpu, tmp_path) -> None:
    engine = Engine.from_pretrained("tiny", "cuda", "float32")
    whole = frames_by(engine, "tiny")
    options, calls, held = options_of("tiny"), itertools.count(), []

    def fail(name: str, args: tuple[Any, ...]) -> None:
        if name == "aten::_convolution" and machine().current_stream().name.startswith("stream") and next(calls) == 40:
            held.append(machine().live_bytes)
            raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.before = fail
    stream = engine.stream(PROMPT, **options)
    parts = []
    with pytest.raises(DeviceError, match="out of memory while decoding"):
        parts.extend(chunk.frames.cpu() for chunk in iter(lambda: next(stream), None))
    stream.save(tmp_path / "run.safetensors")
    stream.close()
    parts += [chunk.frames.cpu() for chunk in engine.resume(tmp_path / "run.safetensors")]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan", "videocrafter2"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_run_takes_no_more_than_was_estimated(gpu, folders, family: str, batch: int) -> None:
    """Of tensors; here forward and decoding, which the estimate adds up, are seldom at their most together."""
    engine = Engine.from_pretrained(folders[family], "cuda", "bfloat16", capture=False)
    options = options_of(family)
    options["miga"] = dataclasses.replace(options["miga"], window_batch=batch)
    with engine.stream(PROMPT, **options) as stream:
        gpu.reset_peak()
        for _ in stream:
            pass
    graphs = Engine.estimate(folders[family], device="cuda", dtype="bfloat16", **options).resident["captured forwards"]
    estimate = engine.running_bytes(engine.resolve(PROMPT, **options), batch) - graphs
    assert 0.8 * estimate < gpu.peak_bytes <= estimate


@pytest.mark.slow
@pytest.mark.parametrize("capture", [False, True])
def test_a_runs_memory_goes_with_its_last_user(gpu, capture: bool) -> None:
    """At once, not when Python next looks for cycles."""
    engine = Engine.from_pretrained("tiny", "cuda", "float32", capture=capture)
    frames_by(engine, "tiny")
    gc.collect()
    before = gpu.live_bytes
    gc.disable()
    try:
        frames_by(engine, "tiny")
        assert gpu.live_bytes == before
        stream = engine.stream(PROMPT, **options_of("tiny"))
        next(stream)
        assert gpu.live_bytes > before
        del stream  # dropped half-way
        assert gpu.live_bytes == before
    finally:
        gc.enable()


@pytest.mark.slow
def test_the_batch_is_chosen_without_a_folder_and_once_for_each_size(gpu, monkeypatch) -> None:
    """An engine of networks that came from elsewhere has no files to read shapes from."""
    bundle = Engine.from_pretrained("tiny", "cuda", "bfloat16").bundle
    engine = Engine(bundle, PRESETS["tiny"], name="narrow", device=torch.device("cuda"))
    asked = []
    running_bytes = estimates.running_bytes
    monkeypatch.setattr(estimates, "running_bytes", lambda *a, **k: asked.append(k) or running_bytes(*a, **k))
    request = engine.resolve(PROMPT, num_frames=49)
    assert engine._window_batch(request) == 8
    assert len(asked) == 3
    assert engine._window_batch(dataclasses.replace(request, seed=7, num_frames=9)) == 8
    assert len(asked) == 3
    need = list(engine._estimates.values())[-1]
    estimate = Engine.estimate("tiny", device="cuda", dtype="bfloat16", window_batch=8)
    assert need == pytest.approx(estimate.device_total, rel=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (need, need))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        assert engine._window_batch(request) == 4  # four fifths of it


@pytest.mark.slow
def test_networks_leave_the_gpu_at_once_and_come_back(gpu, folders) -> None:
    before = gpu.live_bytes
    engine = Engine.from_pretrained(folders["wan"], "cuda", "float32")
    frames = frames_by(engine, "wan")
    held = engine.network_bytes()
    assert 0 < held <= gpu.live_bytes - before
    engine.unload()
    assert gpu.live_bytes == before
    assert torch.equal(frames_by(engine, "wan"), frames)
    on_cpu = engine.to("cpu")
    assert on_cpu is engine
    assert gpu.live_bytes == before
    assert levels_apart(frames_by(engine, "wan"), frames) <= 1
    engine.unload()
    assert engine.device.type == "cpu"
    assert torch.equal(frames_by(engine.to("cuda"), "wan"), frames)  # read again, there
    assert engine.bundle.dtype == torch.float32
    assert gpu.live_bytes - before >= held
