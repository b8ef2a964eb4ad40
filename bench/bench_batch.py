"""One worker of `miga batch` against several on as many processors: `python bench/bench_batch.py [WORKERS]`.

Each worker is a process on its share of the processors, all of them on one piece of memory for the weights. The same
jobs of the embedded model are made by one worker on one processor and by all; wall times without the start, medians
over repeats in turn, with the equality of all frames. Memory of a worker is what it has at the end: RSS, PSS (its share
of what it shares), and what is its own. Rows go to bench/results/batch_cpu.csv.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import result_files
import torch

from miga_engine import Engine
from miga_engine.handover import SharedEngine
from miga_engine.integrations.batch.jobs import Job
from miga_engine.integrations.batch.local import LocalPool, Task
from miga_engine.integrations.batch.running import run
from miga_engine.integrations.batch.store import store_of

PROMPT = "a red kite over green hills at noon"
JOBS_A_WORKER = 3
REPEATS = 3
COLUMNS = ("workers", "jobs", "seconds_1", "seconds", "speedup", "same_frames", "weights_mib", "rss_mib", "pss_mib",
           "own_mib", "commit", "device", "torch", "triton", "threads")  # fmt: skip


def memory_of(pid: int) -> tuple[float, float, float]:
    """MiB of a process: resident, its share, its own."""
    told = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {name: int(size) / 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", told, re.MULTILINE)}
    return sizes["Rss"], sizes["Pss"], sizes["Private_Clean"] + sizes["Private_Dirty"]


def made(jobs: list[Job], count: int, shared: SharedEngine, folder: str) -> tuple[float, dict[str, str], list[Any]]:
    """Seconds, hashes of the frames by job, and the memory of each worker."""
    pool = LocalPool(Task({}, store_of(folder), "mp4", 1000, True), count, shared, ["cpu"])
    try:
        while len(pool.idle()) < count:
            pool.wait(0.1)
        start = time.perf_counter()
        outcome = run(jobs, pool, 0, lambda: False, lambda job, made: None)
        seconds = time.perf_counter() - start
        memory = [memory_of(worker.process.pid) for worker in pool._workers]
    finally:
        pool.close()
    if outcome.failed:
        raise SystemExit(f"jobs failed: {outcome.failed}")
    return seconds, {name: record["frames"] for name, record in outcome.made.items()}, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workers", nargs="?", type=int, default=2)
    parser.add_argument("--num-frames", type=int, default=121)
    given = parser.parse_args()
    count, num_frames = given.workers, given.num_frames
    torch.set_num_threads(1)
    processors = sorted(os.sched_getaffinity(0))
    shared = SharedEngine(Engine.from_pretrained("tiny", "cpu"))
    jobs = [
        Job(
            f"job-{i}",
            {0: "a red kite over green hills at noon"},
            {"num_frames": num_frames, "seed": i, "miga": {}},
            "",
        )
        for i in range(count * JOBS_A_WORKER)
    ]

    def on(number: int, measure: Callable[[], Any]) -> Any:
        """On as many processors, which the processes that it starts have too."""
        os.sched_setaffinity(0, set(processors[:number]))
        try:
            return measure()
        finally:
            os.sched_setaffinity(0, set(processors))

    seconds: dict[int, list[float]] = {1: [], count: []}
    hashes: list[dict[str, str]] = []
    memory: list[Any] = []
    for _ in range(REPEATS):
        for workers, times in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                taken, frames, memory = on(workers, lambda w=workers, f=folder: made(jobs, w, shared, f))
            times.append(taken)
            hashes.append(frames)
    alone, together = (statistics.median(times) for times in seconds.values())
    is_same = all(frames == hashes[0] for frames in hashes)
    rss, pss, own = (statistics.mean(sizes) for sizes in zip(*memory, strict=True))
    print(f"{len(jobs)} videos of {num_frames} frames: 1 worker {alone:.1f} s, {count} workers {together:.1f} s: "
          f"{alone / together:.2f} times as fast; frames {'the same' if is_same else 'DIFFER'}")  # fmt: skip
    print(f"a worker of {count}: {rss:.0f} MiB resident, {pss:.0f} its share, {own:.0f} its own; weights "
          f"{shared.num_bytes / 2**20:.0f} MiB")  # fmt: skip
    row = {
        "workers": count, "jobs": len(jobs), "seconds_1": f"{alone:.4g}", "seconds": f"{together:.4g}",
        "speedup": f"{alone / together:.3f}", "same_frames": is_same,
        "weights_mib": f"{shared.num_bytes / 2**20:.1f}", "rss_mib": f"{rss:.0f}", "pss_mib": f"{pss:.0f}",
        "own_mib": f"{own:.0f}",
    }  # fmt: skip
    result_files.record("batch_cpu", COLUMNS, [row], "cpu")


if __name__ == "__main__":
    main()
