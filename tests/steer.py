"""Streams that are changed at random moments, broken off and gone on with: whether their replays are what was seen.

`python tests/steer.py --runs 20 --changes 50`, by hand: in processes that are killed (SIGKILL) at random moments, with
the embedded model. `tests/runtime/test_steering.py` does it in short, in one process, for all families.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miga_engine.engine import Engine
from miga_engine.runtime.session import load_session, locked
from miga_engine.runtime.stream import Event, Stream
from miga_engine.video.outputs import open_sink, reopen_sink

WORDS = ("a red balloon", "a blue kite", "a white plane over a desert", "snow", "green hills at noon, and a long road")


@dataclass
class Seen:
    """What came of one run: its frames, how often it was changed, and how often it was gone on with."""

    frames: Tensor
    num_changes: int
    num_resumed: int


def tell(stream: Stream, chance: random.Random) -> None:
    """Change something, as people do."""
    ahead = chance.choice((0, 0, 1, 3, 10, 40))
    at: Any = stream.num_frames_out + ahead if ahead else "now"
    if chance.random() < 0.25 and stream.request.guidance_scale != 1:
        stream.set_guidance_scale(chance.choice((1.5, 3.0, 4.25, 7.0)), at=at)
        return
    restart = at == "now" and chance.random() < 0.25
    stream.set_prompt(
        chance.choice(WORDS), at, blend=chance.choice((0, 0, 4, 9)), above=chance.choice((0.0, 0.5, 0.9, 1.0)),
        restart=restart,
    )  # fmt: skip


def steered(
    engine: Engine, path: Path, num_changes: int, chance: random.Random, num_frames: int, **options: Any
) -> Seen:
    """A stream that is told `num_changes` things at random passes, and is dropped and gone on with from its session
    now and then; the session is left at `path`."""
    moments: list[int] = []
    told = resumed = 0

    def on_event(event: Event) -> None:
        nonlocal told
        if event.kind == "progress" and told < num_changes and chance.random() < 0.5:
            tell(stream, chance)
            told += 1
        if event.kind in ("prompt", "guidance_scale"):
            moments.append(event.data["passes"])

    stream = engine.stream(WORDS[0], num_frames, on_event=on_event, **options)
    stream.save_every(1, path)
    frames: list[Tensor] = []
    while stream.num_frames_out < num_frames:
        for chunk in stream:
            frames.append(chunk.frames)
            if chance.random() < 0.1:
                break
        else:
            break
        stream.close()  # what it had made beyond its last session is lost, as in a kill
        stream = engine.resume(path, on_event=on_event)
        stream.save_every(1, path)
        frames = [torch.cat(frames)[: stream.num_frames_out]]
        resumed += 1
    stream.save(path)
    stream.close()
    return Seen(torch.cat(frames), len(stream.request.changes), resumed)


def replayed(engine: Engine, path: Path, **given: Any) -> Tensor:
    """The frames of a session's replay."""
    return torch.cat([chunk.frames for chunk in engine.replay(path, **given)])


def child(engine: Engine, folder: Path, num_changes: int, num_frames: int, seed: int) -> None:
    """Make the video of a folder, or go on with it, into raw frames and a session file; to be killed at any time."""
    path, video, session = folder / "run.safetensors", str(folder / "run.rgb"), None
    if path.exists():
        stream, session = engine.resume(path, on_event=lambda event: on_event(event)), load_session(path)
    else:
        stream = engine.stream(WORDS[0], num_frames, seed=seed, on_event=lambda event: on_event(event))
    chance = random.Random(f"{seed} {stream.num_frames_out} {len(stream.request.changes)}")
    told = len(stream.request.changes)
    request = stream.request
    size = request.fps, request.width, request.height

    def on_event(event: Event) -> None:
        nonlocal told
        if event.kind == "progress" and told < num_changes and chance.random() < 0.5:
            tell(stream, chance)
            told += 1

    sink = open_sink(video, *size) if session is None else reopen_sink(video, *stream.output, *size)
    with sink, locked(path):
        stream.save_every(20, path, sink)
        for chunk in stream:
            sink.write(chunk.frames)
    stream.close()


def killed(model: str, folder: Path, num_changes: int, num_frames: int, seed: int) -> int:
    """Run `child` in processes that are killed at random moments until one comes to the end; how many were."""
    chance, kills = random.Random(f"kills {seed}"), 0
    command = [sys.executable, __file__, "--model", model, "--child", str(folder), "--changes", str(num_changes),
               "--num-frames", str(num_frames), "--seed", str(seed)]  # fmt: skip
    while True:
        process = subprocess.Popen(command)
        try:
            code = process.wait(chance.uniform(4, 25) if kills < 4 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        if code:
            raise SystemExit(f"seed {seed}: the child ended with {code}")
        return kills


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a run; the exit code is 1 where a replay differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--changes", type=int, default=50)
    parser.add_argument("--num-frames", type=int, default=241)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path)
    options = parser.parse_args(argv)
    engine, failures, num_changes, num_kills = Engine.from_pretrained(options.model), 0, 0, 0
    if options.child is not None:
        child(engine, options.child, options.changes, options.num_frames, options.seed)
        return 0
    for number in range(options.seed, options.seed + options.runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            kills = killed(options.model, folder, options.changes, options.num_frames, number)
            changes = len(load_session(folder / "run.safetensors").request.get("changes", []))
            replay = replayed(engine, folder / "run.safetensors").numpy().tobytes()
            is_equal = replay == (folder / "run.rgb").read_bytes()
        failures, num_changes, num_kills = failures + (not is_equal), num_changes + changes, num_kills + kills
        print(f"run {number}: {changes} changes taken up, killed {kills} times, replay "
              f"{'equal' if is_equal else 'DIFFERENT'}", flush=True)  # fmt: skip
    print(f"{options.runs} runs, {num_changes} changes, {num_kills} kills, {failures} replays different")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
