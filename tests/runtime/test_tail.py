"""New frames of the queue: noise alone, or with a share of the cleanest frame, where it has their prompt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from miga_engine.noise import Purpose
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.tail import Tail
from miga_engine.schedule import add_noise, add_signal, make_schedule
from tests.oracle import SHAPE, collect, counter_noise, toy_config, toy_run

CPU = torch.device("cpu")
NUMBERS = np.arange(7, 10)


def _tail(share: float, solver: str = "unipc") -> tuple[Tail, torch.Tensor]:
    """(of a queue whose head, frame 4 of prompt 1, is predicted to be this)"""
    store = FrameStore(12, SHAPE, CPU)
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    store.x0[store.index(store.slots([4]))] = clean
    store.prompt_row[store.slots([4])] = 1
    return Tail(store, make_schedule(solver, 8), counter_noise(5, SHAPE), share), clean


def test_the_share_is_of_the_head_and_of_its_prompt_alone() -> None:
    noise = counter_noise(5, SHAPE)(Purpose.PUSH, NUMBERS)
    tail, clean = _tail(0.25)
    alike, other, mixed = np.array([1, 1, 1]), np.array([2, 2, 2]), np.array([1, 2, 1])
    carrying = 0.25 * clean + 0.75 * noise
    assert torch.equal(tail(Purpose.PUSH, NUMBERS, alike, head=4), carrying)
    assert torch.equal(tail(Purpose.PUSH, NUMBERS, other, head=4), noise)
    found = tail(Purpose.PUSH, NUMBERS, mixed, head=4)
    assert torch.equal(found, torch.stack([carrying[0], noise[1], carrying[2]]))
    assert torch.equal(_tail(0)[0](Purpose.PUSH, NUMBERS, alike, head=4), noise)
    series = tail(Purpose.CANDIDATE, NUMBERS, other, head=4, series=3)
    assert torch.equal(series, counter_noise(5, SHAPE)(Purpose.CANDIDATE, NUMBERS, series=3))


@pytest.mark.parametrize("solver", ["unipc", "euler", "ddim"])
def test_a_share_is_what_a_level_of_that_signal_holds(solver: str) -> None:
    """A frame noised to step i holds alphas[i] of the clean one: the share of that size gives the same frame."""
    schedule = make_schedule(solver, 10)
    x0, noise = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    for step in range(2, 10):
        share = float(schedule.alphas[step])
        assert torch.allclose(add_signal(schedule, x0, noise, share), add_noise(schedule, x0, noise, step), atol=1e-6)
    power = (1 - 0.3) ** 2 if solver != "ddim" else 1 - 0.3**2
    assert math.isclose(
        float(add_signal(schedule, x0 * 0, torch.ones_like(x0), 0.3).square().mean()), power, rel_tol=1e-6
    )


def test_candidates_of_a_search_begin_as_new_frames_do() -> None:
    """Searched at every pass: with the whole of the head in the tail the noise of no candidate is left."""
    options = {"self_reflection": True, "judge_step": 3, "score_drop": -9.0, "zigzag_width": 1, "guidance_frames": 0}
    runs = [toy_run(toy_config(tail_signal=share, candidates=2, **options), 24) for share in (0.0, 1.0)]
    drawn: list[list[torch.Tensor]] = [[], []]
    for run, kept in zip(runs, drawn, strict=True):
        assert run.reflection is not None
        draw = run.reflection.tail_noise

        def seen(purpose, numbers, rows, *, head, series=0, draw=draw, kept=kept, store=run.store):
            found = draw(purpose, numbers, rows, head=head, series=series)
            assert purpose == Purpose.CANDIDATE
            kept.append(found - store.x0[store.index(store.slots([head]))])
            return found

        run.reflection.tail_noise = seen
        collect(run)
    assert all(drawn)
    assert all(not difference.any() for difference in drawn[1])
    assert all(difference.any() for difference in drawn[0])
