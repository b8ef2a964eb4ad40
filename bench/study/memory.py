"""`python -m bench.study.memory`: how long a method remembers what it cannot see.

Videos of the rich world in which the subject disappears behind clouds or hills, from prompts that do not say what it
looks like. Each time it comes back, it has kept its colour or not: the share of those that have, by the latent frames
it was hidden for. A model that remembers nothing keeps one colour in five.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from bench.command import Parser, run_command
from bench.study.grid import write_csv
from bench.study.methods import expand_methods, method_options
from bench.study.paired import pyplot, resampled_ratio, save_figure
from miga_engine.engine import Engine
from miga_engine.errors import ConfigError
from miga_engine.tiny import reader, world

SPANS = (4, 12, 24, 48)
"""Latent frames hidden that gaps are counted under: whichever is nearest in proportion."""
_LATENT = 4  # frames of a latent frame
_LEAST, _MOST = 8, 24  # frames at either side of a gap that must show the subject, and that its look is read from
CHANCE = 1 / len(world.COLOURS)
COLUMNS = ("method", "prompt_index", "prompt", "seed", "num_frames", "gaps")


@dataclass(frozen=True)
class Gap:
    """The subject is hidden from frame `start` on, for `frames`; its colour as read before and after."""

    start: int
    frames: int
    before: str
    after: str

    @property
    def span(self) -> int:
        """Which of `SPANS` it is counted under."""
        return min(SPANS, key=lambda span: abs(math.log(self.frames / _LATENT / span)))


def gaps(reading: reader.Reading) -> list[Gap]:
    """Whenever the subject disappears and comes back; ends of the video, which have one side only, are none."""
    around = np.convolve(np.pad(reading.seen.astype(int), 2, mode="edge"), np.ones(5, int), "valid")
    seen = around >= 3  # a frame or two read otherwise than all around them are a slip
    edges = [0, *(np.flatnonzero(np.diff(seen.astype(int))) + 1).tolist(), len(seen)]
    runs = list(pairwise(edges))
    found = []
    for (before, start), (_, end), (_, after) in zip(runs, runs[1:], runs[2:], strict=False):
        if not seen[start] and min(start - before, after - end) >= _LEAST and end - start >= _LATENT:
            sides = slice(max(before, start - _MOST), start), slice(end, min(after, end + _MOST))
            found.append(Gap(start, end - start, *(reading.most("colour", side) for side in sides)))
    return found


def kept(videos: Sequence[Sequence[Gap]], span: int) -> tuple[int, float, float, float]:
    """Number of gaps of this span, the share of them after which the colour is the same, and its 95 % interval.

    Videos are resampled whole. Without gaps the share is not a number.
    """
    counts = [sum(g.span == span for g in video) for video in videos]
    same = [sum(g.span == span and g.before == g.after for g in video) for video in videos]
    if not any(counts):
        return 0, math.nan, math.nan, math.nan
    return sum(counts), *resampled_ratio(same, counts)


def prompts(count: int) -> list[str]:
    """Prompts that name everything but what the subject looks like; it disappears behind clouds and hills in turn."""
    rng = np.random.default_rng(31)
    named = [name for name in world.FACTORS if name not in ("colour", "pattern")]
    scenes = [world.sample_rich_scene(rng) for _ in range(count)]
    return [world.rich_caption(replace(scene, behind=world.COVERS[i % 2]), named) for i, scene in enumerate(scenes)]


Row = dict[str, str]
"""What is known of one video: `COLUMNS`, its gaps as `to_text` has them."""


def read_rows(path: Path) -> list[Row]:
    """Rows that `write_csv` wrote, none where there is no file yet; ConfigError for another file."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        reader_ = csv.DictReader(stream)
        rows = list(reader_)
    if tuple(reader_.fieldnames or ()) != COLUMNS:
        raise ConfigError(f"{path} is no CSV file of this study, for its columns are others: give another --csv")
    return rows


def to_text(found: Sequence[Gap]) -> str:
    return json.dumps([astuple(gap) for gap in found])


def from_text(text: str) -> list[Gap]:
    return [Gap(*fields) for fields in json.loads(text)]


def by_method(rows: Sequence[Row]) -> dict[str, list[list[Gap]]]:
    """The gaps of every method's videos."""
    found: dict[str, list[list[Gap]]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(from_text(row["gaps"]))
    return found


def table(rows: Sequence[Row]) -> str:
    """A line per method: the share kept at every span, its 95 % interval and the number of gaps."""
    lines = ["| method | videos | " + " | ".join(f"{span} latent frames" for span in SPANS) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(SPANS))
    for method, videos in by_method(rows).items():
        cells = []
        for span in SPANS:
            count, share, low, high = kept(videos, span)
            cells.append(f"{share:.0%} [{low:.0%}, {high:.0%}] of {count}" if count else "none")
        lines.append(f"| `{method}` | {len(videos)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], picture: Path) -> None:
    """The table as curves, with chance as a line."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for i, (method, videos) in enumerate(by_method(rows).items()):
        points = [(span, *kept(videos, span)[1:]) for span in SPANS]
        x, share, low, high = np.array([p for p in points if not math.isnan(p[1])]).reshape(-1, 4).T
        axis.errorbar(x * 1.03**i, share, [share - low, high - share], label=method, marker="o", capsize=3)
    axis.axhline(CHANCE, color="grey", linestyle=":", label="chance")
    axis.set(xscale="log", ylim=(0, 1.03), xlabel="latent frames hidden", ylabel="came back in its colour")
    axis.set_xticks(SPANS, [str(span) for span in SPANS])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    save_figure(figure, picture)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="python -m bench.study.memory", description=__doc__)
    parser.add_argument("--model", default="tiny", metavar="NAME", help="of the rich world (default: tiny)")
    parser.add_argument("--reader", type=Path, metavar="FILE", help="the reader's weights (default: the shipped ones)")
    parser.add_argument("--methods", nargs="+", default=["fifo-equal", "miga", "default"], metavar="METHOD")
    parser.add_argument("--prompts", type=int, default=8, metavar="N")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="videos of each prompt (default: 2)")
    parser.add_argument("--num-frames", type=int, default=1201, metavar="N", help="of each video (default: 1201)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: 1)")
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE", help="a row per video; those that it has "
                        "already are not made again")  # fmt: skip
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the curves (needs matplotlib)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Make the videos that are missing, read them, and print the table."""
    torch.set_num_threads(options.threads)
    model = reader.load_reader(options.reader)
    engine = Engine.from_pretrained(options.model, preset="tiny")
    rows = {(r["method"], int(r["prompt_index"]), int(r["seed"])): r for r in read_rows(options.csv)}
    asked = prompts(options.prompts)
    for i, prompt in enumerate(asked):
        for seed in range(options.seeds):
            for method in expand_methods(options.methods):
                if (method, i, seed) in rows:
                    continue
                noise = seed * len(asked) + i  # each prompt has noise of its own, which the methods share
                video = engine.generate(
                    prompt, num_frames=options.num_frames, seed=noise, **method_options(engine, method)
                )
                found = gaps(reader.read(model, video.frames.cpu().numpy()))
                values = (method, i, prompt, seed, options.num_frames, to_text(found))
                rows[method, i, seed] = dict(zip(COLUMNS, map(str, values), strict=True))
                write_csv(options.csv, list(rows.values()))
                print(f"{method}, {prompt!r}, seed {seed}: hidden {len(found)} times", flush=True)
    print(table(list(rows.values())))
    if options.picture:
        draw(list(rows.values()), options.picture)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
