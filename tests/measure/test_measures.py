"""Measures see the damage they must and no other, as the document says; their formulas on known pictures."""

import json

import numpy as np
import places
import pytest
import torch

from bench.study import damage
from miga_engine.errors import ConfigError
from miga_engine.measure import features, measure, measures
from miga_engine.measure.catalogue import MEASURES

DOCUMENT = places.ROOT / "docs" / "measures.md"
# What each measure must see (▲ rises, ▼ falls) and what must leave it alone (·).
EXPECTED = {
    "consistency": {"still": "▲", "cut": "▼", "seams": "·"},
    "motion": {"still": "▼", "shuffle": "▲", "drift": "·", "fade": "·", "blur": "·"},
    "motion_ratio": {"drift": "·", "fade": "·", "seams": "·"},
    "frozen_share": {"freeze": "▲", "still": "▲", "noise": "·", "flicker": "·", "shuffle": "·", "cut": "·"},
    "flicker": {"flicker": "▼", "noise": "▼", "shuffle": "▼", "still": "▲", "blur": "·"},
    "warping_error": {"noise": "▲", "flicker": "▲", "cut": "▲", "shuffle": "▲", "still": "▼", "fade": "·"},
    "largest_jump": {"cut": "▲", "seams": "▲", "sink": "▲", "blur": "·", "drift": "·"},
    "seam_ratio": {"seams": "▲", "blur": "·", "still": "·"},
    "seam_p": {"seams": "▼", "blur": "·", "noise": "·", "cut": "·", "freeze": "·", "shuffle": "·"},
    "latent_consistency": {"still": "▲", "cut": "▼", "fade": "·"},
    "latent_consistency_min": {"still": "▲", "cut": "▼", "fade": "·"},
    "colour_overlap": {"drift": "▼", "fade": "▼", "cut": "▼", "freeze": "·", "seams": "·"},
    "luminance": {"flicker": "▼", "cut": "▼", "noise": "·", "fade": "·", "freeze": "·", "shuffle": "·"},
    "luminance_ratio": {"cut": "▼", "blur": "·", "noise": "·", "fade": "·", "flicker": "·", "freeze": "·"},
    "saturation": {"drift": "▼", "fade": "▼", "cut": "▼", "freeze": "·", "shuffle": "·", "seams": "·"},
    "saturation_ratio": {"drift": "▼", "fade": "▼", "cut": "▼", "flicker": "·", "freeze": "·", "still": "·"},
    "sharpness": {"blur": "▼", "noise": "▲", "fade": "·", "freeze": "·", "shuffle": "·", "seams": "·"},
    "sharpness_ratio": {"blur": "▼", "noise": "▲", "fade": "·", "flicker": "·", "freeze": "·", "seams": "·"},
    "noise": {"noise": "▲", "blur": "▼", "fade": "·", "freeze": "·", "shuffle": "·", "seams": "·"},
    "noise_ratio": {"noise": "▲", "blur": "▼", "flicker": "·", "freeze": "·", "still": "·", "seams": "·"},
    "hue_drift": {"drift": "▲", "cut": "▲", "fade": "·", "flicker": "·", "freeze": "·", "seams": "·", "sink": "·"},
    "consistency_drift": {"cut": "▲", "fade": "·", "flicker": "·", "shuffle": "·", "seams": "·", "sink": "·"},
    "sharpness_drift": {"blur": "▲", "noise": "▲", "drift": "·", "fade": "·", "flicker": "·", "seams": "·"},
    "luminance_drift": {"cut": "▲", "blur": "·", "noise": "·", "fade": "·", "flicker": "·", "seams": "·", "sink": "·"},
    "saturation_drift": {"drift": "▲", "fade": "▲", "cut": "▲", "flicker": "·", "freeze": "·", "seams": "·"},
    "similarity_drop": {"drift": "▲", "fade": "▲", "cut": "▲", "still": "▼", "flicker": "·", "seams": "·", "sink": "·"},
    "sink_collapse": {"sink": "▲", "drift": "·", "fade": "·", "freeze": "·", "still": "·", "cut": "·", "seams": "·"},
    "returns": {"sink": "▲", "shuffle": "▲", "drift": "·", "fade": "·", "freeze": "·", "still": "·", "cut": "·"},
    "cuts": {"cut": "▲", "sink": "▲", "flicker": "·", "noise": "·", "freeze": "·", "shuffle": "·", "seams": "·"},
    "truth_hazard": {"cut": "▲", "freeze": "·", "still": "·", "shuffle": "·", "seams": "·", "sink": "·"},
    "truth_hazard_low": {"cut": "▲", "freeze": "·", "still": "·", "shuffle": "·", "seams": "·", "sink": "·"},
    "truth_hazard_high": {"cut": "▲", "freeze": "·", "still": "·", "shuffle": "·", "seams": "·", "sink": "·"},
    "truth_subject_consistency": {"cut": "▼", "still": "▲", "flicker": "·", "seams": "·"},
    "truth_background_consistency": {"cut": "▼", "still": "▲", "drift": "▼", "fade": "▼", "seams": "·"},
    "truth_accuracy_subject": {"cut": "▼", "freeze": "·", "still": "·", "shuffle": "·", "seams": "·", "flicker": "·"},
    "truth_accuracy_colour": {"cut": "▼", "freeze": "·", "still": "·", "shuffle": "·", "seams": "·", "flicker": "·"},
    "truth_accuracy_terrain": {"cut": "▼", "freeze": "·", "still": "·", "shuffle": "·", "seams": "·", "flicker": "·"},
    "truth_accuracy_time": {"cut": "▼", "drift": "▼", "still": "·", "shuffle": "·", "seams": "·", "flicker": "·"},
    "truth_colour_profile_distance": {"drift": "▲", "fade": "▲", "flicker": "▲", "cut": "▲", "still": "·", "blur": "·"},
    "truth_colour_drift": {"drift": "▲", "fade": "▲", "cut": "▲", "flicker": "·", "seams": "·"},
    "truth_subject_jitter": {"shuffle": "▲", "seams": "▲", "cut": "▲", "still": "▼", "drift": "·", "fade": "·"},
    "truth_scroll_speed": {"still": "▼", "blur": "·", "drift": "·", "fade": "·", "flicker": "·"},
    "truth_scroll_variation": {"freeze": "▲", "cut": "▲", "shuffle": "▲", "seams": "▲", "drift": "·", "flicker": "·"},
}


@pytest.fixture(scope="module")
def damaged() -> tuple[list[dict[str, float]], dict[str, dict[str, float]]]:
    """Figures of the clean clips, and of the first of them under each damage."""
    vae, clips = damage.load_vae(), damage.clean_clips()
    broken = {name: damage.figures(function(clips[0]), vae) for name, function in damage.DAMAGES.items()}
    return [damage.figures(clip, vae) for clip in clips], broken


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MEASURES if n not in ("subject_consistency", "background_consistency")])
def test_measure_sees_the_damage_it_must_and_no_other(damaged, name):
    clean, broken = damaged
    values = [c[name] for c in clean]
    assert {"▲", "▼"} & set(EXPECTED[name].values()) or name == "motion_ratio"
    got = {what: damage.mark(name, values, broken[what][name]) for what in EXPECTED[name]}
    assert got == EXPECTED[name], (values, {what: broken[what][name] for what in EXPECTED[name]})


@pytest.mark.slow
def test_every_damage_is_seen(damaged):
    seen = damage.marks(*damaged)
    for what in damage.DAMAGES:
        assert sum(row[what] != "·" for row in seen.values()) >= 3, what


@pytest.mark.slow
def test_document_says_what_is_measured(damaged):
    """The text word for word; marks but for values near the border between seen and not seen."""
    clean, broken = damaged
    fresh = damage.document(clean, broken).splitlines()
    stored = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert len(fresh) == len(stored)
    names = iter(clean[0])
    for new, old in zip(fresh, stored, strict=True):
        cells = [cell.strip() for cell in old.strip("|").split("|")]
        if len(cells) != 2 + len(broken) or cells[0] in ("measure", "---"):
            assert new == old
            continue
        name = next(names)
        assert cells[0] == new.strip("|").split("|")[0].strip()
        values = [c[name] for c in clean]
        for what, cell in zip(broken, cells[2:], strict=True):
            possible = {damage.mark(name, values, broken[what][name], strictness) for strictness in (0.7, 1.0, 1.4)}
            assert cell[0] in possible, (name, what, cell, broken[what][name], values)
    assert next(names, None) is None


def test_flicker_and_consistency_are_vbenchs():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 16, 20, 3), np.uint8)
    errors = [np.abs(frames[i].astype(float) - frames[i + 1]).mean() for i in range(4)]
    assert measures.temporal_flicker(frames) == pytest.approx((255 - np.mean(errors)) / 255, abs=1e-12)
    x = rng.standard_normal((6, 40)) + 0.3

    def cosine(a, b):
        return max(0.0, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))

    expected = [(cosine(x[i], x[i - 1]) + cosine(x[i], x[0])) / 2 for i in range(1, 6)]
    np.testing.assert_allclose(features.consistency_curve(x), expected, rtol=1e-12)
    assert min(cosine(x[i], x[0]) for i in range(1, 6)) >= 0


def test_noise_and_sharpness_of_known_pictures():
    rng = np.random.default_rng(1)
    grey = np.full((1, 200, 200, 3), 128.0) + 5 * rng.standard_normal((1, 200, 200, 1))
    assert measures.noise(grey.round().astype(np.uint8))[0] == pytest.approx(5, rel=0.05)
    # the Laplacian of white noise of standard deviation s has the variance 20·s²
    assert measures.sharpness(grey.round().astype(np.uint8))[0] == pytest.approx(20 * (25 + 1 / 12), rel=0.05)
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (32, 64, 3))[None]
    assert measures.noise(ramp)[0] < 1e-4
    assert measures.sharpness(ramp)[0] < 1e-6
    colours = np.zeros((1, 16, 16, 3), np.uint8)
    colours[..., 0] = 255
    assert measures.luminance(colours)[0] == pytest.approx(0.2126)
    assert measures.saturation(colours)[0] == 1


def test_seams_are_compared_with_steps_of_the_same_kind():
    """A VAE that steps at every fourth frame hides no seam and makes none."""
    rng = np.random.default_rng(0)
    steps = 2 + 0.1 * rng.random(95)
    index = np.arange(1, 96)
    steps[index % 4 == 1] *= 2
    ratio, p = measures.seam_visibility(steps, 12, 13)
    assert ratio > 1.5
    assert p < 0.05
    ratio, p = measures.seam_visibility(steps, 12, 13, period=4)
    assert ratio == pytest.approx(1, abs=0.05)
    assert p > 0.05
    steps[(index - 13) % 12 == 0] *= 1.5
    ratio, p = measures.seam_visibility(steps, 12, 13, period=4)
    assert ratio == pytest.approx(1.5, abs=0.1)
    assert p < 0.01
    for block, offset, period in ((1, None, 1), (12, 13, 5), (200, None, 1), (12, -1, 1), (4, 1, 4)):
        with pytest.raises(ConfigError):
            measures.seam_visibility(steps, block, offset, period)


def test_measure_refuses_what_is_no_video():
    for frames in (np.zeros((4, 32, 32, 3)), np.zeros((4, 32, 32), np.uint8), torch.zeros(4, 32, 32, 3), None):
        with pytest.raises(ConfigError, match="uint8"):
            measure(frames)
    with pytest.raises(ConfigError, match="16×16"):
        measure(np.zeros((4, 8, 32, 3), np.uint8))
    black = measure(np.zeros((4, 32, 32, 3), np.uint8), features="descriptor", flow="lucas-kanade")
    assert json.loads(json.dumps(black)) == black
    assert black["measures"]["saturation_ratio"] == 1
    assert [flag.partition(":")[0] for flag in black["flags"]] == ["STILL", "FROZEN"]
