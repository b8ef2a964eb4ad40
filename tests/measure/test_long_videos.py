"""Drift, sink collapse, cuts and hazards of videos whose figures are known because they were made so."""

import colorsys
import dataclasses
import math

import numpy as np
import pytest
from measured import SCENE

from miga_engine.measure import hazard, long_videos, measure, report, truth
from miga_engine.measure.catalogue import MEASURES
from miga_engine.measure.measures import PART_FRAMES
from miga_engine.tiny import world

QUICK = {"features": "descriptor", "flow": "lucas-kanade"}
NEW = ("hue_drift", "consistency_drift", "sharpness_drift", "luminance_drift", "saturation_drift", "similarity_drop",
       "sink_collapse", "returns", "cuts")  # fmt: skip


def _coloured(hues: np.ndarray, turned: float = 0) -> np.ndarray:
    """A frame uint8 [1,1,W,3] of these hues in degrees, each turned by so many, of several saturations."""
    rng = np.random.default_rng(0)
    colours = [
        colorsys.hsv_to_rgb((hue + turned) % 360 / 360, share, 1)
        for hue, share in zip(hues, rng.uniform(0.3, 1, len(hues)), strict=True)
    ]
    return (255 * np.array(colours)).round().astype(np.uint8)[None, None]


def _grey(levels: list[int] | np.ndarray) -> np.ndarray:
    """A frame uint8 [16,16,3] of one grey for each level."""
    return np.broadcast_to(np.asarray(levels, np.uint8)[:, None, None, None], (len(levels), 16, 16, 3)).copy()


@pytest.mark.parametrize(("turned", "distance"), [(0, 0), (7, 7), (90, 90), (130, 130), (-30, 30), (345, 15)])
def test_hue_drift_is_the_angle_by_which_the_hues_were_turned(turned, distance):
    hues = np.random.default_rng(1).uniform(330, 370, 500)  # on both sides of red, where the circle closes
    frames = np.concatenate([_coloured(hues), _coloured(hues, turned)])
    histograms = long_videos.hue_histograms(frames)
    assert long_videos.hue_drift(histograms) == pytest.approx(distance, abs=0.3)
    single = np.concatenate([_coloured(hues[:1]), _coloured(hues[:1], 165)])
    assert long_videos.hue_drift(long_videos.hue_histograms(single)) == pytest.approx(165, abs=0.5)
    chroma = (frames.max(3).astype(float) - frames.min(3)).mean((1, 2)) / 255
    np.testing.assert_allclose(histograms.sum(1), chroma, rtol=1e-6)


def test_hue_drift_of_a_part_of_the_picture_and_of_grey():
    hues = np.full(400, 100.0)
    half = np.concatenate([_coloured(hues)[:, :, :200], _coloured(hues, 60)[:, :, 200:]], 2)
    frames = np.concatenate([_coloured(hues), half])
    weight = long_videos.hue_histograms(_coloured(hues)[:, :, 200:]).sum() / 2
    share = weight / long_videos.hue_histograms(frames[:1]).sum()
    assert long_videos.hue_drift(long_videos.hue_histograms(frames)) == pytest.approx(60 * share, abs=0.3)
    faded = np.concatenate([frames, _grey([128]).reshape(1, 1, 256, 3).repeat(2, 2)[:, :, :400]])
    assert math.isnan(long_videos.hue_drift(long_videos.hue_histograms(faded)))
    assert measure(_grey([90, 100, 110]), **QUICK)["measures"]["hue_drift"] is None


def test_start_end_contrast_is_of_fifteen_percent():
    curve = np.concatenate([np.full(15, 3.0), np.linspace(50, 90, 70), np.full(15, 1.0)])
    assert long_videos.start_end_contrast(curve) == long_videos.start_end_contrast(curve[::-1]) == 2
    assert long_videos.start_end_contrast(curve[14:86]) > 5
    assert long_videos.start_end_contrast(np.array([1.0, 4.0])) == 3
    video = _grey(np.where(np.arange(40) < 34, 100, 151))  # 6 of 40 frames are 15 %
    figures = measure(video, **QUICK)["measures"]
    assert figures["luminance_drift"] == pytest.approx(51 / 255)
    assert figures["saturation_drift"] == 0
    assert figures["sharpness_drift"] == pytest.approx(0, abs=1e-9)


def test_largest_drop_of_similarity_is_to_the_first_frame():
    angles = np.radians([0, 10, 60, 30, 60, 0])
    assert long_videos.similarity_drop(np.stack([np.cos(angles), np.sin(angles)], 1)) == pytest.approx(0.5)


def test_a_video_that_returns_to_its_first_frame():
    away = 10 + 5 * (np.arange(60) % 20)  # 10 … 105, and at frames 20 and 40 the first again
    distances = long_videos.distances_to(_grey(away)[0], _grey(away))
    np.testing.assert_array_equal(distances, away - 10)
    figures = measure(_grey(away), **QUICK)["measures"]
    assert (figures["sink_collapse"], figures["returns"], figures["cuts"]) == (1, 2, 2)
    to_and_fro = 10 + 100 - np.abs(np.arange(201) - 100)  # by one level a frame
    figures = measure(_grey(to_and_fro), **QUICK)["measures"]
    assert figures["sink_collapse"] == pytest.approx(0.08), "8 frames of a slow return"
    assert (figures["returns"], figures["cuts"]) == (1, 0)
    onward = measure(_grey(np.arange(10, 110)), **QUICK)["measures"]
    assert (onward["sink_collapse"], onward["returns"], onward["cuts"]) == (0, 0, 0)
    assert long_videos.sink_collapse(np.zeros(5)) == long_videos.returns(np.zeros(5)) == 0


def test_cuts_are_changes_far_above_the_videos_own_usual():
    scene, other = (world.render(dataclasses.replace(SCENE, seed=seed, time=time), 0, 60)[0]
                    for seed, time in ((4, "dusk"), (9, "noon")))  # fmt: skip
    for places, cuts in (((), 0), ((30,), 1), ((20, 40), 2), ((3, 57), 2), ((30, 31), 2)):
        is_other = np.searchsorted(places, np.arange(60), side="right") % 2 == 1
        video = np.where(is_other[:, None, None, None], other, scene)
        differences = np.abs(np.diff(video.astype(int), axis=0)).mean((1, 2, 3))
        assert long_videos.count_cuts(differences) == cuts, places
    assert long_videos.count_cuts(np.full(50, 40.0)) == 0, "a video that always changes so much has no cut"
    assert long_videos.count_cuts(np.array([0.0] * 20 + [3.9] + [0.0] * 20)) == 0, "below 4 levels is no cut"
    assert long_videos.count_cuts(np.array([90.0])) == 0, "one pair has nothing to be compared with"


def test_parts_give_what_the_whole_gives_and_tables_show_it():
    scene, _ = world.render(SCENE, 100, 3 * PART_FRAMES)
    video = scene[np.arange(len(scene)) % 17]
    whole = measure(video, **QUICK)
    assert measure((video[i : i + PART_FRAMES] for i in range(0, len(video), PART_FRAMES)), **QUICK) == whole
    assert set(NEW) <= set(whole["measures"])
    assert whole["measures"]["returns"] == 2
    lines = report.table({"a": whole}).splitlines()
    shown = {line.strip().rpartition("  ")[0].strip(): line.split()[-1] for line in lines if line}
    assert shown["sink collapse, % ↓"] == "100.0"
    assert shown["returns to the first frame ↓"] == shown["shot cuts ↓"] == "2"
    for name in NEW:
        assert MEASURES[name].better == "lower"
    for size in (1, 5):
        parts = [video[i : i + size] for i in range(0, len(video), size)]
        np.testing.assert_array_equal(
            np.concatenate([long_videos.hue_histograms(part) for part in parts]), long_videos.hue_histograms(video)
        )
        np.testing.assert_array_equal(
            np.concatenate([long_videos.distances_to(video[0], part) for part in parts]), whole["curves"]["distance"]
        )


def _shown(*lengths: int) -> np.ndarray:
    """1 for the first of these numbers of frames, then 0, then 1, …"""
    return np.concatenate([np.full(length, 1.0 - i % 2) for i, length in enumerate(lengths)])


def test_losses_at_known_frames():
    assert hazard.losses(_shown(100)) == (0, 100)
    assert hazard.losses(_shown(40, 60)) == (1, 40)
    assert hazard.losses(_shown(40, 10, 30, 20)) == (2, 70)
    assert hazard.losses(_shown(40, 3, 57)) == (0, 100), "fewer than 4 frames in a row are misread, not lost"
    assert hazard.losses(_shown(40, 20, 3, 37)) == (1, 40), "and not found again"
    assert hazard.losses(_shown(0, 50)) == hazard.losses(_shown(3, 50)) == (0, 0), "what was never there"
    assert hazard.losses(_shown(0, 50, 50)) == (0, 50)
    assert hazard.losses(_shown(40, 60), starts=(0, 40)) == (0, 40), "what the next prompt shows late is not lost"
    assert hazard.losses(_shown(40, 30, 20, 10), starts=(0, 50)) == (2, 60)


def test_hazards_interval_is_the_poisson_distributions():
    def fewer(count: int, mean: float) -> float:
        return sum(math.exp(-mean) * mean**i / math.factorial(i) for i in range(count))

    for count in (1, 4, 25):
        rate, low, high = hazard.hazard(count, 50)
        assert rate == 2 * count
        assert fewer(count, low / 2) == pytest.approx(0.975)
        assert fewer(count + 1, high / 2) == pytest.approx(0.025)
    assert hazard.hazard(0, 100) == (0, 0, pytest.approx(-math.log(0.025)))
    assert all(map(math.isnan, hazard.hazard(0, 0)))


@pytest.mark.slow
def test_hazard_of_a_video_that_loses_its_time_of_day():
    night = dataclasses.replace(SCENE, time="night")
    video = np.concatenate([world.render(SCENE, 0, 30)[0], world.render(night, 30, 30)[0]])
    found = truth.truth_curves(video, world.caption(SCENE)).losses()
    assert found["time"] == (1, 30)
    assert [count for count, _ in found.values()] == [0, 0, 0, 1]
    figures = measure(video, prompt=world.caption(SCENE), **QUICK)["measures"]
    frames = sum(frames for _, frames in found.values())
    assert figures["truth_hazard"] == pytest.approx(100 / frames)
    assert figures["truth_hazard_low"] < figures["truth_hazard"] < figures["truth_hazard_high"]
    asked = {0: world.caption(SCENE), 30: world.caption(night)}
    assert measure(video, prompt=asked, **QUICK)["measures"]["truth_hazard"] == 0, "what is asked for is no loss"
