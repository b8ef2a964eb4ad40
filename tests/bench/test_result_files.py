"""Results keep their columns, survive what fails and are taken over; the table is theirs."""

import csv
import re
import subprocess
from pathlib import Path

import pytest
import torch
from places import ROOT
from result_rows import rows_of

pytestmark = pytest.mark.usefixtures("own_results")


def test_columns_of_results_stay(tmp_path: Path) -> None:
    """Files of results are appended to, so that a column never moves."""
    import result_files
    import timing

    samples = {"op": [1.0, 2.0], "eager": [3.0, 4.0]}
    for _ in range(2):
        timing.append("kernels_cpu", "op", "2×3", torch.float32, samples, "cpu", num_bytes=100, ceiling=2.0)
    with (tmp_path / "kernels_cpu.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    with (ROOT / "bench" / "results" / "kernels_cpu.csv").open(newline="") as stream:
        assert header == next(csv.reader(stream))
    assert len(rows) == 4
    row = dict(zip(header, rows[0], strict=True))
    assert (row["min_ms"], row["x_eager"], row["of_ceiling"], row["x_loop"]) == ("1", "3.00", "0.000", "")
    with pytest.raises(ValueError, match=r"kernels_cpu\.csv has the columns .*: move it away or convert it"):
        result_files.record("kernels_cpu", ("op", *result_files.ENVIRONMENT), [{"op": "other"}], "cpu")


def test_table_shows_the_newest_results(tmp_path: Path) -> None:
    import bench_engine
    import bench_memory
    import result_files
    import table

    with pytest.raises(ValueError, match="holds no results of the engine: run `make bench` first"):
        table.table(tmp_path)
    for speed, ratio in ((1, "1.5"), (9, "3.21")):
        run = {"what": "generate", "model": "tiny", "request": "81 frames", "dtype": "float32", "rest": "0.0123"}
        rows = [
            {**run, "implementation": "engine", "video_frames_per_s": speed, "run_mib": 10, "x_baseline": ratio},
            {**run, "implementation": "diffusers", "video_frames_per_s": 2, "run_mib": 25, "x_baseline": 1},
        ]
        result_files.record("engine_cpu", bench_engine.COLUMNS, rows, "cpu")
    rows = [
        {"what": "import", "implementation": name, "seconds": s} for name, s in (("torch", 2), ("miga_engine", 2.5))
    ]
    result_files.record("engine_cpu", bench_engine.COLUMNS, rows, "cpu")
    lengths = [(1000, 200, 1), (5000, 201, 1.005), (10_000, 203, 1.015)]
    rows = [{"model": "narrow", "latent_frames": n, "peak_mib": mib, "x_1000": x} for n, mib, x in lengths]
    result_files.record("memory_cpu", bench_memory.COLUMNS, rows, "cpu")
    block = table.table(tmp_path)
    lines = block.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert (
        "| whole video, `tiny`, 81 frames | float32 | 9 frames/s | a plain diffusers loop, 2 frames/s | 3.21× |"
        in block
    )
    assert "| 10 MiB | the same loop, 25 MiB | 2.5× |" in block
    assert "1.2 % of the time" in block
    assert "| +0.50 s | `import torch`, 2 s |" in block
    assert "| peak memory over 10,000 latent frames |  | +1.5 % | at 1,000, 200 MiB |" in block
    assert "1.5×" not in block

    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    once = table.insert(text, block)
    assert once == f"before\n{table.BEGIN}\n\n{block}\n\n{table.END}\nafter\n"
    assert table.insert(once, block) == once
    for broken in ("no markers", table.BEGIN, f"{table.END} {table.BEGIN}"):
        with pytest.raises(ValueError, match="the page holds no <!-- bench --> followed by <!-- /bench -->"):
            table.insert(broken, block)


def test_what_leaves_no_use_of_the_gpu_is_raised_once_it_is_written(tmp_path: Path) -> None:
    import result_files

    with pytest.raises(RuntimeError, match="illegal memory access"):
        result_files.fault(RuntimeError("CUDA error: an illegal memory access was encountered"), "cpu", op="x")
    result_files.fault(RuntimeError("CUDA error: out of memory"), "cpu", op="y")
    assert len((tmp_path / "faults_cpu.jsonl").read_text().splitlines()) == 2
    assert result_files.exit_status() == 1


def test_commit_is_told_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import result_files

    monkeypatch.setattr(result_files, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert result_files._commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert result_files._commit() == "unknown"
    monkeypatch.setenv("MIGA_COMMIT", "abc1234")
    result_files.environment.cache_clear()
    try:
        assert result_files.environment("cpu")["commit"] == "abc1234"
    finally:
        result_files.environment.cache_clear()


def test_rows_of_another_machine_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import result_files
    import timing

    monkeypatch.setattr(result_files, "RESULTS", tmp_path / "there")
    timing.append("kernels_cuda", "op", "2", torch.float32, {"op": [1.0]}, "cpu", num_bytes=8, ceiling=1.0)
    result_files.write_line(tmp_path / "there" / "faults_cuda.jsonl", {"op": "x"}, "cpu")
    result_files.write_line(tmp_path / "there" / "first.jsonl", {"stage": "x"}, "cpu")
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    for count in (1, 2):
        taken = result_files.take_over(tmp_path / "there")
        assert [path.name for path in taken] == ["faults_cuda.jsonl", "kernels_cuda.csv"]
        assert [row["op"] for row in rows_of(tmp_path / "kernels_cuda.csv")] == ["op"] * count
        assert len((tmp_path / "faults_cuda.jsonl").read_text().splitlines()) == count
    (tmp_path / "kernels_cuda.csv").write_text("op,other\n")
    with pytest.raises(ValueError, match="move it away or convert it"):
        result_files.take_over(tmp_path / "there")


def test_a_commit_is_marked_where_more_than_results_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import result_files

    def git(*command: str) -> None:
        who = ["-c", "user.name=miga", "-c", "user.email=miga@example.org"]
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True)

    rows, code = tmp_path / "bench/results/rows.csv", tmp_path / "code.py"
    rows.parent.mkdir(parents=True)
    for file in (rows, code):
        file.write_text("one\n")
    git("init")
    git("add", ".")
    git("commit", "--message=one")
    monkeypatch.setattr(result_files, "ROOT", tmp_path)
    monkeypatch.delenv("MIGA_COMMIT", raising=False)
    rows.write_text("one\ntwo\n")
    assert re.fullmatch("[0-9a-f]{7,}", result_files._commit())
    code.write_text("two\n")
    assert re.fullmatch(r"[0-9a-f]{7,}\+", result_files._commit())
