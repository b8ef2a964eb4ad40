"""Workers: threads that make the videos of the queue on one engine, each job into a file of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from typing import Any

import torch

from miga_engine.engine import Engine
from miga_engine.errors import MigaError
from miga_engine.integrations.server.asked import OF_STREAM, model_name
from miga_engine.integrations.server.job import SOURCE, Job
from miga_engine.integrations.server.jobs import Jobs
from miga_engine.integrations.server.metrics import Metrics
from miga_engine.runtime.session import locked
from miga_engine.runtime.stream import Event, Stream
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import sink_for
from miga_engine.video.sink import Sink

_log = logging.getLogger("miga_engine")


class Workers:
    """So many threads, each with one job at a time, until the jobs stop."""

    def __init__(self, engine: Engine, jobs: Jobs, metrics: Metrics, *, count: int, save_every: int) -> None:
        self._engine, self._jobs, self._metrics, self._save_every = engine, jobs, metrics, save_every
        self._threads = [
            threading.Thread(target=self._work, name=f"miga-worker-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until all have ended, which `Jobs.stop` makes them do, each with its session saved."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        torch.get_num_threads()  # OpenMP counts by thread; asking makes torch set this one's count to the process's
        while (job := self._jobs.take()) is not None:
            try:
                status: str | None = self._make(job)
                error = None
            except MigaError as failure:
                code = re.sub(r"(?<!^)(?=[A-Z])", "_", type(failure).__name__).lower()
                status, error = "failed", {"code": code, "message": str(failure).replace(f"{job.folder}{os.sep}", "")}
            except Exception as failure:
                _log.exception("%s has failed", job.id)
                words = " ".join(str(failure).split())
                status, error = "failed", {"code": "internal_error", "message": f"{type(failure).__name__}: {words}"}
            if status is not None:
                self._jobs.end(job, status, error)

    def _make(self, job: Job) -> str | None:
        """Make the video, or go on with it. How the job has ended, None where the server stops before that."""
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(job.session))
            stream = stack.enter_context(self._open(job))
            made_of = {**self._engine.made_of(), "model": model_name(self._engine)}
            metadata = stream.request.metadata(**made_of)
            sink = EncoderThread(_open_sink(job, stream, metadata))
            stack.callback(setattr, job, "stream", None)
            try:
                with sink:
                    stream.save_every(self._save_every, job.session, sink, keep_extension=True)
                    job.num_frames_out = stream.num_frames_out
                    if job.record.replay_of is None:
                        job.begin(stream)
                    self._write(job, stream, sink, metadata, started)
            except MigaError:
                with contextlib.suppress(MigaError):  # the last one stands where this cannot be saved
                    stream.save(job.session, sink)
                raise
            if job.num_frames_out == job.record.num_frames:
                return "completed"
            if job.is_cancelled.is_set():
                return "cancelled"
            if not self._jobs.is_stopping:
                raise MigaError("the video ended before its last frame: go on with it")
            return None

    def _write(self, job: Job, stream: Stream, sink: Sink, metadata: dict[str, Any], started: float) -> None:
        for chunk in stream:
            metadata |= stream.metadata()  # before the sink's first frame, which writes it
            if job.seconds_to_first_frame is None and chunk.first_frame == 0:
                job.seconds_to_first_frame = round(time.monotonic() - started, 3)
                self._metrics.first_frame(job.seconds_to_first_frame)
            left = None if job.record.num_frames is None else job.record.num_frames - chunk.first_frame
            if left == 0:
                break
            frames = chunk.frames[:left]  # a replay that is resumed goes on as its session does
            sink.write(frames)
            job.hub.show(chunk.first_frame, frames)
            job.num_frames_out = chunk.first_frame + len(frames)
            self._metrics.frames(len(frames))
            if len(frames) < len(chunk.frames):
                break

    def _open(self, job: Job) -> Stream:
        record = job.record
        controls: dict[str, Any] = {
            "on_event": lambda event: _tell(job, event),
            "is_cancelled": lambda: self._jobs.is_stopping or job.is_cancelled.is_set(),
            **{name: record.options[name] for name in OF_STREAM if name in record.options},
        }
        if os.path.lexists(job.session):
            return self._engine.resume(job.session, **controls)
        if record.replay_of is not None:
            controls["image"] = None if record.image is None else job.folder / record.image
            return self._engine.replay(job.folder / SOURCE, **controls)
        given = {name: value for name, value in record.options.items() if name not in OF_STREAM}
        if record.image is not None:
            given["image"] = job.folder / record.image
        prompt = {int(frame): text for frame, text in record.prompt.items()}
        return self._engine.stream(prompt, **given, **controls)


def _open_sink(job: Job, stream: Stream, metadata: dict[str, Any]) -> Sink:
    request = stream.request
    size = request.width, request.height
    if stream.output is None or not stream.output[0].get("num_frames"):  # nothing of a file counts, if there is one
        job.video.unlink(missing_ok=True)
        job.stale_inode = None
    return sink_for(job.video, stream.output, request.fps, *size, metadata)


def _tell(job: Job, event: Event) -> None:
    data = {name: value for name, value in event.data.items() if name != "path"}
    job.hub.tell(event.kind, number=event.number, **data)
    if event.kind in ("prompt", "guidance_scale"):
        job.is_changed(event.data.get("prompt"), event.data.get("guidance_scale"), event.data["frame"])
