"""The rich world: every factor shows, the subject disappears and comes back, and the plain world is what it was."""

import dataclasses
import hashlib

import numpy as np
import pytest

from miga_engine.tiny import drawing, world

SIZE = (96, 160)
PLAIN = world.Scene("balloon", "red", "green", "noon", 3)
RICH = world.Scene("kite", "blue", "desert", "dusk", 9, "striped", "houses", "clouds", "left", "slow", True, "hills")


def test_plain_scenes_are_drawn_as_they_were():
    """The shipped weights were trained on these very pictures."""
    rng = np.random.default_rng(1)
    digest = hashlib.sha256()
    for _ in range(12):
        digest.update(world.render(world.sample_scene(rng), int(rng.integers(5000)), 2)[0].tobytes())
    assert digest.hexdigest() == "809860fc332bc122499c3fbd39f3a59dcf98a72d963fea602ff997f37a337224"


def test_torch_draws_the_same_rich_pictures():
    rng = np.random.default_rng(2)
    scenes = [world.sample_rich_scene(rng) for _ in range(48)]
    frames = rng.integers(0, 100_000, 48)
    picture, mask = world.render_frames(scenes, frames, *SIZE)
    by_torch = world.render_tensors(scenes, frames, *SIZE)
    np.testing.assert_allclose(by_torch[0].numpy(), picture, atol=1e-5)
    np.testing.assert_allclose(by_torch[1].numpy(), mask, atol=1e-5)
    assert np.isfinite(by_torch[2].numpy()).all()


@pytest.mark.parametrize(
    ("factor", "values"),
    [
        ("pattern", world.PATTERNS),
        ("land", world.LANDS),
        ("sky", world.SKIES),
        ("side", world.SIDES),
        ("pace", world.PACES),
        ("ring", (False, True)),
        ("behind", ("", *world.COVERS)),
    ],
)
def test_every_factor_shows(factor, values):
    clips = [world.render(dataclasses.replace(PLAIN, **{factor: v}), 0, 400, 32, 48)[0][::20] for v in values]
    for i, clip in enumerate(clips):
        for other in clips[:i]:
            assert (np.abs(clip.astype(int) - other).max(-1) > 40).mean() > 5e-4


def test_a_factor_that_is_no_such_thing_is_named():
    with pytest.raises(ValueError, match="behind is 'trees': choose clouds, hills"):
        dataclasses.replace(PLAIN, behind="trees")


@pytest.mark.parametrize("behind", world.COVERS)
def test_the_subject_disappears_wholly_and_comes_back(behind):
    lengths = []
    for seed in range(12):
        scene = dataclasses.replace(PLAIN, subject=world.SUBJECTS[seed % 4], behind=behind, seed=seed)
        frames = np.arange(2000)
        away = world.away([scene] * 2000, frames)
        runs = np.flatnonzero(np.diff(np.r_[0, away == 1, 0]))
        whole = [b - a for a, b in runs.reshape(-1, 2) if a > 0 and b < 2000]
        assert len(set(whole)) == 1, "the same length every time"
        lengths.append(whole[0])
        assert (away == 0).sum() > 300
        hidden, seen = np.flatnonzero(away == 1)[::31], np.flatnonzero(away == 0)[::31]
        shown = world.render_frames([scene] * len(hidden), hidden)[1]
        assert shown.max() < 0.05, scene
        assert (world.render_frames([scene] * len(seen), seen)[1].sum((1, 2)) > 90).all()
    assert min(lengths) >= 15
    assert max(lengths) <= 193
    assert len(set(lengths)) > 8


def test_nothing_jumps():
    """Two frames that follow each other differ little, wherever clouds, birds and banks come in and leave."""
    rng = np.random.default_rng(3)
    for _ in range(8):
        video, _ = world.render(world.sample_rich_scene(rng), int(rng.integers(3000)), 300, 48, 80)
        steps = np.abs(np.diff(video.astype(np.int16), axis=0)).mean((1, 2, 3))
        assert steps.max() < 14, "of 255"


def test_every_ring_has_all_landmarks_in_an_order_of_its_own():
    rings = [world.ring_of(dataclasses.replace(PLAIN, ring=True, seed=seed)) for seed in range(40)]
    assert {frozenset(ring) for ring in rings} == {frozenset(drawing.LANDMARKS)}
    assert len(set(rings)) > 20
    assert rings[3] == world.ring_of(dataclasses.replace(PLAIN, ring=True))


def test_numbers_of_cells_are_uniform_and_stay():
    cells = np.arange(-5000, 5000)[None]
    a = drawing.hashed(np.array([7]), cells, 1)
    assert ((a >= 0) & (a < 1)).all()
    assert a.mean() == pytest.approx(0.5, abs=0.02)
    assert a.std() == pytest.approx(12**-0.5, abs=0.02)
    np.testing.assert_array_equal(a[:, 100:200], drawing.hashed(np.array([7]), cells[:, 100:200], 1))
    assert (a != drawing.hashed(np.array([8]), cells, 1)).mean() > 0.99


def test_captions_tell_what_is_named_alone():
    assert world.rich_caption(RICH) == (
        "a striped blue kite over desert hills with houses under clouds at dusk "
        "sun on the left slow flight behind hills"
    )
    assert world.rich_caption(RICH, {"terrain", "time"}) == "a thing over desert hills at dusk"
    assert world.rich_caption(RICH, ()) == "a thing over hills"
