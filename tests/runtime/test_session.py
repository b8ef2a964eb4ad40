"""Runs that survive: sessions, resuming, extending, and every fault with its defined outcome."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_model
import kills
import numpy as np
import places
import pytest
import small_run
import torch
from safetensors.torch import save_file
from small_run import miga, rewritten
from torch import Tensor

from miga_engine.cli import render
from miga_engine.config import fifo_config
from miga_engine.engine import Engine
from miga_engine.errors import DeviceError, DriftError, NumericsError, OutputError, SessionError
from miga_engine.runtime import session as session_file
from miga_engine.runtime.drift import DriftMeter
from miga_engine.runtime.session import load_session, previous_path
from miga_engine.runtime.stream import Stream
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import open_sink, reopen_sink
from miga_engine.video.raw import RawFileSink
from miga_engine.video.reading import read_video
from miga_engine.video.video_file import VideoFileSink

OPTIONS = {**golden_model.OPTIONS, "seed": 3, "miga": golden_model.MIGA}
NUM_FRAMES = 61
METADATA = {"prompt": "a red balloon", "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, "cpu")


def _frames(stream: Stream) -> Tensor:
    chunks = [chunk.frames for chunk in stream]
    return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)


@pytest.fixture(scope="module")
def whole(engine: Engine) -> Tensor:
    return _frames(engine.stream("a red balloon", NUM_FRAMES, **OPTIONS))


# Saving and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunk_frames", [None, 7])
def test_a_resumed_run_gives_the_frames_that_come_next(engine, whole, tmp_path, overlap, chunk_frames) -> None:
    options = {**OPTIONS, "overlap_decode": overlap, "chunk_frames": chunk_frames}
    path = tmp_path / "run.safetensors"
    for num_chunks in (0, 1, 2, 5):
        with engine.stream("a red balloon", NUM_FRAMES, **options) as stream:
            taken = [next(stream).frames for _ in range(num_chunks)]
            stream.save(path)
            assert stream.num_frames_out == sum(map(len, taken))
        resumed = engine.resume(path, overlap_decode=overlap)
        assert resumed.num_frames_out == sum(map(len, taken))
        assert torch.equal(torch.cat([*taken, _frames(resumed)]), whole)


def test_saving_changes_nothing_for_the_run_itself(engine, whole, tmp_path) -> None:
    stream = engine.stream("a red balloon", NUM_FRAMES, **OPTIONS)
    frames = []
    for number, chunk in enumerate(stream):
        frames.append(chunk.frames)
        stream.save(tmp_path / f"{number % 2}.safetensors")
    assert torch.equal(torch.cat(frames), whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"refine_steps": 2},
        {"stage2_steps": 0},
        {"self_reflection": True, "score_drop": -1.0},
        {"window_order": "sequential"},
        {"window_batch": 3},
        {"guidance_anchor": True},
    ],
    ids=str,
)
def test_every_stage_can_be_gone_on_with(engine, tmp_path, changes) -> None:
    """Saved at each chunk and resumed from each: with searches, refine passes, and neither."""
    options = {**OPTIONS, "miga": dataclasses.replace(golden_model.MIGA, **changes)}
    _check_resumes_everywhere(engine, options, 41, tmp_path)


def test_fifo_and_a_stochastic_solver_can_be_gone_on_with(tmp_path) -> None:
    engine = Engine.from_pretrained(golden_model.build_videocrafter2(tmp_path / "model"), "cpu")
    miga = dataclasses.replace(golden_model.MIGA, reference_groups=1, candidates=2, judge_step=2)
    for config in (miga, fifo_config(miga, 5)):
        options = {"height": 8, "width": 16, "num_inference_steps": 7, "miga": config}
        _check_resumes_everywhere(engine, options, 6, tmp_path, every=3)


def _check_resumes_everywhere(
    engine: Engine, options: dict[str, Any], num_frames: int, tmp_path: Path, every: int = 4
) -> None:
    stream = engine.stream("a red balloon", num_frames, **options)
    frames, saved = [], [tmp_path / "start.safetensors"]
    stream.save(saved[0])
    for number, chunk in enumerate(stream):
        frames.append(chunk.frames)
        saved.append(tmp_path / f"{number}.safetensors")
        stream.save(saved[-1])
    for number, path in list(enumerate(saved))[1::every]:
        resumed = _frames(engine.resume(path))
        assert torch.equal(torch.cat([*frames[:number], resumed]), torch.cat(frames)), number


def test_a_run_can_be_cancelled_from_another_thread_saved_and_resumed(engine, whole, tmp_path) -> None:
    stream = engine.stream("a red balloon", NUM_FRAMES, **OPTIONS)
    frames = [next(stream).frames]
    stream.cancel()
    frames += [chunk.frames for chunk in stream]
    assert not stream.is_finished
    stream.save(tmp_path / "run.safetensors")
    assert torch.equal(torch.cat([*frames, _frames(engine.resume(tmp_path / "run.safetensors"))]), whole)


def test_an_endless_run_is_resumed_endless(engine, tmp_path) -> None:
    with engine.stream("a red balloon", **OPTIONS) as stream:
        expected = torch.cat([next(stream).frames for _ in range(9)])
    with engine.stream("a red balloon", **OPTIONS) as stream:
        frames = [next(stream).frames for _ in range(4)]
        stream.save(tmp_path / "run.safetensors")
    with engine.resume(tmp_path / "run.safetensors") as resumed:
        frames += [next(resumed).frames for _ in range(5)]
    assert torch.equal(torch.cat(frames), expected)


# Making it longer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("miga", [golden_model.MIGA, fifo_config(golden_model.MIGA, 5)], ids=["miga", "fifo"])
def test_a_finished_run_made_longer_is_a_longer_run(engine, tmp_path, miga) -> None:
    options = {**OPTIONS, "miga": miga}
    path = tmp_path / "run.safetensors"
    stream = engine.stream("a red balloon", 97, **options)
    stream.save_every(30, path, keep_extension=True)
    short = _frames(stream)
    longer = _frames(engine.stream("a red balloon", 121, **options))
    resumed = engine.resume(path, num_frames=121)
    start = resumed.num_frames_out
    assert 0 < start < 97
    assert torch.equal(torch.cat([short[:start], _frames(resumed)]), longer)
    assert _frames(engine.resume(path)).numel() == 0  # and as it was asked for, it is complete


@pytest.mark.parametrize("num_frames", [57, 60, 65])
def test_any_length_made_longer_is_a_longer_run(engine, tmp_path, num_frames) -> None:
    """A unified pass near the end of a run cuts otherwise than that of a longer one: over half of all lengths differed
    where the state was kept only as the last frames were handed over."""
    path, options = tmp_path / "run.safetensors", {**OPTIONS, "miga": dataclasses.replace(golden_model.MIGA, stride=4)}
    stream = engine.stream("a red balloon", num_frames, **options)
    stream.save_every(None, path, keep_extension=True)
    short = _frames(stream)
    for longer in (num_frames + 1, num_frames + 40):
        resumed = engine.resume(path, num_frames=longer)
        whole = torch.cat([short[: resumed.num_frames_out], _frames(resumed)])
        assert torch.equal(whole, _frames(engine.stream("a red balloon", longer, **options))), longer


@pytest.mark.parametrize(("num_frames", "longer"), [(89, 129)])
def test_the_embedded_model_made_longer(tmp_path, num_frames, longer) -> None:
    engine = Engine.from_pretrained("tiny", "cpu")
    stream = engine.stream("a red balloon over snowy hills at dawn", num_frames)
    stream.save_every(None, tmp_path / "run.safetensors", keep_extension=True)
    short = _frames(stream)
    resumed = engine.resume(tmp_path / "run.safetensors", num_frames=longer)
    whole = torch.cat([short[: resumed.num_frames_out], _frames(resumed)])
    assert torch.equal(whole, _frames(engine.stream("a red balloon over snowy hills at dawn", longer)))


def test_a_run_saved_near_its_end_says_that_it_cannot_be_made_longer(engine, tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    stream = engine.stream("a red balloon", 21, **OPTIONS)
    _frames(stream)
    stream.save(path)
    with pytest.raises(SessionError, match="can be finished, but not be made longer"):
        engine.resume(path, num_frames=41)
    with pytest.raises(SessionError, match="can be finished, but not"):
        engine.resume(path, num_frames=9)


def test_a_run_saved_early_can_be_given_another_length(engine, whole, tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    with engine.stream("a red balloon", 201, **OPTIONS) as stream:
        frames = [next(stream).frames for _ in range(2)]
        stream.save(path)
    resumed = torch.cat([*frames, _frames(engine.resume(path, num_frames=NUM_FRAMES))])
    assert torch.equal(resumed, whole)
    with pytest.raises(SessionError, match=r"frames already|past the end"):
        engine.resume(path, num_frames=2)


# The file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(engine: Engine, tmp_path: Path) -> Path:
    path = tmp_path / "run.safetensors"
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS) as stream:
        next(stream)
        stream.save(path)
    return path


def test_a_damaged_file_is_refused_and_the_one_before_it_is_taken(engine, saved, caplog) -> None:
    data = bytearray(saved.read_bytes())
    data[-100] ^= 1
    saved.write_bytes(data)
    with pytest.raises(SessionError, match="damaged, its checksum does not fit"):
        engine.resume(saved)
    previous_path(saved).write_bytes(b"")
    with pytest.raises(SessionError, match="session file that can be read"):
        engine.resume(saved)
    data[-100] ^= 1
    previous_path(saved).write_bytes(data)
    assert engine.resume(saved).num_frames_out > 0
    assert "going on from" in caplog.text


def test_the_file_that_was_replaced_is_kept(engine, tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS) as stream:
        counts = []
        for _ in range(3):
            next(stream)
            stream.save(path)
            counts.append(stream.num_frames_out)
        assert load_session(path).state.numbers["num_frames_out"] == counts[2]
        assert load_session(previous_path(path)).state.numbers["num_frames_out"] == counts[1]
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.previous.safetensors", "run.safetensors"]
        # Killed between its second name and the new file's coming.
        previous_path(path).unlink()
        os.link(path, previous_path(path))
        stream.save(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.previous.safetensors", "run.safetensors"]


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("dtype", "bfloat16", "made with dtype 'bfloat16'"),
        ("vae_dtype", "float16", "made with vae_dtype 'float16'"),
        ("attention", "sdpa", "made with attention 'sdpa'"),
        ("transformer", "0" * 16, "other weights of the transformer"),
        ("VAE", "0" * 16, "other weights of the VAE"),
    ],
)
def test_what_has_changed_is_named(engine, saved, field, value, sentence) -> None:
    rewritten(saved, lambda record, _: record["model"].update({field: value}))
    with pytest.raises(SessionError, match=sentence):
        engine.resume(saved)


def test_another_machine_or_version_is_a_warning(engine, whole, saved, caplog) -> None:
    rewritten(saved, lambda record, _: record["model"].update(torch="1.0", device="cuda", CPU="AVX9, threads: 64"))
    resumed = engine.resume(saved)
    start = resumed.num_frames_out
    assert torch.equal(_frames(resumed), whole[start:])
    assert "made with torch 1.0" in caplog.text
    assert "made with device cuda" in caplog.text
    assert "made with CPU AVX9, threads: 64, and here it is " in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda record, _: record.update(request=3),
        lambda record, _: record["request"].pop("seed"),
        lambda record, _: record["request"]["miga"].update(zigzag_width="wide"),
        lambda record, _: record["request"]["miga"].update(unknown=1),
        lambda record, _: record["request"].update(prompt={"x": "a balloon"}),
        lambda record, _: record["state"].pop("run"),
        lambda record, _: record["state"]["run"].update(tail=10**15),
        lambda record, _: record["state"]["run"].update(unified=[1]),
        lambda record, _: record["state"]["run"].update(stage=7, first="a"),
        lambda record, _: record["state"].update(num_frames_out="many"),
        lambda record, _: record.update(state=None),
        lambda record, tensors: tensors.pop("state/run/sample"),
        lambda record, tensors: tensors.update({"state/run/sample": torch.zeros(3)}),
        lambda record, tensors: tensors.update({"state/decoder/conv9": torch.zeros(3)}),
    ],
)
def test_a_file_with_nonsense_in_it_is_one_sentence(engine, saved, change) -> None:
    rewritten(saved, change)
    with pytest.raises((SessionError, ValueError)) as caught:
        _frames(engine.resume(saved))
    assert type(caught.value).__module__ == "miga_engine.errors"


def test_no_file_and_no_session_file(engine, tmp_path) -> None:
    with pytest.raises(SessionError, match="there is no session file at"):
        engine.resume(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(SessionError, match="is not a session file"):
        engine.resume(tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(SessionError, match="is not a session file that can be read"):
        engine.resume(tmp_path / "text.safetensors")


def test_a_session_file_that_cannot_be_written_leaves_the_old_one(engine, saved, monkeypatch) -> None:
    before = saved.read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(session_file, "save_file", full)
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS) as stream:
        with pytest.raises(OutputError, match=r"cannot write the session file .*: No space left on device"):
            stream.save(saved)
        with pytest.raises(OutputError, match=r"name a session file something\.safetensors"):
            stream.save(saved.with_suffix(".pt"))
    assert saved.read_bytes() == before
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_a_closed_stream_is_not_saved(engine, tmp_path) -> None:
    stream = engine.stream("a red balloon", NUM_FRAMES, **OPTIONS)
    stream.close()
    assert list(stream) == []
    with pytest.raises(SessionError, match="the stream is closed"):
        stream.save(tmp_path / "run.safetensors")


# Faults --------------------------------------------------------------------------------------------------------


class _Fault:
    """Makes a bundle's transformer fail, or answer wrongly, from its n-th call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        self._patch, self._network = monkeypatch, engine.bundle.transformer

    def at_call(self, number: int, act: Callable[[Tensor], Tensor]) -> None:
        forward, count = self._network.forward, iter(range(10**6))
        self._patch.setattr(
            self._network,
            "forward",
            lambda *args, **kwargs: (act if next(count) >= number else lambda x: x)(forward(*args, **kwargs)),
        )


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> _Fault:
    return _Fault(monkeypatch, engine)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_the_run_with_frame_level_and_window(engine, whole, tmp_path, fault, value, monkeypatch) -> None:
    def poisoned(output: Tensor) -> Tensor:
        output = output.clone()
        output[0, 0, -1, 0, 0] = value
        return output

    path = tmp_path / "run.safetensors"
    fault.at_call(130, poisoned)
    stream = engine.stream("a red balloon", NUM_FRAMES, **OPTIONS)
    stream.save_every(4, path)
    frames = []
    with pytest.raises(NumericsError, match=r"NaN or infinity for latent frame \d+ at step \d+ .* window \d+ of its"):
        frames.extend(chunk.frames for chunk in stream)
    with pytest.raises(SessionError, match="in the middle of an update and cannot be saved"):
        stream.save(path)
    assert next(stream, None) is None
    monkeypatch.undo()  # the cause is gone: the state from before goes on as if nothing had happened
    resumed = engine.resume(path)
    start = resumed.num_frames_out
    assert torch.equal(torch.cat([torch.cat(frames)[:start], _frames(resumed)]), whole)


def test_the_flag_is_read_once_a_tick(engine, monkeypatch) -> None:
    reads, ticks = [], []
    from miga_engine.runtime.denoise import Denoiser
    from miga_engine.runtime.stages import VideoRun

    check, tick = Denoiser.check_finite, VideoRun.tick
    monkeypatch.setattr(Denoiser, "check_finite", lambda self: (reads.append(1), check(self))[1])
    monkeypatch.setattr(VideoRun, "tick", lambda self: (ticks.append(1), tick(self))[1])
    _frames(engine.stream("a red balloon", 21, **OPTIONS))
    assert len(reads) == len(ticks) > 10


@pytest.mark.parametrize("call", [3, 100, 140])
def test_out_of_memory_in_the_network_loses_nothing(engine, whole, tmp_path, fault, call, monkeypatch) -> None:
    def no_memory(output: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    fault.at_call(call, no_memory)
    stream = engine.stream("a red balloon", NUM_FRAMES, **OPTIONS)
    frames = []
    with pytest.raises(DeviceError, match="out of memory on cpu in the network"):
        frames.extend(chunk.frames for chunk in stream)
    stream.save(tmp_path / "run.safetensors")
    monkeypatch.undo()
    resumed = _frames(engine.resume(tmp_path / "run.safetensors"))
    assert torch.equal(torch.cat([*frames, resumed]), whole)


@pytest.mark.parametrize("overlap", [False, True])
def test_out_of_memory_in_the_decoder_loses_nothing(engine, whole, tmp_path, overlap, monkeypatch) -> None:
    core, count = engine.bundle.vae.decode_core, iter(range(10**6))

    def no_memory(*arguments: Any) -> Tensor:
        if next(count) >= 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return core(*arguments)

    monkeypatch.setattr(engine.bundle.vae, "decode_core", no_memory)
    stream = engine.stream("a red balloon", NUM_FRAMES, overlap_decode=overlap, **OPTIONS)
    frames = []
    with pytest.raises(DeviceError, match="out of memory while decoding"):
        frames.extend(chunk.frames for chunk in stream)
    assert sum(map(len, frames)) == 1 + 6 * 4  # all that was decoded came out first
    stream.save(tmp_path / "run.safetensors")
    monkeypatch.undo()
    resumed = _frames(engine.resume(tmp_path / "run.safetensors"))
    assert torch.equal(torch.cat([*frames, resumed]), whole)


class _LosesARank:
    """Stands for the process group of a run whose other rank dies at the n-th exchange."""

    rank, count = 0, 1

    def __init__(self, num_exchanges: int) -> None:
        self.num_left = num_exchanges

    def share(self, num_batches: int, rank: int | None = None) -> range:
        return range(num_batches)

    def agree(self, answer: Any) -> Any:
        return answer

    def exchange(self, outputs: Tensor, bounds: list[int]) -> None:
        self.num_left -= 1
        if self.num_left < 0:
            raise DeviceError("rank 0 of 2 lost touch with the others (Connection closed by peer): start the run again")


@pytest.mark.parametrize("num_exchanges", [12, 40])
def test_a_lost_rank_leaves_a_state_to_go_on_from(engine, whole, tmp_path, num_exchanges, monkeypatch) -> None:
    monkeypatch.setattr(engine, "ranks", _LosesARank(num_exchanges))
    stream = engine.stream("a red balloon", NUM_FRAMES, **OPTIONS)
    frames = []
    with pytest.raises(DeviceError, match="lost touch with the others"):
        frames.extend(chunk.frames for chunk in stream)
    stream.save(tmp_path / "run.safetensors")
    monkeypatch.undo()
    resumed = _frames(engine.resume(tmp_path / "run.safetensors"))
    assert torch.equal(torch.cat([*frames, resumed]), whole)


def test_out_of_memory_before_the_first_pass(engine, monkeypatch) -> None:
    def no_memory(*arguments: Any, **named: Any) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("miga_engine.runtime.frame_store.torch.zeros", no_memory)
    with pytest.raises(DeviceError, match="out of memory on cpu before the first pass of a video of 48×32"):
        engine.stream("a red balloon", 9, **OPTIONS)


def _generate(model: Path, video: object, *more: object) -> list[object]:
    return small_run.generate(model, video, NUM_FRAMES, *more)


@pytest.fixture(scope="module")
def whole_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    video = tmp_path_factory.mktemp("whole") / "whole.mp4"
    assert miga(*_generate(folder, video)) == 0
    assert [entry.name for entry in video.parent.iterdir()] == ["whole.mp4"]  # complete: no session file is left
    return read_video(video)


@pytest.mark.parametrize(("num_written", "error"), [(20, errno.ENOSPC), (30, errno.EIO), (5, errno.EPIPE)])
def test_a_disk_that_fills_up(folder, tmp_path, whole_file, num_written, error, monkeypatch, capsys) -> None:
    """The encoder, or the file system under it, fails for good; space comes back before the run is resumed."""
    video, count = tmp_path / "video.mp4", iter(range(10**6))
    mux = VideoFileSink._mux

    def fails(self: Any, packets: list[Any]) -> None:
        for packet in packets:
            if next(count) >= num_written:
                raise OSError(error, os.strerror(error))
            mux(self, [packet])

    monkeypatch.setattr(VideoFileSink, "_mux", fails)
    assert miga(*_generate(folder, video)) == 2
    monkeypatch.undo()
    told = capsys.readouterr().err
    assert f"cannot write {video}" in told
    assert "to go on from frame" in told
    assert "Traceback" not in told
    assert miga("resume", tmp_path / "video.session.safetensors", "--model", folder, "-q") == 0
    assert np.array_equal(read_video(video), whole_file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]


def test_a_full_disk_keeps_every_frame_that_was_made(folder, tmp_path, whole_file, monkeypatch, capsys) -> None:
    """The video's disk is full, the session's is not: no frame has to be made again."""
    (tmp_path / "other").mkdir()
    saved = tmp_path / "other" / "run.safetensors"
    write = RawFileSink._append

    def fails(self: Any, frames: np.ndarray) -> None:
        if self.num_frames >= 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, frames)

    monkeypatch.setattr(RawFileSink, "_append", fails)
    video = tmp_path / "video.rgb"
    assert miga(*_generate(folder, video, "--session", saved)) == 2
    monkeypatch.undo()
    numbers = load_session(saved).state.numbers
    assert numbers["output"]["num_frames"] < numbers["num_frames_out"]
    assert "No space left on device" in capsys.readouterr().err
    assert miga("resume", saved, "--model", folder, "-q") == 2  # the video does not lie beside it
    assert f"name the video with --output {video}" in capsys.readouterr().err
    assert miga("resume", saved, "--model", folder, "-q", "--output", video) == 0
    assert video.stat().st_size == NUM_FRAMES * 32 * 48 * 3


def test_nothing_but_a_broken_pipe_ends_a_run_to_a_pipe(folder, tmp_path) -> None:
    command = [sys.executable, "-m", "miga_engine", *map(str, _generate(folder, "-"))]
    reader = f"{' '.join(map(repr, command))} | head -c 100000 > {tmp_path / 'part.rgb'}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", reader], capture_output=True, text=True, timeout=300, env=_environment())
    assert done.stdout.strip() == "2"
    assert "the program that read it has closed it" in done.stderr
    assert "Traceback" not in done.stderr


def test_kills(tmp_path) -> None:
    """A short run of `python tests/kills.py`, whose full figures are in README; every kind is killed at least once."""
    done = subprocess.run(
        [sys.executable, kills.__file__, "--kills", "10", "--seed", "4"],
        capture_output=True,
        text=True,
        timeout=600,
        env=_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failures" in done.stdout
    for kind in kills.KINDS:
        assert re.search(rf"^kills: .*\b{kind}[ ]+[1-9]", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^refused beside: generate [1-9]\d*, resume [1-9]\d*$", done.stdout, re.MULTILINE), done.stdout


def _environment() -> dict[str, str]:
    roots = [str(places.TESTS), str(places.ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}


# The command ---------------------------------------------------------------------------------------------------


def test_resume_and_extend_from_the_shell(folder, tmp_path, whole_file, capsys) -> None:
    video, saved = tmp_path / "video.mp4", tmp_path / "video.session.safetensors"
    assert miga(*_generate(folder, video, "--num-frames", 33, "--checkpoint-every", 8)) == 0
    assert miga("info", saved) == 0
    told = capsys.readouterr().out
    assert "frames               33 of 33 made" in told
    assert "can be extended      yes" in told
    assert miga("resume", saved, "--model", folder, "-q") == 0  # complete already
    assert miga("resume", saved, "--model", folder, "-q", "--num-frames", NUM_FRAMES) == 0
    assert np.array_equal(read_video(video), whole_file)
    moved = tmp_path / "moved.mp4"
    video.rename(moved)
    assert miga("resume", saved, "--model", folder, "-q", "--num-frames", 65) == 2
    assert "it is gone; name the file with the frames made so far" in capsys.readouterr().err
    assert miga("resume", saved, "--model", folder, "-q", "--num-frames", 65, "-o", moved) == 0
    assert len(read_video(moved)) == 65


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_is_gone_on_with(folder, tmp_path, whole_file, number) -> None:
    video, events = tmp_path / "video.mp4", tmp_path / "events.jsonl"
    command = [sys.executable, "-m", "miga_engine", *map(str, _generate(folder, video, "--events", events))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment())
    while not (events.exists() and '"chunk"' in events.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    told = process.communicate(timeout=120)[1]
    assert process.returncode in (128 + number, 0)  # 0: it was complete before it heard
    if process.returncode:
        assert "to go on from frame" in told
        assert miga("resume", tmp_path / "video.session.safetensors", "--model", folder, "-q", "--events", events) == 0
    assert np.array_equal(read_video(video), whole_file)
    numbers = [json.loads(line) for line in events.read_text().splitlines()]
    assert sum(event["num_frames"] for event in numbers if event["event"] == "chunk") == NUM_FRAMES


def test_a_session_is_resumed_from_another_folder(folder, tmp_path, whole_file, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = os.path.relpath(folder)
    assert miga(*_generate(Path(model), "video.mp4", "--num-frames", 33, "--session", "run.safetensors")) == 0
    monkeypatch.chdir(tmp_path / "there")
    assert miga("resume", "../here/run.safetensors", "--model", folder, "-q", "--num-frames", NUM_FRAMES) == 0
    assert np.array_equal(read_video(tmp_path / "here" / "video.mp4"), whole_file)


def test_older_pictures_are_replaced_by_consent_alone(folder, tmp_path, monkeypatch, capsys) -> None:
    """A run over a folder of pictures, interrupted before its first frame: a session file is not a consent."""
    older = tmp_path / "frames" / "000003.png"
    older.parent.mkdir()
    older.write_bytes(b"an older picture")
    with monkeypatch.context() as patch:
        patch.setattr(render, "_interruptible", lambda: contextlib.nullcontext([signal.SIGINT]))
        assert miga(*_generate(folder, f"{older.parent}/", "--overwrite")) == 130
    told = capsys.readouterr().err
    command = told[told.index("to go on from frame 0: miga ") :].splitlines()[0].split()[7:]
    assert command[-1] == "--overwrite"
    assert older.read_bytes() == b"an older picture"
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "__next__", lambda _: pytest.fail("a frame is made first"))
        assert miga(*command[:-1], "-q") == 2
    assert "000003.png: the picture there is not of this run; move it away, or give --o" in capsys.readouterr().err
    assert miga(*command, "-q") == 0
    assert {path.name for path in older.parent.iterdir()} == {f"{number:06d}.png" for number in range(NUM_FRAMES)}


def test_the_session_of_another_run_is_not_written_over(folder, tmp_path, capsys) -> None:
    (tmp_path / "video.session.safetensors").write_bytes(b"hours of work")
    assert miga(*_generate(folder, tmp_path / "video.mp4")) == 2
    assert "it is the session file of another run; go on with it (miga resume" in capsys.readouterr().err
    assert (tmp_path / "video.session.safetensors").read_bytes() == b"hours of work"


def test_bad_resumes_are_one_sentence(folder, tmp_path, capsys) -> None:
    assert miga("resume", tmp_path / "none.safetensors") == 2
    assert re_sentence(capsys.readouterr().err)
    assert miga(*_generate(folder, tmp_path / "video.mp4", "--checkpoint-every", -1)) == 2
    assert "checkpoint_every must be a whole number" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def re_sentence(text: str) -> bool:
    return text.startswith("miga: ") and text.count("\n") == 1


# Outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["video.mp4", "video.mkv", "video.rgb", "frames/"])
@pytest.mark.parametrize("in_thread", [False, True])
def test_an_output_goes_on_from_its_checkpoint(tmp_path, name, in_thread) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), np.uint8)

    def opened(folder: str) -> Any:
        (tmp_path / folder).mkdir()
        path = f"{tmp_path / folder}/{name}"
        return open_sink(path, 6, 48, 32, METADATA)

    with opened("whole") as sink:
        for i in range(0, 40, 7):
            sink.write(pictures[i : i + 7])
    expected = _bytes_or_frames(tmp_path / "whole" / name)
    for cut in (1, 6, 13, 24, 40):
        sink = EncoderThread(opened(f"part{cut}")) if in_thread else opened(f"part{cut}")
        for i in range(0, cut, 5):
            buffer = pictures[i : min(i + 5, cut)].copy()
            sink.write(buffer)
            if not in_thread:
                buffer[:] = 0  # the caller may use its memory again
        position, behind = sink.checkpoint()
        sink.write(pictures[:9])  # what came after the checkpoint does not count
        sink.abort()
        assert position["num_frames"] + len(behind) == cut
        with reopen_sink(f"{tmp_path / f'part{cut}'}/{name}", position, behind, 6, 48, 32, METADATA) as sink:
            sink.write(pictures[cut:])
        assert np.array_equal(_bytes_or_frames(tmp_path / f"part{cut}" / name), expected), cut


def _bytes_or_frames(path: Path) -> np.ndarray:
    if path.is_dir():
        return np.stack([read_video(image)[0] for image in sorted(path.iterdir())])
    return np.fromfile(path, np.uint8) if path.suffix == ".rgb" else read_video(path)


def test_an_output_that_was_cut_short_is_refused(tmp_path) -> None:
    pictures = np.zeros((40, 32, 48, 3), np.uint8)
    for name in ("video.mkv", "video.rgb"):
        with open_sink(tmp_path / name, 6, 48, 32) as sink:
            sink.write(pictures)
            position, _ = sink.checkpoint()
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 4])
        with pytest.raises(OutputError, match="it holds fewer than the"):
            reopen_sink(tmp_path / name, position, np.zeros((1, 32, 48, 3), np.uint8), 6, 48, 32)
        assert (tmp_path / name).stat().st_size == len(data) // 4


def test_the_same_frames_are_always_the_same_mp4(tmp_path) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (13, 64, 96, 3), np.uint8)
    files = set()
    for number in range(8):
        with open_sink(tmp_path / f"{number}.mp4", 12, 96, 64) as sink:
            sink.write(pictures)
        files.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(files) == 1


# Drift ---------------------------------------------------------------------------------------------------------


def test_drift_is_how_far_values_have_moved() -> None:
    torch.manual_seed(0)
    frames = torch.randint(40, 160, (3, 16, 24, 3), dtype=torch.uint8)
    meter = DriftMeter()
    first = meter.measure(frames)
    assert first["drift"] == 0
    assert first["luminance"] == pytest.approx(
        float((frames.double() @ torch.tensor([0.2126, 0.7152, 0.0722]).double()).mean()) / 255
    )
    assert meter.measure(frames + 51)["drift"] == pytest.approx(51 / 255)
    assert meter.measure(frames.flip(1))["drift"] == 0  # where things are does not matter
    grey = frames.double().mean(3, keepdim=True).expand(frames.shape).to(torch.uint8)
    assert meter.measure(grey)["saturation"] == 0
    assert DriftMeter(json.loads(json.dumps(meter.reference))).measure(frames)["drift"] == 0


def test_a_run_that_drifts_is_stopped_and_can_be_gone_on_with(engine, whole, tmp_path) -> None:
    events: list[dict[str, Any]] = []
    stream = engine.stream(
        "a red balloon", NUM_FRAMES, on_event=lambda event: events.append(json.loads(event.to_json())), **OPTIONS
    )
    _frames(stream)
    drifts = [event["drift"] for event in events if event["event"] == "drift"]
    assert len(drifts) == sum(event["event"] == "chunk" for event in events)
    assert drifts[0] == 0
    limit = sorted(drifts)[len(drifts) // 2]
    stopped = engine.stream("a red balloon", NUM_FRAMES, stop_on_drift=limit, **OPTIONS)
    frames = []
    with pytest.raises(DriftError, match=r"have moved by 0\.\d+ from the beginning, more than stop_on_drift"):
        frames.extend(chunk.frames for chunk in stopped)
    assert len(frames) == next(i for i, drift in enumerate(drifts) if drift > limit) + 1
    stopped.save(tmp_path / "run.safetensors")
    assert torch.equal(torch.cat([*frames, _frames(engine.resume(tmp_path / "run.safetensors"))]), whole)
