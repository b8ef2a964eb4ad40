"""The engine with VideoCrafter2's networks in small: the same line, by facts that come with the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import golden_model
import pytest
import torch

from miga_engine import ConfigError, Engine
from miga_engine.config import PRESETS, fifo_config

OPTIONS = {"height": 16, "width": 32, "num_inference_steps": 8}
MIGA = dataclasses.replace(golden_model.MIGA, judge_step=2, reference_groups=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return golden_model.build_videocrafter2(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return Engine.from_pretrained(folder)


@pytest.fixture(scope="module")
def video(engine) -> torch.Tensor:
    return generate(engine)


def generate(engine: Engine, num_frames: int = 9, prompt="a b balloon", **options) -> torch.Tensor:
    return engine.generate(prompt, num_frames, **(OPTIONS | {"miga": MIGA} | options)).frames


def test_facts_come_with_the_model(engine):
    assert engine.preset is PRESETS["videocrafter2"]
    bundle = engine.bundle
    assert (bundle.prediction_type, bundle.frame_ratio, bundle.latent_channels) == ("epsilon", 1, 4)
    assert (bundle.window_frames, bundle.facts.window_frames, bundle.default_negative_prompt) == (5, 16, "")
    with pytest.raises(ConfigError, match="solver 'unipc' does not fit a model that predicts epsilon"):
        engine.resolve("a b", num_frames=4, solver="unipc", use_scale_array=False, miga=MIGA, **OPTIONS)


def test_every_latent_is_a_frame_and_seeds_reproduce(engine, video):
    assert video.shape == (9, 16, 32, 3)
    assert torch.equal(video, generate(engine))
    assert not torch.equal(video, generate(engine, seed=1))
    chunks = engine.stream("a b balloon", 9, chunk_frames=4, miga=MIGA, overlap_decode=True, **OPTIONS)
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), video)


def test_batches_change_rounding_only(engine, video):
    batched = generate(engine, miga=dataclasses.replace(MIGA, window_batch=3))
    assert (batched.int() - video.int()).abs().max() <= 2


def test_prompts_options_and_the_method_are_heard(engine, video):
    assert not torch.equal(video, generate(engine, prompt="c d"))
    assert not torch.equal(video, generate(engine, use_scale_array=False))
    assert not torch.equal(video, generate(engine, eta=0.0))
    fifo = generate(engine, miga=fifo_config(MIGA, 5))
    assert fifo.shape == video.shape
    assert not torch.equal(video, fifo)


def test_a_run_is_cancelled_between_passes(engine, video):
    chunks = []
    for chunk in engine.stream("a b balloon", is_cancelled=lambda: len(chunks) > 1, miga=MIGA, **OPTIONS):
        chunks.append(chunk)
    frames = torch.cat([chunk.frames for chunk in chunks])
    assert 2 <= len(frames) <= 9
    assert torch.equal(frames[:2], video[:2])


def test_memory_is_estimated(folder):
    small, large = (Engine.estimate(folder, miga=MIGA, **OPTIONS | {"height": size}).device_total for size in (16, 64))
    assert 0 < small < large
