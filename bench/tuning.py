"""What a GPU is tuned by: `python bench/tuning.py [attention] [memory] [forward]`, all of them if none is named.

attention    frame_attention's configurations over a whole window's keys: those tuned, and others
memory       those of the ops that memory bandwidth bounds
forward      the kernels of one forward of Wan2.1 1.3B, by the time they take

Each configuration is first held to its op's error budget. Rows go where bench_kernels.py has its own, those of a
forward to forward_kernels_<device>.csv.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable
from unittest import mock

import bench_kernels
import result_files
import timing
import torch
from bench_forward import BATCH, CONFIGS, FRAMES, HEIGHT, WIDTH, ours, window
from engine_runs import random_transformer
from op_cases import HALF, SIZES, Case
from torch.profiler import ProfilerActivity

DEVICE = result_files.DEVICE
_TILES = [(8192, 16, 8), (8192, 16, 16), (16384, 16, 16), (4096, 16, 4), (4096, 16, 8), (2048, 1, 2), (2048, 1, 4)]
_BLOCKS = [(1024, 4), (2048, 8), (1024, 8), (512, 4), (512, 2), (4096, 8)]
TRIALS = {
    "norm_modulate": ("norm_modulate", "launch", _TILES),
    "residual_norm_modulate": ("norm_modulate", "launch_residual", _TILES),
    "qk_norm_rope": ("qk_norm_rope", "launch", _TILES),
    "sampler_update": ("sampler_update", "launch", _BLOCKS),
}
"""Of each op: its kernel's file and function, and configurations as its CONFIGS has them."""
FORWARD_COLUMNS = ("shape", "kernel", "calls", "ms", "share", *result_files.ENVIRONMENT)


def attention() -> None:
    from miga_engine.kernels.frame_attention import CONFIGS as TUNED
    from miga_engine.kernels.frame_attention import Config, _arch

    # small tiles, of which two or three programs share a multiprocessor, with other numbers of stages
    others = [Config(64, 64, 4, 3), Config(64, 64, 4, 4, True), Config(64, 32, 4, 3, True), Config(64, 32, 4, 5, True)]
    others += [Config(64, 32, 4, 4, True, is_overlapped=True), Config(128, 32, 8, 4, True)]
    bench_kernels.sweep_configurations([*TUNED[_arch(), 128], *others])


def memory() -> None:
    for make in bench_kernels.CASES:
        if make.__name__ in TRIALS:
            torch.manual_seed(0)
            with torch.inference_mode():
                _sweep(make(HALF, SIZES), *TRIALS[make.__name__])


def _sweep(case: Case, file: str, launch: str, configs: list[tuple[int, ...]]) -> None:
    kernel = importlib.import_module(f"miga_engine.kernels.{file}")
    contenders: dict[str, Callable[[], object]] = {}
    for config in configs:
        configured = functools.partial(getattr(kernel, launch), config=config)

        def run(call: Callable[[], object] = case.run, configured: Callable[..., object] = configured) -> object:
            with mock.patch.object(kernel, launch, configured):
                return call()

        name = f"triton {', '.join(map(str, config))}"
        try:
            run(case.check)
            contenders[name] = run
        except Exception as error:
            result_files.fault(error, DEVICE, op=case.op, implementation=name)
    work = {"num_bytes": case.num_bytes, "num_flops": case.num_flops}
    timing.compare(f"kernels_{DEVICE}", case.op, case.shape, case.dtype, contenders, DEVICE, **work)


@torch.inference_mode()
def forward() -> None:
    torch.manual_seed(0)
    network = random_transformer(CONFIGS["1.3B"], DEVICE, HALF)
    run = ours(network, *window(CONFIGS["1.3B"], BATCH, FRAMES, HEIGHT, WIDTH))
    timing.milliseconds(run, DEVICE, 1)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    name = f"self_{'device' if DEVICE == 'cuda' else 'cpu'}_time_total"
    found = sorted(((getattr(e, name) / 1e3, e.count, e.key) for e in profile.key_averages()), reverse=True)
    total = sum(ms for ms, _, _ in found)
    shape = f"1.3B, {BATCH}×{FRAMES}×{HEIGHT}×{WIDTH}, {total:.4g} ms"
    rows = [
        {"shape": shape, "kernel": key[:90], "calls": calls, "ms": f"{ms:.4g}", "share": f"{ms / total:.3f}"}
        for ms, calls, key in found[:30]
    ]
    for row in result_files.record(f"forward_kernels_{DEVICE}", FORWARD_COLUMNS, rows, DEVICE):
        print(f"{row['ms']:>9} ms {row['share']} {row['calls']:>5} × {row['kernel']}", flush=True)


PARTS = {part.__name__: part for part in (attention, memory, forward)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    for name in options.parts or PARTS:
        try:
            PARTS[name]()
        except Exception as error:
            result_files.fault(error, DEVICE, op=name)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
    sys.exit(result_files.exit_status())
