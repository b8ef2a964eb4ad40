"""FIFO-Diffusion as a configuration: its published run, replayed from recorded noise."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import places
import pytest
import torch
from oracle import SHAPE, PlainNetwork, collect, toy_run
from safetensors.torch import load_file

from miga_engine.config import MigaConfig, fifo_config
from miga_engine.noise import Purpose
from miga_engine.presets import PRESETS
from miga_engine.runtime.stages import VideoRun
from miga_engine.schedule import add_noise, make_schedule

GOLDENS = places.GOLDENS / "samplers"
CPU = torch.device("cpu")

FIFO_RECORD = {
    key: value
    for key, value in json.loads((GOLDENS / "vc2_meta.json").read_text()).items()
    if key.startswith("fifo_run_")
}


def _fifo_network(latents, timesteps, rows):
    text = torch.where(rows == 0, -0.2, 0.1).view(-1, 1, 1, 1, 1)
    level = timesteps.view(len(latents), 1, -1, 1, 1) / 1000
    return torch.tanh(0.7 * latents + 0.3 * latents.mean(dim=2, keepdim=True) + 0.6 * level + text)


@pytest.mark.parametrize("lookahead", [1, 0])
def test_fifo_configuration_reproduces_fifo_diffusion(lookahead):
    """The published run: 4-frame windows, 4 partitions, DDIM eta 1, replayed from its noise tape."""
    tensors = load_file(GOLDENS / "vc2_trajectories.safetensors")
    video, tape, expected = (
        tensors[f"fifo_run_lookahead{lookahead}_{key}"][0].transpose(0, 1)
        for key in ("video_init", "noise_tape", "frames_out")
    )
    preset, record = PRESETS["videocrafter2-fifo"], FIFO_RECORD[f"fifo_run_lookahead{lookahead}_cfg"]
    config = dataclasses.replace(preset.miga, stride=record["video_length"] // 2)
    if not lookahead:
        config = dataclasses.replace(config, commit="leading", stride=4)
    padding, window, steps = 2 * lookahead, 4, 16
    stride = window - padding
    num_windows = steps // stride

    def noise(purpose: Purpose, numbers: np.ndarray, *, series=0) -> torch.Tensor:
        if purpose == Purpose.WARMUP:
            return tape[padding : padding + len(numbers)]
        iteration_start = padding + steps + run.num_passes * (num_windows * window + 1)
        if purpose == Purpose.PUSH:
            return tape[iteration_start - 1 :][:1]
        position = numbers - run.head
        plan = position // stride  # the release visits windows from the noisiest to the cleanest
        index = (num_windows - 1 - plan) * window + position % stride + padding
        return tape[iteration_start + index]

    run = VideoRun(
        PlainNetwork(_fifo_network), make_schedule("ddim", steps, eta=preset.sampling.eta), config,
        window_frames=window, frame_shape=tuple(video.shape[1:]), noise=noise, num_frames=6, device=CPU,
        guidance_scale=preset.sampling.guidance_scale,
    )  # fmt: skip
    run._seeding.first_queue(video, run._begin_queue)
    # The release pads with frame 0 at its least noisy level, where we keep it clean.
    padded = run.store.slots(range(run.head - padding, run.head))
    run.store.sample[torch.from_numpy(padded)] = add_noise(
        run.schedule, video[:1].expand(padding, -1, -1, -1), tape[:padding], steps - 1
    )
    outputs = []
    for _ in range(len(expected)):
        head = run.store.slots([run.head])
        run.tick()
        outputs.append(run.store.sample[torch.from_numpy(head)].clone())
    assert (torch.cat(outputs) - expected).abs().max() <= 1e-4
    assert run.stage == "done"
    # Of the frames that leave the queue, the copies of frame 0 come first and are not part of the video.
    assert run.emitted == 6


def test_fifo_preset_is_the_published_run_at_the_models_size():
    sampling, miga = PRESETS["videocrafter2-fifo"].sampling, PRESETS["videocrafter2-fifo"].miga
    assert miga == fifo_config(miga, 16)
    assert (miga.commit, miga.warmup, miga.stride, miga.window_order) == ("trailing", "copies", 8, "parallel")
    assert (sampling.solver, sampling.use_scale_array) == ("ddim", False)
    for record in FIFO_RECORD.values():
        assert (sampling.eta, sampling.guidance_scale) == (record["eta"], record["cfg"])
        assert record["S"] == record["num_partitions"] * record["video_length"]
        assert sampling.num_inference_steps == record["num_partitions"] * 16


def test_fifo_from_noise_to_video():
    latents = collect(toy_run(fifo_config(MigaConfig(), 9), 40, steps=27))
    assert latents.shape == (40, *SHAPE)
    assert latents.isfinite().all()
