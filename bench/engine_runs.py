"""Runs of the engine and of its rival, timed in all and inside their parts: what bench_engine.py compares."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import result_files
import torch

from miga_engine import Engine, ops
from miga_engine.models.wan.dit import WanDiT
from miga_engine.models.wan.vae import StreamDecoder
from miga_engine.request import Request
from miga_engine.runtime import capture
from miga_engine.runtime.stages import VideoRun

PARTS = ("network", "sampler", "score", "decode")
PROMPT = "a red balloon over snowy hills at dawn"


class Clock:
    """Seconds of a run on its device, in all and inside its parts."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._now = time.perf_counter if device == "cuda" else time.process_time
        self._spans: list[tuple[str, Any, Any]] = []
        self._start = self.now()

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self._now()

    def elapsed(self) -> float:
        return self.now() - self._start

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time from now on counts as `part`."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.device == "cuda" and torch.cuda.is_current_stream_capturing():
                return function(*args, **kwargs)
            start = self._mark()
            result = function(*args, **kwargs)
            self._spans.append((part, start, self._mark()))
            return result

        return run

    def shares(self, seconds: float) -> dict[str, float]:
        """By part, of `seconds`; the rest too."""
        sums = dict.fromkeys(PARTS, 0.0)
        for part, start, stop in self._spans:
            sums[part] += start.elapsed_time(stop) / 1e3 if self.device == "cuda" else stop - start
        shares = {part: value / seconds for part, value in sums.items()}
        beside = shares["decode"] if self.device == "cuda" else 0
        return {**shares, "rest": 1 - sum(shares.values()) + beside}

    def _mark(self) -> Any:
        if self.device != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextlib.contextmanager
def watched(clock: Clock, *targets: tuple[object, str, str]) -> Iterator[None]:
    """For its duration the targets (owner, attribute, part) count as their parts."""
    with contextlib.ExitStack() as stack:
        for owner, name, part in targets:
            stack.enter_context(mock.patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        yield


def engine_parts(transformer: WanDiT) -> list[tuple[object, str, str]]:
    parts: list[tuple[object, str, str]] = [
        (transformer, "forward", "network"),
        (ops, "sampler_update", "sampler"),
        (ops, "consistency_score", "score"),
        (StreamDecoder, "push", "decode"),
    ]
    return parts + ([(torch.cuda.CUDAGraph, "replay", "network")] if torch.cuda.is_available() else [])


def loop_parts(loop: Any) -> list[tuple[object, str, str]]:
    return [(loop, "forward", "network"), (loop, "step", "sampler"), (loop, "decode", "decode")]


def run_engine(engine: Engine, request: Request) -> dict[str, float]:
    """One video: seconds, seconds to the first frame, shares of the time."""
    clock = Clock(engine.device.type)
    first = None
    with watched(clock, *engine_parts(engine.bundle.transformer)):
        for chunk in engine.run(request):
            chunk.frames.cpu()
            first = first or clock.elapsed()
    seconds = clock.elapsed()
    return {"seconds": seconds, "first_frame_s": first or seconds, **clock.shares(seconds)}


def run_loop(loop: Any, request: Request) -> dict[str, float]:
    """The same by the diffusers loop, whose first frame comes with the last."""
    clock = Clock(loop.device.type)
    with watched(clock, *loop_parts(loop)):
        loop.video(request)
    seconds = clock.elapsed()
    return {"seconds": seconds, "first_frame_s": seconds, **clock.shares(seconds)}


def load(device: str, dtype: str) -> Engine:
    # The rival attends by SDPA.
    return Engine.from_pretrained("tiny", device, dtype, attention="sdpa")


def resolve(engine: Engine, num_frames: int, window_batch: int = 1, **options: Any) -> Request:
    """The request of the comparison: the preset without what the loop does not know.

    The batch is given, so that it does not depend on the memory that is free when the engine starts.
    """
    miga = options.pop("miga", engine.preset.miga)
    miga = dataclasses.replace(
        miga, self_reflection=False, guidance_anchor=False, past_context=False, history_guidance="off",
        window_batch=window_batch,
    )  # fmt: skip
    sizes = {"height": 32, "width": 48, "num_inference_steps": 8} if result_files.IS_SMALL else {}
    return engine.resolve(PROMPT, num_frames=num_frames, **{**sizes, "miga": miga, **options})


def small_request(engine: Engine, **options: Any) -> Request:
    """A short run through every stage, for the check."""
    miga = dataclasses.replace(engine.preset.miga, stage2_steps=2, refine_steps=2)
    sizes = {"num_frames": 61, "height": 32, "width": 48, "num_inference_steps": 8}
    return resolve(engine, **{**sizes, "miga": miga, **options})


@contextlib.contextmanager
def captured_at_any_size(is_wanted: bool) -> Iterator[None]:
    """Lift the bound above which the engine captures nothing, to see what it saves or costs."""
    bound = sys.maxsize if is_wanted else capture.CAPTURE_POSITIONS
    with mock.patch.object(capture, "CAPTURE_POSITIONS", bound):
        yield


def captured_shapes(run: VideoRun) -> int:
    """How many graphs a run has captured, and shapes that it would capture when they come again."""
    graphs = run.denoiser._graphs
    return 0 if graphs is None else len(graphs._captured) + len(graphs._seen)


def see_all_shapes(run: VideoRun) -> None:
    """Tick through cycles of phases until one captures nothing new, three at most; once where nothing is captured."""
    for _ in range(3):
        before = captured_shapes(run)
        run.tick()
        if captured_shapes(run) == 0:
            return
        for _ in range(run.stride - 1):
            run.tick()
        if captured_shapes(run) == before:
            return


def random_transformer(config: Any, device: str, dtype: torch.dtype) -> WanDiT:
    """A network of torch's initial weights, its dtypes as a loader leaves them."""
    with torch.device(device):
        transformer = WanDiT(config)
    for prefix, module in transformer.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            stored = torch.float32 if WanDiT.keeps_fp32(f"{prefix}.{name}".lstrip(".")) else dtype
            module.register_parameter(name, torch.nn.Parameter(parameter.detach().to(stored), requires_grad=False))
    return transformer.eval()
