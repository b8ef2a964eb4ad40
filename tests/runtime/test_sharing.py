"""Several streams on one engine share batches of windows, and each gives its own frames."""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from sharing_runs import (
    LEVELS,
    LONG_S,
    OPTIONS,
    a_batch,
    apart,
    frames,
    networks,
    sharing_of,
    together,
    until,
)
from torch import Tensor

from miga_engine.engine import Engine
from miga_engine.runtime.joining import joined, split
from miga_engine.runtime.network import Batch
from miga_engine.runtime.stream import Stream

pytestmark = pytest.mark.usefixtures("nothing_is_left")

# The same frames -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "videocrafter2", "experts"])
def test_streams_of_every_kind_give_their_own_frames(name: str, tmp_path: Path) -> None:
    """Prompts, seeds, scales, lengths and beginnings differ; of Wan one has no guidance and one another schedule.

    Alone in a group each is that of the engine to the bit.
    """
    family = small_models.MODELS[name]
    engine = Engine.from_pretrained(family.build(tmp_path / name))
    shared, length = engine.shared(), family.num_frames
    given: list[tuple[Any, int, dict[str, Any]]] = [
        ({0: "a red balloon", 5: "a kite over a wide plain"}, length, {}),
        ("a red balloon", length // 2 + 1, {"seed": 3, "guidance_scale": 4.0}),
    ]
    if name == "wan":
        given += [("night", 20, {"guidance_scale": 1.0}), ("night", 20, {"num_inference_steps": 9}), ("a kite", 50, {})]

    def stream(engine: Engine, i: int) -> Stream:
        prompt, num_frames, changes = given[i]
        return engine.stream(prompt, num_frames, **{**family.options, **changes})

    def late(i: int) -> Tensor:
        time.sleep(0.05 * i)
        return frames(stream(shared, i))

    expected, num_forwards = [], 0
    for i in range(len(given)):
        one = engine.shared()
        expected.append(frames(stream(one, i)))
        num_forwards += sharing_of(one).num_forwards
    assert torch.equal(expected[0], frames(stream(engine, 0)))
    found = together(*(functools.partial(late, i) for i in range(len(given))))
    assert max(map(apart, found, expected)) <= LEVELS
    assert sharing_of(shared).num_forwards < num_forwards  # they did meet


def test_a_shared_batch_is_to_the_bit_that_of_two_windows_of_one_stream(engine: Engine) -> None:
    both, first, second, sharing = networks(engine)
    both.place_prompts(torch.tensor([0, 1, 2]).numpy())
    for network in (first, second):
        network.place_prompts(torch.tensor([0, 1]).numpy())
    one, other = a_batch(engine, 1, [1, 0], [1, 2]), a_batch(engine, 2, [1, 0], [0, 4])
    latents, steps, keep = (torch.cat(pair) for pair in ((one[0], other[0]), (one[2], other[2]), (one[4], other[4])))
    expected = both(Batch(latents, steps.float(), steps, torch.tensor([1, 2, 0, 0]), keep))
    with sharing.lock:  # the thread takes the first call, and is held up until the other two are there
        pool = ThreadPoolExecutor(3)
        calls = [pool.submit(first, a_batch(engine, 0, [1, 0], [0]))]
        until(lambda: bool(sharing._served or calls[0].running()) and sharing._inbox.empty())
        time.sleep(0.05)
        calls += [pool.submit(first, one), pool.submit(second, other)]
        time.sleep(0.05)
    found = [call.result(timeout=LONG_S) for call in calls[1:]]
    pool.shutdown()
    assert sharing.num_forwards == 2
    assert torch.equal(torch.cat(found).view(2, 2, *found[0].shape[1:]).transpose(0, 1).flatten(0, 1), expected)


def test_batches_that_keep_other_frames_and_other_forms_of_prompts_are_joined(engine: Engine) -> None:
    both, _, _, _ = networks(engine)
    both.place_prompts(torch.tensor([0, 1, 2]).numpy())
    batches = [
        a_batch(engine, 1, [1, 0], [1]),
        a_batch(engine, 2, [[1, 1, 1, 0, 0], [0] * 5], [0, 2, 4]),
        a_batch(engine, 3, [0, 0], [3, 4]),
    ]
    batch = joined(batches, [0, 1, 0])
    assert batch.latents.shape[0] == 3
    assert batch.keep.tolist() == [[1, 1, 1], [0, 2, 4], [3, 4, 4]]
    assert batch.prompt_rows.tolist() == [[1] * 5, [2, 2, 2, 1, 1], [0] * 5, [0] * 5, [1] * 5, [0] * 5]
    for found, given, first in zip(split(both(batch), batches), batches, (0, 1, 0), strict=True):
        expected = both(given._replace(prompt_rows=given.prompt_rows + first))
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.slow
def test_latents_of_streams_together_are_those_alone_up_to_rounding(engine: Engine) -> None:
    """In float32 by 1e-4 of their spread at most, over a whole run."""
    requests = [engine.resolve(prompt, num_frames=40, seed=seed, **OPTIONS) for seed, prompt in enumerate("ab")]
    shared = engine.shared()

    def latents(engine: Engine, i: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([clean.latents for clean in engine.start(requests[i])])

    expected = [latents(engine, i) for i in range(2)]
    found = together(*(lambda i=i: latents(shared, i) for i in range(2)))
    assert max(float((a - b).abs().max() / b.std()) for a, b in zip(found, expected, strict=True)) < 1e-4
