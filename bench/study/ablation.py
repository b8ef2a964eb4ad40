"""`python -m bench.study.ablation`: every part of the method against FIFO-Diffusion, with its cost.

Videos are the embedded model's. Differences to FIFO-Diffusion are taken between videos of one prompt and seed; their
intervals come from resampling prompts, which are what varies most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.command import Parser, run_command
from bench.study.grid import NUM_SEGMENTS, Job, measure_video, read_csv, run_grid, video_key, write_csv
from bench.study.methods import GROUPS, METHODS, NUM_PROMPTS, OPEN_ATTRIBUTES, PARTS, expand_methods, prompt_indices
from bench.study.paired import draw_measures, markdown_table, parts_table, pyplot, save_figure
from miga_engine.engine import Engine
from miga_engine.errors import ConfigError
from miga_engine.video.contact_sheet import write_contact_sheet
from miga_engine.video.reading import read_video


def draw_drift(jobs: Sequence[Job], folder: Path, picture: Path) -> None:
    """Curves over the length of the video, mean of all videos of a method; a band of the standard error for two."""
    plt = pyplot()
    made = list(dict.fromkeys(job.method for job in jobs))
    methods = [method for method in made if method in GROUPS["main"]] or made
    curves = {
        method: [measure_video(job, job.path(folder))["curves"] for job in jobs if job.method == method]
        for method in methods
    }
    names = list(next(iter(curves.values()))[0])
    figure, axes = plt.subplots(1, len(names), figsize=(5.6 * len(names), 4.6), layout="constrained")
    where = (np.arange(NUM_SEGMENTS) + 0.5) / NUM_SEGMENTS
    for axis, name in zip(axes, names, strict=True):
        for i, (method, videos) in enumerate(curves.items()):
            values: npt.NDArray[np.float64] = np.array([video[name] for video in videos])
            mean, error = values.mean(0), values.std(0) / max(1, len(values) - 1) ** 0.5
            colour = "black" if method == "fifo-equal" else plt.get_cmap("tab10")(i % 10)
            is_main = method in ("fifo-equal", "lookahead+stage2+anchor+past+history")
            axis.plot(where, mean, color=colour, label=method, linewidth=2.4 if is_main else 1.2)
            if is_main:
                axis.fill_between(where, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=name, xlabel="share of the video")
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
    save_figure(figure, picture)
    plt.close(figure)


def draw_sheet(jobs: Sequence[Job], folder: Path, picture: Path, *, num_tiles: int = 10) -> None:
    """A row of frames, evenly spaced, of every video; methods of one prompt and seed row under row."""
    rows = []
    for job in jobs:
        frames = read_video(job.path(folder))
        rows.append(frames[np.linspace(0, len(frames) - 1, num_tiles).round().astype(int)])
    write_contact_sheet(picture, rows, [f"{job.method}: {job.prompt}, seed {job.seed}" for job in jobs])


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        prog="python -m bench.study.ablation",
        description="Make and measure videos of the embedded model by several methods with the same prompts and seeds. "
        "What --folder or --csv already hold is not made again. The same command may run several times at once: each "
        "takes videos that no other has taken, and the last to end reports them all.",
    )
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where the videos are kept")
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, metavar="N", help=f"at most {NUM_PROMPTS}")
    parser.add_argument("--open", nargs="?", const="any", choices=("any", *OPEN_ATTRIBUTES), help="prompts that each "
                        "leave this open (any of them), which is measured against the video's beginning")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="videos of each prompt (default: 2)")
    parser.add_argument("--num-frames", type=int, default=481, metavar="N", help="of each video (default: 481)")
    parser.add_argument("--methods", nargs="+", default=["main", "alone"], metavar="METHOD",
                        help=f"{', '.join(METHODS)}; groups {', '.join(GROUPS)}; or changes to one, such as "
                        "default,zigzag_width=2 (default: main alone)")  # fmt: skip
    parser.add_argument("--reference", default="fifo", metavar="METHOD", help="what the others are compared with "
                        "(default: fifo)")  # fmt: skip
    parser.add_argument("--existing", action="store_true", help="make nothing: report what the folder holds so far")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: 1)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row per video; those that it has already are not "
                        "made again (default: DIR/ablation.csv)")  # fmt: skip
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="frames of every video, row under row")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw ablation.png and ablation_drift.png there "
                        "(needs matplotlib)")  # fmt: skip
    return parser


def run(options: argparse.Namespace) -> None:
    """Fill the grid, measure it, write the CSV file, print the table."""
    for name, value, most in (("prompts", options.prompts, NUM_PROMPTS), ("seeds", options.seeds, 1000)):
        if not 1 <= value <= most:
            raise ConfigError(f"--{name} is {value}: give 1 to {most}")
    torch.set_num_threads(options.threads)
    engine = Engine.from_pretrained("tiny")
    engine.capture = False  # replayed forwards could not be counted
    csv_path = options.csv or options.folder / "ablation.csv"
    rows = run_grid(
        engine,
        options.folder,
        expand_methods(options.methods),
        prompts=prompt_indices(options.open)[: options.prompts],
        num_seeds=options.seeds,
        num_frames=options.num_frames,
        known=read_csv(csv_path),
        make=not options.existing,
    )
    if not rows:
        raise ConfigError(f"--folder {options.folder} holds none of these videos yet: leave --existing out")
    by_video = {video_key(row): row for row in read_csv(csv_path)}  # another process may have written some meanwhile
    write_csv(csv_path, list((by_video | {video_key(row): row for row in rows}).values()))
    print(markdown_table(rows, options.reference))
    if parts := parts_table(rows, PARTS):
        print(f"Every part against the same method without it:\n\n{parts}")
    jobs = [Job(*video_key(row)) for row in rows]
    jobs = [job for job in jobs if job.path(options.folder).exists()]
    if options.sheet:
        draw_sheet(jobs, options.folder, options.sheet)
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        draw_measures(rows, options.reference, options.pictures / "ablation.png")
        if jobs:
            draw_drift(jobs, options.folder, options.pictures / "ablation_drift.png")


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
