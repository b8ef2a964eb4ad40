"""Processors that others want too: how the command waits, and what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import golden_model
import pytest

from miga_engine import threads
from miga_engine.engine import Engine
from miga_engine.threads import StarvationWatch, processor_quota, share_processors


@pytest.mark.slow
def test_the_command_chooses_how_its_threads_wait_before_torch_is_loaded() -> None:
    script = """
import os, sys
from unittest import mock
for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
    os.environ.pop(name, None)
from miga_engine import cli
assert "torch" not in sys.modules
seen = []
import builtins
load = builtins.__import__
def noted(name, *rest):
    if name == "torch" and not seen:
        seen.append(os.environ.get("GOMP_SPINCOUNT"))
    return load(name, *rest)
builtins.__import__ = noted
cli.main(["info"])
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == f"[{str(threads.SPIN_COUNT)!r}]"


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "3"}])
def test_what_the_user_has_set_stays(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = {**given, "OMP_NUM_THREADS": "5"}
    share_processors(environment)
    assert environment == {**given, "OMP_NUM_THREADS": "5"}


def test_a_process_that_has_loaded_torch_is_left_alone() -> None:
    environment: dict[str, str] = {}
    share_processors(environment)
    assert environment == {}


@pytest.mark.parametrize(
    ("content", "quota"), [("max 100000", None), ("150000 100000", 2), ("5000 100000", 1), ("", None), ("x y", None)]
)
def test_no_more_threads_than_a_container_may_use(tmp_path: Path, monkeypatch, content: str, quota: int | None) -> None:
    path = tmp_path / "cpu.max"
    path.write_text(content)
    assert processor_quota(path) == quota
    assert processor_quota(tmp_path / "none") is None
    monkeypatch.setattr(threads, "processor_quota", lambda: quota)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 64)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment: dict[str, str] = {}
    share_processors(environment)
    assert environment.get("OMP_NUM_THREADS") == (None if quota is None else str(quota))


def test_a_run_that_starves_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    engine = Engine.from_pretrained(golden_model.build(tmp_path), "cpu")
    switches = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(threads, "_forced_switches", lambda: next(switches))
    monkeypatch.setattr(StarvationWatch, "LEAST_SECONDS", 0.0)
    events = []
    options = {**golden_model.OPTIONS, "miga": golden_model.MIGA}
    list(engine.stream("a kite", 17, on_event=lambda event: events.append(event.kind), **options))
    assert events.count("warning") == 1
    assert caplog.text.count("other processes want the processors") == 1


def test_a_run_that_does_not_starve_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_forced_switches", lambda: 5)
    watch = StarvationWatch()
    watch.LEAST_SECONDS = 0.0
    assert watch.look() is None
