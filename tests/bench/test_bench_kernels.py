"""Every case is right at a small size, and is timed by itself: one that fails costs no other its row."""

import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from result_rows import rows_of

pytestmark = pytest.mark.usefixtures("own_results")
CASES = ("block", "frame_attention", "norm_modulate", "residual_norm_modulate", "qk_norm_rope", "cross_attention")
CASES += ("sampler_update", "linear_gelu", "guidance_dots", "consistency_score")


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


def test_trials_are_of_configurations_that_kernels_take() -> None:
    import tuning

    cases = {make.__name__ for make in tuning.bench_kernels.CASES}
    for op, (file, launch, configs) in tuning.TRIALS.items():
        kernel = importlib.import_module(f"miga_engine.kernels.{file}")
        assert op in cases
        default = inspect.signature(getattr(kernel, launch)).parameters["config"].default
        assert configs[0] == kernel.CONFIGS[0] == default
        assert len(set(configs)) == len(configs)


@pytest.mark.slow
@pytest.mark.parametrize("is_saved_at_once", [False, True])
def test_a_contender_that_fails_costs_no_other_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_saved_at_once: bool
) -> None:
    import timing

    monkeypatch.setattr(timing, "IS_SMALL", is_saved_at_once)
    seen: list[list[str]] = []

    def fail() -> None:
        path = tmp_path / "kernels_cpu.csv"
        seen.append([row["implementation"] for row in rows_of(path)] if path.exists() else [])
        raise ValueError("it broke")

    contenders: dict[str, Callable[[], object]] = {"op": lambda: sum(range(1000)), "broken": fail, "eager": list}
    samples = timing.compare(
        "kernels_cpu", "op", "2", torch.float32, contenders, "cpu", repeats=3, notes={"op": "told"}, num_bytes=8
    )
    assert list(samples) == ["op", "eager"]
    assert seen == [["op"] if is_saved_at_once else []]
    rows = rows_of(tmp_path / "kernels_cpu.csv")
    assert [row["implementation"] for row in rows] == ["op", "eager"] * (1 + is_saved_at_once)
    assert [row["note"] for row in rows[-2:]] == ["told", ""]
    assert float(rows[-2]["x_eager"]) > 0
    assert rows[-1]["x_eager"] == "1.00"
    assert all(row["note"].endswith("first look") for row in rows[:-2])
    (fault,) = map(json.loads, (tmp_path / "faults_cpu.jsonl").read_text().splitlines())
    assert (fault["implementation"], fault["failed"]) == ("broken", "ValueError: it broke")
    assert "it broke" in fault["trace"]
    assert fault["device"] == rows[0]["device"]


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
