"""Jobs on disk, a folder each, and their queue: whatever ends the server, none is lost and none is half there.

`FOLDER/ID/job.json` says what was asked for and how it stands, and is only ever replaced as a whole; beside it lie
`video.mp4`, `video.session.safetensors`, and what was sent along. A folder appears under its name when all of that is
in it, and loses the name before it is deleted. One server at a time has a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miga_engine.errors import OutputError
from miga_engine.files import hold, open_own, write_whole, written_whole
from miga_engine.integrations.server.asked import Asked, RequestError
from miga_engine.integrations.server.events import Hub
from miga_engine.runtime.session import SUFFIX
from miga_engine.runtime.stream import Stream

_log = logging.getLogger("miga_engine")

ID = re.compile(r"video_[0-9a-f]{24}")
RUNNING = ("queued", "in_progress")
ENDED = ("completed", "failed", "cancelled")
MOST_REMEMBERED = 32
"""Ended jobs whose events are kept in memory."""
PICTURES = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}
"""What may be sent along, by how it begins."""

SOURCE = f"replayed.session{SUFFIX}"
"""Of a replay: the session file of the job that it repeats."""

_VERSION = 1


@dataclass
class Record:
    """What job.json holds: what was asked for, and how it stands. Times are seconds since 1970."""

    id: str
    prompt: dict[str, str]
    options: dict[str, Any]
    width: int
    height: int
    fps: str
    num_frames: int | None
    seed: int
    created_at: float
    order: int
    image: str | None = None
    replay_of: str | None = None
    status: str = "queued"
    started_at: float | None = None
    completed_at: float | None = None
    error: dict[str, str] | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)
    is_deleted: bool = False
    version: int = _VERSION

    @classmethod
    def read(cls, path: Path) -> Record:
        """What `Job.save` wrote; OSError, ValueError or TypeError where it is not there or something else."""
        with open_own(path) as file:
            record = cls(**json.loads(file.readall()))
        if record.version != _VERSION or not ID.fullmatch(record.id) or record.id != path.parent.name:
            raise ValueError("a job of another version or another folder")
        return record


class Job:
    """A job: its record, its files, and, while it is made, the stream that makes it."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record
        self.video, self.session = folder / "video.mp4", folder / f"video.session{SUFFIX}"
        self.hub = Hub()
        self.is_cancelled = threading.Event()
        self.stream: Stream | None = None
        """While it is made."""
        self.num_frames_out = 0
        self.seconds_to_first_frame: float | None = None
        self.stale_inode: int | None = None
        """Of a video that was begun before, and that is about to be replaced by a copy that goes on."""

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def status(self) -> str:
        return self.record.status

    @property
    def is_ended(self) -> bool:
        return self.record.status in ENDED

    def wait_for_copy(self) -> None:
        """What there is of the video will go on in another file."""
        with contextlib.suppress(FileNotFoundError):
            self.stale_inode = os.stat(self.video).st_ino

    def save(self) -> None:
        """Write job.json, to the disk."""
        with written_whole(self.folder / "job.json") as file:
            file.write(json.dumps(dataclasses.asdict(self.record), indent=1).encode())
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the folder; what is being read stays readable for those who read it."""
        gone = self.folder.with_name(f".{self.id}.gone")
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def view(self, model: str) -> dict[str, Any]:
        """The job as OpenAI's interface shows it, and what ours adds."""
        record, total = self.record, self.record.num_frames
        prompt: Any = record.prompt["0"] if set(record.prompt) == {"0"} else record.prompt
        share = 0 if total is None else int(100 * self.num_frames_out / total)
        seconds = None if total is None else f"{total / _rate(record.fps):g}"
        started, ended = record.started_at, record.completed_at
        return {
            "id": record.id,
            "object": "video",
            "model": model,
            "status": record.status,
            "progress": 100 if record.status == "completed" else min(share, 99),
            "prompt": prompt,
            "size": f"{record.width}x{record.height}",
            "seconds": seconds,
            "created_at": int(record.created_at),
            "started_at": None if started is None else int(started),
            "completed_at": None if ended is None else int(ended),
            "expires_at": None,
            "error": record.error,
            "remixed_from_video_id": record.replay_of,
            "media_type": "video/mp4",
            "file_name": f"{record.id}.mp4",
            "inference_time_s": None if started is None or ended is None else round(ended - started, 3),
            "width": record.width,
            "height": record.height,
            "fps": record.fps,
            "num_frames": total,
            "num_frames_out": self.num_frames_out,
            "seed": record.seed,
            "options": record.options,
            "changes": record.changes,
            "seconds_to_first_frame": self.seconds_to_first_frame,
        }


def _rate(fps: str) -> float:
    above, _, below = fps.partition("/")
    return float(above) / float(below or 1)


class Jobs:
    """All jobs of a folder. Every method may be called from any thread."""

    def __init__(self, folder: str | os.PathLike[str], max_queue: int) -> None:
        """Take the folder, which is made where it is missing, and queue what is not ended; OutputError where others
        have it."""
        self.folder, self.max_queue = Path(os.path.abspath(folder)), max_queue
        self._changed = threading.Condition()
        self._jobs: dict[str, Job] = {}
        self._queue: list[tuple[int, str]] = []
        self._ended: deque[str] = deque()
        self.is_stopping = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open_own(self.folder / ".lock", "a")
        except OSError as error:
            raise OutputError(f"cannot keep jobs in {self.folder}: {error.strerror or error}") from error
        if hold(self._lock) is False:
            self._lock.close()
            raise OutputError(f"cannot keep jobs in {self.folder}: another server has the folder; name another one")
        for path in sorted(self.folder.iterdir()):
            self._take_up(path)
        self._next_order = 1 + max((job.record.order for job in self._jobs.values()), default=0)

    def _take_up(self, path: Path) -> None:
        """A job that a server before this one has left; what it left of others is deleted."""
        if re.fullmatch(rf"\.{ID.pattern}\.(part|gone)", path.name):
            shutil.rmtree(path, ignore_errors=True)
        if not ID.fullmatch(path.name) or path.is_symlink():
            return
        try:
            job = Job(path, Record.read(path / "job.json"))
        except (OSError, ValueError, TypeError) as error:
            _log.warning("%s is no job that can be read (%s): it is left alone", path, error)
            return
        if job.record.is_deleted:
            job.remove()
            return
        self._jobs[job.id] = job
        if job.is_ended:
            if job.status == "completed" and job.record.num_frames is not None:
                job.num_frames_out = job.record.num_frames
        else:
            job.record.status = "queued"
            job.wait_for_copy()
            heapq.heappush(self._queue, (job.record.order, job.id))

    def close(self) -> None:
        """Give the folder back."""
        self._lock.close()

    def add(self, asked: Asked, draft: Draft, *, replay_of: Job | None = None) -> Job:
        """Queue a job, which is on the disk when this returns; RequestError where too many wait."""
        with self._changed:
            if self.is_stopping:
                raise RequestError("the server is stopping: ask again later", 503)
            if len(self._queue) >= self.max_queue:
                raise RequestError(f"{len(self._queue)} jobs wait already: ask again later", 429)
            record = Record(
                draft.id,
                {str(frame): text for frame, text in asked.prompt.items()},
                asked.options,
                asked.width,
                asked.height,
                asked.fps,
                asked.num_frames,
                asked.seed,
                time.time(),
                self._next_order,
                None if draft.image is None else draft.image.name,
                None if replay_of is None else replay_of.id,
            )
            Job(draft.folder, record).save()
            target = self.folder / draft.id
            draft.folder.rename(target)
            _flush(self.folder)
            self._next_order += 1
            job = self._jobs[draft.id] = Job(target, record)
            heapq.heappush(self._queue, (record.order, job.id))
            self._changed.notify()
        job.hub.tell("status", status="queued")
        return job

    def take(self) -> Job | None:
        """The job that has waited longest, now in progress; waits for one, None when the server stops."""
        with self._changed:
            while not self.is_stopping:
                while self._queue:
                    job = self._jobs.get(heapq.heappop(self._queue)[1])
                    if job is not None and job.status == "queued":
                        job.record.status = "in_progress"
                        job.record.started_at = job.record.started_at or time.time()
                        _save(job)
                        job.hub.tell("status", status="in_progress")
                        return job
                self._changed.wait()
            return None

    def end(self, job: Job, status: str, error: Mapping[str, str] | None = None) -> None:
        """Say how a job has ended; one that was deleted meanwhile is gone."""
        with self._changed:
            job.record.status, job.record.error = status, None if error is None else dict(error)
            job.record.completed_at = time.time()
            if job.record.is_deleted:
                self._forget(job)
            else:
                _save(job)
            self._ended.append(job.id)
            while len(self._ended) > MOST_REMEMBERED:
                if (old := self._jobs.get(self._ended.popleft())) is not None and old.is_ended:
                    old.hub.forget()
        job.hub.tell("status", status=status, error=job.record.error)

    def cancel(self, job: Job) -> None:
        """End a job that has not ended; one that is being made ends after the pass at hand."""
        with self._changed:
            if job.status == "queued":
                self.end(job, "cancelled")
            elif job.status == "in_progress":
                job.is_cancelled.set()

    def delete(self, job: Job) -> None:
        """Cancel a job and delete all of it, as soon as nobody works at it."""
        with self._changed:
            self.cancel(job)
            job.record.is_deleted = True
            if job.is_ended:
                self._forget(job)
            else:
                job.save()

    def go_on(self, job: Job) -> None:
        """Queue a job again that was cancelled or has failed; RequestError for any other."""
        with self._changed:
            if job.status not in ("cancelled", "failed"):
                raise RequestError(f"the video is {job.status}: only one that was cancelled or has failed goes on", 409)
            if self.is_stopping or len(self._queue) >= self.max_queue:
                raise RequestError(f"{len(self._queue)} jobs wait already: ask again later", 429)
            job.is_cancelled.clear()
            job.wait_for_copy()
            record = job.record
            record.status, record.error, record.completed_at = "queued", None, None
            record.order, self._next_order = self._next_order, self._next_order + 1
            job.save()
            heapq.heappush(self._queue, (record.order, job.id))
            self._changed.notify()
        job.hub.tell("status", status="queued")

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        job.remove()

    def find(self, name: str) -> Job:
        """The job of an id; RequestError where there is none."""
        job = self._jobs.get(name) if ID.fullmatch(name) else None
        if job is None or job.record.is_deleted:
            raise RequestError("there is no video of this id: GET /v1/videos lists those there are", 404)
        return job

    def all(self) -> list[Job]:
        """In the order in which they came."""
        jobs = [job for job in list(self._jobs.values()) if not job.record.is_deleted]
        return sorted(jobs, key=lambda job: (job.record.created_at, job.record.order))

    def count(self) -> Counter[str]:
        """How many there are by status."""
        return Counter(job.status for job in self.all())

    def stop(self) -> None:
        """Let nobody take a job any more, and let all that is being made end after the pass at hand."""
        self.is_stopping = True
        with self._changed:
            self._changed.notify_all()
            jobs = list(self._jobs.values())
        for job in jobs:
            job.hub.wake()


class Draft:
    """The folder of a job that does not count yet, with what was sent along; it is gone unless it becomes a job."""

    def __init__(self, jobs: Jobs, picture: bytes | None = None, session: Path | None = None) -> None:
        """RequestError where a picture is none. `session` is copied for a replay."""
        self.id = f"video_{secrets.token_hex(12)}"
        self.folder = jobs.folder / f".{self.id}.part"
        suffix = None
        if picture is not None:
            suffix = next((suffix for start, suffix in PICTURES.items() if picture.startswith(start)), None)
            if suffix is None:
                raise RequestError("input_reference is no PNG and no JPEG: send a picture of one of the two", 415)
        self.image = None if suffix is None else self.folder / f"input{suffix}"
        self.folder.mkdir()
        if self.image is not None and picture is not None:
            write_whole(self.image, picture)
        if session is not None:
            with open_own(session) as file:
                write_whole(self.folder / SOURCE, file.readall())

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _save(job: Job) -> None:
    """Where the disk is full, what stands there makes a server that comes back go on with the job."""
    try:
        job.save()
    except OSError as error:
        _log.warning("cannot write how %s stands: %s", job.id, error.strerror or error)


def _flush(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
