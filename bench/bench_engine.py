"""The engine end to end against a plain diffusers loop: `python bench/bench_engine.py [generate|import|iteration]`.

generate    the embedded model `tiny`, the same request by the engine and by baseline_diffusers.py in turns: video
            frames a second, time to the first frame, peak memory (each in a process of its own), and where the time
            goes. Before anything is timed the two are held against each other.
import      `from miga_engine import Engine` over `import torch`, each in fresh processes.
iteration   Stage-1 iterations at a published width with random weights: wall time over the sum of the forwards, and
            how often the host waited for the device. On a CPU choose a small picture and few blocks. With `--capture`
            the clock starts when a whole cycle of phases has brought no shape that is captured and was not yet.

The first two run if none is named. On a CPU: one thread, process time, the minimum of the runs; on a GPU wall time and
events, the minimum too. Rows are appended to bench/results/engine_<device>.csv. A part's column is its share of the
time: network, sampler, score, decode, and the rest, which is bookkeeping. Where forwards are captured as graphs, their
replays count as network; where decoding runs beside the network, the rest leaves it out. On a GPU a contender of
`generate` gets a row after its first run too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import result_files
import torch
from engine_runs import (
    PARTS,
    PROMPT,
    Clock,
    captured_at_any_size,
    captured_shapes,
    engine_parts,
    load,
    random_transformer,
    resolve,
    run_engine,
    run_loop,
    see_all_shapes,
    small_request,
    watched,
)

from miga_engine.models.wan.dit import WAN_T2V_CONFIGS
from miga_engine.noise import CounterNoise
from miga_engine.presets import PRESETS
from miga_engine.prompts import PromptTimeline
from miga_engine.runtime.network import PromptedTransformer
from miga_engine.runtime.stages import VideoRun
from miga_engine.schedule import make_schedule

COLUMNS = (
    "what", "model", "request", "dtype", "implementation", "seconds", "video_frames_per_s", "first_frame_s",
    "peak_mib", "run_mib", "reserved_mib", *PARTS, "rest", "host_syncs", "x_baseline", *result_files.ENVIRONMENT,
)  # fmt: skip


def generate(
    device: str, dtypes: list[str], num_frames: int, num_runs: int, with_peaks: bool, window_batch: int
) -> None:
    for dtype in dtypes:
        engine = load(device, dtype)
        request = resolve(engine, num_frames, window_batch)
        best: dict[str, dict[str, float]] = {}

        def run(name: str, runner: Callable[[], dict[str, float]], best: dict[str, dict[str, float]] = best) -> None:
            result = runner()
            if name not in best or result["seconds"] < best[name]["seconds"]:
                best[name] = result

        def row(name: str, dtype: str = dtype, best: dict[str, dict[str, float]] = best) -> dict[str, str]:
            said = f"{num_frames} frames" + (f", {window_batch} windows together" if window_batch > 1 else "")
            row = {"what": "generate", "model": "tiny", "request": said, "dtype": dtype}
            row |= {"implementation": name, **{key: f"{value:.4g}" for key, value in best[name].items()}}
            row["video_frames_per_s"] = f"{num_frames / best[name]['seconds']:.4g}"
            if "diffusers" in best:
                row["x_baseline"] = f"{best['diffusers']['seconds'] / best[name]['seconds']:.3f}"
            return row

        runners = {"engine": lambda engine=engine, request=request: run_engine(engine, request)}
        is_first_saved = device == "cuda" or result_files.IS_SMALL
        if is_first_saved:
            run("engine", runners["engine"])
            _report([row("engine")], device)
        if result_files.has_diffusers():
            import baseline_diffusers

            try:
                loop = baseline_diffusers.DiffusersLoop(engine)
                difference = baseline_diffusers.check(engine, loop, small_request(engine, window_batch=window_batch))
            except Exception as error:  # then it is no rival
                result_files.fault(error, device, op="generate", dtype=dtype, implementation="diffusers")
            else:
                print(f"{dtype}: latents of engine and diffusers loop compared, {difference:.1e}", flush=True)
                runners["diffusers"] = lambda loop=loop, request=request: run_loop(loop, request)
                if is_first_saved:
                    run("diffusers", runners["diffusers"])
                    _report([row("diffusers")], device)
        for _ in range(num_runs):
            for name, runner in runners.items():
                run(name, runner)
        rows = [row(name) for name in runners]
        if with_peaks:
            rows = [row | _peak(row["implementation"], device, dtype, num_frames, window_batch) for row in rows]
        _report(rows, device)


def _peak(name: str, device: str, dtype: str, num_frames: int, window_batch: int) -> dict[str, str]:
    """Peak memory of one run in a fresh process."""
    arguments = [__file__, "peak", "--device", device, "--dtypes", dtype, "--frames", str(num_frames)]
    arguments += ["--window-batch", str(window_batch)]
    return json.loads(_fresh_process(*arguments, "--implementation", name))


def _fresh_process(*arguments: str) -> str:
    """What Python prints, run with these arguments where this process finds its modules."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def peak(device: str, dtype: str, num_frames: int, implementation: str, window_batch: int) -> dict[str, str]:
    """MiB of this process, or of torch's allocator on a GPU: at most, and above what the loaded models take."""
    engine = load(device, dtype)
    request = resolve(engine, num_frames, window_batch)
    engine.bundle.encode_prompts([PROMPT])  # reads the text encoder
    run: Callable[[], object]
    if implementation == "diffusers":
        import baseline_diffusers

        loop = baseline_diffusers.DiffusersLoop(engine)
        run = functools.partial(loop.video, request)
    else:
        # Frames leave as they come.
        run = functools.partial(sum, (len(chunk.frames) for chunk in engine.run(request)))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated() / 2**20
        run()
        most, reserved = torch.cuda.max_memory_allocated() / 2**20, torch.cuda.max_memory_reserved() / 2**20
    else:
        loaded = result_files.resident_mib()
        run()
        most, reserved = result_files.peak_resident_mib(), None
    sizes = {"peak_mib": f"{most:.1f}", "run_mib": f"{most - loaded:.1f}"}
    return sizes | ({} if reserved is None else {"reserved_mib": f"{reserved:.1f}"})


def import_time(device: str, num_runs: int) -> None:
    """Least seconds of the two imports, in turns."""
    statements = {"torch": "import torch", "miga_engine": "from miga_engine import Engine"}
    best = dict.fromkeys(statements, float("inf"))
    for _ in range(num_runs):
        for name, statement in statements.items():
            code = f"import time; t = time.process_time(); {statement}; print(time.process_time() - t)"
            best[name] = min(best[name], float(_fresh_process("-c", code)))
    _report(
        [{"what": "import", "implementation": name, "seconds": f"{value:.4g}"} for name, value in best.items()], device
    )
    print(f"over torch: {best['miga_engine'] - best['torch']:+.3f} s")


def iteration(device: str, dtype: str, options: argparse.Namespace) -> None:
    """Stage-1 iterations of the preset wan2.1 with fewer steps, two of them in Stage 2, on random weights."""
    config = WAN_T2V_CONFIGS[options.model]
    config = dataclasses.replace(config, num_layers=options.blocks or config.num_layers)
    transformer = random_transformer(config, device, getattr(torch, dtype))
    bundle = dataclasses.replace(load(device, dtype).bundle, transformer=transformer, dtype=transformer.dtype, extra={})
    preset = PRESETS["wan2.1"]
    schedule = make_schedule(preset.sampling.solver, options.steps, preset.sampling.shift)
    miga = dataclasses.replace(preset.miga, stage2_steps=2, self_reflection=False, guidance_anchor=False)
    shape = (config.in_dim, options.height // 8, options.width // 8)
    timeline = PromptTimeline({0: PROMPT}, 0, bundle.first_video_frame)
    texts = timeline.encode("", lambda _: torch.randn(1, 64, config.text_dim, device=device))
    network = PromptedTransformer(bundle, texts, schedule.timesteps, {})
    stage = ""

    def emit(kind: str, **fields: Any) -> None:
        nonlocal stage
        stage = fields["stage"] if kind == "stage" else stage

    run = VideoRun(
        network,
        schedule,
        miga,
        window_frames=bundle.window_frames,
        frame_shape=shape,
        noise=CounterNoise(0, shape, torch.device(device)),
        num_frames=None,
        guidance_scale=preset.sampling.guidance_scale,
        device=torch.device(device),
        emit=emit,
        capture=options.capture,
    )
    with torch.no_grad(), captured_at_any_size(options.capture):
        while stage != "stage1":
            run.tick()  # the last of them is the first iteration, which does not count
        if options.capture:
            see_all_shapes(run)
        num_captured = captured_shapes(run)
        clock = Clock(device)
        with watched(clock, *engine_parts(transformer)):
            for _ in range(options.iterations):
                run.tick()
            seconds = clock.elapsed()
        num_captured = captured_shapes(run) - num_captured
        host_syncs = _host_syncs(run.tick) if device == "cuda" else None
    shares = clock.shares(seconds)
    queue = miga.zigzag_width * (options.steps - 1)
    row = {"what": "iteration", "model": f"{options.model}, {config.num_layers} blocks", "dtype": dtype}
    row |= {"request": f"{options.height}×{options.width}, {queue} frames queued"}
    row |= {"implementation": "engine captured" if options.capture else "engine"}
    if num_captured:
        row["implementation"] += f", {num_captured} shapes meanwhile"
    row |= {"seconds": f"{seconds / options.iterations:.4g}"}
    row |= {part: f"{share:.4g}" for part, share in shares.items()}
    row["host_syncs"] = "" if host_syncs is None else str(host_syncs)
    _report([row], device)
    print(f"wall of an iteration ÷ sum of its forwards: {1 / shares['network']:.4f}")


def _host_syncs(tick: Callable[[], object]) -> int:
    """How often the host waits for the device during a tick."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tick()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _report(rows: list[dict[str, str]], device: str) -> None:
    for row in result_files.record(f"engine_{device}", COLUMNS, rows, device):
        text = [f"{key} {value}" for key, value in row.items() if value != "" and key not in result_files.ENVIRONMENT]
        print("; ".join(text), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ("generate", "import", "iteration", "peak")
    parser.add_argument("what", nargs="*", metavar="WHAT", help="generate, import or iteration")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--frames", type=int, default=81, help="video frames of generate")
    parser.add_argument("--runs", type=int, default=3, help="runs of each contender of generate")
    parser.add_argument("--window-batch", type=int, default=1, help="windows of generate that go together")
    parser.add_argument("--no-peaks", action="store_true", help="leave the memory out, which runs everything once more")
    parser.add_argument("--imports", type=int, default=7, help="fresh processes of each import")
    parser.add_argument("--implementation", choices=("engine", "diffusers"), default="engine", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=tuple(WAN_T2V_CONFIGS), default="1.3B", help="width of iteration")
    parser.add_argument("--blocks", type=int, help="of iteration (default: the model's)")
    parser.add_argument("--height", type=int, default=480, help="pixels of iteration")
    parser.add_argument("--width", type=int, default=832, help="pixels of iteration")
    parser.add_argument(
        "--steps", type=int, default=12, help="sampling steps of iteration; they set the queue's length"
    )
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--capture", action="store_true", help="iteration: replay forwards as CUDA graphs, at any size")
    options = parser.parse_args()
    if unknown := set(options.what) - set(choices):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}: choose from {', '.join(choices[:3])}")
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.what == ["peak"]:
        kind = (options.device, options.dtypes[0], options.frames, options.implementation, options.window_batch)
        print(json.dumps(peak(*kind)))
        return
    for what in options.what or ("generate", "import"):
        if what == "generate":
            runs, batch = options.runs, options.window_batch
            generate(options.device, options.dtypes, options.frames, runs, not options.no_peaks, batch)
        elif what == "import":
            import_time(options.device, options.imports)
        else:
            iteration(options.device, options.dtypes[-1], options)


if __name__ == "__main__":
    main()
    sys.exit(result_files.exit_status())
