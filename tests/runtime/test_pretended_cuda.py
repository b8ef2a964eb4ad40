"""Whole runs on a pretended GPU: the frames of the CPU, and nothing that a real one would do wrong without an error."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pretended_runs import CAN_PRETEND, PROMPT, frames_by, levels_apart, options_of

from miga_engine import Engine, ops
from miga_engine import memory as estimates
from miga_engine.cli import main
from miga_engine.config import ATTENTION_BACKENDS
from miga_engine.device import to_device
from miga_engine.errors import ConfigError, SessionError
from miga_engine.noise import Purpose, frame_noise
from miga_engine.ops.frame_attention import probe
from miga_engine.runtime import capture
from miga_engine.runtime.session import load_session
from miga_engine.runtime.stages import DONE
from miga_engine.video.reading import read_metadata

pytestmark = CAN_PRETEND


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), [("tiny", "float32"), ("wan", "float32"), ("wan", "bfloat16"), ("videocrafter2", "bfloat16")]
)
def test_eager_captured_and_overlapped_runs_give_the_same_frames(gpu, folders, family: str, dtype: str) -> None:
    on_cpu = frames_by(Engine.from_pretrained(folders[family], "cpu", dtype), family)
    eager = frames_by(
        Engine.from_pretrained(folders[family], "cuda", dtype, capture=False), family, overlap_decode=False
    )
    assert not gpu.graphs
    if dtype == "float32":
        assert levels_apart(eager, on_cpu) <= 1
    assert (eager.int() - on_cpu.int()).abs().double().mean() < 1
    captured = Engine.from_pretrained(folders[family], "cuda", dtype)
    assert torch.equal(frames_by(captured, family, overlap_decode=False), eager)
    num_captures = len(gpu.graphs)
    assert 0 < num_captures <= 3  # one or two windows of a whole clip's frames, and of fewer in a search
    assert torch.equal(frames_by(captured, family), eager)


@pytest.mark.slow
def test_the_host_waits_once_a_tick(gpu) -> None:
    """For the news that nothing was NaN; and where it judges by a score, and takes the frames."""
    engine = Engine.from_pretrained("tiny", "cuda", "float32")
    counts, num_ticks = [], []
    for num_frames in (61, 61, 121):
        gpu.waits.clear()
        run = engine.start(engine.resolve(PROMPT, **{**options_of("tiny"), "num_frames": num_frames}))
        num_ticks.append(0)
        while run.stage != DONE:
            run.tick()
            num_ticks[-1] += 1
        counts.append(gpu.waits.copy())
    grown = counts[2] - counts[1]
    regular = [wait for wait in grown if "reflection.py" not in wait]
    assert len(regular) == 1
    assert grown[regular[0]] == num_ticks[2] - num_ticks[1]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["cfg-zero", "apg"])
def test_captured_runs_guide_by_the_rule(gpu, folders, rule: str) -> None:
    changes = {"guidance": rule, "guidance_scale_end": 1.5}
    on_cpu = frames_by(Engine.from_pretrained(folders["wan"], "cpu"), "wan", **changes)
    on_gpu = frames_by(Engine.from_pretrained(folders["wan"], "cuda", "float32"), "wan", **changes)
    assert gpu.graphs
    assert levels_apart(on_gpu, on_cpu) <= 1


@pytest.mark.slow
def test_prompts_change_and_blend(gpu, folders) -> None:
    prompts = {0: PROMPT, 24: "a red balloon over snowy hills at night"}
    options = {"miga": dataclasses.replace(options_of("tiny")["miga"], prompt_blend_frames=8)}
    on_cpu = frames_by(Engine.from_pretrained("tiny", "cpu"), "tiny", prompts, **options)
    on_gpu = frames_by(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny", prompts, **options)
    assert levels_apart(on_gpu, on_cpu) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "overlap"), [("tiny", True), ("wan", False), ("wan", True), ("videocrafter2", True)]
)
def test_a_resumed_run_gives_the_frames_that_come_next(gpu, folders, tmp_path, family: str, overlap: bool) -> None:
    path = tmp_path / "run.safetensors"
    engine = Engine.from_pretrained(folders[family], "cuda", "float32")
    whole = frames_by(engine, family)
    options = options_of(family)
    with engine.stream(PROMPT, overlap_decode=overlap, **options) as stream:
        parts = [next(stream).frames.cpu() for _ in range(2)]
        stream.save(path)
    # By the same engine: one that is new waits in every convolution of its first frames, which hides what is unordered.
    with engine.resume(path, overlap_decode=overlap) as stream:
        parts += [chunk.frames.cpu() for chunk in stream]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.slow
def test_a_second_gpu_is_used_although_the_first_is_current(gpu, folders) -> None:
    expected = frames_by(Engine.from_pretrained("tiny", "cuda", "bfloat16"), "tiny")
    engine = Engine.from_pretrained("tiny", "cuda:1", "bfloat16")
    assert engine.device == torch.device("cuda:1")
    assert torch.equal(frames_by(engine, "tiny"), expected)
    assert torch.cuda.current_device() == 0


def test_a_gpu_without_a_number_is_the_current_one(gpu) -> None:
    with torch.cuda.device(1):
        assert Engine.from_pretrained("tiny", "cuda").device == torch.device("cuda:1")


def test_noise_and_indices_are_drawn_without_a_wait(gpu) -> None:
    noise = frame_noise(0, Purpose.PUSH, torch.arange(5), series=torch.arange(5), device="cuda")
    assert noise.draw((4, 2, 3)).is_cuda
    assert to_device(torch.arange(3), "cuda").tolist() == [0, 1, 2]
    assert [wait for wait in gpu.waits if not wait.startswith("tolist")] == []


# Captured forwards ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_large_batches_are_not_captured(gpu, monkeypatch) -> None:
    expected = frames_by(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny")
    monkeypatch.setattr(capture, "CAPTURE_POSITIONS", 0)
    num_captures = len(gpu.graphs)
    assert levels_apart(frames_by(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny"), expected) <= 1
    assert len(gpu.graphs) == num_captures


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("history", "kinds"), [("off", 1), ("all", 2)])  # the branches read the same, or do not
def test_graphs_are_few_whatever_is_committed(gpu, batch: int, history: str, kinds: int) -> None:
    changes = {"window_batch": batch, "self_reflection": False, "history_guidance": history}
    miga = dataclasses.replace(options_of("tiny")["miga"], **changes)
    frames_by(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny", miga=miga, num_frames=85)
    assert len(gpu.graphs) <= kinds * batch


@pytest.mark.slow
def test_one_capture_at_a_time(gpu) -> None:
    """As torch asks of a process, in which two engines may run in two threads."""
    seen = []
    gpu.before = lambda name, args: seen.append(capture._one_capture.locked()) if gpu.capturing else None
    frames_by(Engine.from_pretrained("tiny", "cuda", "float32"), "tiny")
    assert seen
    assert all(seen)
    assert not capture._one_capture.locked()


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


@pytest.mark.slow
def test_who_computes_attention_is_chosen_once_recorded_and_kept(gpu, folders, tmp_path, monkeypatch) -> None:
    timed: list[str] = []

    def milliseconds(name: str, call: Any) -> float:
        timed.append(call.kind)
        return _slow(name, call)

    monkeypatch.setattr(probe, "_milliseconds", milliseconds)
    engine = Engine.from_pretrained("tiny", "cuda", "bfloat16")
    path, options = tmp_path / "run.safetensors", options_of("tiny")
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_choices_that_are_none_are_one_sentence(gpu, tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    engine = Engine.from_pretrained("tiny", "cuda", "float32")
    with engine.stream(PROMPT, **options_of("tiny")) as stream:
        next(stream)
        for choice in ("magic", "auto", ["sdpa"], {}, None, 7):
            stream._attention["float32, 1 keys"] = choice
            stream.save(path)
            with pytest.raises(SessionError, match="names attention that there is not"):
                engine.resume(path)
        stream._attention["float32, 1 keys"] = "sdpa"
        stream.save(path)
    engine.resume(path).close()


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


@pytest.mark.slow
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
