"""Kill runs at random moments, resume them, and compare every frame: `python tests/kills.py --kills 200 --seed 0`.

A run of the small golden network is started in a forked process and killed with SIGKILL: at a random time, inside the
writing of the session file, or inside the writing of the video. It is resumed, and perhaps killed again, until it ends.
Then the decoded video must be the uninterrupted one, frame for frame, and nothing else may be left in the folder.
"""

from __future__ import annotations

import argparse
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
from typing import Any

import golden_model
import numpy as np
import torch

from miga_engine import cli
from miga_engine.engine import Engine
from miga_engine.runtime import session
from miga_engine.runtime.session import load_session
from miga_engine.video import sink as plain_sinks
from miga_engine.video import sinks
from miga_engine.video.reading import read_video

OPTIONS = [
    *("--height", "32", "--width", "32", "--fps", "6", "--num-inference-steps", "8", "--zigzag-width", "2"),
    *("--stage2-steps", "2", "--guidance-frames", "1", "--stride", "2", "--judge-step", "2", "--seed", "5", "-q"),
]
NUM_FRAMES = 61
VIDEOS = ("video.mp4", "video.mkv", "video.rgb", "frames/")
STATE_MOMENTS = ("before", "begun", "half", "written", "linked", "replaced")


@dataclass
class Results:
    kills: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    num_videos: int = 0


def run_all(num_kills: int, seed: int, report: Callable[[str], None] = lambda line: None) -> Results:
    """Kill until there are num_kills, of each kind at least a sixth."""
    results = Results()
    with tempfile.TemporaryDirectory() as scratch:
        torch.set_num_threads(1)  # threads would not survive the fork
        model = golden_model.build(Path(scratch) / "model")
        engine = Engine.from_pretrained(model, "cpu")
        wanted = {video: _reference(engine, model, Path(scratch) / "whole", video) for video in VIDEOS}
        trial = 0
        while results.kills.total() < num_kills:
            chance = random.Random(f"{seed} {trial}")
            video = VIDEOS[trial % len(VIDEOS)]
            folder = Path(scratch) / "trial"
            before = results.kills.total()
            failure = _trial(engine, model, folder, video, wanted[video], chance, results, trial)
            if failure:
                results.failures.append(f"trial {trial} ({video}): {failure}")
            results.num_videos += 1
            report(f"trial {trial} {video}: {results.kills.total() - before} kills, {failure or 'same frames'}")
            shutil.rmtree(folder)
            trial += 1
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


def _reference(engine: Engine, model: Path, folder: Path, video: str) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    status = _wait(_start(engine, _generate(model, folder, video, 20), None, folder / "log"))
    assert status == 0, (folder / "log").read_text()
    return frames_of(folder / video)


def _generate(model: Path, folder: Path, video: str, every: int) -> list[str]:
    output = str(folder / video) + ("/" if video.endswith("/") else "")
    arguments = ["generate", "a red balloon", "--model", str(model), "--num-frames", str(NUM_FRAMES), "-y"]
    return [*arguments, "-o", output, "--checkpoint-every", str(every), *OPTIONS]


def _trial(
    engine: Engine,
    model: Path,
    folder: Path,
    video: str,
    wanted: np.ndarray,
    chance: random.Random,
    results: Results,
    trial: int,
) -> str | None:
    """One video, killed up to four times; what went wrong, or None."""
    folder.mkdir()
    path, saved = folder / video, sinks_session(folder, video)
    start = _generate(model, folder, video, chance.choice((1, 5, 12, 30)))
    if chance.random() < 0.5 and not video.endswith("/"):
        path.write_bytes(b"an older video, to be replaced when the new one is whole")
    for number in range(5):
        arguments = ["resume", str(saved), "--model", str(model), "-q"] if saved.exists() else start
        plan = _plan(chance, ("time", "state", "output", "time", "time")[(trial + number) % 5]) if number < 4 else None
        status = _wait(_start(engine, arguments, plan, folder / "log"), plan)
        if status == 0:
            break
        if status != -signal.SIGKILL:
            return f"exit status {status}: {(folder / 'log').read_text()[-500:]}"
        assert plan is not None
        results.kills[plan[0]] += 1
        if saved.exists():
            stored = (load_session(saved).state.numbers["output"] or {"num_frames": 0})["num_frames"]
            if stored and not np.array_equal(frames_of(_growing(path, saved))[:stored], wanted[:stored]):
                return f"after a kill, the first {stored} frames are not those of the video"
    if not np.array_equal(frames_of(path), wanted):
        return "the frames differ"
    (folder / "log").unlink()
    left = {entry.name for entry in folder.iterdir()} - {path.name, saved.name, session.previous_path(saved).name}
    return f"left behind: {sorted(left)}" if left else None


def sinks_session(folder: Path, video: str) -> Path:
    return folder / f"{Path(video).stem}.session.safetensors"


def _growing(path: Path, saved: Path) -> Path:
    name = load_session(saved).state.numbers["output"]["growing_name"]
    return path.with_name(name) if name and path.with_name(name).exists() else path


Plan = tuple[str, Any, Any]


def _plan(chance: random.Random, kind: str) -> Plan:
    if kind == "time":
        return kind, chance.uniform(0.0, 2.0), None
    if kind == "state":
        return kind, chance.randint(1, 8), chance.choice(STATE_MOMENTS)
    return kind, chance.randint(1, 80), chance.choice(("before", "half"))


def _start(engine: Engine, arguments: list[str], plan: Plan | None, log: Path) -> int:
    """The process that runs `miga` with these arguments, and kills itself by the plan."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        Engine.from_pretrained = lambda *_, **__: engine  # type: ignore[method-assign, assignment]
        for check in ("_estimate_memory", "_refuse_the_impossible", "_peak_memory"):  # which take their time
            setattr(cli, check, lambda *_: None)
        if plan is not None and plan[0] == "state":
            _die_in_session(plan[1], plan[2])
        elif plan is not None and plan[0] == "output":
            _die_in_output(plan[1], plan[2])
        status = cli.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _wait(process: int, plan: Plan | None = None) -> int:
    if plan is not None and plan[0] == "time":
        time.sleep(plan[1])
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_session(number: int, moment: str) -> None:
    """In the number-th writing of the session file."""
    count = 0
    save_file, keep_previous, flush = session.save_file, session._keep_previous, session._flush_to_disk

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal count
        count += 1
        if count == number and moment == "before":
            _die()
        if count == number and moment == "begun":
            path.with_name(".tmpQ1w2E3").write_bytes(b"safetensors writes here first")
            _die()
        save_file(tensors, path, metadata)
        if count == number and moment == "half":
            os.truncate(path, path.stat().st_size // 2)
        if count == number and moment in ("half", "written"):
            _die()

    def keep(target: Path) -> None:
        keep_previous(target)
        if count == number and moment == "linked":
            _die()

    def flushed(path: Path) -> None:
        if count == number and moment == "replaced" and path.is_dir():
            _die()
        flush(path)

    session.save_file, session._keep_previous, session._flush_to_disk = save, keep, flushed


def _die_in_output(number: int, moment: str) -> None:
    """At the number-th packet, image or write of raw frames."""
    count = 0

    def is_time() -> bool:
        nonlocal count
        count += 1
        return count == number

    mux, write_whole, append = sinks.VideoFileSink._mux, plain_sinks.write_whole, sinks.RawFileSink._append

    def mux_some(self: Any, packets: list[Any]) -> None:
        for packet in packets:
            if is_time():
                _die()
            mux(self, [packet])

    def write_image(path: Path, data: bytes) -> None:
        if is_time():
            _die()
        write_whole(path, data)

    def append_some(self: Any, frames: np.ndarray) -> None:
        for image in frames:
            if is_time():
                if moment == "half":
                    self._file.write(memoryview(image.data).cast("B")[: image.size // 2])
                _die()
            append(self, image[None])

    sinks.VideoFileSink._mux, plain_sinks.write_whole, sinks.RawFileSink._append = mux_some, write_image, append_some  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results = run_all(options.kills, options.seed, lambda line: print(line, flush=True))
    kinds = ", ".join(f"{count} in {kind}" for kind, count in sorted(results.kills.items()))
    print(f"{results.kills.total()} kills ({kinds}), {results.num_videos} videos, {len(results.failures)} failures")
    for failure in results.failures:
        print(failure)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
