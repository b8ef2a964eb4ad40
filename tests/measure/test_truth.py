"""The embedded world's truth is read back from prompts and pictures."""

import dataclasses

import numpy as np
import pytest
from measured import SCENE

from bench.tiny.text import wording
from miga_engine.errors import ConfigError
from miga_engine.measure import measure_tiny, truth
from miga_engine.tiny import world
from miga_engine.tiny.text import read_prompt


def test_prompts_are_read_back_from_every_wording():
    rng = np.random.default_rng(0)
    for caption in world.all_captions():
        scene = truth.scenes_of(caption, 1)[0]
        assert world.caption(scene) == caption
    for _ in range(300):
        scene = world.sample_scene(rng)
        named = read_prompt(wording(scene, rng))
        assert {name: getattr(scene, name) for name in named} == named
        assert "subject" in named
    with pytest.raises(ConfigError, match="names no terrain and no time"):
        truth.scenes_of("a red kite", 1)
    with pytest.raises(ConfigError, match="names no subject and no colour and no terrain and no time"):
        truth.scenes_of("a cat", 1, np.zeros((1, 4), int))


@pytest.mark.slow
def test_what_a_prompt_leaves_open_is_to_stay_as_it_began():
    video = np.concatenate(
        [world.render(SCENE, 0, 30)[0], world.render(dataclasses.replace(SCENE, time="night"), 30, 30)[0]]
    )
    figures = measure_tiny(video, f"a {SCENE.colour} {SCENE.subject} over {SCENE.terrain} hills")
    assert figures["accuracy_time"] == pytest.approx(0.5, abs=0.04)
    assert min(figures[f"accuracy_{name}"] for name in ("subject", "colour", "terrain")) > 0.8
    whole = measure_tiny(video[:30], world.caption(SCENE))
    assert measure_tiny(video[:30], f"a {SCENE.subject}") == whole
    # each prompt of a timeline has a beginning of its own
    assert measure_tiny(video, {0: f"a {SCENE.subject}", 30: f"the {SCENE.subject}"})["accuracy_time"] > 0.95


@pytest.mark.slow
def test_truth_follows_the_subject_and_the_hills_and_timelines():
    video, mask = world.render(SCENE, 300, 60)
    curves = truth.truth_curves(video, world.caption(SCENE))
    weight = mask.sum((1, 2))
    centre = np.stack([(mask.sum(1) * np.arange(96)).sum(1) / weight, (mask.sum(2) * np.arange(64)).sum(1) / weight], 1)
    # the bright part of a subject is not its centre, but moves with it
    assert np.linalg.norm((curves.position - centre) - (curves.position - centre).mean(0), axis=1).max() < 1.5
    shift = 0.6 * (0.8 + 0.4 * np.random.default_rng(SCENE.seed).random(32).astype(np.float32)[17])
    assert np.median(curves.scroll) == pytest.approx(float(shift), rel=0.03)
    other = world.Scene("bird", "red", "snowy", "night", seed=9)
    both = np.concatenate([video, world.render(other, 0, 20)[0]])
    timeline = {0: world.caption(SCENE), 60: world.caption(other)}
    figures = measure_tiny(both, timeline)
    assert min(figures[f"accuracy_{name}"] for name in ("subject", "colour", "terrain", "time")) > 0.95
    assert figures["colour_profile_distance"] < 0.03
    wrong = measure_tiny(both, world.caption(SCENE))
    assert wrong["accuracy_time"] == pytest.approx(0.75, abs=0.02)
    assert wrong["colour_profile_distance"] > 3 * figures["colour_profile_distance"]
    large, _ = world.render(SCENE, 300, 12, 128, 192)
    assert measure_tiny(large, world.caption(SCENE))["accuracy_subject"] == 1
