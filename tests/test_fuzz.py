"""A share of the fuzzer's cases, and that it sees each kind of fault."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from places import ROOT
from refusals import on_linux


@pytest.mark.slow
@on_linux
def test_fuzz() -> None:
    """A share of `python tests/fuzz.py`, each target at least once."""
    program = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--count", "200", "--seed", "7"]
    run = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert run.stdout.endswith("200 cases, 0 failed\n")


@pytest.mark.slow
@on_linux
def test_the_fuzzer_sees_faults(tmp_path: Path) -> None:
    """Loaders that crash, run code, take memory, print nonsense or fail otherwise are told apart."""
    program = textwrap.dedent("""
        import os, sys
        import fuzz
        from miga_engine.errors import MigaError

        def fail(error):
            raise error

        LOADERS = {
            "CRASH": lambda folder: os.kill(os.getpid(), 11),
            "CODE RAN": lambda folder: open(fuzz.CANARY, "w").close(),
            "TOO MUCH MEMORY": lambda folder: bytearray(fuzz.MOST_BYTES + 2**24),
            "MEMORY REFUSED": lambda folder: convert_memory_error(),
            "NO SENTENCE": lambda folder: fail(MigaError("too short")),
            "OTHER EXCEPTION": lambda folder: fail(KeyError("x")),
            "PANIC": lambda folder: fail(BaseException("x")),
        }

        def convert_memory_error():
            try:
                bytearray(2**50)
            except MemoryError as error:
                raise MigaError("there is no room for this file") from error

        def load(folder):
            path = folder / "merges.txt"
            if path.read_text() in LOADERS:
                LOADERS[path.read_text()](folder)

        def build(root):
            (root / "clip").mkdir()
            (root / "clip" / "merges.txt").write_text("good")

        order = iter(LOADERS)
        fuzz.build_pristine = build
        fuzz.TARGETS = {"x": fuzz.Target("clip", "merges.txt", lambda data, rng: next(order).encode(), load)}

        if __name__ == "__main__":
            assert fuzz.run(len(LOADERS), 0) == len(LOADERS)
    """)
    (tmp_path / "faulty.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    run = subprocess.run(
        [sys.executable, tmp_path / "faulty.py"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("case ")]
    found = [line.split("x: ")[1].split(":")[0] for line in lines]
    assert found == [
        "CRASH",
        "CODE RAN",
        "TOO MUCH MEMORY",
        "MEMORY REFUSED",
        "NO SENTENCE",
        "OTHER EXCEPTION",
        "PANIC",
    ]
