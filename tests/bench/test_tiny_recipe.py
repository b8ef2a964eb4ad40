"""The recipe of the embedded model: what it trains on, that it goes on where it stopped, and how pieces are counted."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench.tiny import clipdit, clipvae, export, measures, steps, text, train_dit, train_vae
from bench.tiny.pieces import is_counted, pieces, subject_areas
from miga_engine.errors import ConfigError
from miga_engine.tiny import WEIGHTS_DIR, world
from miga_engine.tiny.drawing import sky_ramp

SETTING = steps.Setting()


def test_rates_hold_and_then_fall():
    rates = [steps.stable_then_falling(share) for share in (0, 0.5, 0.75, 0.875, 1, 1.2)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0.01, 0.01])


def test_areas_are_counted_where_they_do_not_touch():
    areas = torch.zeros(5, 35, 96, dtype=torch.bool)
    areas[1:, 4:14, 10:20] = True
    areas[2, 4:14, 40:50] = True  # a double
    areas[3, 4:14, 21:31] = True  # one pixel apart: one piece
    areas[4, 20:22, 40:43] = True  # a speck
    assert pieces(areas).tolist() == [0, 1, 2, 1, 1]


def test_true_subjects_are_one_piece_and_doubled_or_torn_ones_are_not():
    rng = np.random.default_rng(5)
    for _ in range(24):
        scene = world.sample_scene(rng)
        video, mask = world.render(scene, int(rng.integers(5000)), 5)
        assert pieces(subject_areas(video, scene)).tolist() == [1] * 5, scene
        zenith, horizon = (np.array(world.TIME_RGB[scene.time][k]) for k in (0, 1))
        sky = zenith + sky_ramp(np, np.arange(35)[:, None] + 0.5) * (horizon - zenith)
        where = np.flatnonzero(mask[0, :35].max(0) > 0.1)
        doubled, torn = video.copy(), video.copy()
        free = 0 if where[0] > 96 - where[-1] else 96 - len(where)  # the side with more room
        if abs(free - where[0]) >= len(where) + 3:
            doubled[:, :35, free : free + len(where)] = video[:, :35, where]
            assert pieces(subject_areas(doubled, scene))[0] == 2, scene
        if scene.subject in ("balloon", "plane"):
            middle = int(where.mean())
            torn[:, :35, middle - 3 : middle + 3] = (255 * sky[:, None]).astype(np.uint8)
            assert pieces(subject_areas(torn, scene))[0] >= 2, scene


def test_white_subjects_at_night_are_not_counted():
    white = world.Scene("bird", "white", "dark", "night", 3)
    assert [is_counted(s) for s in (white, replace(white, time="dusk"), replace(white, colour="green"))] == [0, 1, 1]
    clips = [world.render(s, 100, 17)[0] for s in (white, replace(white, colour="green"))]
    clips[0][:, 20:24] = 240  # whatever it shows
    figures = measures.subject_figures(clips, [white, replace(white, colour="green")])
    assert (figures["counted"], figures["not_one_piece"]) == (1, 0.0)


def test_figures_of_true_clips_are_the_worlds():
    scenes = [world.Scene(s, "red", "green", "noon", 3) for s in world.SUBJECTS]
    clips = [world.render(s, 100, 17)[0] for s in scenes]
    figures = measures.subject_figures(clips, scenes)
    assert figures["not_one_piece"] == 0
    assert 0 < figures["jitter"] < 0.4
    shaken = [np.roll(c, 1, 2) if i % 2 else c for i, c in enumerate(clips[0])]
    assert measures.subject_figures([np.stack(shaken)], scenes[:1])["jitter"] > 1


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with one small part of a cache, from the shipped VAE."""
    folder = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipvae, "norm_silu", clipvae.norm_silu)
        patch.setattr(torch, "compile", lambda fn, **_: fn)
        train_dit.cache_latents(folder, SETTING, 2, 57, 2, 0, 1)
        before = (folder / "cache000.pt").stat().st_mtime_ns
        train_dit.cache_latents(folder, SETTING, 2, 57, 2, 0, 1)
    assert (folder / "cache000.pt").stat().st_mtime_ns == before, "a finished part is left alone"
    return folder


def test_cache_holds_normalised_latents_and_what_moves_in_them(work):
    latents, motion, labels = train_dit.load_cache(work)
    assert latents.shape == (2, 16, 15, 8, 12)
    assert motion.shape == (2, 3, 15, 8, 12)
    assert latents.float().std() == pytest.approx(1, abs=0.3)
    assert 0.02 < motion[:, 2].float().mean() < 0.15, "share of the picture that is the subject's"
    assert (motion[:, 0, :, -1] < -0.3).all(), "the near hills go left"
    assert [scene.time in world.TIMES for scene in train_dit.scenes_of(labels)] == [True, True]


def test_batches_depend_on_their_step_alone(work):
    data = train_dit.load_cache(work)
    options = train_dit.DitOptions(minutes=1)
    whole = list(itertools.islice(train_dit._batches(SETTING, *data, options, 0), 3))
    later = next(train_dit._batches(SETTING, *data, options, 2))
    assert all(torch.equal(a, b) for a, b in zip(whole[2], later, strict=True))
    assert not torch.equal(whole[0][0], whole[1][0])


def test_the_motion_head_leaves_the_velocity_alone():
    params = clipdit.init_dit(1)
    x, rows = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 24, clipdit.TEXT_DIM)
    args = (x, torch.tensor([300.0]), rows, clipdit.rope_table(3, 2, 2))
    plain = clipdit.velocity(params, *args)
    v, motion = clipdit.velocity_and_motion(params, clipdit.init_motion_head(192), *args)
    assert torch.equal(v, plain)
    assert motion.shape == (1, 3, 3, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_goes_on_where_it_stopped(work, tmp_path, optimizer, monkeypatch):
    """Parameters, averages and optimisers: a run in two parts ends with what one run ends with."""
    (tmp_path / "cache000.pt").symlink_to(work / "cache000.pt")
    clock = itertools.count()
    monkeypatch.setattr(train_dit.time, "time", lambda: float(next(clock)))  # a second a look at the clock
    monkeypatch.setattr(train_dit, "stable_then_falling", lambda share: 1.0)
    ends = {}
    for name, lengths in {"one": [0.13], "two": [0.07, 0.13]}.items():
        (tmp_path / "dit.pt").unlink(missing_ok=True)
        for minutes in lengths:
            options = train_dit.DitOptions(minutes, batch=2, optimizer=optimizer, compile=False)
            train_dit.train_dit(tmp_path, SETTING, options)
        ends[name] = torch.load(tmp_path / "dit.pt", weights_only=True)
    assert ends["one"]["step"] == ends["two"]["step"] > 4
    for part in ("params", "averages", "optimizers"):
        one, two = (torch.utils._pytree.tree_leaves(ends[n][part]) for n in ("one", "two"))
        assert len(one) == len(two)
        same = (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True))
        assert all(same), part


@pytest.mark.slow
def test_the_decoder_alone_leaves_latents_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "unseen_figures", lambda *_: {})
    shipped = train_vae.load_vae(tmp_path, SETTING)
    train_vae.train_vae(tmp_path, SETTING, train_vae.VaeOptions(0.01, decoder_only=True, compile=False))
    trained = train_vae.load_vae(tmp_path, SETTING)
    changed = {k for k in shipped if not torch.equal(shipped[k], trained[k])}
    assert changed
    assert not any(k.startswith(("encoder.", "conv1.")) for k in changed)


def test_errors_count_more_where_there_is_little_contrast():
    x = torch.zeros(1, 3, 1, 32, 64)
    x[..., 32:] = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    weight = train_vae.contrast_weight(x, 0.5)[0, 0, 0]
    assert float(weight.mean()) == pytest.approx(1)
    flat, busy = float(weight[:, :24].mean()), float(weight[:, 44:].mean())
    spread = float(x[0, 0, 0, :, 32:].std())
    assert flat / busy == pytest.approx(((0.1 + spread) / 0.1) ** 0.5, rel=0.05)


def test_folding_keeps_the_picture_and_gives_the_published_statistics():
    params = clipvae.init_parameters(dim=8, dim_mult=(1, 1, 1, 1), seed=3)
    x = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z, _ = clipvae.encode_clip(params, x)
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    folded = clipvae.folded(params, mean, std)
    after, _ = clipvae.encode_clip(folded, x)
    assert (after.mean((0, 2, 3, 4)) - torch.tensor(clipvae.WAN_LATENTS_MEAN)).abs().max() < 1e-3
    assert (after.std((0, 2, 3, 4)) / torch.tensor(clipvae.WAN_LATENTS_STD) - 1).abs().max() < 1e-3
    plain = clipvae.decode_clip(params, z)
    assert (clipvae.decode_clip(folded, after) - plain).abs().max() <= 1e-4 * plain.abs().max()


def test_a_work_folder_keeps_its_setting(tmp_path):
    rich = steps.Setting(height=96, width=160, rich=True)
    assert steps.kept_setting(tmp_path, {"height": 96, "width": 160, "rich": True}) == rich
    assert steps.kept_setting(tmp_path, {}) == rich
    with pytest.raises(ConfigError, match=r"height is 64, and .*setting.json says 96: leave it out, or take another"):
        steps.kept_setting(tmp_path, {"height": 64})


def test_rich_wordings_are_known_words():
    """No word is <unk>, no text is cut, and every factor is named in about half of them."""
    tokenizer, rng = text.build_tokenizer(rich=True), np.random.default_rng(0)
    scenes = [world.sample_rich_scene(rng) for _ in range(600)]
    words = [text.rich_wording(scene, rng) for scene in scenes]
    assert not [w for w in words if 2 in tokenizer.encode(w).ids]
    assert max(len(tokenizer.encode(w).ids) for w in words) <= steps.Setting(rich=True).text_len
    assert 0.4 < np.mean([" hills with " in w for w in words]) < 0.6
    assert 0.4 < np.mean(["thing" in w for w in words]) < 0.6


@pytest.mark.slow
def test_a_rich_model_of_another_size_is_trained_by_the_same_steps(tmp_path, monkeypatch):
    """VAE, cache and DiT of the rich world, a step or two each, fresh."""
    setting = steps.Setting(height=48, width=80, rich=True, dim=128, ffn_dim=128, layers=2)
    monkeypatch.setattr(train_vae, "unseen_figures", lambda *_: {})
    monkeypatch.setattr(clipvae, "norm_silu", clipvae.norm_silu)
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    monkeypatch.setattr(train_vae, "latent_statistics", functools.partial(train_vae.latent_statistics, num_clips=4))
    train_vae.train_vae(tmp_path, setting, train_vae.VaeOptions(0.001, fresh=True, compile=False))
    train_dit.cache_latents(tmp_path, setting, 2, 57, 1, 0, 1)
    latents, _, labels = train_dit.load_cache(tmp_path)
    assert latents.shape == (2, 16, 15, 6, 10)
    assert all(scene.pace in world.PACES for scene in train_dit.scenes_of(labels))
    train_dit.train_dit(tmp_path, setting, train_dit.DitOptions(0.001, batch=2, fresh=True, compile=False))
    assert torch.load(tmp_path / "dit.pt", weights_only=True)["step"] >= 1


def test_a_rich_training_begins_with_the_words_that_the_shipped_model_knows():
    """A plain caption means the same before the first step, and a new word has a row of its own."""
    rich = steps.Setting(rich=True)
    begun = train_dit._begun(rich, train_dit.DitOptions(minutes=1))
    rows = {}
    for setting, params in ((SETTING, train_dit.shipped_dit()), (rich, begun)):
        ids, mask = text.tokenize(text.build_tokenizer(setting.rich), ["a red balloon over snowy hills at dawn"], 16)
        encoder = {k[5:]: v for k, v in params.items() if k.startswith("text.")}
        rows[setting.rich] = clipdit.encode_text(encoder, ids, mask)
    assert torch.equal(rows[False], rows[True])
    assert len(begun["text.token_embedding.weight"]) == text.build_tokenizer(True).get_vocab_size()
    plain = train_dit._begun(SETTING, train_dit.DitOptions(minutes=1))
    assert all(torch.equal(plain[k], v) for k, v in train_dit.shipped_dit().items())
    with pytest.raises(ConfigError, match=r"another shape than dim 256, ffn_dim 768 and layers 6 say: give --fresh"):
        train_dit._begun(replace(rich, dim=256), train_dit.DitOptions(minutes=1))


def test_what_no_step_has_trained_is_exported_as_it_ships(tmp_path):
    export.export(tmp_path / "work", SETTING, tmp_path / "out", "long", {})
    for name in ("DIT_FILE", "TEXT_FILE", "VAE_FILE"):
        file = getattr(steps, name)
        ours, shipped = load_file(tmp_path / "out" / file), load_file(WEIGHTS_DIR / file)
        assert ours.keys() == shipped.keys()
        assert all(torch.equal(ours[k], shipped[k]) for k in shipped), file
    for name in ("config.json", "google/umt5-xxl/tokenizer.json"):
        assert (tmp_path / "out" / name).read_text() == (WEIGHTS_DIR / name).read_text()
