"""Broken files and options against every loader: `python tests/fuzz.py --count 10000 --seed 0`.

Each case breaks one thing that a stranger may have written: a weights file, an index, a config.json, a tokenizer, a
YAML file, a session file, a video, or the options of a request; some bytes at random, or its structure on purpose. A
worker process loads it under a limit on its address space. A case passes where the loader takes the file or raises a
MigaError of one printable line, asks for no more memory than `MOST_BYTES`, and runs no code. It fails on any other
exception, on a signal, on memory that is refused, after `MOST_SECONDS`, and where the canary file appears. Case I of
a seed is the same in every run: `--only I` repeats it.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from fuzz_pristine import build_pristine
from fuzz_targets import TARGETS, Target, watch_writes
from fuzz_values import CACHE, CANARY, Random

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

MOST_BYTES = 512 * 2**20  # resident, above that before the case; the largest honest file here takes 30 MB
MOST_SECONDS = 30
ADDRESS_SPACE = 4 * 2**30  # beyond the warm worker's, so that what is asked for and never touched shows too


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def refused_memory(error: BaseException | None) -> bool:
    """Whether an error began with memory that could not be had."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def work(connection: Connection, pristine: Path) -> None:
    """Load what is asked for; answer (verdict, message, peak bytes)."""
    for number in (1, 2):  # Rust's panics and FFmpeg write there, and the command
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    import torch

    from miga_engine.errors import MigaError

    torch.set_num_threads(1)
    CACHE["pristine"], CACHE["victims"] = pristine, pristine / "victims"
    sys.addaudithook(watch_writes)
    for target in TARGETS.values():  # what libraries hold for good is there before anything is measured
        if target.is_written:
            shutil.copytree(pristine / target.layout, "warm")
            target.load(Path("warm"))
            shutil.rmtree("warm")
        elif target.file not in ("request", "bpe_simple_vocab_16e6.txt.gz"):
            target.load(pristine / target.layout)
    for path in pristine.rglob("out.safetensors"):
        path.unlink()
    resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + ADDRESS_SPACE,) * 2)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    del [bytearray(64 * 2**20)][0]
    connection.send(("ready" if status_bytes("VmHWM") - before > 60 * 2**20 else "blind", "", 0))
    while (request := connection.recv()) is not None:
        name, folder = request
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status_bytes("VmRSS")
        try:
            TARGETS[name].load(folder)
            verdict, message = "loaded", ""
        except MigaError as error:
            verdict, message = "refused", str(error)
            if not message.isprintable() or not 20 <= len(message) <= 2000:
                verdict = "NO SENTENCE"
            elif refused_memory(error):
                verdict = "MEMORY REFUSED"
        except Exception as error:
            verdict, message = "OTHER EXCEPTION", f"{type(error).__name__}: {error}"[:500]
        except BaseException as error:
            verdict, message = "PANIC", f"{type(error).__name__}: {error}"[:500]
        peak = status_bytes("VmHWM") - before
        if Path(CANARY).exists():
            verdict = "CODE RAN"
            Path(CANARY).unlink()
        elif peak > MOST_BYTES:
            verdict = "TOO MUCH MEMORY"
        connection.send((verdict, message, peak))


class Worker:
    """The process that loads; started anew when it has died or hung."""

    def __init__(self, pristine: Path) -> None:
        self.pristine = pristine
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, self.pristine), daemon=True)
        self.process.start()
        other.close()
        if not self.connection.poll(300) or self.connection.recv()[0] != "ready":
            raise RuntimeError("the worker does not load the good files")

    def load(self, name: str, folder: Path) -> tuple[str, str, int]:
        self.connection.send((name, folder))
        try:
            if self.connection.poll(MOST_SECONDS):
                return self.connection.recv()
            verdict = ("HANG", f"not done after {MOST_SECONDS} s", 0)
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            verdict = ("CRASH", signal.Signals(-code).name if code < 0 else f"exit status {code}", 0)
        self.process.kill()
        self.process.join()
        self.start()
        return verdict

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join()


def make_case(target: Target, pristine: Path, folder: Path, rng: Random) -> None:
    """The layout's files as links, and a broken one in the place of one of them."""
    for path in sorted((pristine / target.layout).rglob("*")):
        place = folder / path.relative_to(pristine / target.layout)
        if path.is_dir():
            place.mkdir(parents=True)
        elif place.name != Path(target.file).name:
            place.parent.mkdir(parents=True, exist_ok=True)
            if target.is_written:
                shutil.copy(path, place)
            else:
                os.link(path, place, follow_symlinks=False)
    place = folder / target.file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(target.breaker((pristine / target.layout / target.file).read_bytes(), rng))


def run(count: int, seed: int, only: int | None = None, keep: Path | None = None, start: str = "") -> int:
    """Number of failed cases, of targets whose names begin with `start`; the table of verdicts is printed."""
    failures = 0
    targets = {name: target for name, target in TARGETS.items() if name.startswith(start)}
    table: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in targets}
    peaks: dict[str, int] = dict.fromkeys(targets, 0)
    names, weights = list(targets), [target.weight for target in targets.values()]
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        os.chdir(scratch)
        pristine = Path(scratch) / "pristine"
        pristine.mkdir()
        build_pristine(pristine)
        CACHE["victims"] = pristine / "victims"
        worker = Worker(pristine)
        for i in range(count) if only is None else (only,):
            rng = Random(f"{seed} {i}")
            name = names[i] if i < len(names) else rng.choices(names, weights)[0]
            folder = Path(scratch) / "case"
            folder.mkdir()
            make_case(TARGETS[name], pristine, folder, rng)
            verdict, message, peak = worker.load(name, folder)
            table[name][verdict] += 1
            peaks[name] = max(peaks[name], peak)
            if verdict not in ("loaded", "refused"):
                failures += 1
                print(f"case {i}, {name}: {verdict}: {message!r}", flush=True)
                if keep is not None:
                    shutil.copytree(folder, keep / str(i), symlinks=True, ignore=lambda _, names: ["pipe.safetensors"])
            elif only is not None:
                print(f"case {i}, {name}: {verdict}: {message}")
            shutil.rmtree(folder)
        worker.stop()
        os.chdir(ROOT)
    verdicts = sorted({verdict for counts in table.values() for verdict in counts}, key=lambda v: (v.isupper(), v))
    print(f"{'':32}{''.join(f'{verdict:>17}' for verdict in verdicts)}{'peak':>12}")
    for name, counts in table.items():
        print(f"{name:32}{''.join(f'{counts[v]:17}' for v in verdicts)}{peaks[name] / 2**20:8.0f} MiB")
    totals = sum(table.values(), collections.Counter())
    print(f"{'all':32}{''.join(f'{totals[v]:17}' for v in verdicts)}{max(peaks.values()) / 2**20:8.0f} MiB")
    print(f"{sum(totals.values())} cases, {failures} failed")
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this case and show its sentence")
    parser.add_argument("--keep", type=Path, help="copy the files of failed cases here")
    parser.add_argument("--target", default="", help="only targets whose names begin so, such as 'session values'")
    options = parser.parse_args()
    sys.exit(1 if run(options.count, options.seed, options.only, options.keep, options.target) else 0)
