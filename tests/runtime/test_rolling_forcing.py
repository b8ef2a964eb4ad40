"""A queue on the levels of Rolling Forcing against its public code: schedule, windows, and what the context costs.

`python tests/runtime/test_rolling_forcing.py` prints the distances that docs/method.md and docs/models.md name.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the helpers are, when it is run by itself
from places import GOLDENS

from miga_engine.models.wan.dit import WanDiT, WanDiTConfig
from miga_engine.noise import Purpose
from miga_engine.presets import PRESETS
from miga_engine.runtime.network import Batch
from miga_engine.runtime.stages import VideoRun
from miga_engine.schedule import make_schedule

FILE = GOLDENS / "rolling_forcing" / "rolling_forcing.safetensors"
PRESET = PRESETS["wan2.1-rolling"]
NUM_FRAMES = 27


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.fixture(scope="module")
def transformer(golden: dict[str, Tensor]) -> WanDiT:
    return golden_transformer(golden)


def golden_transformer(golden: dict[str, Tensor]) -> WanDiT:
    with safe_open(FILE, "pt") as file:
        config = json.loads(file.metadata()["config"])
    known = {field.name for field in dataclasses.fields(WanDiTConfig)}
    network = WanDiT(WanDiTConfig(**{name: size for name, size in config.items() if name in known}))
    state = {key.removeprefix("model."): value.float() for key, value in golden.items() if key.startswith("model.")}
    network.load_state_dict(state)
    return network


class Network:
    """The golden network as a `WindowNetwork` that keeps what it was given and what it gave."""

    num_prompts = 2

    def __init__(self, transformer: WanDiT, text: Tensor, timesteps: Tensor) -> None:
        self.transformer, self.seen = transformer, []
        self.levels, self.context = transformer.encode_timesteps(timesteps), transformer.encode_context(text[None])

    def place_prompts(self, prompt_rows: np.ndarray) -> np.ndarray:
        return prompt_rows

    def __call__(self, batch: Batch) -> Tensor:
        output = self.transformer(batch.latents, (self.levels, batch.steps), self.context)
        self.seen.append((batch.latents[0], batch.timesteps[0], output[0]))
        return output.gather(2, batch.keep[:, None, :, None, None].expand(-1, 4, -1, *output.shape[3:]))


def run_of(golden: dict[str, Tensor], transformer: WanDiT, **changes: Any) -> tuple[VideoRun, Network]:
    """A run of the preset on the golden's noise."""
    config, sampling = dataclasses.replace(PRESET.miga, **changes), PRESET.sampling
    schedule = make_schedule(
        sampling.solver, 5, sampling.shift, denoising_steps=sampling.denoising_steps,
        reference_sigma=config.reference_sigma,
    )  # fmt: skip
    network = Network(transformer, golden["text"], schedule.network_timesteps)

    def noise(purpose: Purpose, frames: np.ndarray, *, series: int | np.ndarray = 0) -> Tensor:
        frames = frames.clip(0, NUM_FRAMES - 1)  # what is behind the video's end is not looked at
        if purpose == Purpose.SOLVER:
            steps = np.minimum(series & 0xFFFF, 3)
            return golden["renoise"][steps, :, frames]
        return golden["noise"][:, frames].transpose(0, 1)

    run = VideoRun(
        network, schedule, config, window_frames=21, frame_shape=(4, 4, 6), noise=noise, num_frames=NUM_FRAMES,
        guidance_scale=sampling.guidance_scale, device=torch.device("cpu"),
    )  # fmt: skip
    return run, network


def error(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).abs().max() / wanted.abs().max())


def rms(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


def test_levels_are_those_of_the_release(golden: dict[str, Tensor]) -> None:
    sampling = PRESET.sampling
    schedule = make_schedule(sampling.solver, 5, sampling.shift, denoising_steps=sampling.denoising_steps)
    assert list(sampling.denoising_steps) == golden["schedule.denoising_steps"].tolist()
    assert error(schedule.timesteps, golden["schedule.timesteps"]) <= 1e-6
    assert error(schedule.sigmas[:-1], golden["schedule.sigmas"]) <= 1e-6


def test_the_queue_grows_and_takes_a_rolling_step_as_the_release_does(golden, transformer) -> None:
    """Up to the first full window, which nothing clean stands before: a block out, the others noised to their next."""
    run, network = run_of(golden, transformer)
    clean = next(iter(run))
    assert [latents.shape[1] for latents, *_ in network.seen] == [3, 6, 9, 12, 15]
    latents, timesteps, velocity = network.seen[-1]
    assert error(latents, golden["first.latents"]) <= 1e-5
    assert error(timesteps, golden["first.timesteps"]) <= 1e-6
    assert error(velocity, golden["first.velocity"]) <= 1e-5
    queued = run.store.sample[run.store.index(run.store.slots(range(3, 15)))]
    assert error(queued.transpose(0, 1), golden["first.next_latents"]) <= 1e-5
    assert error(clean.latents.transpose(0, 1), golden["latents"][:, :3]) <= 1e-5


def test_a_full_window_reads_the_sink_the_block_before_it_and_the_queue(golden, transformer) -> None:
    run, network = run_of(golden, transformer)
    made = torch.cat([clean.latents for clean in run]).transpose(0, 1)
    read = [latents.shape[1] for latents, *_ in network.seen]
    assert read == [3, 6, 9, 12, 15, 18, *[21] * 7]  # the first block is not read twice
    latents, timesteps, _ = network.seen[7]
    assert torch.equal(latents[:, :3], made[:, :3])
    assert torch.equal(latents[:, 3:6], made[:, 6:9])
    assert timesteps[:6].tolist() == [0] * 6


def test_context_that_is_computed_anew_differs_less_than_any_other(golden, transformer) -> None:
    """The release keeps keys and values of clean frames, which saw no noise; here they are read with the window.

    Of random weights this says which form is nearest, and not how near it is on trained ones.
    """
    distances = distances_by_context(golden, transformer)
    assert list(distances) == sorted(distances, key=distances.__getitem__)
    assert distances["preset"] < 0.02


def distances_by_context(golden: dict[str, Tensor], transformer: WanDiT) -> dict[str, float]:
    """Of the final latents of blocks 1 … 4 from those of the release, by what is read beside the queue."""
    distances = {}
    for name, changes in {
        "preset": {},
        "no sink": {"guidance_anchor": False, "guidance_frames": 0, "commit_offset": 6},
        "told the last level": {"reference_sigma": None},
        "no context": {"guidance_anchor": False, "guidance_frames": 0, "commit_offset": 0, "past_context": False},
    }.items():
        run, _ = run_of(golden, transformer, **changes)
        made = torch.cat([clean.latents for clean in run]).transpose(0, 1)
        # The windows of the release shrink towards the end, which begins to show in block 5.
        distances[name] = rms(made[:, 3:15], golden["latents"][:, 3:15])
    return distances


def main() -> None:
    """Print the distances."""
    golden = load_file(FILE)
    for name, distance in distances_by_context(golden, golden_transformer(golden)).items():
        print(f"{name}: {100 * distance:.1f} %")
    masked = rms(golden["first.velocity"], golden["masked.velocity"])
    print(f"a window whose frames see one another, from one through the block-causal mask: {100 * masked:.0f} %")


if __name__ == "__main__":
    main()
