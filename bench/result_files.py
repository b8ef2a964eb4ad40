"""Where the benchmarks write what they found: rows in CSV, faults, and what each says of commit, device and versions.

Rows are appended to bench/results/<file>.csv and are never edited; the newest counts. `python bench/result_files.py
FOLDER` appends those that bench/gpu.sh left in a folder.

Of the environment: MIGA_RESULTS is another folder for the rows, MIGA_COMMIT the commit where there is no git, and
SMALL=1 shrinks every size, to try the benchmarks out: such rows, in out/small unless MIGA_RESULTS is set, say nothing
about speed.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
IS_SMALL = os.environ.get("SMALL") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if os.environ.get("MIGA_NEEDS_GPU") == "1" and DEVICE == "cpu" and not IS_SMALL:
    print("no GPU is visible to torch: this is for a machine with one, and SMALL=1 tries it out on a CPU")
    sys.exit(3)  # which bench/gpu.sh knows
RESULTS = Path(os.environ.get("MIGA_RESULTS") or ROOT / ("out/small" if IS_SMALL else "bench/results"))
ENVIRONMENT = ("commit", "device", "torch", "triton", "threads")

_faults: list[str] = []


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


def newest(path: Path, *keys: str) -> list[dict[str, str]]:
    """The last row of every combination of the columns `keys`, in the order of the file; nothing without a file."""
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return list({tuple(row[key] for key in keys): row for row in csv.DictReader(stream)}.values())


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


def fault(error: BaseException, device: str, **what: object) -> None:
    """Print what failed and append it to the results' faults_<device>.jsonl; raises what leaves no use of the GPU."""
    trace = traceback.format_exception(type(error), error, error.__traceback__)[-8:]
    said = f"{type(error).__name__}: {str(error)[:500]}"
    _faults.append(said)
    print("FAILED", *(f"{key} {value}" for key, value in what.items()), said, flush=True)
    write_line(RESULTS / f"faults_{device}.jsonl", {**what, "failed": said, "trace": "".join(trace)[-4000:]}, device)
    if is_fatal(error):
        raise error


def exit_status() -> int:
    """Of a benchmark at its end: 1 where `fault` has reported anything."""
    return int(bool(_faults))


def is_fatal(error: BaseException) -> bool:
    """Whether the process can launch nothing more, such as after an illegal access."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)


def write_line(path: Path, row: Mapping[str, object], device: str) -> None:
    """Append a row as JSON, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(json.dumps({**row, **environment(device)}, default=str) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


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
    """MIGA_COMMIT, or git's short hash, with + where the working tree differs from it in more than results."""
    if commit := os.environ.get("MIGA_COMMIT"):
        return commit
    try:
        differences = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return _git("rev-parse", "--short", "HEAD") + "+" * bool(differences)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    widest = next((flag for flag in ("avx512_bf16", "avx512f", "avx2") if flag in flags), "")
    return " ".join([*names[:1], widest]).strip() or platform.machine()


def peak_resident_mib() -> float:
    """Largest resident memory of this process so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def resident_mib(process: int | str = "self") -> float:
    """Resident memory of a process now (Linux); 0 once it has ended."""
    pages = int((Path(f"/proc/{process}/statm").read_text() or "0 0").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@functools.cache
def has_diffusers() -> bool:
    """Whether the rival of the network and of whole videos can be imported, with what it needs; says why not."""
    try:
        import baseline_diffusers  # noqa: F401
    except Exception as error:
        print(f"there is no rival, and no check against it: diffusers cannot be used ({error})", flush=True)
        return False
    return True


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python bench/result_files.py FOLDER, which bench/gpu.sh has filled")
    for file in take_over(Path(sys.argv[1])):
        print(file)
