"""A server in this process or another one, and a client of it that can be as rude as it likes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import golden_model
import numpy as np
import places
import torch

from miga_engine import Engine
from miga_engine.integrations.server.serve import Server
from miga_engine.integrations.server.settings import ServeOptions
from miga_engine.video.outputs import open_sink
from miga_engine.video.reading import read_video

METHOD = {"zigzag_width": 2, "stage2_steps": 3, "guidance_frames": 1, "stride": 2, "judge_step": 3}
assert all(getattr(golden_model.MIGA, name) == value for name, value in METHOD.items())
VIDEO: dict[str, Any] = {"prompt": "a red balloon", "num_frames": 30, "fps": 6, "size": "48x32",
                         "num_inference_steps": 8, "miga": METHOD}  # fmt: skip
"""A short video of the small Wan model, as a client asks for it."""
OPTIONS = {**golden_model.OPTIONS, "fps": 6, "miga": golden_model.MIGA}
"""The same for the engine, but for the length."""
SECONDS = 60.0
"""That a test waits for anything."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def refusal(self) -> str:
        """The sentence of a refusal, which is one, and printable."""
        sentence = self.json["error"]["message"]
        assert sentence.isprintable()
        assert len(sentence) < 2000
        return sentence


class Client:
    """Requests to a server, each on a connection of its own."""

    def __init__(self, address: str, **headers: str) -> None:
        self.address, self.headers = address, headers
        self.place = address.removeprefix("http://")

    def connect(self, seconds: float = SECONDS) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.place, timeout=seconds)

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        headers = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"content-type": "application/json", **headers}
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        return self.send("POST", path, body, **headers)

    def start(self, **fields: Any) -> str:
        """The id of a new job of `VIDEO` with other fields."""
        answer = self.post("/v1/videos", {**VIDEO, **fields})
        assert answer.status == 200, answer.body
        return answer.json["id"]

    def job(self, name: str) -> dict[str, Any]:
        return self.get(f"/v1/videos/{name}").json

    def ended(self, name: str, status: str = "completed") -> dict[str, Any]:
        """The job, once it has ended, and so."""
        until = time.monotonic() + SECONDS
        while (job := self.job(name))["status"] in ("queued", "in_progress"):
            assert time.monotonic() < until, job
            time.sleep(0.02)
        assert job["status"] == status, job
        return job

    def begun(self, name: str, num_frames: int = 1) -> dict[str, Any]:
        """The job, once it has so many frames."""
        until = time.monotonic() + SECONDS
        while (job := self.job(name))["num_frames_out"] < num_frames:
            assert time.monotonic() < until, job
            assert job["status"] in ("queued", "in_progress"), job
            time.sleep(0.01)
        return job

    def changed(self, name: str) -> list[dict[str, Any]]:
        """The changes that the video was asked for, once all have been taken up."""
        until = time.monotonic() + SECONDS
        while not all("frame" in change for change in self.job(name)["changes"]):
            assert time.monotonic() < until
            time.sleep(0.02)
        return self.job(name)["changes"]

    def frames(self, name: str, folder: Path) -> np.ndarray:
        """Of a video's content."""
        path = folder / f"{name}.mp4"
        path.write_bytes(self.get(f"/v1/videos/{name}/content").body)
        return read_video(path)


@contextlib.contextmanager
def serving(engine: Engine, folder: Path, **options: Any) -> Iterator[Client]:
    """A server in this process, stopped as by a signal at the end."""
    server = Server(engine, ServeOptions(port=0, folder=str(folder), **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield Client(server.address)
    finally:
        server.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()


@contextlib.contextmanager
def process(folder: Path, *arguments: str) -> Iterator[tuple[Client, subprocess.Popen[str]]]:
    """`miga serve` as a process of its own, killed at the end if it is there yet."""
    command = [sys.executable, "-m", "miga_engine", "serve", "--port", "0", "--folder", str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(places.ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.match(r"miga: serving at (http://\S+), jobs in ", line)
        assert found, line + server.stderr.read()
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield Client(found[1]), server
    finally:
        server.kill()
        server.wait()


def written(frames: torch.Tensor, path: Path, fps: int = 6) -> np.ndarray:
    """What a video of these frames shows: mp4 does not keep every bit."""
    with open_sink(path, fps, frames.shape[2], frames.shape[1]) as sink:
        sink.write(frames)
    return read_video(path)


def first_frames(engine: Engine, count: int) -> torch.Tensor:
    """The first frames of an endless one: uint8 `[T,H,W,3]`."""
    chunks: list[torch.Tensor] = []
    with engine.stream("a red balloon", **OPTIONS) as stream:
        for chunk in stream:
            chunks.append(chunk.frames)
            if sum(map(len, chunks)) >= count:
                break
    return torch.cat(chunks)[:count]
