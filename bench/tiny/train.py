"""The recipe of the embedded model: `python -m bench.tiny.train {vae,cache,dit,classifier,export}`.

Each step keeps its state in `--work` and goes on from it when started again. Lengths of training are wall-clock
minutes, because the recipe is made for a small CPU; the learning rate follows the share of the time used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bench.command import Parser, run_command
from bench.tiny.export import export
from bench.tiny.train_classifier import train_classifier
from bench.tiny.train_dit import cache_latents, train_dit
from bench.tiny.train_vae import train_vae
from miga_engine.tiny import WEIGHTS_DIR


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="python -m bench.tiny.train", description=__doc__)
    parser.add_argument("step", choices=["vae", "cache", "dit", "classifier", "export"])
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="folder of what the steps leave")
    parser.add_argument("--minutes", type=float, default=35.0, help="wall-clock length of a training")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--compile", action="store_true", help="compile what is known to train the same compiled")
    parser.add_argument("--decoder-only", action="store_true", help="vae: train on with the encoder as it is")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clips", type=int, default=2000, help="cache: number of clips over all parts")
    parser.add_argument("--frames", type=int, default=61, help="cache: video frames a clip")
    parser.add_argument("--part", type=int, default=0, help="cache: which part this process makes")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=WEIGHTS_DIR, help="export: where the weights go")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run one step of the recipe."""
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.step == "vae":
        train_vae(args.work, args.minutes, args.lr, compile_step=args.compile, decoder_only=args.decoder_only)
    elif args.step == "cache":
        cache_latents(args.work, args.clips, args.frames, args.part, args.parts)
    elif args.step == "dit":
        train_dit(args.work, args.minutes, args.lr, compile_step=args.compile)
    elif args.step == "classifier":
        train_classifier(args.work, args.minutes)
    else:
        path = args.work / "figures.json"
        export(args.work, args.folder, json.loads(path.read_text()) if path.exists() else {})


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
