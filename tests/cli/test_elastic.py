"""A run that others start again: it goes on from its session, with as many ranks as are left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import golden_model
import numpy as np
import pytest
from places import ROOT

from miga_engine import cli
from miga_engine.cli.write_options import WriteOptions
from miga_engine.runtime.session import load_session
from miga_engine.video.reading import read_video

SMALL = ["--height", "32", "--width", "48", "--num-inference-steps", "10", "--zigzag-width", "2", "--stage2-steps", "3",
         "--guidance-frames", "1", "--stride", "2", "--judge-step", "3", "--fps", "6", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_model.build(tmp_path_factory.mktemp("model") / "small-wan")


def _generate(model: Path, output: Path, num_frames: int, *more: str) -> list[str]:
    return ["generate", "a red balloon", "--model", str(model), "--num-frames", str(num_frames), "--output",
            str(output), "--checkpoint-every", "6", *SMALL, *more]  # fmt: skip


def test_a_run_goes_on_where_its_session_lies(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, video = tmp_path / "whole.mkv", tmp_path / "video.mkv"
    assert cli.main(_generate(model, whole, 30)) == 0
    assert cli.main(_generate(model, video, 30, "--stop-on-drift", "1e-9")) == 2  # it saves, and stops
    capsys.readouterr()
    assert cli.main(_generate(model, video, 30)) == 2  # as somebody types it once more by mistake
    assert "exists" in capsys.readouterr().err
    assert cli.main(_generate(model, video, 30, "--seed", "7", "--auto-resume")) == 2
    assert "it is the session file of another run" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert cli.main(_generate(model, video, 30, "--no-auto-resume")) == 2
    assert cli.main(_generate(model, video, 30)) == 0
    assert np.array_equal(read_video(video), read_video(whole))
    assert cli.main(_generate(model, tmp_path / "new.mkv", 9)) == 0  # which has no session to go on from


@pytest.mark.parametrize(("restarts", "goes_on"), [(None, False), ("", False), ("0", False), ("3", True)])
def test_it_goes_on_by_itself_where_torchrun_may_start_it_again(
    monkeypatch: pytest.MonkeyPatch, restarts: str | None, goes_on: bool
) -> None:
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert WriteOptions().goes_on == goes_on
    assert WriteOptions(auto_resume=True).goes_on
    assert not WriteOptions(auto_resume=False).goes_on


def _agent(port: int, options: list[str], log: Path) -> subprocess.Popen[bytes]:
    """One machine of a group that may shrink to one, with a process of the run."""
    soon = "last_call_timeout=6,keep_alive_interval=1,keep_alive_max_attempt=2"  # that a machine is missed
    torchrun = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d",
                "--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", soon, "--rdzv-id", "video",
                "--local-addr", "localhost"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", "miga_engine", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def _kill(agent: subprocess.Popen[bytes]) -> None:
    """With its process of the run, which has a session of its own."""
    told = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=False).stdout
    for pid in (agent.pid, *map(int, told.split())) if agent.poll() is None else ():
        os.kill(pid, signal.SIGKILL)
    agent.wait()


def _answers(port: int) -> bool:
    with socket.socket() as asks:
        return asks.connect_ex(("localhost", port)) == 0


@pytest.mark.slow
def test_a_lost_rank_costs_no_frame(model: Path, tmp_path: Path) -> None:
    """Two ranks; one machine dies; the other goes on alone from the last session, and the frames are those of one."""
    whole, video = tmp_path / "whole.mkv", tmp_path / "video.mkv"
    assert cli.main(_generate(model, whole, 241)) == 0
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    options = _generate(model, video, 241)
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    first = _agent(port, options, logs[0])
    session = tmp_path / "video.session.safetensors"
    limit = time.monotonic() + 120
    while not _answers(port):  # that of the group's store, without which nobody goes on
        assert time.monotonic() < limit, logs[0].read_text()
        time.sleep(0.05)
    second = _agent(port, options, logs[1])
    try:
        while not (session.exists() and load_session(session).state.numbers["num_frames_out"] >= 12):
            assert first.poll() is None, logs[0].read_text()
            assert time.monotonic() < limit, logs[0].read_text()
            time.sleep(0.05)
        _kill(second)
        assert first.wait(150) == 0, logs[0].read_text()
    finally:
        for agent in (first, second):
            _kill(agent)
    assert "lost touch with the others" in logs[0].read_text()
    assert np.array_equal(read_video(video), read_video(whole))
