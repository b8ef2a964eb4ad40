"""Figures of a server, as Prometheus reads them."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from typing import Any

from miga_engine.integrations.server.job import ENDED, RUNNING
from miga_engine.integrations.server.jobs import Jobs

RECENT_SECONDS = 10.0
"""Over which frames a second are counted."""

_FIRST_FRAME_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self, jobs: Jobs) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # process_resident_memory_bytes among others
        self._jobs: Any = Gauge("miga_jobs", "Jobs by status", ["status"], registry=registry)
        for status in (*RUNNING, *ENDED):
            self._jobs.labels(status).set_function(functools.partial(_count, jobs, status))
        queue = Gauge("miga_queue_length", "Jobs that wait", registry=registry)
        queue.set_function(functools.partial(_count, jobs, "queued"))
        self._frames: Any = Counter("miga_frames", "Video frames made", registry=registry)
        rate = Gauge("miga_frames_per_second", f"Over the last {RECENT_SECONDS:g} seconds", registry=registry)
        rate.set_function(self.frames_per_second)
        self._first: Any = Histogram("miga_seconds_to_first_frame", "From a job's start to its first frame",
                                     buckets=_FIRST_FRAME_BUCKETS, registry=registry)  # fmt: skip
        self._lock, self._recent = threading.Lock(), deque[tuple[float, int]]()
        self._started = time.monotonic()

    def frames(self, count: int) -> None:
        """So many more have been made."""
        self._frames.inc(count)
        with self._lock:
            self._recent.append((time.monotonic(), count))
            self._drop_old()

    def first_frame(self, seconds: float) -> None:
        """A job had its first frame so long after its start."""
        self._first.observe(seconds)

    def frames_per_second(self) -> float:
        with self._lock:
            self._drop_old()
            seconds = min(RECENT_SECONDS, max(1.0, time.monotonic() - self._started))
            return sum(count for _, count in self._recent) / seconds

    def _drop_old(self) -> None:
        now = time.monotonic()
        while self._recent and now - self._recent[0][0] > RECENT_SECONDS:
            self._recent.popleft()

    def text(self) -> bytes:
        """What `GET /metrics` answers."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


def _count(jobs: Jobs, status: str) -> float:
    return jobs.count()[status]
