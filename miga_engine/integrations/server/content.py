"""A video while it grows: read from its file, at the pace of whoever reads, behind whoever writes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from miga_engine.files import WholeFile, open_own
from miga_engine.integrations.server.job import Job
from miga_engine.integrations.server.jobs import Jobs

CHUNK_BYTES = 2**17
POLL_SECONDS = 0.1


async def nothing() -> AsyncIterator[bytes]:
    """Of what is asked about and not for (HEAD)."""
    parts: tuple[bytes, ...] = ()
    for part in parts:
        yield part


async def whole(file: WholeFile) -> AsyncIterator[bytes]:
    """The bytes of a file that is open, and that may be replaced under its name meanwhile."""
    with file:
        while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield data


async def growing(job: Job, jobs: Jobs) -> AsyncIterator[bytes]:
    """The bytes of a job's video from the first one on, as they come, until the job has ended or the server stops.

    Nothing is there before the first frame, and that is waited for. A file that a server before this one left is
    waited for until its copy, which goes on, has taken its place.
    """
    file: WholeFile | None = None
    try:
        while True:
            is_last = job.is_ended or jobs.is_stopping or job.record.is_deleted
            file = file or _opened(job)
            if file is not None:
                while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                    yield data
            if is_last:
                return
            await asyncio.sleep(POLL_SECONDS)
    finally:
        if file is not None:
            file.close()


def _opened(job: Job) -> WholeFile | None:
    """The file, if it is there and will go on under its name."""
    if job.status == "queued":
        return None
    with contextlib.suppress(OSError):
        file = open_own(job.video)
        if job.is_ended or os.fstat(file.fileno()).st_ino != job.stale_inode:
            return file
        file.close()
    return None
