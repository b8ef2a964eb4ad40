"""One rank against several on the same windows: `python bench/bench_scaling.py [RANKS]`.

Each rank is a process on one core (gloo) or on one GPU (NCCL); the work is Stage-1 passes of the embedded model, one
window at a time. Wall times, the minimum over three starts, with the equality of the resulting
queues; rows go to bench/results/scaling_<device>.csv. The unified windows that become ready between the passes are
often single ones, which ranks cannot share: whole ticks gain less.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import result_files
import torch
import torch.distributed as dist

from miga_engine import Engine
from miga_engine.runtime.denoise import Window
from miga_engine.runtime.ranks import Ranks

TICKS = 12
SHARE_OF_FULL = 0.8
"""Of the most windows, what a pass must have to be one of the queue."""
PROMPT = "a red balloon over snowy hills at dawn"


def join_group(rank: int, count: int, folder: Path) -> torch.device:
    """Begin as one of so many processes that meet in the folder: on a processor, or a GPU, of its own."""
    is_cuda = torch.cuda.is_available()
    torch.set_num_threads(1)
    if not is_cuda and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    device = torch.device(f"cuda:{rank}" if is_cuda else "cpu")
    if is_cuda:
        torch.cuda.set_device(device)  # what NCCL and kernels without a device of their own take
    meeting = f"file://{folder}/meet"
    dist.init_process_group("nccl" if is_cuda else "gloo", init_method=meeting, rank=rank, world_size=count)
    return device


def told_by(count: int, command: Callable[[int, str], list[str]]) -> list[Any]:
    """What so many processes at a time print, each that prints one JSON value; `command` of a number and a folder."""
    with tempfile.TemporaryDirectory() as folder:
        running = [
            subprocess.Popen(command(i, folder), env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                             text=True)
            for i in range(count)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"one of {count} processes failed: its error is above")
    return [json.loads(output) for output in outputs if output]


@torch.inference_mode()
def work(rank: int, count: int, folder: Path) -> None:
    """One rank's ticks; rank 0 prints the mean seconds of a pass and the digest of the queue."""
    device = join_group(rank, count, folder)
    ranks = Ranks()
    engine = Engine.from_pretrained("tiny", device, ranks=ranks if count > 1 else None)
    request = engine.resolve(PROMPT, num_frames=None)
    run = engine.start(request)
    while run.stage != "stage1":
        run.tick()
    times = []
    run_windows = run.denoiser.run

    def timed(windows: Sequence[Window], **options: int) -> None:
        dist.barrier()
        start = time.perf_counter()
        run_windows(windows, **options)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((len(windows), time.perf_counter() - start))

    run.denoiser.run = timed
    for _ in range(TICKS):
        run.tick()
    passes = [seconds for count, seconds in times if count >= SHARE_OF_FULL * max(times)[0]]
    if rank == 0:
        digest = hashlib.sha256(run.store.sample.cpu().numpy().tobytes()).hexdigest()
        print(json.dumps({"seconds": sum(passes) / len(passes), "digest": digest}))
    sys.stdout.flush()
    ranks.close()


def measured(count: int) -> dict[str, float | str]:
    """What rank 0 of `count` printed."""

    def command(rank: int, folder: str) -> list[str]:
        return [sys.executable, __file__, "--folder", folder, str(count), "--rank", str(rank)]

    (told,) = told_by(count, command)
    return dict(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", nargs="?", type=int, default=2)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        work(options.rank, options.ranks, options.folder)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[int, list[dict[str, float | str]]] = {1: [], options.ranks: []}
    for _ in range(3):
        for count, outcomes in results.items():
            outcomes.append(measured(count))
    seconds = {count: min(float(outcome["seconds"]) for outcome in outcomes) for count, outcomes in results.items()}
    digests = {outcome["digest"] for outcomes in results.values() for outcome in outcomes}
    speedup = seconds[1] / seconds[options.ranks]
    equality = "equal" if len(digests) == 1 else "DIFFERENT"
    print(f"1 rank: {seconds[1]:.3f} s a pass; {options.ranks} ranks: {seconds[options.ranks]:.3f} s")
    print(f"{speedup:.2f} times as fast, {100 * speedup / options.ranks:.0f} % efficient, queues {equality}")
    path = result_files.RESULTS / f"scaling_{device}.csv"
    row = {"ranks": options.ranks, "seconds_1": f"{seconds[1]:.4g}", "seconds": f"{seconds[options.ranks]:.4g}"}
    row |= {"speedup": f"{speedup:.3f}", "queues_equal": len(digests) == 1, **result_files.environment(device)}
    is_new = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
