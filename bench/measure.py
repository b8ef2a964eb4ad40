"""How the benchmarks measure: contenders interleaved in one process, against ceilings timed in the same run.

On a CPU: one thread, process time, which a busy machine moves least. On a GPU: events around each call, its caches
overwritten before; a call of less than GRAPH_BELOW_MS is timed in a CUDA graph of several, which leaves out what its
launch costs the host. Rows are appended to bench/results/<file>.csv and are never edited; the newest counts.

Of the environment: MIGA_RESULTS is another folder for the rows, MIGA_COMMIT the commit where there is no git, and
SMALL=1 shrinks every size, to try the benchmarks out: such rows, in out/small unless MIGA_RESULTS is set, say nothing
about speed.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from miga_engine import ops

ROOT = Path(__file__).parent.parent
IS_SMALL = os.environ.get("SMALL") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if os.environ.get("MIGA_NEEDS_GPU") == "1" and DEVICE == "cpu" and not IS_SMALL:
    print("no GPU is visible to torch: this is for a machine with one, and SMALL=1 tries it out on a CPU")
    sys.exit(3)  # which bench/gpu.sh knows
RESULTS = Path(os.environ.get("MIGA_RESULTS") or ROOT / ("out/small" if IS_SMALL else "bench/results"))
ENVIRONMENT = ("commit", "device", "torch", "triton", "threads")
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


@functools.cache
def has_diffusers() -> bool:
    """Whether the rival of the network and of whole videos can be imported, with what it needs; says why not."""
    try:
        import baseline_diffusers  # noqa: F401
    except Exception as error:
        print(f"there is no rival, and no check against it: diffusers cannot be used ({error})", flush=True)
        return False
    return True


_faults: list[str] = []


def exit_status() -> int:
    """Of a benchmark at its end: 1 where `fault` has reported anything."""
    return int(bool(_faults))


def fault(error: BaseException, device: str, **what: object) -> None:
    """Print what failed and append it to the results' faults_<device>.jsonl; raises what leaves no use of the GPU."""
    trace = traceback.format_exception(type(error), error, error.__traceback__)[-8:]
    said = f"{type(error).__name__}: {str(error)[:500]}"
    _faults.append(said)
    print("FAILED", *(f"{key} {value}" for key, value in what.items()), said, flush=True)
    write_line(RESULTS / f"faults_{device}.jsonl", {**what, "failed": said, "trace": "".join(trace)[-4000:]}, device)
    if is_fatal(error):
        raise error


def write_line(path: Path, row: Mapping[str, object], device: str) -> None:
    """Append a row as JSON, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps({**row, **environment(device)}, default=str) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def is_fatal(error: BaseException) -> bool:
    """Whether the process can launch nothing more, such as after an illegal access."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)


def record(
    file: str, columns: Sequence[str], rows: Sequence[Mapping[str, object]], device: str
) -> list[dict[str, object]]:
    """Append rows, completed by commit, device and versions, to bench/results/<file>.csv; returns them.

    Raises ValueError where the file was begun with other columns.
    """
    complete = [{**row, **environment(device)} for row in rows]
    _append_rows(RESULTS / f"{file}.csv", columns, complete)
    return complete


def _append_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as stream:
            header = next(csv.reader(stream), [])
        if header != list(columns):
            raise ValueError(f"{path} has the columns {header}, not {list(columns)}: move it away or convert it")
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
        stream.flush()
        os.fsync(stream.fileno())  # whatever ends the machine afterwards


def take_over(folder: Path) -> list[Path]:
    """Append the rows of a GPU that `bench/gpu.sh` left in a folder to those in RESULTS; the files they went to.

    Raises ValueError where one of them was begun with other columns, and then takes over nothing of it.
    """
    files = []
    for path in sorted(folder.glob("*_cuda.*")):
        target = RESULTS / path.name
        if path.suffix == ".csv":
            with path.open(newline="") as stream:
                reader = csv.DictReader(stream)
                _append_rows(target, reader.fieldnames or (), list(reader))
        elif path.suffix == ".jsonl":
            with target.open("a") as stream:
                stream.write(path.read_text())
        else:
            continue
        files.append(target)
    return files


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
    """MIGA_COMMIT, or git's short hash, with + where the working tree differs from it."""
    if commit := os.environ.get("MIGA_COMMIT"):
        return commit
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
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


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python bench/measure.py FOLDER, which bench/gpu.sh has filled")
    for file in take_over(Path(sys.argv[1])):
        print(file)
