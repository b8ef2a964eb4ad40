"""The embedded model's world: deterministic, captioned, smooth, with a true mask."""

import numpy as np
import pytest

from bench.tiny import text
from miga_engine.tiny import world


def test_same_scene_same_frames_wherever_rendering_starts():
    scene = world.Scene("kite", "blue", "snowy", "dusk", seed=5)
    video, mask = world.render(scene, 40, 9)
    again, _ = world.render(scene, 44, 2)
    assert video.dtype == np.uint8
    assert video.shape == (9, 64, 96, 3)
    assert mask.shape == (9, 64, 96)
    np.testing.assert_array_equal(video[4:6], again)
    other, _ = world.render(world.Scene("kite", "blue", "snowy", "dusk", seed=6), 40, 9)
    assert (video != other).any()


def test_scenes_are_drawn_from_the_seed():
    draws = [world.sample_scene(np.random.default_rng(3)) for _ in range(2)]
    assert draws[0] == draws[1]


def test_captions_name_every_combination_once():
    captions = world.all_captions()
    assert len(captions) >= 288
    assert len(set(captions)) == len(captions)
    scene = world.Scene("balloon", "red", "snowy", "dawn")
    assert world.caption(scene) == "a red balloon over snowy hills at dawn"
    assert world.caption(scene) in captions


def test_unknown_attribute_is_named():
    with pytest.raises(ValueError, match="subject is 'whale': choose balloon, "):
        world.Scene("whale", "red", "snowy", "dawn")


@pytest.mark.parametrize("subject", world.SUBJECTS)
@pytest.mark.parametrize("seed", range(4))
def test_mask_covers_the_subject_and_nothing_else(subject, seed):
    """Two scenes that differ in the subject's colour only differ inside the mask only."""
    a, mask = world.render(world.Scene(subject, "red", "green", "noon", seed), 12 * seed, 3)
    b, mask_b = world.render(world.Scene(subject, "blue", "green", "noon", seed), 12 * seed, 3)
    np.testing.assert_array_equal(mask, mask_b)
    changed = (a != b).any(-1)
    assert not (changed & (mask <= 0)).any()
    assert changed[mask > 0.9].mean() > 0.6
    assert (mask.sum((1, 2)) > 90).all()
    assert mask[:, 0].max() < 0.5, "the subject leaves the picture at the top"
    assert mask[:, 54:].max() < 0.5, "the subject sinks into the near hills"


def test_motion_is_smooth_and_never_ends():
    for seed in range(4):
        scene = world.sample_scene(np.random.default_rng(seed))
        early, _ = world.render(scene, 0, 3)
        late, _ = world.render(scene, 10_000_000, 3)
        for video in (early, late):
            step = np.abs(np.diff(video.astype(float), axis=0)).mean()
            assert 0 < step < 6
        assert (early != late).any()


def test_size_scales_the_same_picture():
    scene = world.Scene("plane", "yellow", "desert", "noon", 3)
    small, _ = world.render(scene, 0, 1)
    large, _ = world.render(scene, 0, 1, 128, 192)
    halved = large.reshape(1, 64, 2, 96, 2, 3).mean((2, 4))
    assert np.abs(halved - small).mean() < 3


def test_tokenizer_knows_the_captions_and_marks_other_words():
    tokenizer = text.build_tokenizer()
    for caption in world.all_captions():
        tokens = tokenizer.encode(caption).tokens
        assert "<unk>" not in tokens
        assert tokens[-1] == "</s>"
        assert len(tokens) <= 24
    assert tokenizer.encode("").tokens == ["</s>"]
    assert "<unk>" in tokenizer.encode("a red zebra").tokens
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert "<unk>" not in tokenizer.encode(text.wording(world.sample_scene(rng), rng)).tokens
