"""The shipped weights of the embedded model: they load, reconstruct, read, and equal their training form."""

import json

import numpy as np
import pytest
import torch

from bench.tiny import clipdit, clipvae, measures
from miga_engine.models.loading import load_bundle
from miga_engine.tiny import WEIGHTS_DIR, world
from miga_engine.tiny.classifier import ATTRIBUTES, frame_accuracy, load_classifier, read_attributes, to_tensor


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(WEIGHTS_DIR, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


def test_weights_are_small_and_state_their_figures():
    size = sum(p.stat().st_size for p in WEIGHTS_DIR.rglob("*") if p.is_file())
    assert size <= 25 * 2**20
    facts = json.loads((WEIGHTS_DIR / "miga.json").read_text())
    assert facts["window_frames"] == 13
    assert {"vae", "generated_clips"} <= set(facts["figures"])


@pytest.mark.slow
@torch.no_grad()
def test_vae_reconstructs_an_unseen_scene(bundle):
    """Within 3 dB of the mean that the weights state, in the subject's box too, and flat along time.

    Flat once the causal decoder has started up: the card states how much softer frames 1 and 4 are.
    """
    stated = json.loads((WEIGHTS_DIR / "miga.json").read_text())["figures"]["vae"]
    scene = world.Scene("balloon", "red", "green", "noon", 123_456)
    video, mask = world.render(scene, 20_000, 49)
    x = to_tensor(video)
    rec = bundle.vae.decode(bundle.vae.encode(x.transpose(0, 1)[None]))[0].transpose(0, 1)
    whole, box, along = measures.psnr(x, rec, mask)
    assert whole >= stated["psnr_db"] - 3
    assert box >= stated["psnr_db_subject_box"] - 3
    assert along[5:].min() > whole - 3
    assert abs(along[5:27].mean() - along[27:].mean()) < 1.5


@pytest.mark.slow
@torch.no_grad()
def test_latents_are_normalised_on_the_world(bundle):
    rng = np.random.default_rng(11)
    latents = []
    for _ in range(24):
        video, _ = world.render(world.sample_scene(rng), 300, 9)
        latents.append(bundle.vae.encode(to_tensor(video).transpose(0, 1)[None])[0])
    z = torch.stack(latents)
    assert z.mean((0, 2, 3, 4)).abs().max() < 0.35
    assert z.std((0, 2, 3, 4)).min() > 0.7
    assert z.std((0, 2, 3, 4)).max() < 1.4


@torch.no_grad()
def test_training_form_of_the_vae_equals_the_official_one(bundle):
    params = clipvae.from_official(dict(bundle.vae.named_parameters()))
    video, _ = world.render(world.Scene("bird", "white", "dark", "night", 1), 0, 17)
    x = to_tensor(video).transpose(0, 1)[None]
    mean, logvar = clipvae.encode_clip(params, x)
    official_mean, official_logvar = bundle.vae.encode_moments(x)
    assert (mean - official_mean).abs().max() <= 1e-4 * official_mean.abs().max()
    assert (logvar - official_logvar).abs().max() <= 1e-4 * official_logvar.abs().max()
    decoded = clipvae.decode_clip(params, official_mean).clamp(-1, 1)
    assert (decoded - bundle.vae.decode(bundle.vae.encode(x))).abs().max() <= 1e-4


@torch.no_grad()
def test_training_form_of_dit_and_text_encoder_equals_the_official_one(bundle):
    prompts = ["a red balloon over snowy hills at dawn", ""]
    rows = bundle.encode_prompts(prompts)
    text_len = bundle.transformer.config.text_len
    padded = torch.zeros(2, text_len, rows.shape[2])
    for i, prompt in enumerate(prompts):
        ids, mask = bundle.tokenizer([prompt])
        ours = clipdit.encode_text(dict(bundle.text_encoder.named_parameters()), ids, mask)
        assert (ours[0] - rows[i, : ours.shape[1]]).abs().max() <= 1e-4 * rows.abs().max()
        padded[i, : ours.shape[1]] = ours[0]
    x = torch.randn(2, 16, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([700.0, 100.0])
    official = bundle.transformer(x, times, rows)
    v = clipdit.velocity(dict(bundle.transformer.named_parameters()), x, times, padded, clipdit.rope_table(5, 4, 6))
    assert (v - official).abs().max() <= 1e-4 * official.abs().max()


def test_classifier_reads_rendered_frames(classifier):
    rng = np.random.default_rng(99)
    right = []
    for _ in range(60):
        scene = world.sample_scene(rng)
        video, _ = world.render(scene, int(rng.integers(10_000)), 1)
        right.append(list(frame_accuracy(classifier, to_tensor(video), scene).values()))
    assert np.mean(right, axis=0).min() >= 0.95


@pytest.mark.slow
def test_a_generated_clip_shows_what_its_prompt_says(bundle, classifier):
    """Three prompts, twelve attributes; at least ten are read as asked for."""
    scenes = [
        world.Scene("balloon", "red", "green", "noon"),
        world.Scene("kite", "yellow", "snowy", "dusk"),
        world.Scene("plane", "white", "desert", "night"),
    ]
    clips = measures.sample_clips(bundle, [world.caption(s) for s in scenes], num_steps=12, batch=3)
    assert clips.shape == (3, 49, 3, 64, 96)
    right = 0
    for scene, clip in zip(scenes, clips, strict=True):
        read = read_attributes(classifier, clip)
        right += sum(read[a] == getattr(scene, a) for a in ATTRIBUTES)
    assert right >= 10
