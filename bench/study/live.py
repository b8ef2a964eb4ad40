"""What it costs to be early: the first frame sooner, and a prompt that is changed while the video runs.

`python -m bench.study.live first`: ways to the first frame, a row each: passes and latent frames that the network reads
up to it and up to frame 100, in % of the first row's, and what the videos look like, measured against the embedded
world's truth.

`python -m bench.study.live steer`: ways of a change at "now", a row each: video frames and latent frames read from the
change to the first frame that shows it, whether frames come meanwhile, and how hard the cut is.

Each prints a table; with the default numbers they take some half an hour each on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.command import Parser, run_command
from bench.study.methods import SCENES
from miga_engine import Engine
from miga_engine.measure.truth import truth_curves
from miga_engine.runtime.stream import Event, Stream
from miga_engine.tiny import world
from miga_engine.tiny.classifier import ATTRIBUTES, load_classifier, to_tensor

FIRST: Mapping[str, dict[str, Any]] = {
    "preset": {},
    "warmup clip": {"warmup": "clip"},
    "warmup copies": {"warmup": "copies"},
    "stage2_steps 2": {"stage2_steps": 2},
    "stage2_steps 0": {"stage2_steps": 0},
    "groups of 2": {"zigzag_width": 2},
    "passes_per_advance 2, groups of 2": {"zigzag_width": 2, "passes_per_advance": 2, "stage2_steps": 4},
    "16 steps": {"num_inference_steps": 16},
}
"""Options of the method, and number of steps, that bring the first frame sooner or might."""
CLOCK = 100
"""Video frame by which a way that gives its first frames early must have gone on."""
STEER: Mapping[str, dict[str, Any]] = {
    "above 1: new frames alone": {"above": 1.0},
    "above 0.9": {"above": 0.9},
    "above 0.8, as it is unless asked otherwise": {"above": 0.8},
    "above 0.6": {"above": 0.6},
    "above 0: all that are not clean": {"above": 0.0},
    "above 0.6, blend 24": {"above": 0.6, "blend": 24},
    "restart": {"restart": True},
}
TOLD_AT = 61
"""Video frames given out when the prompt is changed."""
_SETTLED = 6  # frames, of which all but one show the new prompt


class Clock:
    """Latent frames that the network has read so far in a stream's run, both branches as one."""

    def __init__(self, stream: Stream) -> None:
        assert stream._pump is not None
        self.read = 0
        denoiser = stream._pump.run.denoiser
        forward = denoiser._forward_all

        def counted(windows: Any) -> None:
            forward(windows)
            self.read += sum(len(window.slots) for window in windows)

        denoiser._forward_all = counted  # type: ignore[method-assign]


def first_frame(engine: Engine, way: Mapping[str, Any], prompts: int, num_frames: int) -> list[float]:
    """A row of the first table: means over prompts."""
    rows = []
    miga = {name: value for name, value in way.items() if name != "num_inference_steps"}
    if "num_inference_steps" in way:
        miga["judge_step"] = 6
    steps = way.get("num_inference_steps")
    for number, scene in enumerate(SCENES[:prompts]):
        caption, told = world.caption(scene), []

        def on_event(event: Event, told: list[Event] = told) -> None:
            if event.kind == "progress":
                told.append(event)

        stream = engine.stream(
            caption, num_frames, seed=number, miga=miga, num_inference_steps=steps, chunk_frames=1, on_event=on_event
        )
        clock, frames, read, seconds, started = Clock(stream), [], [], [], time.perf_counter()
        for chunk in stream:
            frames.append(chunk.frames[0].numpy())
            read.append(clock.read)
            seconds.append(time.perf_counter() - started)
        video = np.stack(frames)
        means = truth_curves(video, caption).means()
        seam = seams(video)
        rows.append([
            told[0].data["passes_to_first_frame"], read[0], read[CLOCK], seconds[0], seconds[CLOCK],
            100 * np.mean([means[f"accuracy_{name}"] for name in ATTRIBUTES]), 100 * means["subject_consistency"],
            100 * means["background_consistency"], 100 * means["colour_drift"], means["subject_jitter"], seam,
        ])  # fmt: skip
    return [float(value) for value in np.mean(rows, axis=0)]


def seams(video: npt.NDArray[np.uint8]) -> float:
    """The largest step between two neighbouring frames, in median steps."""
    steps = np.abs(np.diff(video.astype(np.int16), axis=0)).mean((1, 2, 3))
    return float(steps.max() / np.median(steps))


def changed(scene: world.Scene, number: int) -> world.Scene:
    """Another scene: by turns of another time of day, over other land, and of another subject and colour."""

    def other(values: tuple[str, ...], value: str) -> str:
        return values[(values.index(value) + 2) % len(values)]

    changes = (
        {"time": other(world.TIMES, scene.time)},
        {"terrain": other(world.TERRAINS, scene.terrain)},
        {"subject": other(world.SUBJECTS, scene.subject), "colour": other(world.COLOURS, scene.colour)},
    )
    return dataclasses.replace(scene, **changes[number % 3])


def begun(engine: Engine, prompts: int, folder: Path) -> list[Path]:
    """Sessions of a video for each prompt, saved when `TOLD_AT` frames are out."""
    paths = []
    for number, scene in enumerate(SCENES[:prompts]):
        paths.append(folder / f"{number}.safetensors")
        with engine.stream(world.caption(scene), None, seed=number, chunk_frames=TOLD_AT) as stream:
            next(stream)
            stream.save(paths[-1])
    return paths


def steered(engine: Engine, way: Mapping[str, Any], sessions: Sequence[Path], num_frames: int) -> list[float]:
    """A row of the second table: medians over prompts, but for shares, which are means."""
    rows = []
    classifier = load_classifier()
    for number, (scene, path) in enumerate(zip(SCENES, sessions, strict=False)):
        target = changed(scene, number)
        stream = engine.resume(path, chunk_frames=1)
        clock, frames, read, seconds, started = Clock(stream), [], [0], [], time.perf_counter()
        stream.set_prompt(world.caption(target), **way)
        while len(frames) < num_frames:
            frames.append(next(stream).frames[0].numpy())
            read.append(clock.read)
            seconds.append(time.perf_counter() - started)
        begins = stream.request.changes[0].frame - TOLD_AT
        stream.close()
        video = np.stack(frames)
        logits = classifier(to_tensor(video))
        shown = np.stack([(x.argmax(-1) == label).numpy() for x, label in zip(logits, target.labels, strict=True)])
        is_changed = np.array([a != b for a, b in zip(scene.labels, target.labels, strict=True)])
        after = shown[is_changed].all(0)
        runs = np.convolve(after, np.ones(_SETTLED), "valid") >= _SETTLED - 1
        first = int(runs.argmax()) if runs.any() else num_frames - 1
        rows.append([
            begins, first, read[first + 1], seconds[first], np.diff(read).max(), 100 * runs.any(),
            100 * shown[~is_changed].mean(), 100 * after[first:].mean(), seams(video[: first + 24]),
        ])  # fmt: skip
    table = np.array(rows, np.float64)
    middle, mean = np.median(table, axis=0), table.mean(axis=0)
    return [*middle[:5], *mean[5:8], middle[8]]


COLUMNS = {
    "first": (
        "passes to the first frame", "read to it", f"read to frame {CLOCK}", "s to it", f"s to frame {CLOCK}",
        "as asked, %", "subject, %", "background, %", "colour drift, %", "jitter, px/frame²", "largest step, medians",
    ),
    "steer": (
        "begins after frames", "shown after frames", "read until shown", "s until shown", "longest wait, read",
        "shown at all, %", "the rest kept, %", "stays, %", "largest step, medians",
    ),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="python -m bench.study.live", description="What it costs to be early: a table.")
    parser.add_argument("table", choices=sorted(COLUMNS), help="first: the first frame; steer: a changed prompt")
    parser.add_argument("--prompts", type=int, default=9, metavar="N", help="a video each (default: 9)")
    parser.add_argument("--num-frames", type=int, default=241, metavar="N", help="of each video, or of each behind the "
                        "change (default: 241)")  # fmt: skip
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    engine = Engine.from_pretrained("tiny", "cpu")
    columns = COLUMNS[options.table]
    print(f"| | {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * len(columns)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(engine, options, Path(folder))
        _print(rows, columns)


def _rows(engine: Engine, options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, list[float]]]:
    if options.table == "first":
        for name, way in FIRST.items():
            yield name, first_frame(engine, way, options.prompts, options.num_frames)
        return
    sessions = begun(engine, options.prompts, folder)
    for name, way in STEER.items():
        yield name, steered(engine, way, sessions, options.num_frames)


def _print(rows: Iterator[tuple[str, list[float]]], columns: Sequence[str]) -> None:
    reference: list[float] | None = None
    for name, values in rows:
        reference = reference or values
        cells = []
        for column, value, first in zip(columns, values, reference, strict=True):
            cells.append(f"{100 * value / first:.0f} %" if column.startswith("read") else f"{value:.3g}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
