"""How much of what a video begins with stays in it: the embedded model, true pictures and clips of its world.

Each scene's first frames are given with a caption that leaves the time of day open. Printed of the frames behind them:
the share with the given time of day, and with the subject, colour and land that the caption names; how far the first
made frame is from the last given, beside the step that the VAE makes there of the true world; and the PSNR of the
given frames as they come out.

`python -m bench.study.begin` takes some five minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.command import Parser, run_command
from miga_engine import Engine
from miga_engine.tiny import world
from miga_engine.tiny.classifier import ATTRIBUTES, frame_accuracy, load_classifier, to_tensor

CLIP_FRAMES = 25
CASES: Mapping[str, tuple[int, dict[str, Any]]] = {
    "nothing": (0, {}),
    "a picture": (1, {}),
    "a picture, told 0": (1, {"reference_sigma": 0.0}),
    "a picture, 2 % of noise": (1, {"reference_sigma": 0.02}),
    f"a clip of {CLIP_FRAMES}": (CLIP_FRAMES, {}),
    f"a clip of {CLIP_FRAMES}, told 0": (CLIP_FRAMES, {"reference_sigma": 0.0}),
    f"a clip of {CLIP_FRAMES}, 2 % of noise": (CLIP_FRAMES, {"reference_sigma": 0.02}),
}
"""What is given: video frames, and options of the method."""
COLUMNS = (*ATTRIBUTES, "step to the first made, levels", "the VAE's own there", "PSNR of what is given, dB")


def scenes(count: int) -> list[world.Scene]:
    """Scenes that differ in all, the times of day in turn."""
    rng = np.random.default_rng(21)
    drawn = [world.sample_scene(rng) for _ in range(count)]
    return [
        world.Scene(s.subject, s.colour, s.terrain, world.TIMES[i % len(world.TIMES)], s.seed)
        for i, s in enumerate(drawn)
    ]


def reconstructed(engine: Engine, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """What the VAE makes of true frames `[T,H,W,3]`."""
    with torch.no_grad():
        latents = engine.bundle.vae.encode(to_tensor(frames).transpose(0, 1)[None])
        decoded = engine.bundle.vae.decode(latents)[0].permute(1, 2, 3, 0)
    return ((decoded + 1) * 127.5).round().numpy().astype(np.int64)


def measured(engine: Engine, scene: world.Scene, case: str, num_frames: int) -> list[float]:
    """A row of `COLUMNS` for a video of a scene; NaN where nothing is given."""
    count, method = CASES[case]
    prompt = world.caption(scene).removesuffix(f" at {scene.time}")
    true, _ = world.render(scene, 0, max(count, 1) + engine.bundle.frame_ratio)
    given = {} if not count else {"image": true[0]} if count == 1 else {"video": true[:count]}
    made = engine.generate(prompt, num_frames, seed=scene.seed, miga=method, **given).frames.numpy()
    behind = made[count:]
    shares = frame_accuracy(load_classifier(), to_tensor(behind), scene)
    if not count:
        return [*shares.values(), *[float("nan")] * 3]
    again = reconstructed(engine, true)
    steps = [np.abs(b.astype(int) - a).mean() for a, b in ((made[count - 1], behind[0]), again[count - 1 : count + 1])]
    error = np.square(made[:count].astype(float) - true[:count]).mean()
    return [*shares.values(), *steps, 10 * np.log10(255**2 / error)]


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        prog="python -m bench.study.begin", description="How much of what a video begins with stays in it: a table."
    )
    parser.add_argument("--scenes", type=int, default=6, metavar="N", help="a video each (default: 6)")
    parser.add_argument("--num-frames", type=int, default=73, metavar="N", help="of each video (default: 73)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    engine = Engine.from_pretrained("tiny", "cpu")
    print(f"| given | {' | '.join(COLUMNS)} |")
    print(f"| --- |{' ---: |' * len(COLUMNS)}")
    for case in CASES:
        rows = [measured(engine, scene, case, options.num_frames) for scene in scenes(options.scenes)]
        means = np.mean(rows, axis=0)
        cells = [f"{100 * value:.0f} %" for value in means[: len(ATTRIBUTES)]]
        cells += ["" if np.isnan(value) else f"{value:.1f}" for value in means[len(ATTRIBUTES) :]]
        print(f"| {case} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
