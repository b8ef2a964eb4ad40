"""`miga resume`: videos that go on after full disks, broken pipes, kills and signals, and from other folders."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kills
import numpy as np
import places
import pytest
import small_run
from small_run import NUM_FRAMES, miga

from miga_engine.cli import render
from miga_engine.runtime.session import load_session
from miga_engine.runtime.stream import Stream
from miga_engine.video.raw import RawFileSink
from miga_engine.video.reading import read_video
from miga_engine.video.video_file import VideoFileSink


def _generate(model: Path, video: object, *more: object) -> list[object]:
    return small_run.generate(model, video, NUM_FRAMES, *more)


@pytest.fixture(scope="module")
def whole_file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    video = tmp_path_factory.mktemp("whole") / "whole.mp4"
    assert miga(*_generate(model, video)) == 0
    assert [entry.name for entry in video.parent.iterdir()] == ["whole.mp4"]  # complete: no session file is left
    return read_video(video)


@pytest.mark.slow
@pytest.mark.parametrize(("num_written", "error"), [(20, errno.ENOSPC), (30, errno.EIO), (5, errno.EPIPE)])
def test_a_disk_that_fills_up(model, tmp_path, whole_file, num_written, error, monkeypatch, capsys) -> None:
    """The encoder, or the file system under it, fails for good; space comes back before the run is resumed."""
    video, count = tmp_path / "video.mp4", iter(range(10**6))
    mux = VideoFileSink._mux

    def fails(self: Any, packets: list[Any]) -> None:
        for packet in packets:
            if next(count) >= num_written:
                raise OSError(error, os.strerror(error))
            mux(self, [packet])

    monkeypatch.setattr(VideoFileSink, "_mux", fails)
    assert miga(*_generate(model, video)) == 2
    monkeypatch.undo()
    told = capsys.readouterr().err
    assert f"cannot write {video}" in told
    assert "to go on from frame" in told
    assert "Traceback" not in told
    assert miga("resume", tmp_path / "video.session.safetensors", "--model", model, "-q") == 0
    assert np.array_equal(read_video(video), whole_file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.slow
def test_a_full_disk_keeps_every_frame_that_was_made(model, tmp_path, whole_file, monkeypatch, capsys) -> None:
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
    assert miga(*_generate(model, video, "--session", saved)) == 2
    monkeypatch.undo()
    numbers = load_session(saved).state.numbers
    assert numbers["output"]["num_frames"] < numbers["num_frames_out"]
    assert "No space left on device" in capsys.readouterr().err
    assert miga("resume", saved, "--model", model, "-q") == 2  # the video does not lie beside it
    assert f"name the video with --output {video}" in capsys.readouterr().err
    assert miga("resume", saved, "--model", model, "-q", "--output", video) == 0
    assert video.stat().st_size == NUM_FRAMES * 32 * 48 * 3


@pytest.mark.slow
def test_nothing_but_a_broken_pipe_ends_a_run_to_a_pipe(model, tmp_path) -> None:
    command = [sys.executable, "-m", "miga_engine", *map(str, _generate(model, "-"))]
    reader = f"{' '.join(map(repr, command))} | head -c 100000 > {tmp_path / 'part.rgb'}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", reader], capture_output=True, text=True, timeout=300, env=_environment())
    assert done.stdout.strip() == "2"
    assert "the program that read it has closed it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
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


@pytest.mark.slow
def test_resume_and_extend_from_the_shell(model, tmp_path, whole_file, capsys) -> None:
    video, saved = tmp_path / "video.mp4", tmp_path / "video.session.safetensors"
    assert miga(*_generate(model, video, "--num-frames", 33, "--checkpoint-every", 8)) == 0
    assert miga("info", saved) == 0
    told = capsys.readouterr().out
    assert "frames               33 of 33 made" in told
    assert "can be extended      yes" in told
    assert miga("resume", saved, "--model", model, "-q") == 0  # complete already
    assert miga("resume", saved, "--model", model, "-q", "--num-frames", NUM_FRAMES) == 0
    assert np.array_equal(read_video(video), whole_file)
    moved = tmp_path / "moved.mp4"
    video.rename(moved)
    assert miga("resume", saved, "--model", model, "-q", "--num-frames", 65) == 2
    assert "it is gone; name the file with the frames made so far" in capsys.readouterr().err
    assert miga("resume", saved, "--model", model, "-q", "--num-frames", 65, "-o", moved) == 0
    assert len(read_video(moved)) == 65


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_is_gone_on_with(model, tmp_path, whole_file, number) -> None:
    video, events = tmp_path / "video.mp4", tmp_path / "events.jsonl"
    command = [sys.executable, "-m", "miga_engine", *map(str, _generate(model, video, "--events", events))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment())
    while not (events.exists() and '"chunk"' in events.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    told = process.communicate(timeout=120)[1]
    assert process.returncode in (128 + number, 0)  # 0: it was complete before it heard
    if process.returncode:
        assert "to go on from frame" in told
        assert miga("resume", tmp_path / "video.session.safetensors", "--model", model, "-q", "--events", events) == 0
    assert np.array_equal(read_video(video), whole_file)
    numbers = [json.loads(line) for line in events.read_text().splitlines()]
    assert sum(event["num_frames"] for event in numbers if event["event"] == "chunk") == NUM_FRAMES


@pytest.mark.slow
def test_a_session_is_resumed_from_another_folder(model, tmp_path, whole_file, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    relative = Path(os.path.relpath(model))
    assert miga(*_generate(relative, "video.mp4", "--num-frames", 33, "--session", "run.safetensors")) == 0
    monkeypatch.chdir(tmp_path / "there")
    assert miga("resume", "../here/run.safetensors", "--model", model, "-q", "--num-frames", NUM_FRAMES) == 0
    assert np.array_equal(read_video(tmp_path / "here" / "video.mp4"), whole_file)


@pytest.mark.slow
def test_older_pictures_are_replaced_by_consent_alone(model, tmp_path, monkeypatch, capsys) -> None:
    """A run over a model of pictures, interrupted before its first frame: a session file is not a consent."""
    older = tmp_path / "frames" / "000003.png"
    older.parent.mkdir()
    older.write_bytes(b"an older picture")
    with monkeypatch.context() as patch:
        patch.setattr(render, "interruptible", lambda: contextlib.nullcontext([signal.SIGINT]))
        assert miga(*_generate(model, f"{older.parent}/", "--overwrite")) == 130
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


def test_the_session_of_another_run_is_not_written_over(model, tmp_path, capsys) -> None:
    (tmp_path / "video.session.safetensors").write_bytes(b"hours of work")
    assert miga(*_generate(model, tmp_path / "video.mp4")) == 2
    assert "it is the session file of another run; go on with it (miga resume" in capsys.readouterr().err
    assert (tmp_path / "video.session.safetensors").read_bytes() == b"hours of work"


def test_bad_resumes_are_one_sentence(model, tmp_path, capsys) -> None:
    assert miga("resume", tmp_path / "none.safetensors") == 2
    assert re_sentence(capsys.readouterr().err)
    assert miga(*_generate(model, tmp_path / "video.mp4", "--checkpoint-every", -1)) == 2
    assert "checkpoint_every must be a whole number" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def re_sentence(text: str) -> bool:
    return text.startswith("miga: ") and text.count("\n") == 1
