"""`miga eval ablation`: every part of the method against FIFO-Diffusion, on the embedded model, with its cost.

Videos are made in the order prompt → seed → method, each once: a folder that holds some of them is filled up, and
wherever the work stops the methods have been given the same prompts and seeds. Differences to FIFO-Diffusion are taken
between videos of one prompt and seed; their intervals come from resampling prompts, which are what varies most.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from miga_engine.config import MigaConfig, fifo_config, replace_options
from miga_engine.errors import ConfigError
from miga_engine.tiny import world

if TYPE_CHECKING:
    from miga_engine.engine import Engine, Event, Request

# Neighbours share at most one attribute, so that the first few are as varied as all: each subject, terrain and time of
# day comes six times, each colour four or five times.
SCENES = tuple(
    world.Scene(
        world.SUBJECTS[i % 4],
        world.COLOURS[(i + i // 5) % 5],
        world.TERRAINS[(i + i // 4) % 4],
        world.TIMES[(3 * i + i // 4 + i // 16) % 4],
    )
    for i in range(24)
)
PROMPTS = tuple(map(world.caption, SCENES))

BARE = {"zigzag_width": 1, "stage2_steps": 0, "refine_steps": 0, "guidance_frames": 0, "self_reflection": False}
"""The method's queue without any of its parts: windows commit their cleaner end, the queue grows behind a clip."""

METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "fifo": ("fifo", {"num_inference_steps": 52}),
    "fifo-equal": ("fifo", {"num_inference_steps": 26}),
    "zigzag": ("bare", {"zigzag_width": 4}),
    "zigzag+stage2": ("bare", {"zigzag_width": 4, "stage2_steps": 5}),
    "zigzag+stage2+guidance": ("default", {"self_reflection": False}),
    "default": ("default", {}),
    "paper": ("default", {"judge": "latent", "channels": "mean", "score_drop": 0.01}),
    "default+refine": ("default", {"refine_steps": 5}),
    "bare": ("bare", {}),
    "stage2": ("bare", {"stage2_steps": 5}),
    "guidance": ("bare", {"guidance_frames": 2}),
    "reflection": ("bare", {"self_reflection": True}),
    "refine": ("bare", {"refine_steps": 5}),
}
"""Rows of the table: what they start from (FIFO-Diffusion, the bare queue, the preset), and what they change."""

WORLD = "world"
"""Not a method: the prompt's scene as the world renders it, which says what the measures can reach."""
SWEEP = (
    "default,zigzag_width=2", "default,zigzag_width=6", "default,zigzag_width=8",
    "default,guidance_frames=0", "default,guidance_frames=1", "default,guidance_frames=4",
    "default,stage2_steps=0", "default,stage2_steps=2", "default,stage2_steps=9",
    "default,stride=3", "default,stride=9",
    "default,score_drop=0.1", "default,score_drop=0.4",
    "default,judge=latent,channels=all", "default,judge=latent,channels=all,judge_step=10,score_drop=0.03",
    "default,judge=x0,channels=mean",
)  # fmt: skip
GROUPS = {
    "main": (*tuple(METHODS)[:8], WORLD),
    "alone": tuple(METHODS)[8:],
    "sweep": SWEEP,
}
REFERENCE = "fifo"
SUFFIX = ".mkv"
NUM_SEGMENTS = 16
"""Parts of a video that its curves over time are averaged in."""


@dataclass(frozen=True)
class Job:
    """One video of the grid."""

    method: str
    prompt_index: int
    seed: int

    @property
    def prompt(self) -> str:
        return PROMPTS[self.prompt_index]

    def path(self, folder: Path) -> Path:
        return folder / self.method / f"{self.prompt_index:02d}_{self.seed}{SUFFIX}"


def method_options(engine: Engine, method: str) -> dict[str, Any]:
    """Options of `Engine.stream` for a name of `METHODS`, or for one with changes, as in ``default,zigzag_width=2``."""
    if method == WORLD:
        return {}
    name, *changes = method.split(",")
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; the methods are {', '.join(METHODS)} and {WORLD}")
    base, options = METHODS[name]
    options = {**options, **dict(_parse_change(method, change) for change in changes)}
    num_steps = options.pop("num_inference_steps", None)
    default = engine.preset.miga
    config = {
        "fifo": fifo_config(default, engine.bundle.window_frames),
        "bare": replace_options(default, BARE),
        "default": default,
    }[base]
    return {"num_inference_steps": num_steps, "miga": replace_options(config, options)}


def _parse_change(method: str, change: str) -> tuple[str, Any]:
    """``stride=3`` → ("stride", 3), by the type of the option's default."""
    name, equals, text = change.partition("=")
    defaults = {field.name: field.default for field in dataclasses.fields(MigaConfig)} | {"num_inference_steps": 0}
    if not equals or name not in defaults:
        raise ConfigError(f"method {method!r} has {change!r}, which is not OPTION=VALUE with an option of MigaConfig")
    default = defaults[name]
    try:
        if isinstance(default, bool):
            return name, {"true": True, "false": False}[text.lower()]
        if isinstance(default, str):
            return name, text
        return name, float(text) if isinstance(default, float) else int(text)
    except (KeyError, ValueError):
        raise ConfigError(f"method {method!r} gives {name} the value {text!r}, which it cannot have") from None


def expand_methods(names: Iterable[str]) -> list[str]:
    """Groups replaced by their methods, each method once."""
    return list(dict.fromkeys(method for name in names for method in GROUPS.get(name, (name,))))


# Videos ----------------------------------------------------------------------------------------------------------


def make_video(engine: Engine, request: Request, path: Path) -> None:
    """Write the video, lossless, and beside it a record of what it cost and what its judge said.

    ``window_frames`` counts the latent frames that all forwards read, once for both branches of guidance.
    """
    from miga_engine.video.sinks import open_sink

    window_frames = 0

    def count(module: object, arguments: tuple[Any, ...], output: object) -> None:
        nonlocal window_frames
        latents = arguments[0]  # [B,C,F,H,W]
        window_frames += latents.shape[0] * latents.shape[2]

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.part{path.suffix}")
    partial.unlink(missing_ok=True)
    events: list[Event] = []
    hook = engine.bundle.transformer.register_forward_hook(count)
    started = time.perf_counter()
    try:
        with open_sink(partial, request.fps, request.width, request.height) as sink:
            for chunk in engine.run(request, on_event=events.append):
                sink.write(chunk.frames)
    finally:
        hook.remove()
    searches = [event.data["adopted"] for event in events if event.kind == "search_finished"]
    record = {
        "request": _comparable(engine, request),
        "window_frames": window_frames,
        "seconds": time.perf_counter() - started,
        "searches": len(searches),
        "adopted": sum(searches),
        "events": [{"event": e.kind, **e.data} for e in events if e.kind == "score" or e.kind.startswith("search")],
    }
    path.with_suffix(".json").write_text(json.dumps(record))
    partial.replace(path)


def render_world(scene: world.Scene, request: Request, path: Path) -> None:
    """Write what the prompt describes, at no cost, in place of a generated video."""
    from miga_engine.video.sinks import open_sink

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.part{path.suffix}")
    partial.unlink(missing_ok=True)
    scene = dataclasses.replace(scene, seed=request.seed)
    with open_sink(partial, request.fps, request.width, request.height) as sink:
        sink.write(world.render(scene, 0, request.num_frames or 0, request.height, request.width)[0])
    record = {"window_frames": 0, "seconds": 0.0, "searches": 0, "adopted": 0, "events": []}
    record["request"] = {"num_frames": request.num_frames, "seed": request.seed}
    path.with_suffix(".json").write_text(json.dumps(record))
    partial.replace(path)


def _comparable(engine: Engine, request: Request) -> dict[str, Any]:
    metadata = json.loads(json.dumps(request.metadata(engine.name)))
    return {**metadata.pop("miga"), **metadata}


def _check_made(engine: Engine, request: Request, path: Path) -> None:
    """Refuse a video that was made with other options; options that did not exist then are not compared."""
    made, now = json.loads(path.with_suffix(".json").read_text())["request"], _comparable(engine, request)
    for name in made.keys() & now.keys() - {"miga_engine"}:
        if made[name] != now[name]:
            raise ConfigError(f"{path} was made with {name} {made[name]!r}, now {now[name]!r} is asked for: give "
                              "another --folder, or remove the file")  # fmt: skip


def measure_video(job: Job, path: Path) -> dict[str, Any]:
    """Measures and curves of a video, kept beside it; a video is measured once."""
    from miga_engine.eval.flow import motion_and_warping
    from miga_engine.eval.measures import temporal_flicker
    from miga_engine.eval.truth import truth_curves
    from miga_engine.video.reading import read_video

    kept = path.with_suffix(".measures.json")
    if not kept.exists():
        frames = read_video(path)
        truth = truth_curves(frames, job.prompt)
        motion, _ = motion_and_warping(frames, "lucas-kanade")
        curves = {
            "subject consistency": truth.subject_consistency,
            "background consistency": truth.background_consistency,
            "distance of the colours from the true world's": truth.colour_profile_distance,
            "motion, px/frame": motion,
        }
        measured = {
            "means": {**truth.means(), "motion": float(motion.mean()), "flicker": temporal_flicker(frames)},
            "curves": {
                name: [float(part.mean()) for part in np.array_split(curve, NUM_SEGMENTS)]
                for name, curve in curves.items()
            },
        }
        partial = kept.with_suffix(".part")
        partial.write_text(json.dumps(measured))
        partial.replace(kept)
    content: dict[str, Any] = json.loads(kept.read_text())
    return content


def run_grid(
    engine: Engine,
    folder: Path,
    methods: Sequence[str],
    *,
    num_prompts: int,
    num_seeds: int,
    num_frames: int,
    make: bool = True,
) -> list[Job]:
    """Make every video of the grid that the folder lacks, unless ``make`` is False; the jobs done, in order of work."""
    jobs = [Job(m, p, s) for p in range(num_prompts) for s in range(num_seeds) for m in methods]
    options = {method: method_options(engine, method) for method in methods}
    requests = [
        # each prompt has noise of its own, which the methods share
        engine.resolve(
            j.prompt, num_frames=num_frames, seed=j.seed * len(PROMPTS) + j.prompt_index, **options[j.method]
        )
        for j in jobs
    ]
    done = []
    for job, request in zip(jobs, requests, strict=True):
        path = job.path(folder)
        if path.exists():
            _check_made(engine, request, path)
        elif job.method == WORLD:
            render_world(SCENES[job.prompt_index], request, path)
        elif make:
            make_video(engine, request, path)
            record = json.loads(path.with_suffix(".json").read_text())
            print(f"{path}: {record['window_frames']} frames read, {record['seconds']:.1f} s", flush=True)
        else:
            continue
        done.append(job)
    return done


# Statistics and reports ------------------------------------------------------------------------------------------

MEASURES: Mapping[str, tuple[str, float]] = {
    "subject_consistency": ("subject consistency, %", 100),
    "background_consistency": ("background consistency, %", 100),
    "motion": ("motion, px/frame", 1),
    "colour_profile_distance": ("colours off the true world, %", 100),
    "colour_drift": ("colour drift, %", 100),
    "subject_jitter": ("subject jitter, px/frame²", 1),
    "accuracy": ("attributes as asked, %", 100),
}
"""Measures of the table: their name there, and the factor to its unit."""
CSV_COLUMNS = (
    "method",
    "prompt_index",
    "prompt",
    "seed",
    "num_frames",
    "window_frames",
    "seconds",
    "searches",
    "adopted",
)
Row = Mapping[str, Any]


def read_row(job: Job, folder: Path, num_frames: int) -> dict[str, Any]:
    """What is known of one video, as a row of the CSV file."""
    path = job.path(folder)
    record = json.loads(path.with_suffix(".json").read_text())
    means = measure_video(job, path)["means"]
    accuracies = [value for name, value in means.items() if name.startswith("accuracy_")]
    row = {**record, **dataclasses.asdict(job), "prompt": job.prompt, "num_frames": num_frames}
    return {name: row[name] for name in CSV_COLUMNS} | means | {"accuracy": float(np.mean(accuracies))}


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def paired_difference(
    rows: Sequence[Row], reference: Sequence[Row], measure: str, *, num_resamples: int = 10_000
) -> tuple[float, float, float]:
    """Mean difference over the prompts and seeds that both have, and its 95 % interval (percentile bootstrap).

    Prompts are resampled whole, with all their seeds: videos of one prompt are not independent of each other.
    """
    values = {(row["prompt_index"], row["seed"]): row[measure] for row in reference}
    by_prompt: dict[int, list[float]] = {}
    for row in rows:
        key = (row["prompt_index"], row["seed"])
        if key in values:
            by_prompt.setdefault(row["prompt_index"], []).append(row[measure] - values[key])
    if not by_prompt:
        raise ConfigError("no prompt and seed is common to the two methods: there is nothing to compare")
    sums = np.array([sum(differences) for differences in by_prompt.values()])
    counts = np.array([len(differences) for differences in by_prompt.values()])
    drawn = np.random.default_rng(0).integers(len(sums), size=(num_resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def markdown_table(rows: Sequence[Row]) -> str:
    """A row per method: cost, and every measure as mean ± standard deviation over videos with its difference to FIFO.

    Differences whose 95 % interval excludes 0 are bold.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}
    reference = by_method.get(REFERENCE)
    titles = ["method", "videos", "latent frames read per frame", *(title for title, _ in MEASURES.values())]
    lines = ["| " + " | ".join(titles) + " |", "| --- " + "| ---: " * (len(titles) - 1) + "|"]
    for method, own in by_method.items():
        cells = [
            f"`{method}`",
            str(len(own)),
            f"{np.mean([row['window_frames'] / row['num_frames'] for row in own]):.1f}",
        ]
        for measure, (_, factor) in MEASURES.items():
            values = np.array([row[measure] for row in own]) * factor
            cell = f"{values.mean():.2f} ± {values.std():.2f}"
            if reference and method != REFERENCE:
                mean, low, high = (factor * x for x in paired_difference(own, reference, measure))
                mark = "**" if low * high > 0 else ""
                cell += f"<br>{mark}{mean:+.2f}{mark} [{low:+.2f}, {high:+.2f}]"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pyplot() -> Any:
    """matplotlib.pyplot without a window."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError('pictures need matplotlib: pip install "miga_engine[bench]", or leave them out') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_measures(rows: Sequence[Row], picture: Path) -> None:
    """Consistency against motion, side by side for subject and background, and each against cost: means with the
    95 % interval of their difference to FIFO."""
    plt = pyplot()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}
    shown = ("subject_consistency", "background_consistency", "colour_profile_distance", "subject_jitter")
    figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 5.2), layout="constrained")
    for axis, measure in zip(axes, shown, strict=True):
        title, factor = MEASURES[measure]
        for i, (method, own) in enumerate(by_method.items()):
            x, y = (np.mean([row[name] for row in own]) for name in ("motion", measure))
            errors = np.zeros((2, 2))  # of x and y, below and above
            if method != REFERENCE and REFERENCE in by_method:
                intervals = [paired_difference(own, by_method[REFERENCE], name) for name in ("motion", measure)]
                errors = np.array([[mean - low, high - mean] for mean, low, high in intervals])
            axis.errorbar(
                x, y * factor, xerr=errors[0][:, None], yerr=factor * errors[1][:, None],
                marker="*" if method == REFERENCE else "os^Dvp"[i % 6], markersize=14 if method == REFERENCE else 7,
                color=plt.get_cmap("tab20")(i % 20), elinewidth=0.8, linestyle="none", label=method,
            )  # fmt: skip
        axis.set(xlabel="motion, px/frame", title=title)
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle("Consistency beside motion; bars: 95 % intervals of the paired difference to FIFO (star)")
    figure.savefig(picture, dpi=110)
    plt.close(figure)


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
            colour = "black" if method == REFERENCE else plt.get_cmap("tab10")(i % 10)
            is_main = method in (REFERENCE, "default")
            axis.plot(where, mean, color=colour, label=method, linewidth=2.4 if is_main else 1.2)
            if is_main:
                axis.fill_between(where, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=name, xlabel="share of the video")
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def draw_sheet(jobs: Sequence[Job], folder: Path, picture: Path, *, num_tiles: int = 10) -> None:
    """A row of frames, evenly spaced, of every video; methods of one prompt and seed row under row."""
    from miga_engine.video.contact_sheet import write_contact_sheet
    from miga_engine.video.reading import read_video

    rows = []
    for job in jobs:
        frames = read_video(job.path(folder))
        rows.append(frames[np.linspace(0, len(frames) - 1, num_tiles).round().astype(int)])
    write_contact_sheet(picture, rows, [f"{job.method}: {job.prompt}, seed {job.seed}" for job in jobs])


def add_parser(commands: Any, name: str = "ablation") -> None:
    """Add the command to the sub-commands of `miga eval`."""
    parser = commands.add_parser(
        name,
        help="every part of the method against FIFO-Diffusion, on the embedded model",
        description="Make and measure videos of the embedded model by several methods with the same prompts and seeds. "
        "What --folder already holds is not made again.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where the videos are kept")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), metavar="N", help=f"at most {len(PROMPTS)}")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="videos of each prompt (default: 2)")
    parser.add_argument("--num-frames", type=int, default=481, metavar="N", help="of each video (default: 481)")
    parser.add_argument("--methods", nargs="+", default=["main", "alone"], metavar="METHOD",
                        help=f"{', '.join(METHODS)}; groups {', '.join(GROUPS)}; or changes to one, such as "
                        "default,zigzag_width=2 (default: main alone)")  # fmt: skip
    parser.add_argument("--existing", action="store_true", help="make nothing: report what the folder holds so far")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: 1)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row per video (default: DIR/ablation.csv)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="frames of every video, row under row")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw ablation.png and ablation_drift.png there "
                        "(needs matplotlib)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """The command: fill the grid, measure it, write the CSV file, print the table."""
    import torch

    from miga_engine.engine import Engine

    for name, value, most in (("prompts", options.prompts, len(PROMPTS)), ("seeds", options.seeds, 1000)):
        if not 1 <= value <= most:
            raise ConfigError(f"--{name} must lie between 1 and {most}, got {value}")
    torch.set_num_threads(options.threads)
    engine = Engine.from_pretrained("tiny")
    engine.capture = False  # replayed forwards could not be counted
    jobs = run_grid(
        engine,
        options.folder,
        expand_methods(options.methods),
        num_prompts=options.prompts,
        num_seeds=options.seeds,
        num_frames=options.num_frames,
        make=not options.existing,
    )
    if not jobs:
        raise ConfigError(f"--folder {options.folder} holds none of these videos yet: leave --existing out")
    rows = [read_row(job, options.folder, options.num_frames) for job in jobs]
    write_csv(options.csv or options.folder / "ablation.csv", rows)
    print(markdown_table(rows))
    if options.sheet:
        draw_sheet(jobs, options.folder, options.sheet)
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        draw_measures(rows, options.pictures / "ablation.png")
        draw_drift(jobs, options.folder, options.pictures / "ablation_drift.png")
    return 0
