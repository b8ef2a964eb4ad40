"""Self-reflection: better candidates alone are adopted, searches read what they may, every judge judges."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from oracle import SHAPE, PlainNetwork, collect, counter_noise, pseudo_network, toy_config, toy_run

from miga_engine.config import MigaConfig
from miga_engine.noise import Purpose
from miga_engine.runtime.judges import JUDGES
from miga_engine.runtime.stages import VideoRun
from miga_engine.schedule import make_schedule

CPU = torch.device("cpu")


@pytest.mark.slow
def test_reflection_adopts_only_better_candidates_and_reports_them():
    events: list = []
    config = toy_config(self_reflection=True, judge_step=4, score_drop=0.0, candidates=3)
    collect(toy_run(config, 40, events=events))
    searches = [data for kind, data in events if kind == "search_finished"]
    assert searches
    for search in searches:
        assert search["adopted"] == (max(search["scores"]) > search["score"])
    assert any(s["adopted"] for s in searches)
    assert [s["search"] for s in searches] == list(range(len(searches)))


@pytest.mark.slow
def test_a_search_compares_like_with_like_where_it_is_asked_to():
    """What goes on from the judged frames' own noise is one of the continuations, and is beaten as they are."""
    options = {"self_reflection": True, "judge_step": 4, "score_drop": -1.0, "candidates": 3}
    events: dict[str, list] = {"judged": [], "continued": []}
    for baseline, found in events.items():
        collect(toy_run(toy_config(**options, search_baseline=baseline), 60, events=found))
    searches = {name: [d for kind, d in found if kind == "search_finished"] for name, found in events.items()}
    assert all(search["baseline"] == search["score"] for search in searches["judged"])
    for search in searches["continued"]:
        assert len(search["scores"]) == 3
        assert search["adopted"] == (max(search["scores"]) > search["baseline"])
    share = {name: sum(s["adopted"] for s in found) / len(found) for name, found in searches.items()}
    assert 0.4 < share["continued"] < 1  # the best of three of four that are drawn alike: 3/4 by chance
    # the first search of both starts from the same state, and so do its candidates
    first, again = searches["judged"][0], searches["continued"][0]
    assert (first["frame"], first["score"]) == (again["frame"], again["score"])
    assert np.allclose(first["scores"], again["scores"], atol=1e-6)


@pytest.mark.slow
def test_what_is_continued_is_what_the_judged_frames_were_made_of(monkeypatch):
    """With the candidates' noise replaced by that of the frames themselves nothing can exceed the baseline."""
    config = toy_config(self_reflection=True, judge_step=4, score_drop=-1.0, search_baseline="continued")
    run, events = toy_run(config, 40), []
    run.emit = run.reflection.emit = lambda kind, **data: events.append((kind, data))
    noise = run.denoiser.noise

    def of_the_frames(purpose, frames, *, series=0):
        return noise(Purpose.PUSH, frames) if purpose is Purpose.CANDIDATE else noise(purpose, frames, series=series)

    monkeypatch.setattr(run.reflection.tail_noise, "noise", of_the_frames)
    collect(run)
    searches = [data for kind, data in events if kind == "search_finished"]
    assert searches
    assert not any(search["adopted"] for search in searches)
    assert all(score == search["baseline"] for search in searches for score in search["scores"])


@pytest.mark.slow
def test_reflection_with_an_unreachable_threshold_changes_nothing():
    config = toy_config(self_reflection=True, judge_step=4, score_drop=10.0)
    assert torch.equal(collect(toy_run(config, 30)), collect(toy_run(toy_config(), 30)))


@pytest.mark.slow
def test_candidates_batch_without_changing_the_result():
    options = {"self_reflection": True, "judge_step": 4, "score_drop": 0.0, "candidates": 3}
    alone = collect(toy_run(toy_config(**options), 30))
    together = collect(toy_run(toy_config(**options, window_batch=6), 30))
    assert (alone - together).abs().max() <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("has_anchor", [False, True])
def test_searches_read_the_anchor_of_their_own_prompt(has_anchor):
    config = toy_config(self_reflection=True, judge_step=4, score_drop=0.0, guidance_anchor=has_anchor)
    run = VideoRun(
        PlainNetwork(pseudo_network), make_schedule("unipc", 16, 5.0), config, window_frames=9, frame_shape=SHAPE,
        noise=counter_noise(5, SHAPE), num_frames=60, guidance_scale=5.0, device=CPU,
        prompt_row=lambda frame: 1 if frame < 33 else 2,
    )  # fmt: skip
    store, search_windows, searches = run.store, run.reflection._windows, []

    def watched(reference, candidates):
        windows = search_windows(reference, candidates)
        for window in windows:
            is_anchored = window.slots[0] in run.references.anchor
            rows = store.prompt_row[window.slots[int(is_anchored) :]]
            assert is_anchored == (has_anchor and bool((rows == store.prompt_row[run.references.anchor]).all()))
            assert len(window.slots) <= 9
            assert not np.isin(window.committed, [*run.references.anchor, *reference]).any()
            searches.append(is_anchored)
        committed = np.concatenate([window.committed for window in windows])
        assert sorted(committed) == sorted(candidates.ravel())  # each once
        return windows

    run.reflection._windows = watched
    collect(run)
    assert True in searches if has_anchor else searches


def test_every_judge_can_be_chosen() -> None:
    (judge,) = (field for field in dataclasses.fields(MigaConfig) if field.name == "judge")
    assert set(judge.metadata["choices"]) == set(JUDGES)


@pytest.mark.slow
@pytest.mark.parametrize("judge", ["latent", "x0"])
@pytest.mark.parametrize("channels", ["mean", "all"])
def test_every_judge_runs(judge, channels):
    events: list = []
    config = toy_config(self_reflection=True, judge_step=4, score_drop=0.0, judge=judge, channels=channels)
    latents = collect(toy_run(config, 20, events=events))
    assert latents.isfinite().all()
    scores = [data["score"] for kind, data in events if kind == "score"]
    assert scores
    assert all(-1.001 <= score <= 1.001 for score in scores)
