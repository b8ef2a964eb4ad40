"""`python -m bench.study.gap`: the gap profile of the embedded model on clips of its own world.

`miga eval gap` does the same for any model on any clips; here the scenes are unseen ones of the world, and captions may
leave something open, as in `bench.study.ablation --open`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bench.command import Parser, run_command
from bench.study.methods import OPEN_ATTRIBUTES, expand_methods, leaving_open, method_options
from miga_engine.engine import Engine
from miga_engine.measure.gap import Clip, gap_profile, patterns, table, write_picture
from miga_engine.tiny import world

_NUM_FRAMES = 241
_FIRST_FRAME = 1000


def clips(count: int, left_open: str | None) -> Iterator[Clip]:
    """Unseen scenes with their captions, which leave this attribute open."""
    rng = np.random.default_rng(9000)
    for _ in range(count):
        scene = world.sample_scene(rng)
        caption = leaving_open(scene, left_open) if left_open else world.caption(scene)
        yield Clip(world.render(scene, _FIRST_FRAME, _NUM_FRAMES)[0], caption)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="python -m bench.study.gap", description=__doc__)
    parser.add_argument("--model", default="tiny", metavar="NAME", help="(default: tiny)")
    parser.add_argument("--clips", type=int, default=40, metavar="N", help="scenes (default: 40)")
    parser.add_argument("--open", choices=OPEN_ATTRIBUTES, help="what captions leave open (default: nothing)")
    parser.add_argument("--methods", nargs="*", default=[], metavar="METHOD",
                        help="of bench.study.ablation, beside the usual patterns")  # fmt: skip
    parser.add_argument("--num-inference-steps", type=int, default=26, metavar="T", help="(default: 26)")
    parser.add_argument("--passes", type=int, default=2, metavar="N", help="of the queue for each clip (default: 2)")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="the table as curves over the noise levels")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: 1)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    torch.set_num_threads(options.threads)
    engine = Engine.from_pretrained(options.model, preset="tiny")
    request = engine.resolve(prompt="any", num_inference_steps=options.num_inference_steps)
    compared = patterns(method_options(engine, "miga")["miga"], engine.bundle.window_frames)
    compared |= {name: method_options(engine, name)["miga"] for name in expand_methods(options.methods)}
    with tqdm(total=options.clips, unit="clip", disable=None) as bar:
        shown = clips(options.clips, options.open)
        bands, profiles = gap_profile(engine, shown, compared, request, passes=options.passes, on_clip=bar.update)
    print(table(bands, profiles))
    if options.picture:
        write_picture(options.picture, bands, profiles)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
