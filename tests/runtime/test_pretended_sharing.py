"""Streams that share a pretended GPU: the frames of one alone, and work in order whichever CUDA streams it is in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pretended_device import OnMachine
from pretended_runs import CAN_PRETEND, PROMPT, frames_by, levels_apart
from torch import Tensor

from miga_engine import Engine

pytestmark = CAN_PRETEND


def _frames(engine: Engine, prompt: Any, seed: int) -> Tensor:
    return frames_by(engine, "wan", prompt, seed=seed, num_frames=10)


@pytest.mark.slow
@pytest.mark.parametrize("has_own_stream", [False, True])
def test_streams_that_share_a_gpu_give_their_frames(gpu, folders, has_own_stream: bool) -> None:
    """Without graphs; at once, with prompts that come while others compute, and from CUDA streams of their own."""
    prompts = [{0: PROMPT, 5: "night"}, PROMPT]
    engine = Engine.from_pretrained(folders["wan"], "cuda", "float32", capture=False)
    alone = [_frames(engine, prompt, seed) for seed, prompt in enumerate(prompts)]
    shared = engine.shared()

    def work(seed: int) -> Tensor:
        with OnMachine():
            if not has_own_stream:
                return _frames(shared, prompts[seed], seed)
            with torch.cuda.stream(torch.cuda.Stream()):
                return _frames(shared, prompts[seed], seed)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work, seed) for seed in range(2)]
        found = [future.result(timeout=100) for future in futures]
    assert max(map(levels_apart, found, alone)) <= 1
    assert not gpu.graphs
    sharing = shared._sharing
    assert sharing is not None
    assert sharing.num_forwards > 0
