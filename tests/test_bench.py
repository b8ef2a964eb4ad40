"""What the benchmarks stand on: the rival makes the engine's video, results keep their columns, the table is theirs."""

import csv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import measure

    monkeypatch.setattr(measure, "RESULTS", tmp_path)


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
    import measure

    samples = {"op": [1.0, 2.0], "eager": [3.0, 4.0]}
    for _ in range(2):
        measure.append("kernels_cpu", "op", "2×3", torch.float32, samples, "cpu", num_bytes=100, ceiling=2.0)
    with (tmp_path / "kernels_cpu.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    with (ROOT / "bench" / "results" / "kernels_cpu.csv").open(newline="") as stream:
        assert header == next(csv.reader(stream))
    assert len(rows) == 4
    row = dict(zip(header, rows[0], strict=True))
    assert (row["min_ms"], row["x_eager"], row["of_ceiling"], row["x_loop"]) == ("1", "3.00", "0.000", "")
    with pytest.raises(ValueError, match=r"kernels_cpu\.csv has the columns .*: move it away or convert it"):
        measure.record("kernels_cpu", ("op", *measure.ENVIRONMENT), [{"op": "other"}], "cpu")


def test_table_shows_the_newest_results(tmp_path: Path) -> None:
    import bench_engine
    import bench_memory
    import measure
    import table

    with pytest.raises(ValueError, match="holds no results of the engine: run `make bench` first"):
        table.table(tmp_path)
    for speed, ratio in ((1, "1.5"), (9, "3.21")):
        run = {"what": "generate", "model": "tiny", "request": "81 frames", "dtype": "float32", "rest": "0.0123"}
        rows = [
            {**run, "implementation": "engine", "video_frames_per_s": speed, "run_mib": 10, "x_baseline": ratio},
            {**run, "implementation": "diffusers", "video_frames_per_s": 2, "run_mib": 25, "x_baseline": 1},
        ]
        measure.record("engine_cpu", bench_engine.COLUMNS, rows, "cpu")
    rows = [
        {"what": "import", "implementation": name, "seconds": s} for name, s in (("torch", 2), ("miga_engine", 2.5))
    ]
    measure.record("engine_cpu", bench_engine.COLUMNS, rows, "cpu")
    lengths = [(1000, 200, 1), (5000, 201, 1.005), (10_000, 203, 1.015)]
    rows = [{"model": "narrow", "latent_frames": n, "peak_mib": mib, "x_1000": x} for n, mib, x in lengths]
    measure.record("memory_cpu", bench_memory.COLUMNS, rows, "cpu")
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
