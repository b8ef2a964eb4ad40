"""Prompts over time: which row of the table a latent frame is shown, by arithmetic and by counting."""

from __future__ import annotations

import random

import pytest
import torch
from oracle import prompt_table

from miga_engine.prompts import PromptTimeline


def _first_frame(latent: int) -> int:
    return 0 if latent == 0 else 4 * latent - 3


def test_timeline_rows_change_at_the_frame():
    timeline = PromptTimeline({0: "day", 20: "night"}, 0, _first_frame)
    rows = [timeline.prompt_row(latent) for latent in range(9)]
    assert rows == [1, 1, 1, 1, 1, 1, 2, 2, 2]  # latent 6 decodes to frames 21 … 24
    contexts = prompt_table(timeline, lambda texts: torch.full((1, len(texts[0]) + 1, 2), float(len(texts[0]))))
    assert contexts.shape == (3, 6, 2)
    assert contexts[1, :4].eq(3).all()
    assert contexts[1, 4:].eq(0).all()


def test_timeline_blends_linearly():
    timeline = PromptTimeline({0: "a", 20: "b"}, 7, _first_frame)
    contexts = prompt_table(timeline, lambda texts: torch.full((1, 1, 1), {"": 0.0, "a": 1.0, "b": 2.0}[texts[0]]))
    values = [float(contexts[timeline.prompt_row(latent)]) for latent in range(10)]
    assert values == pytest.approx([1, 1, 1, 1, 1, 1, 1 + 2 / 8, 1 + 6 / 8, 2, 2])


def test_rows_are_the_same_however_many_prompts_there_are():
    """The arithmetic of rows against counting: hard cuts, blends that meet, prompts shorter than a latent frame."""
    chance = random.Random(0)
    for _ in range(60):
        starts = sorted({0, *(chance.randrange(1, 120) for _ in range(chance.randrange(9)))})
        blend = chance.choice((0, 1, 3, 7, 40))
        timeline = PromptTimeline({start: str(start) for start in starts}, blend, _first_frame)
        rows, blends = [], 0
        for latent in range(60):
            frame = _first_frame(latent)
            entry = max(i for i, start in enumerate(starts) if start <= frame)
            if entry and frame < starts[entry] + blend:
                rows.append(1 + len(starts) + blends)
                blends += 1
            else:
                rows.append(1 + entry)
        assert [timeline.prompt_row(latent) for latent in range(60)] == rows
        assert len(timeline) == 1 + len(starts) + blends
        for span in (1, 3, 10, 40):
            most = max(len(set(rows[i : i + span])) for i in range(60 - span + 1))
            assert most <= timeline.most_prompt_rows(span) <= min(span, len(timeline) - 1)


def test_a_late_prompt_costs_nothing() -> None:
    """Rows are found where prompts change, not by counting up to there."""
    timeline = PromptTimeline({0: "a", 10**9: "b"}, 8, lambda latent: 1 + 4 * (latent - 1) if latent else 0)
    assert timeline.prompt_row(0) == timeline.prompt_row(10**8) == 1
    rows = [timeline.prompt_row(10**9 // 4 + i) for i in range(4)]
    assert rows == [1, 3, 4, 2]
