"""The recipe of the embedded model: `python -m bench.tiny.train {vae,cache,dit,classifier,reader,export}`.

Each step keeps its state in `--work` and goes on from it when started again, the DiT's as if it had never stopped.
Lengths of training are wall-clock minutes, because the recipe is made for a small CPU; the learning rate follows the
share of the time used. What no step has trained in `--work` is taken from the shipped weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.command import Parser, run_command
from bench.tiny.export import export
from bench.tiny.steps import Setting, kept_setting
from bench.tiny.train_classifier import train_classifier
from bench.tiny.train_dit import DECAYS, DitOptions, cache_latents, train_dit
from bench.tiny.train_reader import train_reader
from bench.tiny.train_vae import VaeOptions, train_vae
from miga_engine.tiny import WEIGHTS_DIR


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="python -m bench.tiny.train", description=__doc__)
    parser.add_argument("step", choices=["vae", "cache", "dit", "classifier", "reader", "export"])
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="folder of what the steps leave")
    parser.add_argument("--minutes", type=float, default=35.0, help="wall-clock length of a training")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--height", type=int, help="of the pictures; these six are kept in --work (default: 64)")
    parser.add_argument("--width", type=int, help="(default: 96)")
    parser.add_argument("--rich", action="store_true", default=None, help="train on the rich world")
    parser.add_argument("--dim", type=int, help="width of the DiT (default: 192)")
    parser.add_argument("--ffn-dim", type=int, help="of the DiT (default: 768)")
    parser.add_argument("--layers", type=int, help="of the DiT (default: 6)")
    parser.add_argument("--device", default="cpu", help="where it runs, such as cuda (not classifier)")
    parser.add_argument("--fresh", action="store_true", help="vae, dit: begin with new weights, not the shipped ones")
    parser.add_argument(
        "--batch", type=int, help="vae: how many times the usual (default: 1); dit: windows a step (16)"
    )
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon", help="dit: for the hidden matrices")
    parser.add_argument("--muon-times", type=float, default=1.0, help="dit: Muon's learning rate over --lr")
    parser.add_argument("--subject-weight", type=float, default=4.0, help="dit: how much more the subject counts")
    parser.add_argument("--change-weight", type=float, default=1.0, help="dit: how much more change in time counts")
    parser.add_argument("--motion-weight", type=float, default=0.1, help="dit: weight of the motion head")
    parser.add_argument("--seed", type=int, default=0, help="vae, dit: of weights and batches")
    parser.add_argument("--compile", action="store_true", help="compile what is known to train the same compiled")
    parser.add_argument("--decoder-only", action="store_true", help="vae: train on with the encoder as it is")
    parser.add_argument("--contrast-power", type=float, default=0.0, help="vae: how much more low contrast counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clips", type=int, default=3000, help="cache: number of clips over all parts")
    parser.add_argument("--frames", type=int, default=97, help="cache: video frames a clip")
    parser.add_argument("--per-part", type=int, default=250, help="cache: clips a file")
    parser.add_argument("--part", type=int, default=0, help="cache: which part this process makes")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=WEIGHTS_DIR, help="export: where the weights go")
    parser.add_argument("--average", choices=list(DECAYS), default="long", help="export: which average of the DiT")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run one step of the recipe."""
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    asked = {f.name: getattr(args, f.name) for f in dataclasses.fields(Setting) if getattr(args, f.name) is not None}
    setting = kept_setting(args.work, asked)

    def options(kind: type[Any]) -> Any:
        given = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind)}
        return kind(**{name: value for name, value in given.items() if value is not None})

    if args.step == "vae":
        train_vae(args.work, setting, options(VaeOptions), args.device)
    elif args.step == "cache":
        cache_latents(args.work, setting, args.clips, args.frames, args.per_part, args.part, args.parts, args.device)
    elif args.step == "dit":
        train_dit(args.work, setting, options(DitOptions), args.device)
    elif args.step == "classifier":
        train_classifier(args.work, setting, args.minutes)
    elif args.step == "reader":
        train_reader(args.work, setting, args.minutes, device=args.device)
    else:
        path = args.work / "figures.json"
        figures = json.loads(path.read_text()) if path.exists() else {}
        export(args.work, setting, args.folder, args.average, figures)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
