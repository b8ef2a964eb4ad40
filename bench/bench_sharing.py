"""Several streams on one engine: `python bench/bench_sharing.py [--steps 8] [--repeats 3] [--threads 1 2]`.

Frames a second of 1, 2 and 4 streams of the embedded model, all together, in three ways that take turns in one process:
one after the other; each in a thread, with nothing shared; each in a thread, sharing batches of windows
(`Engine.shared`). Beside them what batches bring by themselves: one stream at window_batch 1, 2, 4 and 8. Wall times,
the median over the repeats and the extremes; a ratio is the median of each round's, to one after the other or to
window_batch 1. On a CPU that others use too, wall times say little: `cpu_ratio` is that of the process's own time, the
work of a frame. Rows go to bench/results/sharing_<device>.csv, for each number of torch's threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import result_files
import torch

from miga_engine import Engine
from miga_engine.request import Request

PROMPTS = (
    "a red balloon over snowy hills at dawn",
    "a yellow boat on the sea at night",
    "a green kite over a meadow at noon",
    "a blue fish over sand at dusk",
)
COLUMNS = (
    "what", "model", "dtype", "streams", "window_batch", "frames", "steps", "frames_per_s", "least", "most", "ratio",
    "cpu_ratio", "windows_a_forward", *result_files.ENVIRONMENT,
)  # fmt: skip
ALONE, APART, SHARED, BATCHED = "one after the other", "in threads", "in threads, sharing", "one stream, batched"


def work(engine: Engine, request: Request) -> int:
    """One video; how many windows went through the network."""
    with engine.run(request) as stream:
        for chunk in stream:
            chunk.frames.cpu()
        assert stream._pump is not None
        return stream._pump.run.denoiser.num_forwards


def in_turn(engine: Engine, requests: list[Request]) -> int:
    return sum(work(engine, request) for request in requests)


def together(engine: Engine, requests: list[Request]) -> int:
    with ThreadPoolExecutor(len(requests)) as pool:
        return sum(pool.map(functools.partial(work, engine), requests))


def measured(engine: Engine, num_frames: int, steps: int, repeats: int) -> list[dict[str, object]]:
    """Rows of all ways, which take turns."""

    def request(i: int, window_batch: int = 1) -> Request:
        steps_of = {"stage2_steps": steps // 4, "judge_step": 3 * steps // 8}
        miga = dataclasses.replace(engine.preset.miga, window_batch=window_batch, **steps_of)
        return engine.resolve(PROMPTS[i], num_frames=num_frames, seed=i, num_inference_steps=steps, miga=miga)

    ways: dict[tuple[str, int, int], Callable[[], int]] = {}
    shared = engine.shared()
    assert shared._sharing is not None
    for count in (1, 2, 4):
        requests = [request(i) for i in range(count)]
        for what, run, by in ((ALONE, in_turn, engine), (APART, together, engine), (SHARED, together, shared)):
            ways[what, count, 1] = functools.partial(run, by, requests)
    for window_batch in (1, 2, 4, 8):
        ways[BATCHED, 1, window_batch] = functools.partial(work, engine, request(0, window_batch))
    ways[BATCHED, 1, 1]()  # what is made once is not timed
    rounds: list[dict[tuple[str, int, int], tuple[float, float]]] = []  # of the wall, and of the process
    windows: dict[int, list[float]] = {}
    for _ in range(repeats):
        took = {}
        for way, timed in ways.items():
            before, start, own = shared._sharing.num_forwards, time.perf_counter(), time.process_time()
            num_windows = timed()
            took[way] = time.perf_counter() - start, time.process_time() - own
            if way[0] == SHARED:
                windows.setdefault(way[1], []).append(num_windows / (shared._sharing.num_forwards - before))
        rounds.append(took)
    rows = []
    for what, count, window_batch in ways:
        times = [took[what, count, window_batch][0] for took in rounds]
        base = (BATCHED, 1, 1) if what == BATCHED else (ALONE, count, 1)
        ratio, cpu_ratio = (
            statistics.median(took[base][i] / took[what, count, window_batch][i] for took in rounds) for i in range(2)
        )
        rates = [count * num_frames / taken for taken in times]
        row: dict[str, object] = {"what": what, "model": "tiny", "dtype": "float32", "streams": count}
        row |= {"window_batch": window_batch, "frames": num_frames, "steps": steps}
        row |= {"ratio": f"{ratio:.3f}", "cpu_ratio": f"{cpu_ratio:.3f}"}
        row |= {"frames_per_s": f"{statistics.median(rates):.4g}", "least": f"{min(rates):.4g}"}
        row["most"] = f"{max(rates):.4g}"
        if what == SHARED:
            row["windows_a_forward"] = f"{statistics.median(windows[count]):.2f}"
        rows.append(row)
        print(
            f"{what:22} {count} streams, window_batch {window_batch}: {row['frames_per_s']:>6} frames/s "
            f"({row['least']} to {row['most']}), {ratio:.2f} times {base[0]}, by own time {cpu_ratio:.2f}"
            + (f", {row['windows_a_forward']} windows a forward" if what == SHARED else ""),
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    engine = Engine.from_pretrained("tiny", options.device, "float32")
    for threads in options.threads:
        torch.set_num_threads(threads)
        result_files.environment.cache_clear()
        print(f"{threads} threads of torch", flush=True)
        rows = measured(engine, options.frames, options.steps, options.repeats)
        result_files.record(f"sharing_{engine.device.type}", COLUMNS, rows, engine.device.type)


if __name__ == "__main__":
    main()
