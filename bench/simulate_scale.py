"""What more ranks and more machines would bring, simulated: `python bench/simulate_scale.py [--table]`.

A pass is simulated as it is run: its windows are dealt out by `runtime.ranks.share_of` itself, each rank computes
its own one after the other, then all outputs are broadcast, rank by rank and branch by branch, and every rank updates
all of the queue. What a window, an update and a broadcast take is measured apart: windows of the embedded model by as
many processes as there are ranks, which know nothing of each other, and broadcasts of two sizes. Then whole passes of
one and of two ranks are measured (`bench_scaling.py`) and held against the simulation; rows go to
bench/results/scale_cpu.csv. `--table` prints the tables of docs/scale.md, for GPUs that are not here, from `GPU` and
the windows of Wan2.1's preset; the unified windows, which become ready one by one, are shared out by nobody.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench_scaling
import result_files
import torch
import torch.distributed as dist

from miga_engine import Engine
from miga_engine.presets import PRESETS
from miga_engine.runtime.denoise import Window
from miga_engine.runtime.layout import RunLayout
from miga_engine.runtime.ranks import share_of

SIZES = (2**14, 2**22)
"""Bytes of the broadcasts that are measured."""
REPEATS = 3
WAN_WINDOW = 21
WAN_LATENT = (16, 60, 104)
FRAMES_A_LATENT = 4
COLUMNS = ("ranks", "simulated", "measured", "apart", "commit", "device", "torch", "triton", "threads")


class Costs(NamedTuple):
    """Seconds of a window's forward, of the rest of a pass, of a broadcast of nothing; bytes a second of one."""

    window: float
    rest: float
    latency: float
    bandwidth: float


GPU = Costs(window=1.008, rest=0.005, latency=30e-6, bandwidth=40e9)
"""A window of Wan2.1 1.3B at 480×832 on an H100, both branches in bfloat16 (bench/results/forward_cuda.csv); the others
are assumed: NCCL over NDR InfiniBand at four fifths of its 400 Gbit/s, the update and the plan of a pass."""


class Pass(NamedTuple):
    """Frames that each window commits, and bytes of a frame's output in all branches."""

    commits: list[int]
    num_branches: int
    frame_bytes: int


def pass_seconds(one: Pass, num_ranks: int, costs: Costs) -> tuple[float, int]:
    """Seconds of a pass and the bytes that are broadcast in it."""
    shares = [share_of(len(one.commits), rank, num_ranks) for rank in range(num_ranks)]
    computing = max(len(share) for share in shares) * costs.window
    if num_ranks == 1:
        return computing + costs.rest, 0
    exchanging, num_bytes = 0.0, 0
    for share in shares:
        size = sum(one.commits[share.start : share.stop]) * one.frame_bytes
        if size:
            exchanging += one.num_branches * (costs.latency + size / costs.bandwidth)
            num_bytes += one.num_branches * size
    return computing + exchanging + costs.rest, num_bytes


def wan_layout() -> RunLayout:
    """That of Wan2.1's preset, of an endless video."""
    preset = PRESETS["wan2.1"]
    return RunLayout(preset.miga, preset.sampling.num_inference_steps, WAN_WINDOW, None, 0, None)


def advance_seconds(layout: RunLayout, num_ranks: int, costs: Costs) -> tuple[float, float, int]:
    """Of what a full queue does for a group of latent frames: seconds, windows of the slowest rank, bytes broadcast."""
    config, head = layout.config, 10 * layout.window_frames
    cuts = layout.queue_plan(head, head + layout.num_groups * config.zigzag_width, 0)
    channels, height, width = WAN_LATENT
    queue = Pass([cut.commit_stop - cut.commit_start for cut in cuts], 2, channels * height * width * 4)
    unified = Pass([layout.stride], queue.num_branches, queue.frame_bytes)
    num_unified = config.zigzag_width * layout.num_levels / layout.stride
    seconds, num_bytes = pass_seconds(queue, num_ranks, costs)
    more, more_bytes = pass_seconds(unified, num_ranks, costs)
    passes = config.passes_per_advance
    windows = passes * -(-len(cuts) // num_ranks) + num_unified
    return passes * seconds + num_unified * more, windows, round(passes * num_bytes + num_unified * more_bytes)


# What is measured -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def windows_alone(number: int, count: int, folder: Path) -> None:
    """One of `count` processes that compute the same passes and know nothing of each other; prints its means."""
    bench_scaling.join_group(number, count, folder)
    engine = Engine.from_pretrained("tiny", "cpu")
    run = engine.start(engine.resolve(bench_scaling.PROMPT, num_frames=None))
    while run.stage != "stage1":
        run.tick()
    denoiser, forward, whole = run.denoiser, run.denoiser._forward, run.denoiser.run
    in_forward, passes = [0.0], list[tuple[list[int], float, float]]()

    def timed(windows: list[Window], first_output: int) -> None:
        start = time.perf_counter()
        forward(windows, first_output)
        in_forward[0] += time.perf_counter() - start

    def timed_pass(windows: Sequence[Window], **options: Any) -> None:
        in_forward[0] = 0.0
        dist.barrier()
        start = time.perf_counter()
        whole(windows, **options)
        seconds = time.perf_counter() - start
        commits = [window.commit_stop - window.commit_start for window in windows]
        passes.append((commits, in_forward[0], seconds - in_forward[0]))

    denoiser._forward, denoiser.run = timed, timed_pass
    for _ in range(bench_scaling.TICKS):
        run.tick()
    frame_bytes = run.store.sample[0].numel() * run.store.sample.element_size()
    most = max(len(commits) for commits, _, _ in passes)
    full = [one for one in passes if len(one[0]) >= bench_scaling.SHARE_OF_FULL * most]
    print(json.dumps({
        "window": statistics.mean(forward / len(commits) for commits, forward, _ in full),
        "rest": statistics.mean(rest for _, _, rest in full), "commits": [commits for commits, _, _ in full],
        "branches": denoiser._num_branches, "frame_bytes": frame_bytes,
    }))  # fmt: skip
    dist.destroy_process_group()


def broadcasts(number: int, count: int, folder: Path) -> None:
    """One of `count` ranks that broadcast in turn; rank 0 prints seconds a broadcast by size."""
    bench_scaling.join_group(number, count, folder)
    seconds = []
    for size in SIZES:
        data, times = torch.zeros(size, dtype=torch.uint8), []
        for _ in range(60):
            dist.barrier()
            start = time.perf_counter()
            for source in range(count):
                dist.broadcast(data, source)
            times.append((time.perf_counter() - start) / count)
        seconds.append(statistics.median(times))
    if number == 0:
        print(json.dumps(seconds))
    dist.destroy_process_group()


def _processes(task: str, count: int) -> list[Any]:
    """What `count` processes of a task print."""

    def command(number: int, folder: str) -> list[str]:
        words = [sys.executable, __file__, "--task", task, "--count", str(count), "--folder", folder]
        return [*words, "--number", str(number)]

    return bench_scaling.told_by(count, command)


def measured_costs(count: int) -> tuple[Costs, list[Pass]]:
    """Of `count` processes at a time on this machine, the slowest of them, and the passes that were computed."""
    alone = _processes("windows", count)
    latency = bandwidth = 0.0
    if count > 1:
        (small, large), *_ = _processes("broadcasts", count)
        bandwidth = (SIZES[1] - SIZES[0]) / max(large - small, 1e-9)
        latency = max(small - SIZES[0] / bandwidth, 0.0)
    window, rest = (max(one[name] for one in alone) for name in ("window", "rest"))
    first = alone[0]
    passes = [Pass(commits, first["branches"], first["frame_bytes"]) for commits in first["commits"]]
    return Costs(window, rest, latency, bandwidth), passes


def predicted(count: int) -> float:
    """Mean seconds of the passes by `count` ranks."""
    costs, passes = measured_costs(count)
    return statistics.mean(pass_seconds(one, count, costs)[0] for one in passes)


def compare(num_ranks: int) -> None:
    """Simulation against measurement for one and for `num_ranks` ranks, the least of some repeats of each in turn."""
    told: dict[int, list[float]] = {1: [], num_ranks: []}
    took: dict[int, list[float]] = {1: [], num_ranks: []}
    for _ in range(REPEATS):
        for count in told:
            told[count].append(predicted(count))
            took[count].append(float(bench_scaling.measured(count)["seconds"]))
    rows = []
    for count in told:
        simulated, real = min(told[count]), min(took[count])
        apart = simulated / real - 1
        print(f"{count} ranks: {simulated:.4f} s a pass simulated, {real:.4f} s measured: {apart:+.1%}")
        rows.append(
            {"ranks": count, "simulated": f"{simulated:.4g}", "measured": f"{real:.4g}", "apart": f"{apart:.4f}"}
        )
    result_files.record("scale_cpu", COLUMNS, rows, "cpu")


def table() -> str:
    """For docs/scale.md: one video over ranks, and many over a thousand GPUs."""
    layout = wan_layout()
    latents = layout.config.zigzag_width
    alone, most, _ = advance_seconds(layout, 1, GPU)
    lines = ["| GPUs a video | windows in a row, of the slowest | s a group | times as fast | efficiency | GB sent a "
             "group |", "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for ranks in (1, 2, 4, 8, 16, 32):
        seconds, windows, num_bytes = advance_seconds(layout, ranks, GPU)
        speed = alone / seconds
        lines.append(
            f"| {ranks} | {windows:g} of {most:g} | {seconds:.1f} | {speed:.2f} | {speed / ranks:.0%} | "
            f"{num_bytes / 1e9:.2f} |"
        )
    lines += ["", "| GPUs | GPUs a video | videos at once | video frames/s of all | efficiency | minutes for 1,000 "
              "frames |", "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for gpus in (8, 64, 256, 1000):
        for ranks in (1, 4, 8):
            seconds = advance_seconds(layout, ranks, GPU)[0]
            rate = gpus // ranks * latents * FRAMES_A_LATENT / seconds
            whole = gpus * latents * FRAMES_A_LATENT / alone
            minutes = 1000 / (latents * FRAMES_A_LATENT) * seconds / 60
            lines.append(f"| {gpus} | {ranks} | {gpus // ranks} | {rate:.1f} | {rate / whole:.0%} | {minutes:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of docs/scale.md, and measure nothing")
    parser.add_argument("--ranks", type=int, default=2)
    for name, kind in (("task", str), ("count", int), ("number", int), ("folder", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        print(table())
    elif given.task is None:
        compare(given.ranks)
    else:
        {"windows": windows_alone, "broadcasts": broadcasts}[given.task](given.number, given.count, given.folder)


if __name__ == "__main__":
    main()
