"""What the benchmarks stand on: the rival makes the engine's video, every case is right at a small size, results keep
their columns and survive what fails, the table is theirs."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import ROOT

CASES = ("block", "frame_attention", "norm_modulate", "residual_norm_modulate", "qk_norm_rope", "cross_attention")
CASES += ("sampler_update", "linear_gelu", "consistency_score")


@pytest.fixture(autouse=True)
def _bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import result_files

    monkeypatch.setattr(result_files, "RESULTS", tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"num_frames": 21, "guidance_scale": 1.5}], ids=["long", "shorter than a clip"]
)
def test_diffusers_loop_makes_the_engines_latents_and_video(options: dict) -> None:
    import baseline_diffusers
    import bench_engine

    engine = bench_engine.load("cpu", "float32")
    loop = baseline_diffusers.DiffusersLoop(engine)
    request = bench_engine.small_request(engine, **options)
    ours, frames = baseline_diffusers.engine_latents(engine, request)
    theirs = loop.latents(request)
    assert frames.shape[0] == request.num_frames
    assert ours.shape[0] == theirs.shape[0] == engine.bundle.num_latent_frames(request.num_frames)
    assert (ours - theirs).abs().max() <= baseline_diffusers.TOLERANCE * theirs.abs().max()


def test_check_refuses_another_video() -> None:
    import baseline_diffusers
    import bench_engine

    engine = bench_engine.load("cpu", "float32")
    loop = baseline_diffusers.DiffusersLoop(engine)
    request = bench_engine.small_request(engine, num_frames=21)
    assert baseline_diffusers.check(engine, loop, request) <= baseline_diffusers.TOLERANCE
    loop.transformer.proj_out.bias.add_(1e-3)
    with pytest.raises(AssertionError, match=r"latents of engine and diffusers loop differ by \d.*: not timed"):
        baseline_diffusers.check(engine, loop, request)


def test_half_precision_is_held_to_the_float32_latents() -> None:
    import baseline_diffusers
    import bench_engine

    engine = bench_engine.load("cpu", "bfloat16")
    loop = baseline_diffusers.DiffusersLoop(engine)
    kept = {p.dtype for name, p in loop.transformer.named_parameters() if "norm2" in name or "scale_shift" in name}
    assert (loop.transformer.blocks[0].attn1.to_q.weight.dtype, kept) == (torch.bfloat16, {torch.float32})
    assert 0 < baseline_diffusers.check(engine, loop, bench_engine.small_request(engine, num_frames=21)) < 0.1


def test_parts_of_a_run_add_up() -> None:
    import bench_engine

    engine = bench_engine.load("cpu", "float32")
    result = bench_engine.run_engine(engine, bench_engine.small_request(engine, num_frames=21))
    assert sum(result[part] for part in (*bench_engine.PARTS, "rest")) == pytest.approx(1)
    assert all(result[part] > 0 for part in ("network", "sampler", "decode", "rest"))
    assert result["network"] > 0.5
    assert 0 < result["first_frame_s"] <= result["seconds"]


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
        with pytest.raises(ValueError, match="the README holds no <!-- bench --> followed by <!-- /bench -->"):
            table.insert(broken, block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_and_holds_its_budget(name: str, dtype: torch.dtype) -> None:
    import bench_kernels

    assert [make.__name__ for make in bench_kernels.CASES] == list(CASES)
    torch.manual_seed(0)
    with torch.inference_mode():
        case = getattr(bench_kernels, name)(dtype, bench_kernels.SMALL)
        case.check()
        case.run()
        case.rivals["eager"]()
    assert bool(case.num_bytes) != bool(case.num_flops)
    assert (name == "cross_attention") <= bool(case.num_bytes)


def test_a_case_that_is_wrong_is_not_measured() -> None:
    import bench_kernels

    case = bench_kernels.norm_modulate(torch.float32, bench_kernels.SMALL)
    ours, eager, exact = case.results()
    case.results = lambda: (ours + 1e-4, eager, exact)
    with pytest.raises(AssertionError, match="norm_modulate leaves its error budget: nothing is measured"):
        case.check()


def test_configurations_have_names_of_their_own() -> None:
    import bench_kernels
    from miga_engine.kernels.frame_attention import CONFIGS

    for configs in CONFIGS.values():
        assert len({bench_kernels.configuration_name(config) for config in configs}) == len(configs)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("is_saved_at_once", [False, True])
def test_a_contender_that_fails_costs_no_other_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_saved_at_once: bool
) -> None:
    import timing

    monkeypatch.setattr(timing, "IS_SMALL", is_saved_at_once)
    seen: list[list[str]] = []

    def fail() -> None:
        path = tmp_path / "kernels_cpu.csv"
        seen.append([row["implementation"] for row in _rows(path)] if path.exists() else [])
        raise ValueError("it broke")

    contenders: dict[str, Callable[[], object]] = {"op": lambda: sum(range(1000)), "broken": fail, "eager": list}
    samples = timing.compare(
        "kernels_cpu", "op", "2", torch.float32, contenders, "cpu", repeats=3, notes={"op": "told"}, num_bytes=8
    )
    assert list(samples) == ["op", "eager"]
    assert seen == [["op"] if is_saved_at_once else []]
    rows = _rows(tmp_path / "kernels_cpu.csv")
    assert [row["implementation"] for row in rows] == ["op", "eager"] * (1 + is_saved_at_once)
    assert [row["note"] for row in rows[-2:]] == ["told", ""]
    assert float(rows[-2]["x_eager"]) > 0
    assert rows[-1]["x_eager"] == "1.00"
    assert all(row["note"].endswith("first look") for row in rows[:-2])
    (fault,) = map(json.loads, (tmp_path / "faults_cpu.jsonl").read_text().splitlines())
    assert (fault["implementation"], fault["failed"]) == ("broken", "ValueError: it broke")
    assert "it broke" in fault["trace"]
    assert fault["device"] == rows[0]["device"]


def test_what_leaves_no_use_of_the_gpu_is_raised_once_it_is_written(tmp_path: Path) -> None:
    import result_files

    with pytest.raises(RuntimeError, match="illegal memory access"):
        result_files.fault(RuntimeError("CUDA error: an illegal memory access was encountered"), "cpu", op="x")
    result_files.fault(RuntimeError("CUDA error: out of memory"), "cpu", op="y")
    assert len((tmp_path / "faults_cpu.jsonl").read_text().splitlines()) == 2
    assert result_files.exit_status() == 1


class _PretendedGpu:
    """Graphs and events of which each call takes the time that the test gives it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import timing

        self.now = 0.0
        self.captured: list[float] | None = None
        self.streams: list[object] = []
        self.modes: list[str] = []
        gpu = self

        class Graph:
            def replay(self) -> None:
                gpu.now += sum(self.times)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, stop: "Event") -> float:
                return stop.at - self.at

        @contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            gpu.captured = []
            try:
                yield
            finally:
                graph.times, gpu.captured = gpu.captured, None

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
        monkeypatch.setattr(torch.cuda, "set_stream", self.streams.append)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.modes.append)
        monkeypatch.setattr(timing, "_overwrite_caches", lambda: self.take(0.08))

    def take(self, time: float) -> None:
        if self.captured is None:
            self.now += time
        else:
            self.captured.append(time)


def test_short_calls_are_timed_by_replaying_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    import timing

    gpu = _PretendedGpu(monkeypatch)
    calls = []

    def short() -> None:
        calls.append(gpu.captured is not None)
        gpu.take(0.01 if gpu.captured is not None else 0.05)  # a launch by itself takes longer than its work

    sampler = timing.Sampler(short, "cuda")
    assert (sampler(), sampler.note) == (pytest.approx(0.01), "by graph")
    assert calls == [False] * 3 + [True] * timing.GRAPH_CALLS
    long = timing.Sampler(lambda: gpu.take(0.3), "cuda")
    assert (long(), long.note) == (pytest.approx(0.3), "")

    def waits() -> None:
        if gpu.modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        gpu.take(0.05)

    def allocates() -> None:
        if gpu.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        gpu.take(0.05)

    for run, streams in ((waits, []), (allocates, ["stream"])):
        uncaptured = timing.Sampler(run, "cuda")
        assert (uncaptured(), uncaptured.note) == (pytest.approx(0.05), "")
        assert (gpu.streams, gpu.modes[-1], gpu.captured) == (streams, "default", None)
    assert timing.milliseconds(lambda: gpu.take(0.4), "cuda") == pytest.approx(0.4)


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


def test_clock_of_captured_iterations_starts_when_every_shape_was_seen() -> None:
    import bench_engine

    graphs = SimpleNamespace(_seen=set(), _captured={})
    run = SimpleNamespace(stride=4, denoiser=SimpleNamespace(_graphs=graphs), ticks=0)

    def tick() -> None:
        shape = run.ticks % run.stride
        if shape in graphs._seen:
            graphs._captured[shape] = None
        graphs._seen.add(shape)
        run.ticks += 1

    run.tick = tick
    bench_engine.see_all_shapes(run)
    assert (run.ticks, bench_engine.captured_shapes(run)) == (3 * run.stride, 2 * run.stride)
    bench_engine.see_all_shapes(run)
    assert run.ticks == 4 * run.stride
    run.denoiser._graphs = None  # as of a run that captures nothing
    bench_engine.see_all_shapes(run)
    assert run.ticks == 4 * run.stride + 1


def test_requests_of_the_comparison_name_their_batch() -> None:
    import bench_engine

    engine = bench_engine.load("cpu", "float32")
    for request in (bench_engine.resolve(engine, 21), bench_engine.small_request(engine)):
        assert request.miga.window_batch == 1
    assert bench_engine.small_request(engine, window_batch=4).miga.window_batch == 4


@pytest.mark.parametrize(("command", "most"), [("first", 300), ("second", 400)])
def test_limits_of_a_command_add_up(command: str, most: int) -> None:
    """Each stage may take its limit and the seconds between interrupt and kill."""
    plan = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", command, "--plan"], capture_output=True, text=True, check=True
    )
    stages = dict(line.split() for line in plan.stdout.splitlines())
    assert sum(sum(map(int, limit.split("+"))) for limit in stages.values()) <= most
    assert list(stages)[-1] == "specialised"
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
    for stage in ("env", "ops", "attention", "tiny", "whole", "tests", "specialised"):
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
    assert {"op", "eager"} <= {row["implementation"] for row in _rows(tmp_path / "kernels_cpu.csv")}
    # Triton 3.6's interpreter fails in loops with numpy from 2.4 on: then that is all, and it is told.
    faults = (tmp_path / "faults_cpu.jsonl").read_text().splitlines() if run.returncode else []
    assert (run.returncode, bool(faults)) in ((0, False), (1, True))
    assert all(json.loads(fault)["implementation"].startswith("triton") for fault in faults)


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
        assert [row["op"] for row in _rows(tmp_path / "kernels_cuda.csv")] == ["op"] * count
        assert len((tmp_path / "faults_cuda.jsonl").read_text().splitlines()) == count
    (tmp_path / "kernels_cuda.csv").write_text("op,other\n")
    with pytest.raises(ValueError, match="move it away or convert it"):
        result_files.take_over(tmp_path / "there")
