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

import golden_model
import numpy as np
import places
import pytest
import small_run
import torch
from safetensors.torch import save_file
from small_run import Change, miga, rewritten
from torch import Tensor

from miga_engine.engine import Engine
from miga_engine.errors import DeviceError, MigaError, OutputError, SessionError
from miga_engine.runtime import session as session_file
from miga_engine.runtime.session import load_session, locked, previous_path

NUM_FRAMES = 33
OPTIONS = {**golden_model.OPTIONS, "seed": 3, "miga": golden_model.MIGA}


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


@pytest.fixture
def stopped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run to a video of this name that was told to stop after some frames: its session file."""

    def stop(name: str = "video.rgb", after: int = 9, *more: object) -> Path:
        from miga_engine.runtime.stream import Stream

        following = Stream.__next__

        def next_and_stop(self: Stream) -> Any:
            chunk = following(self)
            if self.num_frames_out >= after:
                os.kill(os.getpid(), signal.SIGTERM)
            return chunk

        with monkeypatch.context() as patch:
            patch.setattr(Stream, "__next__", next_and_stop)
            assert miga(*_generate(model, f"{tmp_path}/{name}", *more)) == 128 + signal.SIGTERM
        return tmp_path / f"{Path(name).stem}.session.safetensors"

    return stop


# Where it writes ---------------------------------------------------------------------------------------------------


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


def test_a_video_that_is_a_link_is_not_followed(model, outside, stopped, capsys) -> None:
    before = _content(outside)
    saved = stopped()
    video = saved.with_name("video.rgb")
    video.unlink()
    video.symlink_to(outside / "a.rgb")
    assert miga("resume", saved, "--model", model, "-q") == 2
    assert "is a link: name the video" in capsys.readouterr().err
    assert _content(outside) == before


def test_a_model_that_nobody_named_is_not_opened(model, tmp_path, stopped, capsys) -> None:
    saved = stopped()
    assert miga("resume", saved, "-q") == 2
    assert f"name the model with --model {model}" in capsys.readouterr().err
    shutil.copytree(model, tmp_path / "models" / "small")
    rewritten(saved, lambda record, _: record["model"].update(name=str(tmp_path / "models" / "small")))
    assert miga("resume", saved, "-q") == 0  # below the session file


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


def test_a_command_that_goes_on_is_told_whole(model, tmp_path, stopped, capsys) -> None:
    """With what the session file is not trusted to say."""
    (tmp_path / "states").mkdir()
    stopped("video.rgb", 9, "--session", tmp_path / "states" / "run.safetensors")
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


def test_a_session_that_is_cut_while_it_is_read_is_no_signal(engine, tmp_path, saved_bytes, monkeypatch) -> None:
    """A file that is mapped ends the process where it is cut meanwhile."""
    path = tmp_path / "run.safetensors"
    path.write_bytes(saved_bytes)
    checksum = session_file._checksum

    def cut(record: str, tensors: dict[str, Tensor]) -> str:
        os.truncate(path, 100)
        return checksum(record, tensors)

    monkeypatch.setattr(session_file, "_checksum", cut)
    assert engine.resume(path).num_frames_out > 0


# Who is at it ------------------------------------------------------------------------------------------------------


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


# What it holds -----------------------------------------------------------------------------------------------------


def _run(**changes: Any) -> Change:
    return lambda record, _: record["state"]["run"].update(changes)


def _state(**changes: Any) -> Change:
    return lambda record, _: record["state"].update(changes)


def _request(**changes: Any) -> Change:
    return lambda record, _: record["request"].update(changes)


def _integers(name: str, value: int) -> Change:
    return lambda _, tensors: tensors[f"state/run/{name}"].fill_(value)


CHANGES: dict[str, Change] = {
    "unknown stage": _run(stage="stage9"),
    "stage of another moment": _run(stage="warmup"),
    "next of another stage": _run(next="push"),
    "a list for a text": _run(stage=["stage1"]),
    "unified counter beyond the queue": _run(unified=[10**6, 10**6, 10**6]),
    "unified counters that rise": _run(unified=[0, 1, 2]),
    "unified counter below zero": _run(unified=[-1, -1, -1]),
    "a text among the counters": _run(unified=["1", 0, 0]),
    "too few counters": _run(unified=[]),
    "window batch of nothing": _run(window_batch=0),
    "window batch beyond memory": _run(window_batch=10**9),
    "windows that ranks share": _run(share_windows=0),
    "head": _run(head=10**15),
    "tail before head": _run(tail=-(10**6)),
    "first": _run(first=-(10**9)),
    "emitted": _run(emitted=10**9),
    "passes": _run(num_passes=-3),
    "forwards": _run(num_forwards=-1),
    "parts that were done": _run(parts_done=2),
    "searches beyond the noise's counter": _run(num_searches=2**40),
    "score": _run(previous_score=float("nan")),
    "a score of text": _run(previous_score="high"),
    "has parted": _run(has_parted=False),
    "true for one": _run(window_batch=True),
    "frames out": _state(num_frames_out=10**9),
    "frames out, below zero": _state(num_frames_out=-5),
    "chunks": _state(num_chunks="many"),
    "events": _state(num_events=-1),
    "drift": _state(drift={"0": [[1.0]]}),
    "drift of no prompt": _state(drift={"7": [[0.5] * 256] * 3}),
    "drift of NaN": _state(drift={"0": [[float("nan")] * 256] * 3}),
    "output": _state(output={"path": 3, "num_frames": 0}),
    "step index out of its table": _integers("step_index", 10**6),
    "step index below zero": _integers("step_index", -1),
    "step index of another moment": _integers("step_index", 3),
    "history length": _integers("history_length", 99),
    "prompt row of no prompt": _integers("prompt_row", 10**9),
    "prompt row below zero": _integers("prompt_row", -7),
    "frame number": _integers("frame_number", 2**40),
    "frames in a billion": _request(num_frames="33"),
    "height of another picture": _request(height=4096),
    "steps": _request(num_inference_steps=1000),
    "steps, none": _request(num_inference_steps=0),
    "seed": _request(seed=-1),
    "rate": _request(fps=0),
    "an unknown option": _request(magic=1),
    "a prompt of no text": _request(prompt={"0": 5}),
    "a timeline without a beginning": _request(prompt={"5": "a kite"}),
    "solver": _request(solver="magic"),
    "zigzag width": lambda record, _: record["request"]["miga"].update(zigzag_width=4),
    "queue of fewer frames": lambda _, tensors: tensors.update({"state/run/sample": torch.zeros(1, 16, 4, 6)}),
    "integers of another kind": lambda _, tensors: tensors.update(
        {"state/run/step_index": tensors["state/run/step_index"].float()}
    ),
    "a tensor too many": lambda _, tensors: tensors.update({"state/more": torch.zeros(1)}),
    "decoder of another picture": lambda _, tensors: tensors.update(
        {name: tensor[:, :, :1].clone() for name, tensor in tensors.items() if name.startswith("state/decoder/")}
    ),
    "decoder that has seen nothing": lambda _, tensors: [
        tensors.pop(name) for name in list(tensors) if name.startswith("state/decoder/")
    ],
    "frames given twice": lambda _, tensors: tensors.update(
        {"state/frames": torch.zeros(4, 32, 48, 3, dtype=torch.uint8)}
    ),
    "model of a list": lambda record, _: record["model"].update(preset=["tiny"]),
    "no model": lambda record, _: record.update(model=None),
}


@pytest.fixture(scope="module")
def saved_bytes(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "run.safetensors"
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS) as stream:
        next(stream)
        next(stream)
        stream.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_value_that_no_run_writes_is_one_sentence(engine, tmp_path, saved_bytes, change, capsys) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(saved_bytes)
    rewritten(path, change)
    with pytest.raises(MigaError) as caught:
        engine.resume(path)
    assert str(caught.value).isprintable()
    assert "run.safetensors" in str(caught.value) or isinstance(caught.value, DeviceError)
    assert miga("info", path) in (0, 2)
    assert miga("resume", path, "--model", engine.name, "-q", "-o", tmp_path / "video.rgb") == 2
    assert capsys.readouterr().err.count("\n") <= 2
    assert not (tmp_path / "video.rgb").exists()


def test_a_session_that_asks_for_all_memory_is_refused_before_it_is_allocated(engine) -> None:
    miga = golden_model.MIGA
    with pytest.raises(DeviceError, match=r"the queue of this run alone would need .* GiB of memory"):
        engine.stream("a kite", 9, **{**OPTIONS, "height": 16384, "width": 16384, "miga": miga})


def test_nothing_from_a_file_reaches_the_terminal_raw(engine, tmp_path, saved_bytes, capsys, caplog) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(saved_bytes)
    evil = "\x1b]0;owned\x07\x1b[2J"
    rewritten(path, lambda record, _: (record["model"].update(torch=evil), record["request"].update(solver=evil)))
    assert miga("info", path) == 0
    assert miga("resume", path, "--model", engine.name, "-q", "-o", tmp_path / "video.rgb") == 2
    path.write_bytes(saved_bytes)
    rewritten(path, lambda record, _: record["model"].update(torch=evil))
    engine.resume(path).close()
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err + caplog.text
    assert "\\x1b]0;owned" in caplog.text


# What a person hears -----------------------------------------------------------------------------------------------


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


def test_events_are_told_once_though_the_run_was_killed(model, tmp_path, stopped) -> None:
    events = tmp_path / "events.jsonl"
    saved = stopped("video.rgb", 9, "--events", events)
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
