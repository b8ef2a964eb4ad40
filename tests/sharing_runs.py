"""Streams that share an engine, each in a thread, and the networks of such."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import golden_model
import torch
from torch import Tensor

from miga_engine.engine import Engine
from miga_engine.resolve import schedule_of, timeline_of
from miga_engine.runtime.network import Batch, PromptedTransformer
from miga_engine.runtime.sharing import SharedTransformer, Sharing
from miga_engine.runtime.stream import Stream

OPTIONS = {"height": 32, "width": 32, "num_inference_steps": 8, "miga": golden_model.MIGA}
LEVELS = 2
"""Of 255: what another batch of windows changes at most in these runs, as with `window_batch`."""
LONG_S = 60.0
"""Whoever waits so long here is held up by another."""


def frames(stream: Stream, *, slow: float = 0.0) -> Tensor:
    with stream:
        chunks = []
        for chunk in stream:
            chunks.append(chunk.frames)
            time.sleep(slow)
    return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)


def apart(one: Tensor, other: Tensor) -> int:
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


def together(*works: Callable[[], Any]) -> list[Any]:
    """What they give, each in a thread of its own."""
    pool = ThreadPoolExecutor(len(works))
    try:
        futures: list[Future[Any]] = [pool.submit(work) for work in works]
        return [future.result(timeout=LONG_S) for future in futures]
    finally:
        pool.shutdown(wait=False)


def is_there() -> bool:
    return any(thread.name == "miga-sharing" for thread in threading.enumerate())


def until(condition: Callable[[], bool], seconds: float = LONG_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def sharing_of(engine: Engine) -> Sharing:
    assert engine._sharing is not None
    return engine._sharing


def networks(engine: Engine) -> tuple[PromptedTransformer, SharedTransformer, SharedTransformer, Sharing]:
    """One of two prompts, and two of one each that share."""
    request = engine.resolve({0: "a red balloon", 40: "a kite at sea"}, num_frames=80, **OPTIONS)
    sharing = sharing_of(engine.shared())
    timesteps = schedule_of(request).network_timesteps

    def texts(prompt: dict[int, str]) -> Any:
        timeline = timeline_of(dataclasses.replace(request, prompt=prompt), engine.bundle)
        return timeline.encode("", engine.bundle.encode_prompts)

    both = PromptedTransformer(engine.bundle, texts({0: "a red balloon", 40: "a kite at sea"}), timesteps, {})
    each = [
        SharedTransformer(sharing, engine.bundle, texts({0: prompt}), timesteps, {})
        for prompt in ("a red balloon", "a kite at sea")
    ]
    return both, each[0], each[1], sharing


def a_batch(engine: Engine, seed: int, rows: list[Any], keep: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, engine.bundle.latent_channels, 5, 4, 4, generator=generator)
    steps = torch.randint(0, 8, (1, 5), generator=generator)
    return Batch(latents, steps.float(), steps, torch.tensor(rows), torch.tensor([keep]))
