"""A queue whose seed clip is what the video begins with: as one that is given that clip, and out at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from oracle import collect, toy_config, toy_run
from small_run import frames_of

from miga_engine import Engine

PROMPT = "a red balloon"


@pytest.mark.parametrize("changes", [
    {}, {"guidance_anchor": True, "refine_steps": 3}, {"zigzag_width": 1, "commit_offset": -1, "past_context": True},
    {"passes_per_advance": 2, "stage2_steps": 4, "self_reflection": True, "judge_step": 2, "reference_groups": 1,
     "score_drop": 0.0},
])  # fmt: skip
@pytest.mark.parametrize("num_frames", [30, None])
def test_it_goes_on_as_a_run_that_is_given_the_clip(changes: dict[str, Any], num_frames: int | None) -> None:
    run = toy_run(toy_config(warmup="clip", **changes), num_frames)
    clip = next(iter(run)).latents
    assert run.num_ticks == run.schedule.num_steps
    given = toy_run(toy_config(**changes), num_frames, given=clip)
    assert torch.equal(next(iter(given)).latents, clip)
    count, made, expected = 30 - len(clip), [], []
    for ours, theirs in zip(run, given, strict=False):
        made.append(ours.latents)
        expected.append(theirs.latents)
        if sum(map(len, made)) >= count:
            break
    assert sum(map(len, made)) >= count
    assert torch.equal(torch.cat(made), torch.cat(expected))


def test_the_clip_is_an_ordinary_one() -> None:
    clip = collect(toy_run(toy_config(warmup="clip"), 30))[:9]
    ordinary = collect(toy_run(toy_config(warmup="clip"), 9))
    assert torch.equal(clip, ordinary)
    assert not torch.equal(collect(toy_run(toy_config(), 30))[:9], clip)


@pytest.mark.parametrize("name", ["wan", "ti2v", "experts"])
def test_a_clip_that_is_all_that_was_asked_for_can_be_made_longer(name: str, tmp_path: Path) -> None:
    model, path = small_models.MODELS[name], tmp_path / "run.safetensors"
    engine = Engine.from_pretrained(model.build(tmp_path / name))
    options = {**model.options, "miga": dataclasses.replace(model.options["miga"], warmup="clip"), "seed": 3}
    stream = engine.stream(PROMPT, 11, **options)
    stream.save_every(None, path, keep_extension=True)
    short = frames_of(stream)
    longer = engine.resume(path, 45)
    start = longer.num_frames_out
    whole = frames_of(engine.stream(PROMPT, 45, **options))
    assert torch.equal(whole[:11], short)
    assert torch.equal(torch.cat([whole[:start], frames_of(longer)]), whole)
    assert len(frames_of(engine.resume(path))) == 0
