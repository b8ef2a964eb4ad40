"""Streams that are changed at random moments, broken off and gone on with: whether their replays are what was seen.

`python tests/steer.py --runs 20 --changes 50`: by hand, at length; `tests/runtime/test_steering.py` does it in short.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miga_engine.engine import Engine
from miga_engine.runtime.stream import Event, Stream

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


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a run; the exit code is 1 where a replay differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--changes", type=int, default=50)
    parser.add_argument("--num-frames", type=int, default=481)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    engine, failures = Engine.from_pretrained(options.model), 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.runs):
            path = Path(folder) / f"{number}.safetensors"
            chance = random.Random(f"{options.seed} {number}")
            seen = steered(engine, path, options.changes, chance, options.num_frames, seed=number)
            is_equal = torch.equal(replayed(engine, path), seen.frames)
            failures += not is_equal
            print(f"run {number}: {len(seen.frames)} frames, {seen.num_changes} changes, resumed {seen.num_resumed} "
                  f"times, replay {'equal' if is_equal else 'DIFFERENT'}", flush=True)  # fmt: skip
    print(f"{options.runs} runs, {failures} replays different")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
