"""Jobs on disk, a folder each, and their queue: whatever ends the server, none is lost and none is half there.

`FOLDER/ID/job.json` says what was asked for and how it stands, and is only ever replaced as a whole; beside it lie
`video.mp4`, `video.session.safetensors`, and what was sent along. A folder appears under its name when all of that is
in it, and loses the name before it is deleted. One server at a time has a folder.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path

from miga_engine.errors import OutputError
from miga_engine.files import hold, open_own, write_whole
from miga_engine.integrations.server.asked import Asked, RequestError
from miga_engine.integrations.server.job import ID, SOURCE, Job, Record

_log = logging.getLogger("miga_engine")

MOST_REMEMBERED = 32
"""Ended jobs whose events are kept in memory."""
PICTURES = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}
"""What may be sent along, by how it begins."""


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
                id=draft.id,
                **asked.to_record(),
                created_at=time.time(),
                order=self._next_order,
                image=None if draft.image is None else draft.image.name,
                replay_of=None if replay_of is None else replay_of.id,
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
