"""A session file may be a stranger's: what it can make the engine do, and what it cannot (docs/files.md)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import places
import pytest
import small_run
import torch
from safetensors.torch import save_file
from small_run import OPTIONS, miga, rewritten
from torch import Tensor

from miga_engine.errors import OutputError, SessionError
from miga_engine.runtime import session as session_file
from miga_engine.runtime.session import load_session, locked, previous_path
from miga_engine.runtime.stream import Stream

NUM_FRAMES = 33


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's own files, which must stay as they are."""
    folder = tmp_path_factory.mktemp("outside")
    for name in ("a.rgb", "a.mp4", "a.mkv", "000000.png", "000001.png", "000007.png", "notes.txt"):
        (folder / name).write_bytes(b"hours of work " * 100)
    return folder


def _content(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


def _generate(model: Path, video: object, *more: object) -> list[object]:
    return small_run.generate(model, video, NUM_FRAMES, *more)


def _stop(model: Path, folder: Path, name: str, after: int, *more: object) -> Path:
    """A run to a video of this name in the folder that was told to stop after some frames: its session file."""
    following = Stream.__next__

    def next_and_stop(self: Stream) -> Any:
        chunk = following(self)
        if self.num_frames_out >= after:
            os.kill(os.getpid(), signal.SIGTERM)
        return chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "__next__", next_and_stop)
        assert miga(*_generate(model, f"{folder}/{name}", *more)) == 128 + signal.SIGTERM
    return folder / f"{Path(name).stem}.session.safetensors"


@pytest.fixture(scope="module")
def stopped_once(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `stopped` begins with if nothing else is asked for: session files do not say where they lie."""
    return _stop(model, tmp_path_factory.mktemp("stopped"), "video.rgb", 9)


@pytest.fixture
def stopped(model: Path, stopped_once: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run into a folder of the test's own, stopped after nine frames: its session file."""

    def stop(*more: object) -> Path:
        if more:
            return _stop(model, tmp_path, "video.rgb", 9, *more)
        shutil.copytree(stopped_once.parent, tmp_path, dirs_exist_ok=True)
        return tmp_path / stopped_once.name

    return stop


# Where it writes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.rgb", "a.mp4", "a.mkv", "%06d.png", "new.mp4"])
@pytest.mark.parametrize("num_frames", [0, 9])
def test_a_session_writes_nowhere_that_nobody_named(model, outside, stopped, capsys, name, num_frames) -> None:
    before = _content(outside)
    saved = stopped()

    def elsewhere(record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        output = record["state"]["output"]
        made = tensors["state/output_frames"]
        out = record["state"]["num_frames_out"]
        output["path"] = str(outside / name)
        for key in output:
            if key.startswith("growing"):
                output[key] = str(outside / name)
        if num_frames == 0:
            output["num_frames"] = 0
            tensors["state/output_frames"] = torch.zeros(out, *made.shape[1:], dtype=torch.uint8)

    rewritten(saved, elsewhere)
    assert miga("resume", saved, "--model", model, "-q") == 2
    assert "name the video with --output" in capsys.readouterr().err
    assert _content(outside) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "recorded", ["", "/", ".", "..", "a.png", "/a.png", "video.rgb", "../video.rgb", "/../..", None, "x\0y"]
)
@pytest.mark.parametrize("kind", ["output", "model"])
def test_a_place_that_is_none_is_one_sentence(engine, stopped, capsys, recorded, kind) -> None:
    saved = stopped()
    capsys.readouterr()

    def change(record: dict[str, Any], _: dict[str, Tensor]) -> None:
        if kind == "output":
            record["state"]["output"]["path"] = recorded
        else:
            record["model"]["name"] = recorded

    rewritten(saved, change)
    previous_path(saved).unlink()
    before = _content(saved.parent)
    assert miga("resume", saved, "-q", *(["--model", engine.name] if kind == "output" else [])) == 2
    told = capsys.readouterr().err
    assert told.startswith("miga: ")
    assert told.count("\n") == 1
    assert _content(saved.parent) == before


@pytest.mark.slow
def test_a_video_that_is_a_link_is_not_followed(model, outside, stopped, capsys) -> None:
    before = _content(outside)
    saved = stopped()
    video = saved.with_name("video.rgb")
    video.unlink()
    video.symlink_to(outside / "a.rgb")
    assert miga("resume", saved, "--model", model, "-q") == 2
    assert "is a link: name the video" in capsys.readouterr().err
    assert _content(outside) == before


@pytest.mark.slow
def test_a_model_that_nobody_named_is_not_opened(model, tmp_path, stopped, capsys) -> None:
    saved = stopped()
    assert miga("resume", saved, "-q") == 2
    assert f"name the model with --model {model}" in capsys.readouterr().err
    shutil.copytree(model, tmp_path / "models" / "small")
    rewritten(saved, lambda record, _: record["model"].update(name=str(tmp_path / "models" / "small")))
    assert miga("resume", saved, "-q") == 0  # below the session file


@pytest.mark.slow
def test_a_copied_folder_goes_on_in_the_copy(model, tmp_path, stopped) -> None:
    saved = stopped()
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (saved.name, "video.rgb"):
        shutil.copy(tmp_path / name, copy)
    before = _content(tmp_path)
    assert miga("resume", copy / saved.name, "--model", model, "-q") == 0
    assert _content(tmp_path) == before
    assert (copy / "video.rgb").stat().st_size == NUM_FRAMES * 32 * 48 * 3
    assert miga("resume", saved, "--model", model, "-q") == 0
    assert (tmp_path / "video.rgb").read_bytes() == (copy / "video.rgb").read_bytes()


@pytest.mark.slow
def test_a_command_that_goes_on_is_told_whole(model, tmp_path, stopped, capsys) -> None:
    """With what the session file is not trusted to say."""
    (tmp_path / "states").mkdir()
    stopped("--session", tmp_path / "states" / "run.safetensors")
    told = capsys.readouterr().err
    command = f"miga resume {tmp_path}/states/run.safetensors --output {tmp_path}/video.rgb --model {model}"
    assert command in told
    assert miga(*command.split()[1:], "-q") == 0


@pytest.mark.parametrize("name", ["run.safetensors", "run.previous.safetensors"])
def test_a_file_that_is_no_session_is_never_replaced(model, engine, tmp_path, name, capsys) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / name)
    before = _content(tmp_path)
    session = tmp_path / "run.safetensors"
    assert miga(*_generate(model, tmp_path / "video.mp4", "--session", session, "-y")) == 2
    assert f"{name} is there and is no session file" in capsys.readouterr().err
    with engine.stream("a kite", 9, **OPTIONS) as stream, pytest.raises(OutputError, match="is no session file"):
        stream.save(session)
    with engine.stream("a kite", 9, **OPTIONS) as stream, pytest.raises(OutputError, match="is no session file"):
        stream.save_every(10, session)
    session_file.remove_session(session)
    assert _content(tmp_path) == before


def test_links_that_others_put_in_the_way_are_not_followed(engine, tmp_path, outside) -> None:
    before = _content(outside)
    session = tmp_path / "run.safetensors"
    for name in (".run.safetensors.part", ".run.previous.safetensors.part", ".run.safetensors.lock"):
        (tmp_path / name).symlink_to(outside / "notes.txt")
    with locked(session), engine.stream("a kite", 9, **OPTIONS) as stream:
        for _ in range(3):
            stream.save(session)
    assert _content(outside) == before
    session.unlink()
    session.symlink_to(outside / "notes.txt")
    with engine.stream("a kite", 9, **OPTIONS) as stream, pytest.raises(OutputError, match="is no session file"):
        stream.save(session)
    assert _content(outside) == before


def test_an_empty_file_made_for_it_is_taken(engine, tmp_path) -> None:
    (tmp_path / "run.safetensors").touch()
    with engine.stream("a kite", 9, **OPTIONS) as stream:
        stream.save(tmp_path / "run.safetensors")
    assert load_session(tmp_path / "run.safetensors").request["seed"] == 3


# Who is at it ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_at_one_session_are_one_too_many(model, stopped, capsys) -> None:
    saved = stopped()
    before = _content(saved.parent)
    script = f"from miga_engine.runtime.session import locked\nwith locked({str(saved)!r}): print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    assert miga("resume", saved, "--model", model, "-q") == 2
    assert "another process is making the video of" in capsys.readouterr().err
    assert {name: data for name, data in _content(saved.parent).items() if not name.endswith(".lock")} == before
    other.kill()
    other.wait()
    assert miga("resume", saved, "--model", model, "-q") == 0
    assert [entry.name for entry in saved.parent.iterdir()] == ["video.rgb"]


# What a person hears -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_warnings_are_heard_without_a_bar_too(model, tmp_path, stopped, capsys) -> None:
    saved, events = stopped(), tmp_path / "events.jsonl"
    rewritten(saved, lambda record, _: record["model"].update(torch="1.0"))
    shutil.copy(saved, previous_path(saved))
    saved.write_bytes(saved.read_bytes()[:-9])
    assert miga("resume", saved, "--model", model, "-q", "--events", events) == 0
    told = capsys.readouterr().err
    assert "miga: warning: " in told
    assert f"going on from {previous_path(saved)}" in told
    assert "was made with torch 1.0, and here it is" in told
    kinds = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert kinds[:2] == ["warning", "warning"]


@pytest.mark.slow
def test_events_are_told_once_though_the_run_was_killed(model, tmp_path, stopped) -> None:
    events = tmp_path / "events.jsonl"
    saved = stopped("--events", events)
    written = events.read_text()
    last = json.loads(written.splitlines()[-1])
    assert last["event"] == "saved"
    lines = [json.dumps({"event": "chunk", "number": last["number"] + k, "num_frames": 4}) for k in (1, 2)]
    events.write_text(written + "\n".join(lines) + '\n{"event": "chu')  # killed later than it saved
    assert miga("resume", saved, "--model", model, "-q", "--events", events) == 0
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert events.read_text().startswith(written)
    assert [event["number"] for event in told] == list(range(1, len(told) + 1))
    assert sum(event["num_frames"] for event in told if event["event"] == "chunk") == NUM_FRAMES
    other = tmp_path / "other.jsonl"
    other.write_text('{"mine": 1}\nnotes\n')
    assert miga(*_generate(model, tmp_path / "next.rgb", "--checkpoint-every", 8, "--num-frames", 9)) == 0
    assert miga("resume", tmp_path / "next.session.safetensors", "--model", model, "--events", other, "-q") == 0
    assert other.read_text().startswith('{"mine": 1}\nnotes\n')


@pytest.mark.slow
def test_a_terminal_that_hangs_up_saves_as_a_stop_does(model, tmp_path) -> None:
    video = tmp_path / "video.rgb"
    command = [sys.executable, "-m", "miga_engine", *map(str, _generate(model, video, "--num-frames", 400))]
    roots = [str(places.TESTS), str(places.ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )  # fmt: skip
    while not video.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGHUP
    assert "to go on from frame" in told
    stored = load_session(tmp_path / "video.session.safetensors").state.numbers["output"]["num_frames"]
    assert stored > 0
    frames = np.fromfile(video, np.uint8)
    assert len(frames) == stored * 32 * 48 * 3


@pytest.mark.slow
def test_a_hang_up_that_is_ignored_stays_ignored(model, tmp_path) -> None:
    """As under nohup."""
    video = tmp_path / "video.rgb"
    command = [sys.executable, "-m", "miga_engine", *map(str, _generate(model, video, "--num-frames", 60))]
    script = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", script, *command], stderr=subprocess.PIPE, text=True)
    while not video.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert video.stat().st_size == 60 * 32 * 48 * 3


def test_an_error_is_one_printable_line() -> None:
    assert str(SessionError("a\x1b[2Jb\nc")) == "a\\x1b[2Jb c"
