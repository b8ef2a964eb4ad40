"""The embedded model's world: deterministic, captioned, smooth, with a true mask."""

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("size", [(64, 96), (96, 160)])
def test_torch_draws_the_same_pictures(size):
    rng = np.random.default_rng(8)
    scenes = [world.sample_scene(rng) for _ in range(40)]
    frames = rng.integers(0, 1_000_000, 40)
    picture, mask = world.render_frames(scenes, frames, *size)
    tensors = world.render_tensors(scenes, frames, *size)
    assert tensors[0].dtype == tensors[1].dtype == tensors[2].dtype == torch.float32
    assert tensors[2].shape == (40, *size, 2)
    np.testing.assert_allclose(tensors[0].numpy(), picture, atol=1e-5)
    np.testing.assert_allclose(tensors[1].numpy(), mask, atol=1e-5)


@pytest.mark.parametrize("height", [64, 128])
def test_motion_is_how_the_parts_move(height):
    """What the subject's centre and the near hills' crest do over two frames is their flow, twice."""
    for seed in range(4):
        scene = world.Scene("balloon", "red", "green", "noon", seed)
        picture, mask, flow = world.render_tensors([scene] * 3, [700, 701, 702], height, height * 3 // 2)
        y, x = torch.arange(mask.shape[1]), torch.arange(mask.shape[2])
        total = mask.sum((1, 2))
        centre = torch.stack([(mask.sum(1) * x).sum(1), (mask.sum(2) * y).sum(1)], 1) / total[:, None]
        inside = flow[1][mask[1] > 0.99]
        assert (centre[2] - centre[0] - 2 * inside.mean(0)).abs().max() < 0.12 * height / 64
        hills = flow[:, -2:]
        assert hills[..., 1].abs().max() == 0
        assert hills[..., 0].std() < 1e-6, "the near layer moves as one"
        speed = -float(hills[1, 0, 0, 0])
        crest = (picture[:, height * 13 // 16 :, :, 0].sum(1)).double()  # how much of each column is hill, by its shade
        slope = (crest[1].roll(-1) - crest[1].roll(1))[2:-2] / 2
        change = ((crest[2] - crest[0]) / 2)[2:-2]
        assert abs(float((change * slope).sum() / slope.square().sum()) - speed) < 0.1 * speed
