"""What streams that share an engine hold and leave, what is refused, and streams that begin and end at random.

MIGA_STRESS=N makes the random test that many times as long.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import places
import pytest
import torch
from sharing_runs import (
    LEVELS,
    LONG_S,
    OPTIONS,
    apart,
    frames,
    is_there,
    networks,
    sharing_of,
    together,
    until,
)
from torch import Tensor

from miga_engine.engine import Engine
from miga_engine.errors import ConfigError, MigaError
from miga_engine.runtime.joining import Texts
from miga_engine.runtime.ranks import Ranks
from miga_engine.runtime.sharing import SharedTransformer
from miga_engine.runtime.stream import Stream

pytestmark = pytest.mark.usefixtures("nothing_is_left")

# What is held --------------------------------------------------------------------------------------------------------


def test_texts_take_the_rows_of_the_streams_that_are_there(shared: Engine, alone: Tensor) -> None:
    sharing = sharing_of(shared)
    first = shared.stream("a red balloon", 30, **OPTIONS)
    taken = next(first).frames

    def width() -> int:
        table: Any = sharing._texts.table
        return table.bias.shape[3]

    narrow = width()
    for seed in range(20):  # that come and go
        shared.stream({0: "a kite", 9: "snow at night"}, 30, seed=seed, **OPTIONS).close()
        until(lambda: len(sharing._texts.places) == 1)
        assert sharing._texts.num_rows <= 2 + 3
    kept = [shared.stream("a much longer text " * 4, 30, **OPTIONS) for _ in range(8)]
    assert sharing._texts.num_rows == 9 * 2
    assert width() > narrow
    del kept
    gc.collect()
    until(lambda: sharing._texts.num_rows == 2)
    assert width() == narrow
    # of texts that have been moved from table to table
    assert apart(torch.cat([taken, frames(first)]), alone) <= LEVELS
    until(lambda: sharing._texts.table is None)


def test_texts_keep_their_rows_where_the_table_is_made_anew(engine: Engine) -> None:
    both, _, _, _ = networks(engine)
    prompts = [both._encode(row) for row in range(3)]
    num_keys = max(prompt.bias.shape[3] for prompt in prompts)
    texts = Texts().seated("one", prompts[0], 3, num_keys).seated("other", prompts[0], 2, num_keys)
    texts.write("other", 0, prompts[2])
    texts.write("other", 1, prompts[1])
    before = [texts.table.row(3 + row, num_keys) for row in range(2)]  # type: ignore[union-attr]
    texts = texts.without("one").packed()
    assert texts.num_rows == 2
    for row, old in enumerate(before):
        new: Any = texts.table.row(row, num_keys)  # type: ignore[union-attr]
        assert torch.equal(new.bias, old.bias)  # type: ignore[attr-defined]
        assert torch.equal(new.layers[0][0], old.layers[0][0])  # type: ignore[attr-defined]
    assert not torch.equal(before[0].layers[0][0], before[1].layers[0][0])  # type: ignore[attr-defined]
    assert texts.without("other") == Texts()


def test_a_session_saved_meanwhile_is_gone_on_with_alone(
    engine: Engine, shared: Engine, alone: Tensor, tmp_path
) -> None:
    path = tmp_path / "run.safetensors"

    def saved() -> Tensor:
        with shared.stream("a red balloon", 30, **OPTIONS) as stream:
            taken = [next(stream).frames for _ in range(3)]
            stream.save(path)
        return torch.cat(taken)

    taken, _ = together(saved, lambda: frames(shared.stream("a kite", 30, seed=2, **OPTIONS)))
    assert apart(torch.cat([taken, frames(engine.resume(path))]), alone) <= LEVELS
    assert apart(torch.cat([taken, frames(shared.resume(path))]), alone) <= LEVELS


def test_the_engine_itself_shares_nothing(engine: Engine, shared: Engine, alone: Tensor) -> None:
    stream = shared.stream("a kite", seed=2, **OPTIONS)
    next(stream)
    before = sharing_of(shared).num_forwards
    assert torch.equal(frames(engine.stream("a red balloon", 30, **OPTIONS)), alone)
    assert sharing_of(shared).num_forwards == before
    assert engine.capture
    assert not shared.capture
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_what_cannot_share_is_refused(engine: Engine, shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ranks", Ranks.__new__(Ranks))
    with pytest.raises(ConfigError, match="several processes share the windows of one video: load the engine without"):
        engine.shared()
    monkeypatch.undo()
    for most in (0, 2.5, True):
        with pytest.raises(ConfigError, match=f"most_windows is {most}: give a whole number of windows, 1 or more"):
            engine.shared(most)
    request = shared.resolve("a kite", num_frames=20, **OPTIONS)
    run = shared.start(request)
    network = run.denoiser.network
    assert isinstance(network, SharedTransformer)
    network.sharing.leave(network.member)
    until(lambda: not is_there())
    with pytest.raises(MigaError, match="the network of a stream that is over was asked once more"):
        run.tick()


PROGRAM = """
import sys, golden_model
from miga_engine import Engine
engine = Engine.from_pretrained(sys.argv[1]).shared()
options = {**golden_model.OPTIONS, "miga": golden_model.MIGA}
streams = [engine.stream("a red balloon", seed=seed, **options) for seed in range(3)]
next(streams[0])
next(streams[1])
print("seen")
"""


@pytest.mark.slow
def test_a_program_may_end_with_streams_open(model: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(places.ROOT / "tests"), str(places.ROOT)])}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model)], capture_output=True, text=True, env=environment, timeout=LONG_S
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "seen", "")


# At random -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_streams_that_begin_and_end_at_random_give_their_frames(engine: Engine, alone: Tensor) -> None:
    num_rounds = int(os.environ.get("MIGA_STRESS", "1"))
    for number in range(num_rounds):
        shared = engine.shared(random.Random(number).choice((2, 3, 8)))
        together(*(functools.partial(_at_random, shared, alone, 10 * number + i) for i in range(3)))
        gc.collect()
        until(lambda: not is_there())


def _at_random(engine: Engine, alone: Tensor, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(2):
        time.sleep(chance.uniform(0, 0.2))
        asked: list[bool] = []
        stream: Stream | None = engine.stream(
            "a red balloon", 30, is_cancelled=lambda asked=asked: bool(asked), **OPTIONS
        )
        how, taken = chance.choice(("whole", "close", "cancel", "drop")), []
        last = 99 if how == "whole" else chance.randrange(4)
        for chunk in stream or ():
            taken.append(chunk.frames)
            if len(taken) > last and not asked:
                if how == "cancel":
                    asked.append(True)
                else:
                    break
            if chance.random() < 0.2:
                time.sleep(chance.uniform(0, 0.1))
        if how != "drop" and stream is not None:
            stream.close()
        stream = None
        found = torch.cat(taken)
        assert apart(found, alone[: len(found)]) <= LEVELS
        assert how != "whole" or len(found) == 30
