"""A disk that is full at any write: one sentence, nothing lost, nothing half made, and the run goes on from there."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden_model
import numpy as np
import pytest
from clips import HEIGHT, METADATA, WIDTH
from places import ROOT
from stopped_runs import FRAMES, NAMES, RATE, opened, pictures, tree

from miga_engine import files
from miga_engine.cli import main
from miga_engine.errors import OutputError
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import reopen_sink
from miga_engine.video.sink import Sink

NUM_FRAMES = 20


class _Disk:
    """Takes so many writes, of the next one a half, and none after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_writes: int) -> None:
        self.num_left = num_writes
        self.is_full = False
        monkeypatch.setattr(files.WholeFile, "write", lambda file, data: self.write(file, data))

    def write(self, file: io.FileIO, data: Any) -> int:
        rest = memoryview(data).cast("B")
        self.num_left -= 1
        if self.num_left < 0:
            if not self.is_full:
                io.FileIO.write(file, rest[: len(rest) // 2])
            self.is_full = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return io.FileIO.write(file, rest) or 0


def _check_sentence(error: OutputError) -> None:
    assert str(error).startswith("cannot write ")
    assert str(error).endswith(": No space left on device")


def _write(sink: Sink, frames: "np.ndarray[Any, Any]") -> None:
    for start in range(0, len(frames), 4):
        sink.write(frames[start : start + 4])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("is_overwriting", "in_thread"), [(False, False), (True, False), (False, True)])
def test_a_disk_that_is_full_at_any_write(
    tmp_path: Path, name: str, is_overwriting: bool, in_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    with opened(f"{tmp_path}/whole/{name}") as sink:
        _write(sink, FRAMES[:NUM_FRAMES])
    whole = pictures(f"{tmp_path}/whole/{name}")
    if name == "frames/" and is_overwriting:
        return  # older pictures go first
    num_writes = 0
    while True:
        folder = tmp_path / str(num_writes)
        folder.mkdir()
        path = f"{folder}/{name}"
        if is_overwriting:
            Path(path).write_bytes(b"old")
        with monkeypatch.context() as patch:
            disk = _Disk(patch, num_writes)
            plain = opened(path, overwrite=is_overwriting)
            sink = EncoderThread(plain) if in_thread else plain
            sink.checkpoint()  # as a run saves it before its first frame
            try:
                with sink:
                    _write(sink, FRAMES[:NUM_FRAMES])
            except OutputError as error:
                _check_sentence(error)
            if not disk.is_full:
                break
            assert not is_overwriting or Path(path).read_bytes() == b"old"
        record, behind = sink.checkpoint()
        num_taken = record["num_frames"] + len(behind)
        assert num_taken > 0
        with reopen_sink(path, record, behind, RATE, WIDTH, HEIGHT, METADATA) as sink:
            sink.write(FRAMES[num_taken:NUM_FRAMES])
        assert np.array_equal(pictures(path), whole), num_writes
        assert {entry.name for entry in folder.iterdir()} == {name.rstrip("/")}
        num_writes += 1
    assert num_writes > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_is_full_while_a_run_is_gone_on_with(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_writes in range(12):
        folder = tmp_path / str(num_writes)
        folder.mkdir()
        path = f"{folder}/{name}"
        with opened(path) as sink:
            sink.write(FRAMES[:14])
            position = sink.checkpoint()
        with monkeypatch.context() as patch:
            disk = _Disk(patch, num_writes)
            try:
                with reopen_sink(path, *position, RATE, WIDTH, HEIGHT, METADATA) as sink:
                    sink.write(FRAMES[14:NUM_FRAMES])
            except OutputError as error:
                _check_sentence(error)
        if disk.is_full:
            with reopen_sink(path, *position, RATE, WIDTH, HEIGHT, METADATA) as sink:
                sink.write(FRAMES[14:NUM_FRAMES])
        assert len(pictures(path)) == NUM_FRAMES
        assert {entry.name for entry in folder.iterdir()} == {name.rstrip("/")}


# The command ---------------------------------------------------------------------------------------------------------

OPTIONS = ["--height", "32", "--width", "48", "--fps", "6", "--num-frames", "33", "--num-inference-steps", "8", "-q",
           "--zigzag-width", "2", "--stage2-steps", "3", "--guidance-frames", "1", "--stride", "2",
           "--judge-step", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("model"))


def _generate(folder: Path, output: object, *more: object) -> list[str]:
    return ["generate", "a red balloon", "--model", str(folder), *OPTIONS, "-o", str(output), *map(str, more)]


def _in_shell(tmp_path: Path, arguments: list[str], redirection: str) -> subprocess.CompletedProcess[str]:
    command = f'"$@" {redirection}'
    return subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-m", "miga_engine", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "sentence"),
    [
        (">/dev/full", "cannot write standard output: No space left on device"),
        (">&-", "cannot write standard output: it is closed"),
    ],
)
def test_a_standard_output_that_takes_nothing(folder: Path, tmp_path: Path, redirection: str, sentence: str) -> None:
    saved = tmp_path / "run.safetensors"
    done = _in_shell(tmp_path, _generate(folder, "-", "--session", saved), redirection)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if saved.exists():
        again = _in_shell(tmp_path, ["resume", str(saved), "--model", str(folder), "-o", "-", "-q"], "> video.rgb")
        assert again.returncode == 0, again.stderr
        assert (tmp_path / "video.rgb").stat().st_size == 33 * 32 * 48 * 3


@pytest.mark.slow
def test_a_closed_standard_error_does_not_lead_into_the_frames(folder: Path, tmp_path: Path) -> None:
    done = _in_shell(tmp_path, _generate(folder, "-"), "2>&- > video.rgb")
    assert done.returncode == 0
    assert (tmp_path / "video.rgb").stat().st_size == 33 * 32 * 48 * 3
    done = _in_shell(tmp_path, _generate(folder, "video.mp4"), "2>&- <&- >&-")
    assert done.returncode == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["video.mp4", "video.rgb"]


@pytest.mark.slow
def test_standard_output_is_not_the_file_that_the_run_wrote(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(_generate(folder, "video.mp4", "--checkpoint-every", 8)) == 0
    before = tree(tmp_path)
    assert main(["resume", "video.session.safetensors", "--model", str(folder), "-o", "-", "-q"]) == 2
    assert "cannot go on with -: the run did not write such a file" in capsys.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_a_log_of_events_that_takes_nothing_loses_no_frame(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events, video = tmp_path / "events.jsonl", tmp_path / "video.rgb"
    whole = files.WholeFile.write
    for num_events in (0, 3, 9, 20):
        count = iter(range(10**6))

        def write(file: Any, data: Any, count: Any = count, num_events: int = num_events) -> int:
            if file.name == str(events) and next(count) >= num_events:
                io.FileIO.write(file, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return whole(file, data)

        with monkeypatch.context() as patch:
            patch.setattr(files.WholeFile, "write", write)
            assert main(_generate(folder, video, "--events", events)) == 2
        told = capsys.readouterr().err
        assert f"cannot write {events}: No space left on device" in told
        assert "to go on from frame" in told
        assert events.read_text().count("\n") == num_events
        assert (
            main(
                [
                    "resume",
                    str(tmp_path / "video.session.safetensors"),
                    "--model",
                    str(folder),
                    "-q",
                    "--events",
                    str(events),
                ]
            )
            == 0
        )
        assert video.stat().st_size == 33 * 32 * 48 * 3
        assert all(line.startswith("{") and line.endswith("}") for line in events.read_text().splitlines())
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["events.jsonl", "video.rgb"]
        events.unlink()
        video.unlink()


@pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mkv", "pipe:1.mp4", "file:x.rgb", "crypto:x.mp4"])
def test_names_with_a_colon_are_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with opened(name) as sink:
        sink.write(FRAMES[:14])
        position = sink.checkpoint()
    with reopen_sink(name, *position, RATE, WIDTH, HEIGHT, METADATA) as sink:
        sink.write(FRAMES[14:20])
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert len(pictures(name)) == 20
