"""The first minutes on a GPU: `python bench/first_minutes.py STAGE [STAGE ...]`, in order of what is learnt a second.

env          what the machine has
ceilings     copies and matrix products
ops          each op but attention at the size of Wan2.1 1.3B: off the float64 oracle by how much, and how fast
attention    the backends and the kernel's configurations at the size of Wan2.1 1.3B
tiny         the embedded model eager, captured, overlapped, both, and both again: the same frames?
whole        a random 1.3B through the whole line, 81 frames of 480×832 in 6 steps: eager, then in batches of 4 and
             captured, although the engine by itself captures smaller ones only
vae          the published VAE at random weights: a latent frame of 480×832 in each dtype, and off float32 by how much;
             its widest convolution as it is, over stacked frames, against cuDNN's in three dimensions
tests        the tests of the kernels, in as many processes as there are cores, at most 16

Each row is printed and appended to first_minutes_<device>.jsonl beside the other results as it is made; rows of
attention go where bench_kernels.py has its own. A part that fails is a row too, and the next one goes on.
SMALL=1 shrinks every size and takes a CPU, to find slips before a GPU's minutes are spent on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bench_kernels
import pytest
import result_files
import timing
import torch
from engine_runs import captured_at_any_size, random_transformer
from torch import Tensor, nn

from miga_engine import Engine, memory
from miga_engine.models.layers import set_tf32
from miga_engine.models.wan.dit import WAN_T2V_CONFIGS
from miga_engine.models.wan.vae import WanVAE, WanVAEConfig
from miga_engine.models.wan.vae_layers import CausalConv3d
from miga_engine.presets import PRESETS

DEVICE = result_files.DEVICE
IS_SMALL = result_files.IS_SMALL
PROMPT = "a red balloon over snowy hills at dawn"
PACKAGES = ("av", "diffusers", "ftfy", "matplotlib", "pytest_benchmark", "transformers", "triton", "xdist")
ATTENTION_OPS = ("frame_attention", "cross_attention", "block")
ON_CPU_ONLY = ("test_aot.py", "test_extension.py", "test_gelu.py", "test_linear.py")  # of tests/ops
_started = time.perf_counter()


def say(stage: str, **fields: Any) -> None:
    """Print a row and put it on the disk."""
    row = {"stage": stage, **fields, "at_s": round(time.perf_counter() - _started, 2)}
    print("; ".join(f"{key} {_short(value)}" for key, value in row.items() if key != "trace"), flush=True)
    result_files.write_line(result_files.RESULTS / f"first_minutes_{DEVICE}.jsonl", row, DEVICE)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def attempt(stage: str, part: str, run: Callable[[], dict[str, Any]]) -> None:
    """A row of what `run` returns, or of how it failed; raises what leaves no use of the GPU."""
    try:
        fields = run()
    except Exception as error:
        say(stage, part=part, failed=f"{type(error).__name__}: {str(error)[:500]}")
        result_files.fault(error, DEVICE, op=f"{stage}, {part}")
    else:
        say(stage, part=part, **fields)


def env() -> None:
    gpu: dict[str, Any] = {}
    if DEVICE == "cuda":
        facts = torch.cuda.get_device_properties(0)
        gpu = {"gpu": facts.name, "capability": f"{facts.major}.{facts.minor}", "memory_mib": facts.total_memory >> 20}
        gpu |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "processors": os.cpu_count()}
    tools = {name: shutil.which(name) or "" for name in ("git", "g++", "nvcc", "ncu", "compute-sanitizer")}
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    say("env", python=sys.version.split()[0], **gpu, tools=tools, missing=missing)


def ceilings() -> None:
    attempt("ceilings", "copy", lambda: {"gb_per_s": timing.copy_ceiling(DEVICE)})
    attempt("ceilings", "matmul", lambda: {"tflop_per_s": timing.matmul_ceiling(DEVICE, torch.bfloat16)})


def ops() -> None:
    for make in bench_kernels.CASES:
        if make.__name__ not in ATTENTION_OPS:
            attempt("ops", make.__name__, lambda make=make: _op(make))


@torch.inference_mode()
def _op(make: Callable[..., bench_kernels.Case]) -> dict[str, Any]:
    torch.manual_seed(0)
    case = make(torch.bfloat16, bench_kernels.SIZES)
    ours, eager, exact = (tensor.double() for tensor in case.results())
    errors = {"error": (ours - exact).abs().max().item(), "eager_error": (eager - exact).abs().max().item()}
    del ours, eager, exact
    case.check()
    ours_ms, eager_ms = (timing.milliseconds(run, DEVICE) for run in (case.run, case.rivals["eager"]))
    work = {"gb_per_s": case.num_bytes / ours_ms / 1e6, "tflop_per_s": case.num_flops / ours_ms / 1e9}
    return {"shape": case.shape, **errors, "ms": ours_ms, "x_eager": eager_ms / ours_ms, **work}


def attention() -> None:
    try:
        bench_kernels.measure_case(bench_kernels.frame_attention, torch.bfloat16)
    except Exception as error:
        result_files.fault(error, DEVICE, op="frame_attention")
    bench_kernels.sweep_configurations()


def tiny() -> None:
    sizes = {"height": 32, "width": 48, "num_inference_steps": 12} if IS_SMALL else {}
    for dtype in ("float32", "bfloat16"):
        engine = Engine.from_pretrained("tiny", DEVICE, dtype, attention="sdpa")
        miga = dataclasses.replace(engine.preset.miga, window_batch=2, stage2_steps=2)
        request = engine.resolve(PROMPT, num_frames=29 if IS_SMALL else 81, miga=miga, **sizes)
        expected: list[Tensor] = []

        def run(
            engine=engine, request=request, expected=expected, *, capture: bool, overlap_decode: bool
        ) -> dict[str, Any]:
            engine.capture = capture
            start = time.perf_counter()
            frames = torch.cat([chunk.frames.cpu() for chunk in engine.run(request, overlap_decode=overlap_decode)])
            seconds = time.perf_counter() - start
            if not expected:
                expected.append(frames)
            off = (frames.int() - expected[0].int()).abs().max().item()
            return {"seconds": seconds, "frames": len(frames), "is_equal": off == 0, "levels_off": off}

        for name, capture, overlap_decode in (
            ("eager", False, False),
            ("captured", True, False),
            ("overlapped", False, True),
            ("both", True, True),
            ("both again", True, True),
        ):
            attempt(
                "tiny",
                f"{name}, {dtype}",
                lambda run=run, c=capture, o=overlap_decode: run(capture=c, overlap_decode=o),
            )


class RandomText(nn.Module):
    """In place of the text encoder, whose weights nobody carries: embeddings that depend on the prompt alone."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=10**9)
        self.width, self.device = width, device

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        seed = 0 if ids.is_meta else int(ids.sum())
        embedded = torch.randn(*ids.shape, self.width, generator=torch.Generator().manual_seed(seed))
        return embedded.to(self.device, torch.bfloat16)


def random_engine(device: str) -> Engine:
    """Wan2.1 1.3B of random weights, with the tokenizer of the embedded model."""
    config, sizes = WAN_T2V_CONFIGS["1.3B"], WanVAEConfig()
    if IS_SMALL:
        config = dataclasses.replace(config, num_layers=1, dim=128, num_heads=1, ffn_dim=64, text_dim=8)
        sizes = dataclasses.replace(sizes, dim=8, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
    torch.manual_seed(0)
    with torch.device(device):
        vae = WanVAE(sizes).eval().requires_grad_(False)
    vae.to(device)
    tiny_bundle = Engine.from_pretrained("tiny", device, "bfloat16").bundle
    text = RandomText(config.text_dim, device)
    bundle = dataclasses.replace(
        tiny_bundle,
        transformer=random_transformer(config, device, torch.bfloat16),
        vae=vae,
        dtype=torch.bfloat16,
        facts=dataclasses.replace(tiny_bundle.facts, window_frames=21, text_len=config.text_len),
        open_text_encoder=lambda: text,
        extra={},
    )
    return Engine(bundle, PRESETS["wan2.1"], name="random", device=torch.device(device))


def whole() -> None:
    sizes = {"height": 32, "width": 32} if IS_SMALL else {"height": 480, "width": 832}
    sizes |= {"num_frames": 81, "num_inference_steps": 6}
    engine = random_engine(DEVICE)
    expected: list[Tensor] = []

    def run(*, window_batch: int, capture: bool) -> dict[str, Any]:
        engine.capture = capture
        options = {"stage2_steps": 2, "self_reflection": False, "window_batch": window_batch}
        request = engine.resolve(PROMPT, miga=dataclasses.replace(engine.preset.miga, **options), **sizes)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        first, frames = None, []
        with captured_at_any_size(capture), engine.run(request) as stream:
            for chunk in stream:
                frames.append(chunk.frames.cpu())
                first = first or time.perf_counter() - start
        video = torch.cat(frames)
        row = {"seconds": time.perf_counter() - start, "first_frame_s": first, "shape": tuple(video.shape)}
        row |= {"mean_level": video.float().mean().item(), "attention": stream.metadata().get("attention_choices", {})}
        if DEVICE == "cuda":
            row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            row["reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
        if expected:
            row["levels_off"] = (video.int() - expected[0].int()).abs().max().item()
        expected.append(video)
        return row

    for window_batch, is_captured in ((1, False), (4, True)):
        kind = "captured" if is_captured else "eager"
        attempt(
            "whole",
            f"{kind}, window_batch {window_batch}",
            lambda b=window_batch, c=is_captured: run(window_batch=b, capture=c),
        )
        attempt(
            "whole", f"estimate, window_batch {window_batch}", lambda b=window_batch: estimate(window_batch=b, **sizes)
        )


def estimate(*, window_batch: int, height: int, width: int, **options: Any) -> dict[str, Any]:
    """What the engine expects to need, to compare with the peak."""
    engine = random_engine("meta")
    changes = {"stage2_steps": 2, "self_reflection": False, "window_batch": window_batch}
    miga = dataclasses.replace(engine.preset.miga, **changes)
    request = engine.resolve(PROMPT, miga=miga, height=height, width=width, **options)

    engine.bundle = memory.longest_texts(engine.bundle)
    with memory.counting("cuda") as ledger:
        started = engine.start(request)
    stored = dict.fromkeys(("transformer", "VAE", "text encoder"), 0)
    need = memory.estimate(started, engine.bundle, ledger, stored=stored)
    return {"device_mib": need.device_total / 2**20, **{name: size / 2**20 for name, size in need.parts.items()}}


@torch.inference_mode()
def vae() -> None:
    sizes = dataclasses.replace(WanVAEConfig(), dim=8, num_res_blocks=1) if IS_SMALL else WanVAEConfig()
    height, width = (4, 6) if IS_SMALL else (60, 104)
    torch.manual_seed(0)
    latents = torch.randn(1, sizes.z_dim, 3, height, width, device=DEVICE)
    network = WanVAE(sizes).eval().requires_grad_(False).to(DEVICE)
    exact: list[Tensor] = []

    def decode(dtype: torch.dtype, allow_tf32: bool) -> dict[str, Any]:
        network.to(dtype).lay_out()
        set_tf32(network, allow_tf32)
        decoder = network.stream_decoder()
        frames = decoder.push(latents).float()
        if not exact:
            exact.append(frames)
        ms = timing.milliseconds(lambda: decoder.push(latents[:, :, -1:]), DEVICE)
        return {"ms": ms, "levels_off": 127.5 * (frames - exact[0]).abs().max().item()}

    forms = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}
    usable = {name: form for name, form in forms.items() if DEVICE == "cuda" or not form[1]}
    for name, form in usable.items():
        attempt("vae", f"decode, {name}", lambda form=form: decode(*form))
    for name, form in usable.items():
        attempt("vae", f"convolution, {name}", lambda form=form: _convolution(*form, 8 * height, 8 * width))


def _convolution(dtype: torch.dtype, allow_tf32: bool, height: int, width: int) -> dict[str, Any]:
    """Four frames behind two, 96 channels: milliseconds of the form in use, and of one 3-D convolution."""
    layer = CausalConv3d(96, 96, (3, 3, 3), padding=1).to(DEVICE, dtype)
    layer.lay_out()
    layer.allow_tf32 = allow_tf32
    frames = torch.randn(1, 6, height, width, 96, device=DEVICE).to(dtype)
    weight = layer.weight.contiguous(memory_format=torch.channels_last_3d)

    def in_three_dimensions() -> Tensor:
        return torch._convolution(
            frames.permute(0, 4, 1, 2, 3), weight, layer.bias, (1, 1, 1), (0, 1, 1), (1, 1, 1), False, (0, 0, 0), 1,
            False, False, True, allow_tf32,
        )  # fmt: skip

    off = (layer.taps(frames, 3).float() - in_three_dimensions().permute(0, 2, 3, 4, 1).float()).abs().max().item()
    stacked, whole = (timing.milliseconds(run, DEVICE) for run in (lambda: layer.taps(frames, 3), in_three_dimensions))
    return {"stacked_ms": stacked, "in_three_dimensions_ms": whole, "apart": off}


class _TestRows:
    """A row for each test that fails, and a count now and then: what is known when the limit ends the tests."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
        if report.failed:
            say("tests", part=report.nodeid, failed=str(report.longrepr)[-1500:])
        elif sum(self.counts.values()) % 25 == 0:
            say("tests", **self.counts)


def tests() -> None:
    folder = result_files.ROOT / "tests" / "ops"
    files = sorted(path for path in folder.glob("test_*.py") if path.name not in ON_CPU_ONLY)
    if IS_SMALL and DEVICE == "cpu":
        files = [folder / "test_frame_attention.py"]  # interpreted, the others take minutes
    rows = _TestRows()
    processes = 1 if IS_SMALL else min(os.cpu_count() or 1, 16)
    arguments = ["-q", "-p", "no:cacheprovider", "--benchmark-disable", "-n", str(processes), "--dist", "worksteal"]
    arguments += ["-k", "not cpp"]
    status = pytest.main([*arguments, *map(str, files)], plugins=[rows])
    say("tests", status=int(status), **rows.counts)


STAGES = {
    stage.__name__: stage for stage in (env, ceilings, ops, attention, tiny, whole, vae, tests)
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    options = parser.parse_args()
    if DEVICE == "cpu" and not IS_SMALL:
        parser.error("no GPU is visible to torch, and SMALL=1 was not given")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this with it ignored
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    for name in options.stages:
        start = time.perf_counter()
        try:
            with torch.no_grad():
                STAGES[name]()
        except KeyboardInterrupt:
            say(name, failed="interrupted: its time is over")
            sys.exit(130)
        except Exception as error:
            say(name, failed=f"{type(error).__name__}: {str(error)[:500]}")
            result_files.fault(error, DEVICE, op=name)
        say(name, done_after_s=time.perf_counter() - start)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
    sys.exit(result_files.exit_status())
