"""The schedule of a batch: which worker makes what, what is tried again, and what is said of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from miga_engine.integrations.batch.jobs import Job
from miga_engine.integrations.batch.local import Pool
from miga_engine.integrations.batch.making import Report

WAIT_SECONDS = 0.2
NOT_TRIED_AGAIN = ("ConfigError", "CheckpointError", "DriftError")
"""Kinds of errors that come again."""


@dataclass
class Outcome:
    """What came of a batch, by jobs' names: `made` as the manifest has it, the sentences of what `failed`."""

    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    num_lost: int = 0
    """Workers that died at a job."""
    is_stopped: bool = False


def run(
    jobs: Sequence[Job],
    pool: Pool,
    retries: int,
    is_stopping: Callable[[], bool],
    on_made: Callable[[Job, dict[str, Any]], None],
    on_frames: Callable[[int], None] = lambda num_frames: None,
) -> Outcome:
    """Have the jobs made, in order, by whoever is idle.

    One that fails, or whose worker dies, goes to the end of the queue, to be gone on with, up to `retries` times.
    on_made: called with each video once it is there. on_frames: with the number of frames that there are in all, over
    and over. Where it is to stop, what is being made is saved.
    """
    waiting, outcome = deque(jobs), Outcome()
    at: dict[int, Job] = {}
    tries: dict[str, int] = {}
    frames: dict[str, int] = {}

    def end(worker: int, report: Report) -> None:
        job = at.pop(worker)
        if "made" in report:
            on_made(job, report["made"])
            outcome.made[job.name] = report["made"]
            outcome.failed.pop(job.name, None)
        elif "stopped" not in report:
            outcome.num_lost += "lost" in report
            outcome.failed[job.name] = report.get("error") or f"its worker {report['lost']}"
            tries[job.name] = tries.get(job.name, 0) + 1
            if tries[job.name] <= retries and report.get("kind") not in NOT_TRIED_AGAIN:
                waiting.append(job)

    while True:
        if is_stopping() and not outcome.is_stopped:
            outcome.is_stopped = True
            waiting.clear()
            pool.stop()
        for worker in pool.idle():
            if waiting:
                at[worker] = waiting.popleft()
                pool.give(worker, at[worker])
        if not at and not waiting:
            return outcome
        for worker, report in pool.wait(WAIT_SECONDS):
            if worker not in at:
                continue
            frames[at[worker].name] = report.get("num_frames_out", frames.get(at[worker].name, 0))
            if "num_frames_out" not in report:
                end(worker, report)
        on_frames(sum(frames.values()))
