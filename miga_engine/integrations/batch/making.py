"""A worker's part: it makes a job's video, or goes on with it where another has left it, and says what came of it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from miga_engine._version import __version__
from miga_engine.engine import Engine
from miga_engine.errors import MigaError, OutputError
from miga_engine.integrations.batch.jobs import Job
from miga_engine.integrations.batch.store import Store
from miga_engine.resuming import is_of
from miga_engine.runtime.session import SUFFIX, load_session, locked, previous_path, remove_session
from miga_engine.runtime.stream import Event, Stream
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import sink_for
from miga_engine.video.sink import Sink

Report = dict[str, Any]
"""What a worker says of a job: `num_frames_out` meanwhile; at last `made`, `error`, or `stopped`."""


def video_of(job: Job, container: str) -> str:
    return f"{job.name}.{container}"


def session_of(job: Job) -> str:
    return f"{job.name}.session{SUFFIX}"


def remove_sessions(store: Store, job: Job) -> None:
    """Of a job whose video is there."""
    for name in (session_of(job), str(previous_path(Path(session_of(job))))):
        store.remove(name)


class Maker:
    """One engine, which makes a video after another into a store."""

    def __init__(self, engine: Engine, store: Store, container: str, save_every: int, *, overwrite: bool) -> None:
        self._engine, self._store = engine, store
        self._container, self._save_every, self._overwrite = container, save_every, overwrite

    def make(self, job: Job, is_stopping: Callable[[], bool]) -> Iterator[Report]:
        """Reports of the job, of which the last is its end; no error of it is raised."""
        try:
            yield from self._make(job, is_stopping)
        except MigaError as error:
            yield {"error": str(error), "kind": type(error).__name__}
        except Exception as error:
            yield {"error": f"{type(error).__name__}: {' '.join(str(error).split())}", "kind": "internal error"}

    def _make(self, job: Job, is_stopping: Callable[[], bool]) -> Iterator[Report]:
        names = [video_of(job, self._container), session_of(job)]
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(self._store.workplace(names))
            video, session = (folder / name for name in names)
            stack.enter_context(locked(session))
            tally = Tally()

            def on_event(event: Event) -> None:
                if event.kind == "drift":
                    tally.drift = event.data["drift"]
                elif event.kind == "saved":  # the video first: a session may name less of it than there is
                    for name in names:
                        self._store.keep(folder, name)

            stream = stack.enter_context(self._open(job, session, on_event, is_stopping))
            request = stream.request
            metadata = request.metadata(**self._engine.made_of())
            size = request.fps, request.width, request.height
            sink = EncoderThread(sink_for(video, stream.output, *size, metadata, overwrite=self._overwrite))
            tally.begin(sink, stream)
            try:
                with sink:
                    stream.save_every(self._save_every, session, tally)
                    for chunk in stream:
                        metadata |= stream.metadata()  # before the sink's first frame, which writes it
                        tally.add(chunk.frames)
                        yield {"num_frames_out": stream.num_frames_out}
            except MigaError:
                with contextlib.suppress(MigaError):  # the last one stands where this cannot be saved
                    stream.save(session, tally)
                raise
            if stream.is_finished:
                self._store.keep(folder, names[0])
            end = {"made": self._record(names[0], stream, tally)} if stream.is_finished else {"stopped": True}
        yield end  # with everything closed: whoever hears it may end this process

    def _open(
        self, job: Job, session: Path, on_event: Callable[[Event], None], is_cancelled: Callable[[], bool]
    ) -> Stream:
        options = {**job.of_stream(), "on_event": on_event, "is_cancelled": is_cancelled}
        request = self._engine.resolve(job.prompt, **job.of_video())
        if not os.path.lexists(session):
            return self._engine.run(request, **options)
        if not is_of(request, load_session(session)):
            if self._overwrite:
                remove_session(session)
                return self._engine.run(request, **options)
            raise OutputError(
                f"{session.name} is of another video than {job.place} asks for: give it another name, or "
                "another folder to the batch, or --overwrite"
            )
        return self._engine.resume(session, **options)

    def _record(self, video: str, stream: Stream, tally: Tally) -> dict[str, Any]:
        request, of_engine = stream.request, self._engine.identity()
        kept = ("dtype", "vae_dtype", "device", "transformer", "VAE", "torch")
        return {
            "video": video,
            "frames": tally.frames_hash,
            "num_frames": stream.num_frames_out,
            "width": request.width,
            "height": request.height,
            "fps": request.fps,
            "seconds": round(tally.seconds(), 3),
            "drift": tally.drift,
            "attempts": tally.attempts,
            "host": socket.gethostname(),
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **self._engine.made_of(),
            **{name: of_engine[name] for name in kept},
            "miga_engine": __version__,
        }


class Tally:
    """An output that counts: a hash of all frames, seconds and attempts, which go into session files and on with them.

    The hash of n frames is that of the hash of n − 1, 16 bytes, none before the first, and then the frame, rows of RGB:
    BLAKE2b of 16 bytes.
    """

    def __init__(self) -> None:
        self.frames_hash, self.attempts = "", 1
        self.drift: float | None = None
        """Of the last chunk: by how much colours have moved since the prompt began, as a share of their range."""
        self._seconds, self._begun = 0.0, time.monotonic()

    def begin(self, sink: Sink, stream: Stream) -> None:
        """Write into a sink what the stream gives, and go on from what its session has counted."""
        self._sink = sink
        left = {} if stream.output is None else stream.output[0]
        if left.get("attempts"):
            self.frames_hash, self.attempts = left["frames"], int(left["attempts"]) + 1
            self.drift, self._seconds = json.loads(left["drift"]), float(left["seconds"])

    def add(self, frames: Tensor) -> None:
        """Write and count frames uint8 [n,H,W,3]."""
        array = frames.cpu().numpy()
        self._sink.write(array)
        for frame in array:
            content = bytes.fromhex(self.frames_hash) + frame.tobytes()
            self.frames_hash = hashlib.blake2b(content, digest_size=16).hexdigest()

    def seconds(self) -> float:
        """Of all attempts, up to now."""
        return self._seconds + time.monotonic() - self._begun

    def checkpoint(self) -> tuple[dict[str, Any], Tensor]:
        """That of the sink, and what was counted."""
        position, frames = self._sink.checkpoint()
        counted = {"frames": self.frames_hash, "seconds": repr(self.seconds()), "attempts": str(self.attempts),
                   "drift": json.dumps(self.drift)}  # fmt: skip
        return {**position, **counted}, frames
