"""`miga batch` with small models: what is made, gone on with, tried again, and said."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batch_cluster
import numpy as np
import pytest
import torch
from batch_cluster import hash_of
from places import ROOT
from served import METHOD, OPTIONS

from miga_engine import Engine, cli
from miga_engine.errors import OutputError
from miga_engine.integrations.batch import local
from miga_engine.integrations.batch.jobs import Job, read_jobs
from miga_engine.integrations.batch.making import Maker, Report, session_of, video_of
from miga_engine.integrations.batch.manifest import NAME
from miga_engine.integrations.batch.running import run
from miga_engine.integrations.batch.segments import Segments
from miga_engine.integrations.batch.store import Store, store_of
from miga_engine.video.joining import join
from miga_engine.video.reading import read_metadata, read_video

ASKED: dict[str, Any] = {"num_frames": 30, "fps": 6, "height": 32, "width": 48, "num_inference_steps": 8, **METHOD}
assert {**{name: OPTIONS[name] for name in ("fps", "height", "width", "num_inference_steps")}} == {
    name: ASKED[name] for name in ("fps", "height", "width", "num_inference_steps")
}


def _jobs(folder: Path, *jobs: dict[str, Any]) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps({**ASKED, **job}) + "\n" for job in jobs), encoding="utf-8")
    return path


def _job(folder: Path, **job: Any) -> Job:
    (one,) = read_jobs(_jobs(folder, {"prompt": "a red balloon", **job}), {}, [])
    return one


def _alone(engine: Engine, job: Job) -> torch.Tensor:
    return engine.generate(job.prompt, **job.options).frames


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text(encoding="utf-8").splitlines()]


# A worker's part ------------------------------------------------------------------------------------------------------


def _maker(engine: Engine, store: Store, *, overwrite: bool = False) -> Maker:
    return Maker(engine, store, "mkv", 6, overwrite=overwrite)


@pytest.fixture(params=["folder", "url"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return store_of(f"{'file://' if request.param == 'url' else ''}{tmp_path}/out")


def test_a_job_is_made_and_gone_on_with_wherever_it_was_left(engine: Engine, store: Store, tmp_path: Path) -> None:
    job = _job(tmp_path, prompt={"0": "a red balloon", "12": "a blue kite"}, seed=2)
    expected = _alone(engine, job)
    for num_asked in (20, 0):
        asked = itertools.count()
        told = list(_maker(engine, store).make(job, lambda asked=asked, most=num_asked: next(asked) > most))
        assert told[-1] == {"stopped": True}
    *told, end = _maker(engine, store).make(job, lambda: False)
    assert all(set(report) == {"num_frames_out"} for report in told)
    made = end["made"]
    assert (made["frames"], made["num_frames"], made["attempts"] > 1) == (hash_of(expected), 30, True)
    assert made["drift"] is not None
    assert store.names() >= {video_of(job, "mkv"), session_of(job)}
    with store.workplace([made["video"]]) as folder:
        assert torch.equal(torch.from_numpy(read_video(folder / made["video"])), expected)
        assert read_metadata(folder / made["video"])["seed"] == 2
    (again,) = _maker(engine, store).make(job, lambda: False)  # finished, and nobody had heard of it
    assert {**again["made"], "attempts": 0, "seconds": 0, "finished": ""} == {
        **made, "attempts": 0, "seconds": 0, "finished": ""
    }  # fmt: skip


def test_a_session_of_another_video_is_not_gone_on_with(engine: Engine, tmp_path: Path) -> None:
    store = store_of(str(tmp_path / "out"))
    assert list(_maker(engine, store).make(_job(tmp_path, name="x"), lambda: True))[-1] == {"stopped": True}
    other = _job(tmp_path, name="x", seed=5)
    (report,) = _maker(engine, store).make(other, lambda: False)
    assert report["kind"] == "OutputError"
    assert report["error"].startswith("x.session.safetensors is of another video than line 1 of ")
    *_, end = _maker(engine, store, overwrite=True).make(other, lambda: False)
    assert end["made"]["frames"] == hash_of(_alone(engine, other))


def test_a_video_of_somebody_else_is_left_alone(engine: Engine, tmp_path: Path) -> None:
    store, job = store_of(str(tmp_path / "out")), _job(tmp_path, name="x")
    (tmp_path / "out" / "x.mkv").write_text("somebody's")
    *_, report = _maker(engine, store).make(job, lambda: False)
    assert report["kind"] == "OutputError"
    assert (tmp_path / "out" / "x.mkv").read_text() == "somebody's"


def test_what_fails_is_a_report(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(str(tmp_path / "out"))
    *_, report = _maker(engine, store).make(_job(tmp_path, stop_on_drift=1e-9), lambda: False)
    assert (report["kind"], "stop_on_drift" in report["error"]) == ("DriftError", True)

    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("a fault\nof ours")

    monkeypatch.setattr(engine, "resolve", fails)
    (report,) = _maker(engine, store).make(_job(tmp_path), lambda: False)
    assert report == {"error": "KeyError: 'a fault\\nof ours'", "kind": "internal error"}


# Segments -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["mkv", "mp4"])
def test_segments_are_joined_once_all_are_there(engine: Engine, store: Store, tmp_path: Path, container: str) -> None:
    job = _job(tmp_path, prompt={"0": "a red balloon", "12": "a blue kite"}, num_frames=29, segments=2, name="x")
    maker, found = Maker(engine, store, container, 100, overwrite=False), []
    segments = Segments([job], {}, store, container, lambda *told: found.append(told))
    assert segments.left == job.parts()
    made = [list(maker.make(part, lambda: False))[-1]["made"] for part in job.parts()]
    segments.add(job.parts()[1], made[1])
    assert found == []
    again = Segments([job], {job.parts()[1].name: made[1]}, store, container, lambda *told: found.append(told))
    assert again.left == [job.parts()[0]]  # as a batch does that was killed between them
    again.add(job.parts()[0], made[0])
    ((whole, record, parts),) = found
    assert (whole, parts) == (job, job.parts())
    assert (record["num_frames"], record["segments"]) == (29, [part["frames"] for part in made])
    names = [record["video"], *(part["video"] for part in made)]
    with store.workplace(names) as folder:
        joined, *cut = (read_video(folder / name) for name in names)
        assert np.array_equal(joined, np.concatenate(cut))
        said = read_metadata(folder / record["video"])
    assert said["segments"] == [
        {"first_frame": 0, "seed": 0}, {"first_frame": 14, "seed": job.parts()[1].options["seed"]}
    ]  # fmt: skip
    if container == "mkv":
        assert [hash_of(torch.from_numpy(frames)) for frames in cut] == record["segments"]
        assert torch.equal(torch.from_numpy(cut[1]), _alone(engine, job.parts()[1]))


def test_videos_of_other_kinds_are_not_joined(engine: Engine, tmp_path: Path) -> None:
    video = engine.generate("a red balloon", 5, **OPTIONS)
    video.save(tmp_path / "a.mkv")
    dataclasses.replace(video, frames=video.frames[:, :, :32]).save(tmp_path / "b.mkv")
    (tmp_path / "whole.mkv").write_text("somebody's")
    with pytest.raises(OutputError, match="it was encoded otherwise"):
        join([tmp_path / "a.mkv", tmp_path / "b.mkv"], tmp_path / "whole.mkv", 6, {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.mkv", "b.mkv", "whole.mkv"}
    assert (tmp_path / "whole.mkv").read_text() == "somebody's"


# The schedule ---------------------------------------------------------------------------------------------------------


class Pretended:
    """A pool whose workers answer by a script: for each job, what is said at each try."""

    def __init__(self, count: int, script: dict[str, list[list[Report]]]) -> None:
        self.at: dict[int, deque[Report]] = {i: deque() for i in range(count)}
        self.script = {name: deque(tries) for name, tries in script.items()}
        self.given: list[tuple[int, str]] = []
        self.is_stopped = False

    def idle(self) -> list[int]:
        return [worker for worker, reports in self.at.items() if not reports]

    def give(self, worker: int, job: Job) -> None:
        self.given.append((worker, job.name))
        self.at[worker].extend(self.script[job.name].popleft())

    def wait(self, seconds: float) -> list[tuple[int, Report]]:
        if self.is_stopped:
            for reports in self.at.values():
                if reports:
                    reports.clear()
                    reports.append({"stopped": True})
        return [(worker, reports.popleft()) for worker, reports in self.at.items() if reports]

    def stop(self) -> None:
        self.is_stopped = True

    def close(self) -> None: ...


def _named(*names: str) -> list[Job]:
    return [Job(name, {0: "a"}, {"num_frames": 9, "miga": {}}, f"line {i}") for i, name in enumerate(names)]


def test_what_fails_is_tried_again_and_what_comes_again_is_not() -> None:
    made: Report = {"made": {"num_frames": 9}}
    pool = Pretended(2, {
        "a": [[{"num_frames_out": 4}, {"lost": "was ended by SIGKILL"}], [{"num_frames_out": 9}, made]],
        "b": [[{"error": "no", "kind": "ConfigError"}]],
        "c": [[{"error": "full", "kind": "OutputError"}], [{"error": "full", "kind": "OutputError"}]],
        "d": [[made]],
    })  # fmt: skip
    told: list[str] = []
    frames: list[int] = []
    outcome = run(
        _named("a", "b", "c", "d"), pool, 1, lambda: False, lambda job, made: told.append(job.name), frames.append
    )
    assert told == list(outcome.made) == ["d", "a"]
    assert outcome.failed == {"b": "no", "c": "full"}
    assert (outcome.num_lost, outcome.is_stopped) == (1, False)
    assert [name for _, name in pool.given] == ["a", "b", "c", "d", "a", "c"]
    assert frames == sorted(frames)
    assert frames[-1] == 9


def test_a_stop_lets_every_worker_save_and_begins_no_more() -> None:
    endless: list[Report] = [{"num_frames_out": number} for number in range(1, 1000)]
    pool = Pretended(2, {name: [list(endless)] for name in "abc"})
    outcome = run(_named("a", "b", "c"), pool, 1, lambda: len(pool.given) == 2, lambda job, made: None)
    assert (outcome.is_stopped, outcome.made, outcome.failed) == (True, {}, {})
    assert [name for _, name in pool.given] == ["a", "b"]


def test_processors_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 4, 6, 7}, raising=False)
    assert local.shares(2) == [[1, 3], [4, 6, 7]]
    assert local.shares(5) == [[1], [3], [4], [6], [7]]
    assert local.shares(6) == [None] * 6


# The command ----------------------------------------------------------------------------------------------------------


def _start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "miga_engine", "batch", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def _workers(batch: subprocess.Popen[str]) -> list[int]:
    told = subprocess.run(
        ["pgrep", "-P", str(batch.pid), "-f", "spawn_main"], capture_output=True, text=True, check=False
    )
    return [int(word) for word in told.stdout.split()]


def _wait_until(is_so: Callable[[], bool], batch: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while not is_so():
        assert batch.poll() is None, batch.stderr.read() if batch.stderr else ""
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="needs pgrep")
def test_a_batch_loses_workers_is_interrupted_and_goes_on(
    engine: Engine, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a red balloon", "a blue kite", "a white plane"]
    path = _jobs(tmp_path, *({"prompt": prompt, "num_frames": 73} for prompt in prompts),
                 {"prompt": "drifts", "stop_on_drift": 1e-9})  # fmt: skip
    jobs, out = read_jobs(path, {}, []), tmp_path / "out"
    arguments = (path, "-o", out, "--model", model, "--workers", 2, "--save-every", 6, "--quiet")
    batch = _start(*arguments)
    with batch:
        sessions = [out / session_of(job) for job in jobs[:2]]
        _wait_until(lambda: all(session.exists() for session in sessions), batch)
        os.kill(_workers(batch)[0], signal.SIGKILL)
        _wait_until(lambda: len(_workers(batch)) == 2, batch)
        batch.send_signal(signal.SIGINT)
        said = batch.stderr.read() if batch.stderr else ""
        assert batch.wait(60) == 130, said
        assert "miga: interrupted; the same command goes on" in said
    assert cli.main(["batch", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "miga: failed: drifts" in said
    assert "of 4 videos failed" in said
    records = _records(out)
    assert [record["name"] for record in records] == [job.name for job in jobs[:3]]
    for job, record in zip(jobs, records, strict=False):
        assert record["made"]["frames"] == hash_of(_alone(engine, job))
    assert max(record["made"]["attempts"] for record in records) > 1
    there = {entry.name for entry in out.iterdir()}
    assert {name for name in there if "session" not in name} == {".lock", NAME, *(video_of(job, "mp4") for job in jobs)}
    assert all(name.startswith(jobs[3].name) for name in there if "session" in name)

    # What is there is left out, and a manifest can be verified: here with a line that lies.
    kept = _jobs(tmp_path, *({"prompt": prompt, "num_frames": 73} for prompt in prompts))
    assert cli.main(["batch", str(kept), *map(str, arguments[1:])]) == 0
    assert "3 of 3 videos are there already" in capsys.readouterr().err
    lying = tmp_path / "lying" / NAME
    lying.parent.mkdir()
    records[0]["made"]["frames"] = "00" * 16
    lying.write_text("".join(json.dumps(record) + "\n" for record in records[:2]), encoding="utf-8")
    assert cli.main(["batch", str(lying), "--model", str(model), "--verify", "9", "--workers", "2", "-q"]) == 2
    said = capsys.readouterr().err
    assert f"{jobs[0].name}: OTHER 73 frames" in said
    assert f"{jobs[1].name}: the same 73 frames" in said
    assert "1 of 2 videos have other frames than the manifest says" in said


def test_what_cannot_be_made_is_refused_before_anything_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _jobs(tmp_path, {"prompt": "a"}, {"prompt": "b", "height": 33})
    arguments = ["batch", str(path), "-o", str(tmp_path / "out"), "--model", str(model)]
    assert cli.main(arguments) == 2
    assert f"line 2 of {path}: height must be a multiple of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*arguments, "--workers", "0"]) == 2
    assert "workers must be a whole number of at least 1" in capsys.readouterr().err


def test_a_dry_run_shows_what_each_needs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _jobs(tmp_path, {"prompt": "a"}, {"prompt": "b", "num_frames": 13, "width": 96, "name": "wide"})
    assert cli.main(["batch", str(path), "-o", str(tmp_path / "out"), "--model", str(model), "--dry-run"]) == 0
    head, narrow, wide, _, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["video", "frames", "on", "a", "CPU", "on", "a", "GPU"]
    assert (narrow.split()[:2], wide.split()[:2]) == ([_job(tmp_path, prompt="a").name, "30"], ["wide", "13"])
    assert float(narrow.split()[-2]) < float(wide.split()[-2])
    assert last.startswith("2 videos, 43 frames. At once, of the largest, on a GPU: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cluster_loses_a_worker_and_a_node() -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    assert batch_cluster.run(4, 1, 37, seed=0, seconds=1.0) == []
