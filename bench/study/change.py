"""`python -m bench.study.change`: where in the queue a video changes its mind.

What each latent frame is predicted to be at each of its steps is placed between what the video began as (0) and what
the first method's video ends as (1). A change that frames bring along from the noise is there from the top; one that
spreads to cleaner frames from their noisier neighbours begins further down.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.command import Parser, run_command
from bench.study.methods import PROMPTS, method_options, noise_seed
from bench.study.paired import pyplot, save_figure
from miga_engine.engine import Engine
from miga_engine.errors import ConfigError
from miga_engine.request import Request
from miga_engine.runtime.denoise import Window
from miga_engine.runtime.stages import SEED_CLIP

_ENDS = 8
"""Latent frames at either end of a video that say what it looks like there."""


def follow(engine: Engine, request: Request) -> Tensor:
    """`[N,T,C·H]`: what each latent frame is predicted to be clean after each step, as means over the picture's rows;
    NaN for steps that it did not take in the queue or behind it: the seed clip is left out."""
    run = engine.start(request)
    run_windows: Callable[..., None] = run.denoiser.run
    found: dict[tuple[int, int], Tensor] = {}

    def watched(windows: Sequence[Window], **options: object) -> None:
        slots = np.concatenate([window.committed for window in windows]) if windows else np.empty(0, np.int64)
        keys = list(zip(run.store.frame_number[slots].tolist(), run.store.step_index[slots].tolist(), strict=True))
        run_windows(windows, **options)
        if run.stage != SEED_CLIP:
            predicted = run.store.x0[run.store.index(slots)]  # [n,C,H,W]
            found.update(zip(keys, predicted.mean(-1).flatten(1), strict=True))

    run.denoiser.run = watched
    num_frames = sum(len(clean.latents) for clean in run)
    steps = range(run.schedule.num_steps)
    nothing = torch.full_like(next(iter(found.values())), float("nan"))
    return torch.stack([torch.stack([found.get((k, s), nothing) for s in steps]) for k in range(num_frames)])


def places(followed: Tensor, start: Tensor, end: Tensor) -> npt.NDArray[np.float64]:
    """`[N,T]`: 0 where a prediction lies at `start`, 1 where it lies at `end`, along the line between them."""
    line = (end - start).double()
    return ((followed.double() - start) @ line / (line @ line)).numpy()


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="python -m bench.study.change", description=__doc__)
    parser.add_argument("--methods", nargs="+", required=True, metavar="METHOD", help="of bench.study.ablation")
    parser.add_argument("--prompt", type=int, required=True, metavar="INDEX", help=f"0 to {len(PROMPTS) - 1}, as in "
                        "the ablation's CSV files")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="as in those files (default: 0)")
    parser.add_argument("--num-frames", type=int, default=161, metavar="N", help="of the video (default: 161)")
    parser.add_argument("--picture", type=Path, required=True, metavar="PNG", help="a panel for each method")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: 1)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Draw the picture."""
    if not 0 <= options.prompt < len(PROMPTS):
        raise ConfigError(f"--prompt is {options.prompt}: give 0 to {len(PROMPTS) - 1}")
    plt = pyplot()
    torch.set_num_threads(options.threads)
    engine = Engine.from_pretrained("tiny")
    prompt, seed = PROMPTS[options.prompt], noise_seed(options.prompt, options.seed)
    followed = {
        method: follow(
            engine,
            engine.resolve(prompt, num_frames=options.num_frames, seed=seed, **method_options(engine, method)),
        )
        for method in options.methods
    }
    clean = followed[options.methods[0]][:, -1]
    start, end = clean[:_ENDS].mean(0), clean[-_ENDS:].mean(0)
    figure, axes = plt.subplots(len(followed), 1, figsize=(9, 2.9 * len(followed)), layout="constrained", squeeze=False)
    for axis, (method, frames) in zip(axes[:, 0], followed.items(), strict=True):
        image = axis.imshow(places(frames, start, end).T, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.set(title=method, xlabel="latent frame", ylabel="step (0: noise)")
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="0: its beginning, 1: its end")
    figure.suptitle(f"{prompt}, seed {options.seed}: what frames are predicted to be while they become clean")
    save_figure(figure, options.picture)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
