"""Kill runs at random moments, resume them, and compare every frame: `python tests/kills.py --kills 200 --seed 0`.

A run of the small golden network, of every kind in `RUNS`, is started in a forked process and killed with SIGKILL: at a
random time, inside the writing of the session file, or inside the writing of the video. It is resumed, and perhaps
killed again; at last it is stopped for a moment with SIGSTOP inside such a writing, when it holds the lock, and a
second resume of its session must be refused. It goes on to the end. Then the decoded video must be the uninterrupted
one, frame for frame, and nothing else may be left in the folder. Half of the runs replace an older video.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import golden_model
import numpy as np
import torch

from miga_engine import cli
from miga_engine.cli import generate
from miga_engine.engine import Engine
from miga_engine.runtime import session
from miga_engine.runtime.session import load_session
from miga_engine.video import images
from miga_engine.video.raw import RawFileSink
from miga_engine.video.reading import read_video
from miga_engine.video.video_file import VideoFileSink

OPTIONS = [
    *("--height", "32", "--width", "32", "--fps", "6", "--num-inference-steps", "8", "--zigzag-width", "2"),
    *("--stage2-steps", "2", "--guidance-frames", "1", "--stride", "2", "--judge-step", "2", "--seed", "5", "-q"),
]
NUM_FRAMES = 61
VIDEOS = ("video.mp4", "video.mkv", "video.rgb", "frames/")
_PROMPTS = ("--prompt-at", "20", "a blue kite", "--prompt-at", "41", "a plane at night", "--prompt-blend-frames", "8")
RUNS = {
    "plain": (),
    "searches": ("--score-drop", "-1"),  # one at every judgement
    "prompts": _PROMPTS,
    "bfloat16": ("--dtype", "bfloat16"),
    "batches": ("--window-batch", "2"),
    "overlap": ("--overlap-decode",),
    "all": (*_PROMPTS, "--score-drop", "-1", "--dtype", "bfloat16", "--window-batch", "2", "--overlap-decode"),
}  # as many as have no divisor in common with VIDEOS: every run meets every video
PLACES = ("time", "state", "output")
KINDS = (*PLACES, *RUNS, *VIDEOS, "generate", "resume", "replacing")
"""Of a kill: where it fell, in which run, into which video, in which command, and beside an older video."""
STATE_MOMENTS = ("before", "begun", "half", "written", "linked", "replaced")
REFUSAL = "another process is making the video of"


@dataclass
class Results:
    num_kills: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    """By each of `KINDS`, so that a kill counts several times."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Second resumes that were refused, by the command that held the lock."""
    failures: list[str] = field(default_factory=list)
    num_videos: int = 0

    @property
    def has_all(self) -> bool:
        return all(self.kills[kind] for kind in KINDS) and all(self.refusals[name] for name in ("generate", "resume"))


class Reference(NamedTuple):
    frames: np.ndarray
    seconds: float


def run_all(num_kills: int, seed: int, report: Callable[[str], None] = lambda line: None) -> Results:
    """Kill until there are num_kills, one of each kind at least, and each command had a second resume refused."""
    results = Results()
    with tempfile.TemporaryDirectory() as scratch:
        torch.set_num_threads(1)  # threads would not survive the fork
        model = golden_model.build(Path(scratch) / "model")
        engines = {dtype: Engine.from_pretrained(model, "cpu", dtype) for dtype in ("float32", "bfloat16")}
        references: dict[tuple[str, bool], Reference] = {}
        while results.num_kills < num_kills or not (results.has_all or results.failures):
            trial = Trial(engines, model, Path(scratch) / "trial", results.num_videos, seed)
            key = (trial.run, trial.video == "video.mp4")  # all others hold every bit, and so the same frames
            if key not in references:
                references[key] = trial.reference(Path(scratch) / "whole")
            before = results.num_kills
            failure = trial.go(references[key], results)
            if failure:
                results.failures.append(f"trial {trial.number} ({trial.run}, {trial.video}): {failure}")
            results.num_videos += 1
            kills = results.num_kills - before
            report(f"trial {trial.number} {trial.run} {trial.video}: {kills} kills, {failure or 'same frames'}")
    return results


def frames_of(path: Path) -> np.ndarray:
    """All frames of a video file, a raw file, or a folder of images."""
    if path.suffix == ".rgb":
        data = np.fromfile(path, np.uint8)
        size = 32 * 32 * 3
        return data[: len(data) // size * size].reshape(-1, 32, 32, 3)
    if path.is_dir():
        images = [read_video(image)[0] for image in sorted(path.glob("[0-9]*.png"))]
        return np.stack(images) if images else np.empty((0, 32, 32, 3), np.uint8)
    return read_video(path)


class Plan(NamedTuple):
    """Where a signal falls: after ``number`` seconds, or at a moment of the number-th writing of state or output."""

    place: str
    number: Any
    moment: str = ""
    signal: signal.Signals = signal.SIGKILL


class Trial:
    """One video, killed up to four times."""

    def __init__(self, engines: dict[str, Engine], model: Path, folder: Path, number: int, seed: int) -> None:
        self.engines, self.model, self.folder, self.number = engines, model, folder, number
        self.chance = random.Random(f"{seed} {number}")
        self.run, self.video = list(RUNS)[number % len(RUNS)], VIDEOS[number % len(VIDEOS)]
        self.every = self.chance.choice((1, 5, 12, 30))
        self.replaces = self.chance.random() < 0.5

    def reference(self, folder: Path) -> Reference:
        """The video without an interruption, and how long it takes."""
        folder.mkdir(exist_ok=True)
        started = time.perf_counter()
        status = _wait(self._start(self._generate(folder, 20), None, folder / "log"))
        seconds = time.perf_counter() - started
        assert status == 0, (folder / "log").read_text()
        return Reference(frames_of(folder / self.video), seconds)

    def go(self, wanted: Reference, results: Results) -> str | None:
        """Kill and resume until the video is there; what went wrong, or None."""
        self.folder.mkdir()
        try:
            return self._go(wanted, results)
        finally:
            shutil.rmtree(self.folder)

    def _go(self, wanted: Reference, results: Results) -> str | None:
        path, saved, log = self.folder / self.video, session_of(self.folder, self.video), self.folder / "log"
        if self.replaces:
            _write_older(path)
        most = self.chance.randint(0, 4)
        for attempt in range(most + 1):
            command = "resume" if saved.exists() else "generate"
            arguments = self._resume(saved) if command == "resume" else self._generate(self.folder, self.every)
            place = PLACES[(self.number + attempt) % 3] if attempt < most else self.chance.choice(("state", "output"))
            plan = self._plan(place, wanted.seconds, is_last=attempt == most)
            process = self._start(arguments, plan, log)
            status = _wait(process, plan)
            if status == -signal.SIGSTOP:
                if saved.exists():
                    if failure := self._rival(saved):
                        os.kill(process, signal.SIGKILL)
                        _wait(process)
                        return failure
                    results.refusals[command] += 1
                os.kill(process, signal.SIGCONT)
                status = _wait(process)
            if status == 0:
                break
            if status != -signal.SIGKILL:
                return f"exit status {status} of {command}: {log.read_text()[-500:]}"
            results.num_kills += 1
            results.kills.update([place, self.run, self.video, command, *["replacing"] * self.replaces])
            if saved.exists():
                stored = (load_session(saved).state.numbers["output"] or {"num_frames": 0})["num_frames"]
                if stored and not np.array_equal(frames_of(_growing(path, saved))[:stored], wanted.frames[:stored]):
                    return f"after a kill, the first {stored} frames are not those of the video"
        if not np.array_equal(frames_of(path), wanted.frames):
            return "the frames differ"
        log.unlink()
        kept = {path.name, saved.name, session.previous_path(saved).name}
        left = {entry.name for entry in self.folder.iterdir()} - kept
        return f"left behind: {sorted(left)}" if left else None

    def _rival(self, saved: Path) -> str | None:
        """A second resume, while another process holds the lock: what is wrong with how it ends, or None."""
        log = self.folder / "rival"
        status = _wait(self._start(self._resume(saved), None, log))
        said = log.read_text()
        log.unlink()
        return None if status == 2 and REFUSAL in said else f"exit status {status} of a second resume: {said[-500:]}"

    def _generate(self, folder: Path, every: int) -> list[str]:
        output = str(folder / self.video) + ("/" if self.video.endswith("/") else "")
        arguments = ["generate", "a red balloon", "--model", str(self.model), "--num-frames", str(NUM_FRAMES), "-y"]
        return [*arguments, "-o", output, "--checkpoint-every", str(every), *OPTIONS, *RUNS[self.run]]

    def _resume(self, saved: Path) -> list[str]:
        arguments = ["resume", str(saved), "--model", str(self.model), "-q", "--checkpoint-every", str(self.every)]
        stored = load_session(saved).state.numbers["output"]["num_frames"]
        older_is_there = self.replaces and self.video.endswith("/") and not stored  # which only the user may give up
        return [*arguments, "-y"] if older_is_there else arguments

    def _plan(self, place: str, seconds: float, *, is_last: bool) -> Plan:
        """Inside a run that takes these seconds; the last signal only stops it, where it can go on from."""
        sign = signal.SIGSTOP if is_last else signal.SIGKILL
        if place == "time":
            return Plan(place, self.chance.uniform(0.0, seconds))
        if place == "state":
            moments = [moment for moment in STATE_MOMENTS if not (is_last and moment in ("begun", "half"))]
            return Plan(place, self.chance.randint(1, 1 + 30 // self.every), self.chance.choice(moments), sign)
        moment = "before" if is_last else self.chance.choice(("before", "half"))
        return Plan(place, self.chance.randint(1, 40), moment, sign)

    def _start(self, arguments: list[str], plan: Plan | None, log: Path) -> int:
        """The process that runs `miga` with these arguments, and sends itself the plan's signal."""
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        status = 1
        try:
            with log.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            self._prepare()
            if plan is not None and plan.place == "state":
                _signal_in_session(plan)
            elif plan is not None and plan.place == "output":
                _signal_in_output(plan)
            status = cli.main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _prepare(self) -> None:
        """Leave out what takes its time, and overlap in resumed runs too, for which there is no flag."""
        Engine.from_pretrained = lambda model=None, device=None, dtype=None, **__: self.engines[dtype or "float32"]  # type: ignore[method-assign]
        for check in ("_estimate_memory", "_refuse_the_impossible", "_peak_memory"):
            setattr(generate, check, lambda *_: None)
        if "--overlap-decode" in RUNS[self.run]:
            Engine.resume = functools.partialmethod(Engine.resume, overlap_decode=True)  # type: ignore[method-assign, assignment]


def session_of(folder: Path, video: str) -> Path:
    return folder / f"{Path(video).stem}.session.safetensors"


def _write_older(path: Path) -> None:
    """A video of another run, to be replaced."""
    if path.suffix:
        path.write_bytes(b"an older video, to be replaced when the new one is whole")
        return
    path.mkdir()
    for number in (0, 7, 300):
        (path / f"{number:06d}.png").write_bytes(b"an older picture")


def _growing(path: Path, saved: Path) -> Path:
    name = load_session(saved).state.numbers["output"]["growing_name"]
    return path.with_name(name) if name and path.with_name(name).exists() else path


def _wait(process: int, plan: Plan | None = None) -> int:
    """The exit code; minus the number of the signal that ended or stopped the process."""
    if plan is not None and plan.place == "time":
        time.sleep(plan.number)
        os.kill(process, plan.signal)
    status = os.waitpid(process, os.WUNTRACED)[1]
    return -os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def _signal_in_session(plan: Plan) -> None:
    """In the number-th writing of the session file."""
    count = 0
    save_file, keep_previous, flush = session.save_file, session._keep_previous, session._flush_to_disk

    def reach(moment: str, prepare: Callable[[], object] = lambda: None) -> None:
        if (count, moment) == (plan.number, plan.moment):
            prepare()
            os.kill(os.getpid(), plan.signal)

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal count
        count += 1
        reach("before")
        reach("begun", lambda: path.with_name(".tmpQ1w2E3").write_bytes(b"safetensors writes here first"))
        save_file(tensors, path, metadata)
        reach("half", lambda: os.truncate(path, path.stat().st_size // 2))
        reach("written")

    def keep(target: Path) -> None:
        keep_previous(target)
        reach("linked")

    def flushed(path: Path) -> None:
        if path.is_dir():
            reach("replaced")
        flush(path)

    session.save_file, session._keep_previous, session._flush_to_disk = save, keep, flushed  # type: ignore[assignment]


def _signal_in_output(plan: Plan) -> None:
    """At the number-th packet, image or write of raw frames."""
    count = 0

    def reach(prepare: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == plan.number:
            if plan.moment == "half":
                prepare()
            os.kill(os.getpid(), plan.signal)

    mux, write_whole, append = VideoFileSink._mux, images.write_whole, RawFileSink._append

    def mux_some(self: Any, packets: list[Any]) -> None:
        for packet in packets:
            reach()
            mux(self, [packet])

    def write_image(path: Path, data: bytes) -> None:
        reach()
        write_whole(path, data)

    def append_some(self: Any, frames: np.ndarray) -> None:
        for image in frames:
            reach(functools.partial(self._file.write, memoryview(image.data).cast("B")[: image.size // 2]))
            append(self, image[None])

    VideoFileSink._mux, images.write_whole, RawFileSink._append = mux_some, write_image, append_some  # type: ignore[method-assign, assignment]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = run_all(options.kills, options.seed, lambda line: print(line, flush=True))
    print("kills: " + ", ".join(f"{kind} {results.kills[kind]}" for kind in KINDS))
    print("refused beside: " + ", ".join(f"{command} {count}" for command, count in sorted(results.refusals.items())))
    inside = results.kills["state"] + results.kills["output"]
    print(
        f"{results.num_kills} kills, {inside} of them inside a write, {results.num_videos} videos, "
        f"{len(results.failures)} failures"
    )
    for failure in results.failures:
        print(failure)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
