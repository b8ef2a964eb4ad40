"""Whole runs on a pretended GPU: the frames of the CPU, and nothing that a real one would do wrong without an error."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import golden_model
import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import Machine, Stream, machine, pretended_cuda
from torch import Tensor

from miga_engine import Engine, ops
from miga_engine import memory as estimates
from miga_engine.cli import main
from miga_engine.config import ATTENTION_BACKENDS, PRESETS
from miga_engine.device import is_out_of_memory, to_device
from miga_engine.errors import ConfigError, DeviceError, SessionError
from miga_engine.noise import Purpose, frame_noise
from miga_engine.ops.frame_attention import probe
from miga_engine.runtime import denoise
from miga_engine.runtime.session import load_session
from miga_engine.runtime.stages import DONE
from miga_engine.video.reading import read_metadata

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here: its own guard must stay"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="the pretended device guard needs a C++ compiler"),
]

PROMPT = "a red balloon over snowy hills at dawn"
TINY = {"height": 32, "width": 48, "num_inference_steps": 8}


@pytest.fixture
def gpu() -> Iterator[Machine]:
    with pretended_cuda() as here:
        yield here
        report = "\n".join(f"{count} × {hazard}" for hazard, count in here.hazards.most_common())
    assert not here.hazards, report


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    built = {name: family.build(root / name) for name, family in golden_model.FAMILIES.items()}
    return {**built, "tiny": "tiny"}


def _options(family: str) -> dict[str, Any]:
    if family == "tiny":
        miga = dataclasses.replace(PRESETS["tiny"].miga, stage2_steps=2, window_batch=2, judge_step=3)
        return {**TINY, "num_frames": 61, "miga": miga}
    known = golden_model.FAMILIES[family]
    miga = dataclasses.replace(known.options["miga"], window_batch=2)
    return {**known.options, "num_frames": known.num_frames, "miga": miga}


def _frames(engine: Engine, family: str, prompt: Any = PROMPT, **changes: Any) -> Tensor:
    return engine.generate(prompt, **{**_options(family), **changes}).frames


def _levels_apart(one: Tensor, other: Tensor) -> int:
    """The largest difference: that of roundings, where norms and attention are other code than the CPU's, is 1."""
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"), [("tiny", "float32"), ("wan", "float32"), ("wan", "bfloat16"), ("videocrafter2", "bfloat16")]
)
def test_eager_captured_and_overlapped_runs_give_the_same_frames(gpu, folders, family: str, dtype: str) -> None:
    on_cpu = _frames(Engine.from_pretrained(folders[family], "cpu", dtype), family)
    eager = _frames(Engine.from_pretrained(folders[family], "cuda", dtype, capture=False), family, overlap_decode=False)
    assert not gpu.graphs
    if dtype == "float32":
        assert _levels_apart(eager, on_cpu) <= 1
    assert (eager.int() - on_cpu.int()).abs().double().mean() < 1
    captured = Engine.from_pretrained(folders[family], "cuda", dtype)
    assert torch.equal(_frames(captured, family, overlap_decode=False), eager)
    num_captures = len(gpu.graphs)
    assert 0 < num_captures <= 3  # one or two windows of a whole clip's frames, and of fewer in a search
    assert torch.equal(_frames(captured, family), eager)


def test_the_host_waits_once_a_tick(gpu) -> None:
    """For the news that nothing was NaN; and where it judges by a score, and takes the frames."""
    engine = Engine.from_pretrained("tiny", "cuda", "float32")
    counts, num_ticks = [], []
    for num_frames in (61, 61, 121):
        gpu.waits.clear()
        run = engine.start(engine.resolve(PROMPT, **{**_options("tiny"), "num_frames": num_frames}))
        num_ticks.append(0)
        while run.stage != DONE:
            run.tick()
            num_ticks[-1] += 1
        counts.append(gpu.waits.copy())
    grown = counts[2] - counts[1]
    regular = [wait for wait in grown if "reflection.py" not in wait]
    assert len(regular) == 1
    assert grown[regular[0]] == num_ticks[2] - num_ticks[1]


def test_prompts_change_and_blend(gpu, folders) -> None:
    prompts = {0: PROMPT, 24: "a red balloon over snowy hills at night"}
    options = {"miga": dataclasses.replace(_options("tiny")["miga"], prompt_blend_frames=8)}
    on_cpu = _frames(Engine.from_pretrained("tiny", "cpu"), "tiny", prompts, **options)
    on_gpu = _frames(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny", prompts, **options)
    assert _levels_apart(on_gpu, on_cpu) <= 1


@pytest.mark.parametrize("family", ["tiny", *golden_model.FAMILIES])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_resumed_run_gives_the_frames_that_come_next(gpu, folders, tmp_path, family: str, overlap: bool) -> None:
    path = tmp_path / "run.safetensors"
    engine = Engine.from_pretrained(folders[family], "cuda", "float32")
    whole = _frames(engine, family)
    options = _options(family)
    with engine.stream(PROMPT, overlap_decode=overlap, **options) as stream:
        parts = [next(stream).frames.cpu() for _ in range(2)]
        stream.save(path)
    # By the same engine: one that is new waits in every convolution of its first frames, which hides what is unordered.
    with engine.resume(path, overlap_decode=overlap) as stream:
        parts += [chunk.frames.cpu() for chunk in stream]
    assert torch.equal(torch.cat(parts), whole)


def test_a_second_gpu_is_used_although_the_first_is_current(gpu, folders) -> None:
    expected = _frames(Engine.from_pretrained("tiny", "cuda", "bfloat16"), "tiny")
    engine = Engine.from_pretrained("tiny", "cuda:1", "bfloat16")
    assert engine.device == torch.device("cuda:1")
    assert torch.equal(_frames(engine, "tiny"), expected)
    assert torch.cuda.current_device() == 0


def test_a_gpu_without_a_number_is_the_current_one(gpu) -> None:
    with torch.cuda.device(1):
        assert Engine.from_pretrained("tiny", "cuda").device == torch.device("cuda:1")


def test_noise_and_indices_are_drawn_without_a_wait(gpu) -> None:
    noise = frame_noise(0, Purpose.PUSH, torch.arange(5), stream=torch.arange(5), device="cuda")
    assert noise.draw((4, 2, 3)).is_cuda
    assert to_device(torch.arange(3), "cuda").tolist() == [0, 1, 2]
    assert [wait for wait in gpu.waits if not wait.startswith("tolist")] == []


# Captured forwards ---------------------------------------------------------------------------------------------------


def test_large_batches_are_not_captured(gpu, monkeypatch) -> None:
    expected = _frames(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny")
    monkeypatch.setattr(denoise, "CAPTURE_POSITIONS", 0)
    num_captures = len(gpu.graphs)
    assert _levels_apart(_frames(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny"), expected) <= 1
    assert len(gpu.graphs) == num_captures


@pytest.mark.parametrize("batch", [1, 3])
def test_graphs_are_few_whatever_is_committed(gpu, batch: int) -> None:
    miga = dataclasses.replace(_options("tiny")["miga"], window_batch=batch, self_reflection=False)
    _frames(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny", miga=miga, num_frames=121)
    assert len(gpu.graphs) <= batch


def test_one_capture_at_a_time(gpu) -> None:
    """As torch asks of a process, in which two engines may run in two threads."""
    seen = []
    gpu.before = lambda name, args: seen.append(denoise._one_capture.locked()) if gpu.capturing else None
    _frames(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny")
    assert seen
    assert all(seen)
    assert not denoise._one_capture.locked()


# Memory --------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("error", OUT_OF_MEMORY[:5:2])
def test_memory_that_runs_out_in_the_first_forward_halves_the_batch(gpu, error: Exception) -> None:
    engine, events = Engine.from_pretrained("tiny", "cuda", "float32", capture=False), []
    expected = _frames(engine, "tiny")
    gpu.before = fault = _Fault(gpu, error, in_capture=False)
    live: list[int] = []
    forward = denoise.Denoiser._forward

    def watched(self: denoise.Denoiser, *arguments: Any) -> None:
        if not fault.is_over:
            live.append(gpu.live_bytes)
        forward(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoise.Denoiser, "_forward", watched)
        frames = engine.generate(PROMPT, **_options("tiny"), on_event=events.append).frames
    assert fault.is_over
    assert [event.data["window_batch"] for event in events if event.kind == "window_batch"] == [1]
    assert _levels_apart(frames, expected) <= 1
    # Nothing of the failed forward was held, by its error's traceback say, when the cache was emptied.
    assert gpu.live_at_empty_cache[-1] <= live[-1]


def test_memory_that_runs_out_in_the_first_capture_ends_capturing_alone(gpu) -> None:
    engine, events = Engine.from_pretrained("tiny", "cuda", "float32"), []
    expected = _frames(engine, "tiny")
    num_captures = len(gpu.graphs)
    gpu.before = fault = _Fault(gpu, OUT_OF_MEMORY[0], in_capture=True, windows=1)
    stream = torch.cuda.current_stream()
    frames = engine.generate(PROMPT, **_options("tiny"), on_event=events.append).frames
    assert fault.is_over
    assert torch.cuda.current_stream() is stream
    assert torch.equal(frames, expected)
    assert [event.data for event in events if event.kind == "capture"] == [{"is_on": False, "reason": "out of memory"}]
    assert len(gpu.graphs) == num_captures + 1


def test_memory_that_runs_out_in_a_later_forward_leaves_graphs_usable(gpu) -> None:
    """Graphs of a batch that is halved are given up with their pool, and smaller ones are captured anew."""
    engine, events = Engine.from_pretrained("tiny", "cuda", "float32"), []
    expected = _frames(engine, "tiny")
    num_captures = len(gpu.graphs)
    count = itertools.count()

    def fail(name: str, args: tuple[Any, ...]) -> None:
        # Between replays nothing but eager forwards passes here: those of two windows, after graphs of one.
        is_it = name == "miga::frame_attention" and args[0].shape[0] >= 4 and gpu.capturing is None
        if is_it and next(count) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.before = fail
    frames = engine.generate(PROMPT, **_options("tiny"), on_event=events.append).frames
    assert [event.kind for event in events if event.kind in ("window_batch", "capture")] == ["window_batch"]
    assert _levels_apart(frames, expected) <= 1
    assert len(gpu.graphs) > num_captures + 1  # one before, one after


def test_another_error_in_a_capture_is_not_hidden(gpu) -> None:
    gpu.before = _Fault(gpu, RuntimeError("no kernel image"), in_capture=True, windows=1)
    with pytest.raises(RuntimeError, match="during capture") as raised:
        _frames(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny")
    assert str(raised.value.__context__) == "no kernel image"


def test_memory_that_runs_out_in_the_decoder_is_given_back(gpu, tmp_path) -> None:
    engine = Engine.from_pretrained("tiny", "cuda", "float32")
    whole = _frames(engine, "tiny")
    options, calls, held = _options("tiny"), itertools.count(), []

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


@pytest.mark.parametrize("family", ["wan", "videocrafter2"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_run_takes_no_more_than_was_estimated(gpu, folders, family: str, batch: int) -> None:
    """Of tensors; here forward and decoding, which the estimate adds up, are seldom at their most together."""
    engine = Engine.from_pretrained(folders[family], "cuda", "bfloat16", capture=False)
    options = _options(family)
    options["miga"] = dataclasses.replace(options["miga"], window_batch=batch)
    with engine.stream(PROMPT, **options) as stream:
        gpu.reset_peak()
        for _ in stream:
            pass
    graphs = Engine.estimate(folders[family], device="cuda", dtype="bfloat16", **options).resident["captured forwards"]
    estimate = engine.running_bytes(engine.resolve(PROMPT, **options), batch) - graphs
    assert 0.8 * estimate < gpu.peak_bytes <= estimate


@pytest.mark.parametrize("capture", [False, True])
def test_a_runs_memory_goes_with_its_last_user(gpu, capture: bool) -> None:
    """At once, not when Python next looks for cycles."""
    engine = Engine.from_pretrained("tiny", "cuda", "float32", capture=capture)
    _frames(engine, "tiny")
    gc.collect()
    before = gpu.live_bytes
    gc.disable()
    try:
        _frames(engine, "tiny")
        assert gpu.live_bytes == before
        stream = engine.stream(PROMPT, **_options("tiny"))
        next(stream)
        assert gpu.live_bytes > before
        del stream  # dropped half-way
        assert gpu.live_bytes == before
    finally:
        gc.enable()


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


# Attention -----------------------------------------------------------------------------------------------------------


def test_cudnn_attention_leaves_the_switches_of_other_threads_alone(gpu) -> None:
    seen = []

    def look(name: str, args: tuple[Any, ...]) -> None:
        if name == "aten::_scaled_dot_product_cudnn_attention":
            cuda = torch.backends.cuda
            seen.append((cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()))

    gpu.before = look
    q, k, v = (torch.randn(1, 40, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = ops.frame_attention(q, k, v, backend="cudnn")
    assert seen == [(True, True, True)]
    assert (out - ops.frame_attention(q, k, v, backend="reference")).abs().max() < 0.02


def _slow(name: str, call: Any) -> float:
    return {"cudnn": 1.0, "triton": 2.0}.get(name, 3.0)


def test_who_computes_attention_is_chosen_once_recorded_and_kept(gpu, folders, tmp_path, monkeypatch) -> None:
    timed: list[str] = []

    def milliseconds(name: str, call: Any) -> float:
        timed.append(call.kind)
        return _slow(name, call)

    monkeypatch.setattr(probe, "_milliseconds", milliseconds)
    engine = Engine.from_pretrained("tiny", "cuda", "bfloat16")
    path, options = tmp_path / "run.safetensors", _options("tiny")
    during: list[int] = []
    with engine.stream(PROMPT, **options, on_event=lambda event: during.append(len(timed))) as stream:
        parts = [next(stream).frames.cpu()]
        stream.save(path)
        assert during[-1] == len(timed)
    choices = load_session(path).model["attention_choices"]
    assert choices == stream.metadata()["attention_choices"]
    assert choices["bfloat16, 78 keys, 3 heads of 64"] == "cudnn"
    # Timed in the first forward, before a frame is decoded, and never again: not for other batches or fewer queries.
    assert set(timed) == set(choices)
    num_timed = len(timed)
    video = engine.generate(PROMPT, **options)
    assert len(timed) == num_timed
    assert video.metadata["attention_choices"] == choices

    # Elsewhere another backend would win; a run that is gone on with keeps its own.
    monkeypatch.setattr(probe, "_fastest", {})
    monkeypatch.setattr(probe, "_milliseconds", lambda name, call: -_slow(name, call))
    used = set()
    gpu.before = lambda name, args: used.add(name)
    parts += [chunk.frames.cpu() for chunk in Engine.from_pretrained("tiny", "cuda", "bfloat16").resume(path)]
    assert "aten::_scaled_dot_product_cudnn_attention" in used
    assert torch.equal(torch.cat(parts), video.frames)


def test_the_command_says_what_it_took_and_who_computed_attention(gpu, tmp_path, capsys) -> None:
    pytest.importorskip("av", reason="an mp4 is written")
    video = tmp_path / "balloon.mp4"
    small = ["--num-frames", "5", "--height", "32", "--width", "48", "--num-inference-steps", "8"]
    small += ["--stage2-steps", "2", "--judge-step", "3"]
    assert main(["generate", PROMPT, "--device", "cuda", "--output", str(video), "-q", *small]) == 0
    said = re.search(r"on cuda:0 \S+ \S+ allocated, .* \(estimated (.*)\)$", capsys.readouterr().err, re.MULTILINE)
    engine = Engine.from_pretrained("tiny", "cuda", "bfloat16")
    options = {"height": 32, "width": 48, "num_inference_steps": 8, "num_frames": 5}
    miga = dataclasses.replace(engine.preset.miga, stage2_steps=2, judge_step=3)
    assert said[1] == estimates.amount(engine.running_bytes(engine.resolve(PROMPT, miga=miga, **options), 8))
    choices = read_metadata(video)["attention_choices"]
    assert choices
    assert set(choices.values()) <= set(ATTENTION_BACKENDS)


@pytest.mark.parametrize("choice", ["magic", "auto", ["sdpa"], {}, None, 7])
def test_choices_that_are_none_are_one_sentence(gpu, tmp_path, choice: Any) -> None:
    path = tmp_path / "run.safetensors"
    engine = Engine.from_pretrained("tiny", "cuda", "float32")
    with engine.stream(PROMPT, **_options("tiny")) as stream:
        next(stream)
        stream._attention["float32, 1 keys"] = choice
        stream.save(path)
    with pytest.raises(SessionError, match="names attention that there is not"):
        engine.resume(path)


# Precision -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_gelu_is_the_products_epilogue(gpu) -> None:
    used = []
    gpu.before = lambda name, args: used.append(name)
    x, weight, bias = (torch.randn(size, device="cuda") for size in ((2, 3, 8), (6, 8), (6,)))
    out = ops.linear(x, weight, bias, gelu=True)
    assert "aten::_addmm_activation" in used
    assert "aten::gelu_" not in used
    expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    assert out.shape == (2, 3, 6)
    assert torch.allclose(out.cpu(), expected.cpu(), atol=1e-6)
    ops.linear(x, weight, bias)
    assert used.count("aten::_addmm_activation") == 1


@pytest.mark.parametrize("family", ["tiny", "videocrafter2"])
@pytest.mark.parametrize(("vae_dtype", "allowed"), [("float32", False), ("tf32", True)])
def test_convolutions_round_as_asked_whatever_the_host_has_set(gpu, folders, family, vae_dtype, allowed) -> None:
    seen = set()

    def look(name: str, args: tuple[Any, ...]) -> None:
        if name in ("aten::_convolution", "aten::convolution") and args[0].is_cuda:
            seen.add((name, *args[9:]))

    gpu.before = look
    engine = Engine.from_pretrained(folders[family], "cuda", "float32", vae_dtype=vae_dtype)
    assert engine.identity()["vae_dtype"] == vae_dtype
    with torch.no_grad():
        channels, factor = engine.bundle.latent_channels, 8
        engine.bundle.vae.decode(torch.zeros(1, channels, 2, factor, factor, device="cuda"))
    assert seen == {("aten::_convolution", False, False, True, allowed)}


def test_tf32_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="vae_dtype 'tf32' is for GPUs"):
        Engine.from_pretrained("tiny", "cpu", vae_dtype="tf32")


# The machine itself --------------------------------------------------------------------------------------------------


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
