"""The whole line on the embedded model: prompt to video, streaming against whole-sequence passes, prompts over time."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from oracle import Oracle, PlainNetwork, counter_noise, prompt_table

from miga_engine import Engine, _extension
from miga_engine.prompts import PromptTimeline
from miga_engine.runtime.stages import VideoRun
from miga_engine.schedule import make_schedule

STEPS = 8
SHAPE = (16, 4, 6)  # equality of bits needs no larger picture


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("tiny", "cpu")


@pytest.fixture(scope="module")
def network(engine):
    return make_network(engine)


def make_network(engine: Engine):
    timeline = PromptTimeline({0: "a red balloon over snowy hills at dawn"}, 0, engine.bundle.first_video_frame)
    with torch.no_grad():
        context = engine.bundle.transformer.encode_context(prompt_table(timeline, engine.bundle.encode_prompts))

    @torch.no_grad()
    def forward(latents, timesteps, rows):
        return engine.bundle.transformer(latents, timesteps, context, context_index=rows)

    return forward


def _config(engine: Engine, **options):
    return dataclasses.replace(engine.preset.miga, stage2_steps=3, self_reflection=False, **options)


def _few_steps(engine: Engine) -> dict:
    return {"num_inference_steps": 12, "miga": _config(engine)}


def _stream(engine: Engine, network, config, num_frames: int) -> torch.Tensor:
    run = VideoRun(
        PlainNetwork(network), make_schedule("unipc", STEPS, 3.0), config, window_frames=engine.bundle.window_frames,
        frame_shape=SHAPE, noise=counter_noise(2, SHAPE), num_frames=num_frames, guidance_scale=3.0,
        device=torch.device("cpu"),
    )  # fmt: skip
    return torch.cat([clean.latents for clean in run])


@pytest.mark.slow
@pytest.mark.parametrize(("num_frames", "refine_steps"), [(13, 3), (20, 0), (31, 3)])
def test_streamed_equals_whole_sequence_bit_for_bit(engine, network, num_frames, refine_steps):
    """31 ends inside a window: it is no multiple of the stride behind the window."""
    config = _config(engine, refine_steps=refine_steps)
    oracle = Oracle(network, make_schedule("unipc", STEPS, 3.0), config, 13, counter_noise(2, SHAPE), 3.0)
    assert torch.equal(_stream(engine, network, config, num_frames), oracle.run(num_frames))


@pytest.mark.slow
@pytest.mark.parametrize("window_batch", [2, 5])
def test_window_batch_is_rounding_only(engine, network, window_batch):
    alone = _stream(engine, network, _config(engine), 20)
    batched = _stream(engine, network, _config(engine, window_batch=window_batch), 20)
    assert (alone - batched).abs().max() <= 2e-3 * alone.abs().max()


EAGER_RUN = """
import sys, torch, test_tiny_line as line
engine = line.Engine.from_pretrained("tiny", "cpu")
torch.save(line._stream(engine, line.make_network(engine), line._config(engine, refine_steps=2), 20), sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not _extension.load(), reason="the C++ CPU kernels were not built")
def test_cpp_kernels_and_eager_ops_make_the_same_latents(engine, network, tmp_path):
    environment = {**os.environ, "MIGA_EXTENSION": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", EAGER_RUN, tmp_path / "eager.pt"], env=environment, check=True)
    eager = torch.load(tmp_path / "eager.pt")
    fused = _stream(engine, network, _config(engine, refine_steps=2), 20)
    assert (fused - eager).abs().max() <= 1e-4 * eager.abs().max()


def test_presets_defaults_fit_the_model(engine):
    extra = engine.bundle.extra
    preset = engine.preset
    assert (preset.height, preset.width, preset.fps) == (extra["height"], extra["width"], extra["fps"])
    assert engine.bundle.default_negative_prompt == ""


@pytest.mark.slow
def test_night_falls_when_the_prompt_says_so(engine):
    """The picture darkens near the change and not before; the steps are few, so the picture is rough."""
    prompts = {0: "a red balloon over snowy hills at noon", 80: "a red balloon over snowy hills at night"}
    frames = engine.generate(prompts, 141, seed=3, **_few_steps(engine)).frames
    light = frames.float().mean(dim=(1, 2, 3))
    assert light[120:].mean() < 0.6 * light[:40].mean()
    assert light[:57].min() > 0.75 * light[:40].mean()


@pytest.mark.slow
def test_prompts_are_heard(engine):
    """At noon the sky is blue, at dusk it is not."""
    noon, dusk = (
        engine.generate(f"a yellow kite over green hills at {time}", 49, seed=1, **_few_steps(engine)).frames.float()
        for time in ("noon", "dusk")
    )
    blueness = [float((frames[:, :24, :, 2] - frames[:, :24, :, 0]).mean()) for frames in (noon, dusk)]
    assert blueness[0] > blueness[1] + 30
