"""The ablation's videos: each made once, measured once, and a row of the CSV file for each.

Videos are made in the order prompt → seed → method: a folder that holds some of them is filled up, and wherever the
work stops the methods have been given the same prompts and seeds.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.study.methods import NUM_PROMPTS, OPEN_ATTRIBUTES, PROMPTS, SCENES, WORLD, method_options, noise_seed
from bench.study.paired import COMPARED, VideoRow
from miga_engine.config import MigaConfig
from miga_engine.errors import ConfigError
from miga_engine.files import open_own, path_written_whole, write_whole
from miga_engine.request import Request
from miga_engine.runtime.network import NEGATIVE_ROW
from miga_engine.tiny import world

if TYPE_CHECKING:
    from miga_engine.engine import Engine
    from miga_engine.runtime.stream import Event

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


# Videos ----------------------------------------------------------------------------------------------------------


def make_video(engine: Engine, request: Request, path: Path, asked: Mapping[str, Any]) -> None:
    """Write the video, lossless, and beside it a record of what was asked, what it cost and what its judge said.

    `window_frames` counts the latent frames that all forwards read, once for both branches of guidance, whether these
    read the same or not.
    """
    from miga_engine.video.outputs import open_sink

    window_frames = 0

    def count(module: object, arguments: tuple[Any, ...], options: Mapping[str, Any], output: object) -> None:
        nonlocal window_frames
        prompts = options["context_index"]  # of each window in each branch, or of each of its frames
        is_conditional = prompts.reshape(len(prompts), -1)[:, 0] != NEGATIVE_ROW
        window_frames += int(is_conditional.sum()) * arguments[0].shape[2]  # [B,C,F,H,W]

    path.parent.mkdir(parents=True, exist_ok=True)
    events: list[Event] = []
    hook = engine.bundle.transformer.register_forward_hook(count, with_kwargs=True)
    started = time.perf_counter()
    try:
        with path_written_whole(path) as partial:
            with open_sink(partial, request.fps, request.width, request.height) as sink:
                for chunk in engine.run(request, on_event=events.append):
                    sink.write(chunk.frames)
            searches = [event.data["adopted"] for event in events if event.kind == "search_finished"]
            judged = [e for e in events if e.kind == "score" or e.kind.startswith("search")]
            record = {
                "request": asked,
                "window_frames": window_frames,
                "seconds": time.perf_counter() - started,
                "searches": len(searches),
                "adopted": sum(searches),
                "events": [{"event": e.kind, **e.data} for e in judged],
            }
            write_whole(path.with_suffix(".json"), json.dumps(record))
    finally:
        hook.remove()


def render_world(scene: world.Scene, request: Request, path: Path, asked: Mapping[str, Any]) -> None:
    """Write what the prompt describes, at no cost, in place of a generated video."""
    from miga_engine.video.outputs import open_sink

    path.parent.mkdir(parents=True, exist_ok=True)
    scene = dataclasses.replace(scene, seed=request.seed)
    record = {"request": asked, "window_frames": 0, "seconds": 0.0, "searches": 0, "adopted": 0, "events": []}
    with path_written_whole(path) as partial:
        with open_sink(partial, request.fps, request.width, request.height) as sink:
            sink.write(world.render(scene, 0, request.num_frames or 0, request.height, request.width)[0])
        write_whole(path.with_suffix(".json"), json.dumps(record))


def _comparable(engine: Engine, job: Job, request: Request) -> dict[str, Any]:
    """What a video depends on, by name."""
    if job.method == WORLD:
        return {"num_frames": request.num_frames, "seed": request.seed}
    metadata = json.loads(json.dumps(request.metadata(engine.name)))
    return {**metadata.pop("miga"), **metadata}


def _digest(asked: Mapping[str, Any]) -> str:
    """Ten letters for what was asked; an option that is added later leaves them alone while it has its default."""
    defaults = {option.name: option.default for option in dataclasses.fields(MigaConfig)} | {
        "miga_engine": asked.get("miga_engine")
    }
    changed = {name: value for name, value in asked.items() if name not in defaults or value != defaults[name]}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:10]


def _check_made(asked: Mapping[str, Any], path: Path) -> None:
    """Refuse a video that was made with other options; options that did not exist then are not compared."""
    made = json.loads(path.with_suffix(".json").read_text())["request"]
    for name in made.keys() & asked.keys() - {"miga_engine"}:
        if made[name] != asked[name]:
            raise ConfigError(f"{path} was made with {name} {made[name]!r}, now {asked[name]!r} is asked for: give "
                              "another --folder, or remove the file")  # fmt: skip


def measure_video(job: Job, path: Path) -> dict[str, Any]:
    """Measures and curves of a video, kept beside it; a video is measured once."""
    from miga_engine.measure.flow import motion_and_warping
    from miga_engine.measure.measures import temporal_flicker
    from miga_engine.measure.truth import truth_curves
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
        write_whole(kept, json.dumps(measured))
    content: dict[str, Any] = json.loads(kept.read_text())
    return content


CSV_COLUMNS = (
    "method",
    "prompt_index",
    "prompt",
    "seed",
    "options",
    "num_frames",
    "window_frames",
    "seconds",
    "searches",
    "adopted",
)
DERIVED = {"kept"}
"""Measures that other columns give: in the rows of `run_grid`, not in the file."""
REFLECTION = ("self_reflection", "score_drop", "judge_step", "reference_groups", "candidates", "judge", "channels")
"""Options that leave a video as it is while no search begins."""


def run_grid(
    engine: Engine,
    folder: Path,
    methods: Sequence[str],
    *,
    prompts: Iterable[int],
    num_seeds: int,
    num_frames: int,
    known: Iterable[VideoRow] = (),
    make: bool = True,
) -> list[VideoRow]:
    """A row of the CSV file for each video of the grid, by prompt (an index of `PROMPTS`), seed and method.

    Videos are made that neither the folder nor the `known` rows have, unless `make` is False; then, and for those
    that another process is making now, there is no row. A video without reflection is not made where one with it never
    searched: it is the same.
    """
    options = {method: method_options(engine, method) for method in methods}
    rows = {video_key(row): row for row in known}
    # What searches comes first: where nothing was found, the video without reflection is known.
    order = sorted(methods, key=lambda method: method == WORLD or not options[method]["miga"].self_reflection)
    videos = [(p, s) for p in prompts for s in range(num_seeds)]
    wanted = [Job(method, *video) for video in videos for method in methods]
    requests = {
        job: engine.resolve(
            job.prompt, num_frames=num_frames, seed=noise_seed(job.prompt_index, job.seed), **options[job.method]
        )
        for job in wanted
    }
    for job in (Job(method, *video) for video in videos for method in order):
        request, path = requests[job], job.path(folder)
        asked = _comparable(engine, job, request)
        row = rows.get(video_key(job)) or _unsearched_twin(job, requests, rows)
        if row is not None:
            if row["method"] == job.method and row["options"] != _digest(asked):
                raise ConfigError(f"the CSV file's row of {job.method}, {job.prompt!r}, seed {job.seed} was made with "
                                  "other options: take it out, or give another --csv")  # fmt: skip
            rows[video_key(job)] = {**row, "method": job.method, "options": _digest(asked)}
            continue
        if path.exists():
            _check_made(asked, path)
        elif make and job.method == WORLD:
            render_world(SCENES[job.prompt_index % NUM_PROMPTS], request, path, asked)
        elif make and not _make_unless_claimed(engine, request, path, asked):
            print(f"{path} is being made by another process", flush=True)
        if path.exists():
            rows[video_key(job)] = _read_row(job, path, asked)
    made = [rows[video_key(job)] for job in wanted if video_key(job) in rows]
    return [{**row, "kept": kept_share(row)} for row in made]


def video_key(video: Job | VideoRow) -> tuple[str, int, int]:
    row = dataclasses.asdict(video) if isinstance(video, Job) else video
    return row["method"], int(row["prompt_index"]), int(row["seed"])


def _unsearched_twin(
    job: Job, requests: Mapping[Job, Request], rows: Mapping[tuple[str, int, int], VideoRow]
) -> VideoRow | None:
    """The row of a video that differs from this one, without reflection, in nothing but a reflection that never
    searched."""
    request = requests[job]
    if job.method == WORLD or request.miga.self_reflection:
        return None
    own = {name: getattr(request.miga, name) for name in REFLECTION}
    for other, theirs in requests.items():
        if (other.prompt_index, other.seed) != (job.prompt_index, job.seed) or other.method in (job.method, WORLD):
            continue
        row = rows.get(video_key(other))
        is_same = dataclasses.replace(theirs, miga=dataclasses.replace(theirs.miga, **own)) == request
        if row is not None and is_same and int(row["searches"]) == 0:
            return row
    return None


def _make_unless_claimed(engine: Engine, request: Request, path: Path, asked: Mapping[str, Any]) -> bool:
    """Make the video, unless another process does: its claim is a lock that ends with it. False where it is claimed."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open_own(path.with_suffix(".lock"), "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        if not path.exists():  # it may have appeared since it was looked for
            make_video(engine, request, path, asked)
            record = json.loads(path.with_suffix(".json").read_text())
            print(f"{path}: {record['window_frames']} frames read, {record['seconds']:.1f} s", flush=True)
    return True


def _read_row(job: Job, path: Path, asked: Mapping[str, Any]) -> VideoRow:
    """What is known of one video, as a row of the CSV file."""
    record = json.loads(path.with_suffix(".json").read_text())
    means = measure_video(job, path)["means"]
    accuracies = [value for name, value in means.items() if name.startswith("accuracy_")]
    row = {**record, **dataclasses.asdict(job), "prompt": job.prompt, "options": _digest(asked)}
    row["num_frames"] = asked["num_frames"]
    row = {name: row[name] for name in CSV_COLUMNS} | means | {"accuracy": float(np.mean(accuracies))}
    return {name: float(_rounded(value)) if isinstance(value, float) else value for name, value in row.items()}


def kept_share(row: VideoRow) -> float:
    """Share of frames that keep what the prompt leaves open as the video began with it; NaN for a prompt that leaves
    nothing open."""
    index = int(row["prompt_index"])
    if index < NUM_PROMPTS:
        return math.nan
    return float(row[f"accuracy_{OPEN_ATTRIBUTES[index % len(OPEN_ATTRIBUTES)]}"])


def _rounded(value: float) -> str:
    """As the CSV file has it, so that a row is the same whether it was read or measured."""
    return f"{value:.6g}"


def read_csv(path: Path) -> list[VideoRow]:
    """VideoRows that `write_csv` wrote, none where there is no file yet; ConfigError for another file."""
    if not path.exists():
        return []
    text = ("method", "prompt", "options")
    try:
        with path.open(newline="") as stream:
            rows: list[VideoRow] = [
                {name: value if name in text else float(value) for name, value in row.items()}
                for row in csv.DictReader(stream)
            ]
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no CSV file of an ablation ({error}): give another --csv") from error
    if any(not {*CSV_COLUMNS, *COMPARED} - DERIVED <= row.keys() for row in rows):
        raise ConfigError(f"{path} is no CSV file of an ablation, for it lacks columns: give another --csv")
    return rows


def write_csv(path: Path, rows: Sequence[VideoRow]) -> None:
    """Write the rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in DERIVED))
    with io.StringIO(newline="") as stream:
        writer = csv.DictWriter(stream, names, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _rounded(v) if isinstance(v, float) else v for k, v in row.items()})
        write_whole(path, stream.getvalue())
