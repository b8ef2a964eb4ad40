"""Processors that another process wants too: `python bench/bench_shared.py` times the command beside a busy process.

Each row is a way to wait, a fresh process of `miga generate` with two threads, alone and beside one process that does
nothing but compute; the runs of all rows take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
WAYS: dict[str, dict[str, str]] = {
    "the command's own": {},
    "spin, OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    "GOMP_SPINCOUNT=5000": {"GOMP_SPINCOUNT": "5000"},
    "GOMP_SPINCOUNT=20000": {"GOMP_SPINCOUNT": "20000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
HOG = [sys.executable, "-c", "while True: pass"]
GOAL = 2.2
"""Times the time alone that the command may take beside one busy process."""


def seconds(way: dict[str, str], num_frames: int, num_hogs: int) -> float:
    """Of the frames alone: what loading takes is taken off by a run of few."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-m", "miga_engine", "generate", "a red balloon over snowy hills at dawn", "-q"]
    hogs = [subprocess.Popen(HOG) for _ in range(num_hogs)]
    try:
        started = time.perf_counter()
        subprocess.run(
            [*command, "--num-frames", str(num_frames), "-o", "-"], env=kept | way, cwd=ROOT, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return time.perf_counter() - started
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-frames", type=int, default=49)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.repeats):
        for name in options.ways:
            for num_hogs in (0, 1):
                took = seconds(WAYS[name], options.num_frames, num_hogs)
                times.setdefault((name, num_hogs), []).append(took)
    best = min(statistics.median(times[name, 0]) for name in options.ways)
    print(f"{'':26}{'alone':>10}{'beside one':>12}{'ratio':>8}{'of the best alone':>19}")
    for name in options.ways:
        alone, beside = (statistics.median(times[name, num_hogs]) for num_hogs in (0, 1))
        print(f"{name:26}{alone:8.1f} s{beside:10.1f} s{beside / alone:8.2f}{beside / best:19.2f}")
    ratio = statistics.median(times[options.ways[0], 1]) / statistics.median(times[options.ways[0], 0])
    if options.ways[0] == "the command's own" and ratio > GOAL:
        sys.exit(f"beside one busy process the command takes {ratio:.2f} times as long, more than {GOAL}")


if __name__ == "__main__":
    main()
