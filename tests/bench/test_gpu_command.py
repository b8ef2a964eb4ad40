"""The commands of bench/gpu.sh keep to their time, and what fails in them costs no other its rows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from result_rows import rows_of


@pytest.mark.parametrize(("command", "most"), [("first", 300), ("second", 400), ("third", 300)])
def test_limits_of_a_command_add_up(command: str, most: int) -> None:
    """Each stage may take its limit and the seconds between interrupt and kill."""
    plan = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", command, "--plan"], capture_output=True, text=True, check=True
    )
    stages = dict(line.split() for line in plan.stdout.splitlines())
    assert sum(sum(map(int, limit.split("+"))) for limit in stages.values()) <= most
    script = (ROOT / "bench" / "gpu.sh").read_text(encoding="utf-8")
    named = re.findall(r'^  "(\w+) \d+ (bench/\w+\.py) ?(.*)"$', script, re.MULTILINE)
    assert {name for name, _, _ in named} >= set(stages) - {"wheels"}
    assert all((ROOT / path).is_file() for _, path, _ in named)


PYTHON = """#!/bin/bash
echo "$1 ${*: -1} $MIGA_NEEDS_GPU" >> "$MIGA_RESULTS/rows.txt"
%s
"""


def _command(command: str, folder: Path, python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """bench/gpu.sh with a shell script in place of Python, in a folder that holds nothing else."""
    checkout = folder / "checkout"
    (checkout / "bench").mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "gpu.sh", checkout / "bench")
    interpreter = folder / "python"
    interpreter.write_text(PYTHON % python)
    interpreter.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(interpreter), "OUT": str(folder / "results"), **environment}
    return subprocess.run(
        ["bash", checkout / "bench" / "gpu.sh", command],
        env={**environment, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_stage_that_is_killed_costs_no_other_its_rows(tmp_path: Path) -> None:
    run = _command("first", tmp_path, 'case "$*" in *tiny*) kill -9 $$ ;; *whole*) exit 1 ;; esac')
    assert run.returncode == 1
    stages = map(json.loads, (tmp_path / "results" / "first.jsonl").read_text().splitlines())
    status = {stage["stage"]: stage["status"] for stage in stages}
    assert status.pop("C++ kernels", 0) == 0  # beside the others, it may not have come to its end
    assert (status.pop("tiny"), status.pop("whole")) == (137, 1)
    assert set(status.values()) == {0}
    rows = (tmp_path / "results" / "rows.txt").read_text()
    for stage in ("env", "ops", "attention", "tiny", "whole", "tests"):
        assert f"bench/first_minutes.py {stage} 1\n" in rows


def test_results_are_at_most_eight_files_however_the_command_ends(tmp_path: Path) -> None:
    many = 'for i in 1 2 3 4 5 6 7 8 9; do echo $i > "$MIGA_RESULTS/$i"; done'
    ends = "kill -TERM $(cut -d ' ' -f 4 /proc/$PPID/stat)"  # the parent of `timeout` is the command
    run = _command("second", tmp_path, f"{many}; {ends}; sleep 20")
    assert run.returncode == 130
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["second.tar.gz"]
    listed = subprocess.run(
        ["tar", "-tzf", tmp_path / "results" / "second.tar.gz"], capture_output=True, text=True, check=True
    )
    assert {"./rows.txt", "./second.log", "./9"} <= set(listed.stdout.split())


@pytest.mark.slow
def test_without_a_gpu_one_sentence_and_a_failure(tmp_path: Path) -> None:
    run = _command("second", tmp_path, "echo no GPU is visible; exit 3")
    assert run.returncode == 3
    assert (tmp_path / "results" / "rows.txt").read_text().count("\n") == 1
    environment = {**os.environ, "MIGA_NEEDS_GPU": "1", "SMALL": "", "CUDA_VISIBLE_DEVICES": ""}
    imported = subprocess.run(
        [sys.executable, "-c", "import result_files"],
        cwd=ROOT / "bench",
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert imported.returncode == 3
    assert imported.stdout == (
        "no GPU is visible to torch: this is for a machine with one, and SMALL=1 tries it out on a CPU\n"
    )


@pytest.mark.slow
def test_first_minutes_run_as_far_as_a_cpu_goes(tmp_path: Path) -> None:
    environment = {**os.environ, "SMALL": "1", "MIGA_RESULTS": str(tmp_path), "MIGA_COMMIT": "abc1234"}
    stages = ("env", "ceilings", "ops", "attention", "whole")
    run = subprocess.run(
        [sys.executable, ROOT / "bench" / "first_minutes.py", *stages],
        env={**environment, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    rows = [json.loads(line) for line in (tmp_path / "first_minutes_cpu.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "failed" in row]
    assert [row["stage"] for row in rows if "done_after_s" in row] == list(stages)
    assert {row["commit"] for row in rows} == {"abc1234"}
    parts = {row["part"]: row for row in rows if "part" in row}
    assert parts["norm_modulate"]["error"] < 0.1
    assert parts["captured, window_batch 4"]["shape"] == [81, 32, 32, 3]
    assert parts["captured, window_batch 4"]["levels_off"] <= 2
    assert parts["estimate, window_batch 4"]["device_mib"] > 0
    assert {"op", "eager"} <= {row["implementation"] for row in rows_of(tmp_path / "kernels_cpu.csv")}
    # Triton 3.6's interpreter fails in loops with numpy from 2.4 on: then that is all, and it is told.
    faults = (tmp_path / "faults_cpu.jsonl").read_text().splitlines() if run.returncode else []
    assert (run.returncode, bool(faults)) in ((0, False), (1, True))
    assert all(json.loads(fault)["implementation"].startswith("triton") for fault in faults)
