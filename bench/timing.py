"""How the benchmarks time: contenders interleaved in one process, against ceilings timed in the same run.

On a CPU: one thread, process time, which a busy machine moves least. On a GPU: events around each call, its caches
overwritten before; a call of less than GRAPH_BELOW_MS is timed in a CUDA graph of several, which leaves out what its
launch costs the host. What was timed becomes a row of a results file (result_files.py) for each contender.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from result_files import ENVIRONMENT, IS_SMALL, fault, is_fatal, record

from miga_engine import ops

COLUMNS = (
    "op", "shape", "dtype", "implementation", "p20_ms", "p50_ms", "p80_ms", "min_ms", "bytes", "flops", "rate", "unit",
    "of_ceiling", "x_eager", "x_compiled", "x_loop", "note", *ENVIRONMENT,
)  # fmt: skip

RIVALS = ("eager", "compiled", "loop")  # straightforward PyTorch, torch.compile of it, a Python loop over frames

GRAPH_BELOW_MS = 0.2
GRAPH_CALLS = 10
FIRST_SAMPLES = 3


class Sampler:
    """Milliseconds of one call of `run` at each call of this, after two that did not count."""

    def __init__(self, run: Callable[[], object], device: str) -> None:
        self._take = functools.partial(_sample_gpu if device == "cuda" else _sample_cpu, run)
        self.note = ""
        elapsed = min(self._take() for _ in range(2))
        if device == "cuda" and elapsed < GRAPH_BELOW_MS:
            try:
                self._take = Replay(run)
                self._take()
                self.note = "by graph"
            except RuntimeError as error:  # what waits for the device, or allocates on the host, is not captured
                if is_fatal(error):
                    raise
                self._take = functools.partial(_sample_gpu, run)

    def __call__(self) -> float:
        return self._take()


class Replay:
    """Milliseconds of a short call: GRAPH_CALLS of it in a CUDA graph, the caches overwritten before each.

    The time of a graph that only overwrites them is taken off.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        _refuse_waits(run)
        self._both = _captured([_overwrite_caches, run])
        self._overwriting = _captured([_overwrite_caches])

    def __call__(self) -> float:
        both, overwriting = (_between_events(graph.replay) for graph in (self._both, self._overwriting))
        return max(both - overwriting, 1e-4) / GRAPH_CALLS


def _refuse_waits(run: Callable[[], object]) -> None:
    """RuntimeError where the host waits for the device: before a capture, whose failure is hard to recover from."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for call in [*calls] * GRAPH_CALLS:
                call()
    except BaseException:
        torch.cuda.set_stream(stream)  # a failed capture leaves its own behind
        raise
    return graph


def interleave(
    contenders: Mapping[str, Callable[[], object]], device: str, repeats: int = 11
) -> dict[str, list[float]]:
    """Milliseconds of every contender, taken in turns after two rounds that do not count."""
    return _in_turns({name: Sampler(run, device) for name, run in contenders.items()}, repeats)


def _in_turns(samplers: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    rounds = [{name: sample() for name, sample in samplers.items()} for _ in range(repeats)]
    return {name: sorted(times[name] for times in rounds) for name in samplers}


def milliseconds(run: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Median of `repeats` calls after one."""
    take = _sample_gpu if device == "cuda" else _sample_cpu
    take(run)
    return sorted(take(run) for _ in range(repeats))[repeats // 2]


def _sample_cpu(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def _sample_gpu(run: Callable[[], object]) -> float:
    _overwrite_caches()
    return _between_events(run)


def _between_events(run: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _overwrite_caches() -> None:
    _cache_filler().zero_()


@functools.cache
def _cache_filler() -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def best(times: list[float], device: str) -> float:
    """What ratios are made of: the median on a GPU; on a CPU the minimum, since others only ever add to it."""
    return times[len(times) // 2] if device == "cuda" else times[0]


@functools.cache
def copy_ceiling(device: str) -> float:
    """GB/s, read and written, of the fastest plain copy of 256 MB on a CPU (one thread) or 1 GB on a GPU."""
    count = 1 << (16 if IS_SMALL else 28 if device == "cuda" else 26)
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    elapsed = best(interleave({"copy": lambda: target.copy_(source)}, device)["copy"], device)
    return 2 * 4 * source.numel() / elapsed / 1e6


@functools.cache
def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product."""
    size = 64 if IS_SMALL else 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    elapsed = best(interleave({"matmul": lambda: ops.linear(a, b)}, device)["matmul"], device)
    return 2 * size**3 / elapsed / 1e9


def append(
    file: str,
    op: str,
    shape: str,
    dtype: torch.dtype,
    samples: Mapping[str, list[float]],
    device: str,
    *,
    num_bytes: int = 0,
    num_flops: int = 0,
    ceiling: float | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[dict[str, object]]:
    """One row for each contender; `eager`, `compiled` and `loop` among them are what the others are compared with.

    num_bytes or num_flops, whichever bounds the op, makes the rate and its share of the ceiling: `ceiling` in the
    unit of the rate, else that of copies or matrix products.
    """
    rows = []
    for name, times in samples.items():
        elapsed = best(times, device)
        if num_flops:
            rate, unit = num_flops / elapsed / 1e9, "TFLOP/s"
            limit = ceiling or matmul_ceiling(device, dtype)
        else:
            rate, unit = num_bytes / elapsed / 1e6, "GB/s"
            limit = ceiling or copy_ceiling(device)
        faster = {rival: best(samples[rival], device) / elapsed for rival in RIVALS if rival in samples}
        quantile = {q: times[int(q * (len(times) - 1) / 100 + 0.5)] for q in (20, 50, 80)}
        row: dict[str, object] = {"op": op, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"implementation": name, **{f"p{q}_ms": f"{t:.4g}" for q, t in quantile.items()}}
        row |= {"min_ms": f"{times[0]:.4g}", "bytes": num_bytes, "flops": num_flops, "rate": f"{rate:.4g}"}
        row |= {"unit": unit, "of_ceiling": f"{rate / limit:.3f}"}
        row |= {f"x_{rival}": f"{ratio:.2f}" for rival, ratio in faster.items()}
        row["note"] = (notes or {}).get(name, "")
        rows.append(row)
    return record(file, COLUMNS, rows, device)


def compare(
    file: str,
    op: str,
    shape: str,
    dtype: torch.dtype,
    contenders: Mapping[str, Callable[[], object]],
    device: str,
    *,
    repeats: int = 11,
    notes: Mapping[str, str] | None = None,
    **work: int,
) -> dict[str, list[float]]:
    """Time the contenders, print and append their rows; the samples of those that ran.

    On a GPU, where anything may fail or hang for the first time, each contender gets a row of its own as soon as it has
    run, and one of another time, with the ratios, at the end, when all have taken turns. One that fails is reported by
    `fault` and left out. A row's note is that of `notes`, what attention `auto` took, and how the time was taken.
    """
    samplers: dict[str, Sampler] = {}
    said: dict[str, str] = {}

    def save(samples: Mapping[str, list[float]], *more: str) -> None:
        joined = {name: "; ".join(filter(None, (said[name], *more))) for name in samples}
        for row in append(file, op, shape, dtype, samples, device, notes=joined, **work):
            print(line(row), flush=True)

    for name, run in contenders.items():
        try:
            with attention_choices() as choices:
                samplers[name] = Sampler(run, device)
            chosen = "; ".join(f"attention {backend} ({kind})" for kind, backend in choices.items())
            said[name] = "; ".join(filter(None, ((notes or {}).get(name, ""), chosen, samplers[name].note)))
            if device == "cuda" or IS_SMALL:
                save({name: sorted(samplers[name]() for _ in range(FIRST_SAMPLES))}, "first look")
        except Exception as error:
            samplers.pop(name, None)
            fault(error, device, op=op, shape=shape, dtype=str(dtype), implementation=name)
    samples = _in_turns(samplers, repeats)
    save(samples)
    return samples


def line(row: Mapping[str, object]) -> str:
    """A row of `append` for people."""
    ratios = [f"{name} {row[key]}" for name in RIVALS if row.get(key := f"x_{name}")]
    return (
        f"{row['op']:22} {row['shape']} {row['dtype']} {row['implementation']:10} {row['p50_ms']:>8} ms "
        f"{row['rate']:>6} {row['unit']} {row['of_ceiling']} of ceiling"
        + (f"; times faster than {', '.join(ratios)}" if ratios else "")
        + (f" ({row['note']})" if row["note"] else "")
    )


@contextlib.contextmanager
def attention_choices() -> Iterator[dict[str, str]]:
    """What `auto` takes on a GPU meanwhile, by kind of call."""
    choices: dict[str, str] = {}
    with ops.attention_choices(choices):
        yield choices
