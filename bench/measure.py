"""How the benchmarks measure: contenders interleaved in one process, against ceilings timed in the same run.

On a CPU: one thread, process time, which a busy machine moves least. On a GPU: events around each call, its caches
overwritten before. Rows are appended to bench/results/<file>.csv and are never edited.
"""

from __future__ import annotations

import csv
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from miga_engine import ops

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = ("commit", "device", "torch", "triton", "threads")
COLUMNS = (
    "op", "shape", "dtype", "implementation", "p20_ms", "p50_ms", "p80_ms", "min_ms", "bytes", "flops", "rate", "unit",
    "of_ceiling", "x_eager", "x_compiled", "x_loop", *ENVIRONMENT,
)  # fmt: skip

RIVALS = ("eager", "compiled", "loop")  # straightforward PyTorch, torch.compile of it, a Python loop over frames


def interleave(
    contenders: Mapping[str, Callable[[], object]], device: str, repeats: int = 11
) -> dict[str, list[float]]:
    """Milliseconds of every contender, taken in turns after two rounds that do not count."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    sample = _sample_gpu if device == "cuda" else _sample_cpu
    for i in range(repeats + 2):
        for name, run in contenders.items():
            elapsed = sample(run)
            if i >= 2:
                samples[name].append(elapsed)
    return {name: sorted(times) for name, times in samples.items()}


def _sample_cpu(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def _sample_gpu(run: Callable[[], object]) -> float:
    _cache_filler().zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


@functools.cache
def _cache_filler() -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def best(times: list[float], device: str) -> float:
    """What ratios are made of: the median on a GPU; on a CPU the minimum, since others only ever add to it."""
    return times[len(times) // 2] if device == "cuda" else times[0]


@functools.cache
def copy_ceiling(device: str) -> float:
    """GB/s, read and written, of the fastest plain copy of 256 MB on a CPU (one thread) or 1 GB on a GPU."""
    source = torch.ones((1 << 28) if device == "cuda" else (1 << 26), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    elapsed = best(interleave({"copy": lambda: target.copy_(source)}, device)["copy"], device)
    return 2 * 4 * source.numel() / elapsed / 1e6


@functools.cache
def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product."""
    size = 8192 if device == "cuda" else 1536
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
        rows.append(row)
    return record(file, COLUMNS, rows, device)


def record(
    file: str, columns: Sequence[str], rows: Sequence[Mapping[str, object]], device: str
) -> list[dict[str, object]]:
    """Append rows, completed by commit, device and versions, to bench/results/<file>.csv; returns them.

    Raises ValueError where the file was begun with other columns.
    """
    path = RESULTS / f"{file}.csv"
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as stream:
            header = next(csv.reader(stream), [])
        if header != list(columns):
            raise ValueError(f"{path} has the columns {header}, not {list(columns)}: move it away or convert it")
    complete = [{**row, **environment(device)} for row in rows]
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(complete)
    return complete


def newest(path: Path, *keys: str) -> list[dict[str, str]]:
    """The last row of every combination of the columns `keys`, in the order of the file; nothing without a file."""
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return list({tuple(row[key] for key in keys): row for row in csv.DictReader(stream)}.values())


def peak_resident_mib() -> float:
    """Largest resident memory of this process so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def resident_mib(process: int | str = "self") -> float:
    """Resident memory of a process now (Linux); 0 once it has ended."""
    pages = int((Path(f"/proc/{process}/statm").read_text() or "0 0").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@functools.cache
def environment(device: str) -> dict[str, object]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    threads = "" if device == "cuda" else torch.get_num_threads()
    return {"commit": _commit(), "device": name, "torch": torch.__version__, "triton": triton, "threads": threads}


def _commit() -> str:
    """Short hash, with + where the working tree differs from it; empty outside a repository."""
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return answer.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    widest = next((flag for flag in ("avx512_bf16", "avx512f", "avx2") if flag in flags), "")
    return " ".join([*names[:1], widest]).strip() or platform.machine()
