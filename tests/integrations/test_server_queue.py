"""`miga serve`: a queue, videos that are steered, and what survives a stop and a kill."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from served import SECONDS, VIDEO, first_frames, process, serving, written
from websockets.sync.client import connect

from miga_engine import Engine
from miga_engine.errors import OutputError
from miga_engine.integrations.server import job as job_module
from miga_engine.integrations.server.job import Job
from miga_engine.integrations.server.jobs import Jobs
from miga_engine.runtime.session import load_session
from miga_engine.runtime.stream import Stream

# A queue -------------------------------------------------------------------------------------------------------------


def test_a_queue_has_an_end_and_waits_for_nobody(engine: Engine, tmp_path: Path) -> None:
    """Those who do not read what they are sent, and those who leave, hold up nobody."""
    with serving(engine, tmp_path / "jobs", max_queue=1) as client, contextlib.ExitStack() as stack:
        first = client.start(num_frames=None)
        client.begun(first)
        for path in ("content", "events"):
            idle = stack.enter_context(contextlib.closing(client.connect()))
            idle.request("GET", f"/v1/videos/{first}/{path}")
        place = f"{client.address.replace('http', 'ws')}/v1/videos/{first}/live?frames=1"
        stack.enter_context(connect(place, max_queue=1, close_timeout=0.1))
        with connect(place) as live:
            texts, pictures = [], []
            while len(texts) < 20 or len(pictures) < 20:
                message = live.recv(SECONDS)
                (texts if isinstance(message, str) else pictures).append(message)
            live.send('{"type": "change", "at": 3}')
            live.send("no JSON")
            live.send('{"prompt": "a blue kite", "path": "/tmp"}')
            refusals = []
            while len(refusals) < 3:
                message = live.recv(SECONDS)
                told = json.loads(message) if isinstance(message, str) else {}
                refusals += [told["message"]] if told.get("event") == "refused" else []
            assert "send one of the two" in refusals[0]
            assert "is no JSON" in refusals[1]
            assert "unknown field 'path'" in refusals[2]
        assert {json.loads(text)["event"] for text in texts} >= {"chunk", "drift"}
        numbers = [int.from_bytes(picture[:8], "big") for picture in pictures]
        assert numbers == sorted(set(numbers))
        assert all(picture[8:].startswith(b"\x89PNG") for picture in pictures)
        waiting = client.start()
        answer = client.post("/v1/videos", VIDEO)
        assert (answer.status, answer.refusal) == (429, "1 jobs wait already: ask again later")
        assert client.post(f"/v1/videos/{waiting}/prompt", {"prompt": "b"}).status == 409
        assert client.post(f"/v1/videos/{waiting}/resume").status == 409
        assert client.get(f"/v1/videos/{waiting}/session").status == 404
        client.post(f"/v1/videos/{waiting}/cancel")
        assert client.ended(waiting, "cancelled")["started_at"] is None
        assert client.get(f"/v1/videos/{waiting}/content").status == 404
        before = client.job(first)["num_frames_out"]
        client.begun(first, before + 12)  # it goes on
        measures = client.get("/metrics").body.decode()
        for line in ('miga_jobs{status="in_progress"} 1.0', 'miga_jobs{status="cancelled"} 1.0',
                     "miga_queue_length 0.0", "miga_seconds_to_first_frame_count 1.0"):  # fmt: skip
            assert f"\n{line}\n" in measures
        found = {name: float(re.search(rf"^{name} (\S+)$", measures, re.M)[1]) for name in (
            "miga_frames_total", "miga_frames_per_second", "process_resident_memory_bytes")}  # fmt: skip
        assert found["miga_frames_total"] >= before + 12
        assert found["miga_frames_per_second"] > 1
        assert found["process_resident_memory_bytes"] > 2**26
    assert json.loads((tmp_path / "jobs" / first / "job.json").read_text())["status"] == "in_progress"


def test_what_fails_is_told_and_can_be_gone_on_with(engine: Engine, monkeypatch, tmp_path: Path) -> None:
    with serving(engine, tmp_path, max_queue=2) as client:
        name = client.start(num_frames=None, stop_on_drift=0.0)
        error = client.ended(name, "failed")["error"]
        assert error["code"] == "drift_error"
        assert "more than stop_on_drift 0" in error["message"]
        with monkeypatch.context() as patch:
            patch.setattr(Stream, "save_every", lambda *_, **__: 1 / 0)
            broken = client.start()
            assert client.ended(broken, "failed")["error"]["code"] == "internal_error"
        with monkeypatch.context() as patch:
            patch.setattr(Job, "save", _full)
            answer = client.post("/v1/videos", VIDEO)
            assert (answer.status, answer.refusal) == (507, "the server cannot keep a job: No space left on device")
        assert client.post(f"/v1/videos/{broken}/resume").status == 200
        client.ended(broken)


# Steering ------------------------------------------------------------------------------------------------------------


def test_a_video_is_steered_and_replayed(engine: Engine, monkeypatch, tmp_path: Path) -> None:
    with serving(engine, tmp_path / "jobs") as client:
        name = client.start(num_frames=None)
        path = f"/v1/videos/{name}"
        client.begun(name, 6)
        assert client.post(f"{path}/prompt", {"prompt": "a blue kite", "above": 0}).status == 202
        assert client.post(f"{path}/prompt", {"guidance_scale": 3}).status == 202
        for body, status, sentence in (
            ({"prompt": ""}, 400, "the prompt is empty or no text"),
            ({"prompt": "a\x00"}, 400, "which is no character of a text"),
            ({"prompt": "a", "at": "later"}, 400, "at must be 'now' or a video frame"),
            ({"prompt": "a", "at": -1}, 400, "at must be 'now' or a video frame"),
            ({"prompt": "a", "blend": "x"}, 400, "blend must be a whole number"),
            ({"prompt": "a", "restart": 1}, 400, "restart is 1: give true or false"),
            ({"prompt": "a", "guidance_scale": 2}, 400, "send one of the two"),
            ({"guidance_scale": 2, "blend": 3}, 400, "blend is for a change of the prompt"),
            ({"guidance_scale": -1}, 400, "guidance_scale must be a finite number"),
            ({"prompt": "a", "when": 3}, 422, "unknown field 'when'"),
        ):
            answer = client.post(f"{path}/prompt", json.dumps(body).encode(), content_type="application/json")
            assert (answer.status, sentence in answer.refusal) == (status, True), answer.body
        monkeypatch.setattr(job_module, "MOST_CHANGES", 2)
        assert client.post(f"{path}/prompt", {"guidance_scale": 4}).status == 429
        changes = client.changed(name)
        assert [change.get("prompt") for change in changes] == ["a blue kite", None]
        client.begun(name, changes[0]["frame"] + 18)
        client.post(f"{path}/cancel")
        count = client.ended(name, "cancelled")["num_frames_out"]
        told = client.get(f"{path}/events").body.decode()
        assert '"prompt": "a blue kite"' in told
        assert "event: progress" in told
        assert client.post(f"{path}/prompt", {"prompt": "a red kite"}).status == 409

        again = client.post(f"{path}/replay").json
        assert (again["remixed_from_video_id"], again["num_frames"]) == (name, count)
        assert client.post(f"/v1/videos/{again['id']}/prompt", {"prompt": "b"}).status == 409
        client.ended(again["id"])
        made = client.frames(name, tmp_path)
        assert np.array_equal(client.frames(again["id"], tmp_path), made)
        same = min(change["frame"] for change in changes) // 6 * 6  # whole seconds, each encoded by itself
        assert same >= 6
        plain = written(first_frames(engine, same + 12), tmp_path / "plain.mp4")
        assert np.array_equal(made[:same], plain[:same])
        assert not np.array_equal(made[same + 6 : same + 12], plain[same + 6 : same + 12])


def test_a_change_that_no_session_has_is_asked_for_again(engine: Engine, tmp_path: Path) -> None:
    """As a kill between the answer and the next pass leaves it; then a replay that is stopped is gone on with."""
    with serving(engine, tmp_path / "jobs") as client:
        name = client.start(num_frames=None)
        client.begun(name)
    record = tmp_path / "jobs" / name / "job.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "changes": [{"prompt": "a blue kite", "at": 13}]}))
    with serving(engine, tmp_path / "jobs", save_every=6) as client:
        client.changed(name)
        client.begun(name, 30)
        client.post(f"/v1/videos/{name}/cancel")
        count = client.ended(name, "cancelled")["num_frames_out"]
        made = client.frames(name, tmp_path)
        again = client.post(f"/v1/videos/{name}/replay").json["id"]
        client.begun(again, 12)
    with serving(engine, tmp_path / "jobs") as client:
        assert client.ended(again)["num_frames_out"] == count
        assert np.array_equal(client.frames(again, tmp_path), made)


def test_a_change_that_came_too_late_is_not_taken_for_a_later_one(engine: Engine, tmp_path: Path) -> None:
    """Beyond the end: the stream drops it, and a server that goes on asks for neither of the two again."""
    with serving(engine, tmp_path / "jobs", save_every=6) as client:
        name = client.start(num_frames=100)
        client.begun(name, 6)
        for body in ({"prompt": "a green kite", "at": 5000}, {"prompt": "a blue kite", "above": 0}):
            assert client.post(f"/v1/videos/{name}/prompt", body).status == 202
        (change,) = client.changed(name)
        assert change["prompt"] == "a blue kite"
    session = tmp_path / "jobs" / name / "video.session.safetensors"
    (taken_up,) = load_session(session).request["changes"]
    assert taken_up["frame"] == change["frame"]
    with serving(engine, tmp_path / "jobs") as client:
        client.ended(name)
        assert client.job(name)["changes"] == [change]
    assert load_session(session).request["changes"] == [taken_up]


def _full(job: Job) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# A stop, and a kill --------------------------------------------------------------------------------------------------


def test_a_stopped_server_is_gone_on_with(
    engine: Engine, shown: np.ndarray, longer: np.ndarray, tmp_path: Path
) -> None:
    """In the middle of one job, with another in the queue and a third that has ended; a form is kept, a folder too."""
    folder = tmp_path / "jobs"
    with serving(engine, folder, save_every=12) as client:
        done = client.start()
        client.ended(done)
        running, queued = client.start(num_frames=43), client.start()
        client.begun(running, 10)
        with pytest.raises(OutputError, match="another server has the folder"):
            Jobs(folder, 3)
    for name, kind in ((".video_" + "0" * 24 + ".part", "left"), ("video_" + "1" * 24, "damaged"), ("notes", "own")):
        (folder / name).mkdir()
        (folder / name / "job.json").write_text(f'{{"id": "{kind}"}}')
    with serving(engine, folder) as client:
        assert {job["id"] for job in client.get("/v1/videos").json["data"]} == {done, running, queued}
        assert np.array_equal(client.frames(running, tmp_path), longer)
        for name in (done, queued):
            client.ended(name)
            assert np.array_equal(client.frames(name, tmp_path), shown)
    assert {path.name for path in folder.iterdir()} == {".lock", "notes", "video_" + "1" * 24, done, running, queued}


@pytest.mark.slow
def test_a_killed_server_is_gone_on_with(model: Path, shown: np.ndarray, longer: np.ndarray, tmp_path: Path) -> None:
    """SIGKILL in the middle of a job: none is lost, no frame is another one. Then SIGTERM, and the code is 0."""
    arguments = ["--model", str(model), "--save-every", "12"]
    with process(tmp_path / "jobs", *arguments) as (client, server):
        running, queued = client.start(num_frames=43), client.start()
        deleted = client.start()
        client.send("DELETE", f"/v1/videos/{deleted}")
        client.begun(running, 20)
        server.kill()
    with process(tmp_path / "jobs", *arguments) as (client, server):
        assert np.array_equal(client.frames(running, tmp_path), longer)  # which waits for the copy that goes on
        client.ended(queued)
        assert np.array_equal(client.frames(queued, tmp_path), shown)
        assert client.get(f"/v1/videos/{deleted}").status == 404
        endless = client.start(num_frames=None)
        client.begun(endless, 6)
        with contextlib.closing(client.connect()) as reading:
            reading.request("GET", f"/v1/videos/{endless}/content")
            answer = reading.getresponse()
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(OSError):
                answer.read()
        assert server.wait(SECONDS) == 0
    record = json.loads((tmp_path / "jobs" / endless / "job.json").read_text())
    assert record["status"] == "in_progress"
    session = load_session(tmp_path / "jobs" / endless / "video.session.safetensors")
    assert session.state.numbers["num_frames_out"] >= 6
