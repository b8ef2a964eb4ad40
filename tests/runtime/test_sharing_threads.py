"""Streams that share an engine: nobody holds up another, whatever ends, fails or is interrupted."""

from __future__ import annotations

import dataclasses
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import golden_model
import pytest
import torch
from sharing_runs import (
    LEVELS,
    LONG_S,
    OPTIONS,
    a_batch,
    apart,
    frames,
    networks,
    sharing_of,
    together,
    until,
)
from torch import Tensor

from miga_engine.engine import Engine
from miga_engine.errors import DeviceError, MigaError
from miga_engine.runtime import sharing as meeting

pytestmark = pytest.mark.usefixtures("nothing_is_left")

# Nobody holds up another ---------------------------------------------------------------------------------------------


def test_streams_asked_in_turns_by_one_thread_wait_for_nobody(shared: Engine, alone: Tensor) -> None:
    streams = [shared.stream("a red balloon", 30, **OPTIONS) for _ in range(2)]
    taken: list[list[Tensor]] = [[], []]
    for _ in range(3):
        for stream, mine in zip(streams, taken, strict=True):
            mine.append(next(stream).frames)
    for stream, mine in zip(streams, taken, strict=True):
        assert torch.equal(torch.cat([*mine, frames(stream)]), alone)


def _ends(how: str) -> Callable[[Engine], object]:
    """A stream that ends before its end, or is slow."""

    def work(engine: Engine) -> object:
        asked: list[bool] = []
        stream = engine.stream("a kite", seed=5, is_cancelled=lambda: bool(asked), **OPTIONS)
        next(stream)
        next(stream)
        if how == "close":
            stream.close()
        elif how == "cancel":
            asked.append(True)
            list(stream)
        elif how == "stand still":
            return stream
        elif how == "slow":
            for _ in range(3):
                time.sleep(0.1)
                next(stream)
        return None  # dropped

    return work


@pytest.mark.parametrize("how", ["close", "cancel", "drop", "stand still", "slow"])
def test_a_stream_that_ends_or_stands_still_leaves_the_others_be(shared: Engine, alone: Tensor, how: str) -> None:
    work = _ends(how)
    found, kept = together(lambda: frames(shared.stream("a red balloon", 30, **OPTIONS)), lambda: work(shared))
    assert apart(found, alone) <= LEVELS
    del kept


def test_nobody_waits_for_one_that_is_silent_longer_than_patience(shared: Engine, alone: Tensor) -> None:
    """A callback that lasts for as long as the other stream, in the middle of a run: of which nobody is told."""
    is_done, kinds = threading.Event(), []

    def stands_still(event: Any) -> None:
        kinds.append(event.kind)
        if event.kind == "score":
            assert is_done.wait(LONG_S)

    def fast() -> Tensor:
        until(lambda: "score" in kinds)
        found = frames(shared.stream("a red balloon", 30, **OPTIONS))
        is_done.set()
        return found

    found, _ = together(fast, lambda: frames(shared.stream("a kite", 30, on_event=stands_still, **OPTIONS)))
    assert apart(found, alone) <= LEVELS


def test_one_that_says_so_is_not_waited_for_at_all(
    shared: Engine, alone: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding, or with its chunk given out: with all the patience in the world."""
    monkeypatch.setattr(meeting, "PATIENCE", 1e6)
    still = shared.stream("a kite", **OPTIONS)
    next(still)
    found, _ = together(
        lambda: frames(shared.stream("a red balloon", 30, **OPTIONS)),
        lambda: shared.generate("a kite", 5, **OPTIONS),
    )
    assert apart(found, alone) <= LEVELS
    still.close()


class _Fails:
    """Makes the network fail for batches that a rule says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        self._patch, self._network = monkeypatch, engine.bundle.transformer

    def where(self, rule: Callable[[Tensor, Tensor], BaseException | None]) -> None:
        forward = self._network.forward

        def fails(latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            error = rule(latents, kwargs["context_index"])
            if error is not None:
                raise error
            return forward(latents, *args, **kwargs)

        self._patch.setattr(self._network, "forward", fails)


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> _Fails:
    return _Fails(monkeypatch, engine)


def test_an_error_reaches_the_stream_whose_it_is(shared: Engine, alone: Tensor, fails: _Fails) -> None:
    """In a forward of both too: each is then computed alone."""
    mark = 1234.5
    fails.where(lambda latents, _: ValueError("of one window") if bool((latents == mark).any()) else None)

    def marked() -> None:
        stream = shared.stream("a kite", seed=9, **OPTIONS)
        next(stream)
        assert stream._pump is not None
        stream._pump.run.store.sample.fill_(mark)
        with pytest.raises(ValueError, match="of one window"):
            list(stream)

    found, _ = together(lambda: frames(shared.stream("a red balloon", 30, **OPTIONS)), marked)
    assert apart(found, alone) <= LEVELS


def test_nan_of_one_stream_is_not_another_s(shared: Engine, alone: Tensor) -> None:
    def poisoned() -> None:
        stream = shared.stream("a kite", seed=9, **OPTIONS)
        next(stream)
        assert stream._pump is not None
        stream._pump.run.store.sample.fill_(float("nan"))
        with pytest.raises(MigaError, match="NaN or infinity"):
            list(stream)

    found, _ = together(lambda: frames(shared.stream("a red balloon", 30, **OPTIONS)), poisoned)
    assert apart(found, alone) <= LEVELS


def test_where_memory_is_short_for_windows_together_they_go_alone(
    shared: Engine, alone: Tensor, fails: _Fails, caplog: pytest.LogCaptureFixture
) -> None:
    fails.where(lambda latents, _: torch.OutOfMemoryError("CUDA out of memory.") if len(latents) > 1 else None)
    found = together(*[lambda: frames(shared.stream("a red balloon", 30, **OPTIONS))] * 3)
    assert all(torch.equal(frames, alone) for frames in found)  # one window at a time, as alone
    assert sharing_of(shared).most_windows == 1
    assert "windows of several streams: at most 1 go together now" in caplog.text


def test_where_memory_is_short_for_one_window_every_stream_hears_of_it(shared: Engine, fails: _Fails) -> None:
    fails.where(lambda latents, _: torch.OutOfMemoryError("CUDA out of memory."))

    def refused() -> None:
        with pytest.raises(DeviceError, match="out of memory on cpu in the network, with one window of 5 latent"):
            list(shared.stream("a red balloon", 30, **OPTIONS))

    together(refused, refused)


def test_a_stream_halves_its_own_batch_where_that_is_too_large(shared: Engine, alone: Tensor, fails: _Fails) -> None:
    fails.where(lambda latents, _: MemoryError() if len(latents) > 2 else None)
    miga = dataclasses.replace(golden_model.MIGA, window_batch=4)
    events: list[Any] = []

    def work(seed: int) -> Tensor:
        return frames(shared.stream("a red balloon", 30, on_event=events.append, **{**OPTIONS, "miga": miga}))

    found = together(lambda: work(0), lambda: work(0))
    assert max(apart(frames, alone) for frames in found) <= LEVELS
    assert {event.data["window_batch"] for event in events if event.kind == "window_batch"} == {2}


# Interrupts ----------------------------------------------------------------------------------------------------------


def _interrupted(engine: Engine, arrange: Callable[[], None], **options: Any) -> tuple[Tensor, int]:
    """Frames of a stream of this thread, which is the main one, that goes on after each interrupt."""
    taken, count = [], 0
    stream = engine.stream("a red balloon", 30, **{**OPTIONS, **options})
    arrange()
    while True:
        try:
            taken.append(next(stream).frames)
        except StopIteration:
            break
        except KeyboardInterrupt:
            count += 1
            arrange()
    stream.close()
    return torch.cat(taken), count


@pytest.fixture
def _sigint() -> Any:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    sys.settrace(None)
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("_sigint")
@pytest.mark.parametrize("part", range(2))
def test_an_interrupt_at_any_line_changes_nothing(shared: Engine, alone: Tensor, part: int) -> None:
    """Lines of what a caller does at the meeting; another stream goes on beside it.

    Of lines that take a lock a tracer sees one that no signal finds: between a block's end and the lock's.
    """
    chance = random.Random(part)
    lines, count = sorted((chance.randrange(5, 500) for _ in range(25)), reverse=True), 0

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if lines and count >= lines[-1]:
                lines.pop()
                signal.raise_signal(signal.SIGINT)
        return line

    def call(frame: Any, event: str, argument: Any) -> Any:
        is_ours = frame.f_code.co_filename.endswith("/sharing.py")
        return (
            line if is_ours and frame.f_code.co_name in ("output", "pause", "_give", "__call__", "__init__") else None
        )

    pool = ThreadPoolExecutor(1)
    other = pool.submit(lambda: frames(shared.stream("a red balloon", 30, **OPTIONS)))
    try:
        found, num_interrupts = _interrupted(shared, lambda: sys.settrace(call))
    finally:
        sys.settrace(None)
    assert num_interrupts > 10
    assert apart(found, alone) <= LEVELS
    assert apart(other.result(timeout=LONG_S), alone) <= LEVELS
    pool.shutdown()


@pytest.mark.usefixtures("_sigint")
def test_an_interrupt_of_one_that_waits_loses_nothing(shared: Engine, alone: Tensor) -> None:
    """Signals that come at any moment, most of them while the output of a batch is waited for."""
    over = threading.Event()

    def signals() -> None:
        chance = random.Random(0)
        while not over.wait(chance.uniform(0.03, 0.1)):
            os.kill(os.getpid(), signal.SIGINT)

    pool = ThreadPoolExecutor(2)
    other = pool.submit(lambda: frames(shared.stream("a red balloon", 30, **OPTIONS)))
    stream = shared.stream("a red balloon", 30, **OPTIONS)
    taken: list[Tensor] = []
    num_interrupts = 0
    sender = pool.submit(signals)
    while True:
        try:
            try:
                taken.append(next(stream).frames)
            except StopIteration:
                over.set()
                sender.result()
                break
        except KeyboardInterrupt:
            num_interrupts += 1
    over.set()
    sender.result()
    found = torch.cat(taken)
    assert num_interrupts > 3
    assert apart(found[: len(alone)], alone[: len(found)]) <= LEVELS
    assert apart(other.result(timeout=LONG_S), alone) <= LEVELS
    stream.close()
    pool.shutdown()


@pytest.mark.usefixtures("_sigint")
def test_a_batch_whose_caller_was_interrupted_is_not_computed(engine: Engine) -> None:
    _, first, second, sharing = networks(engine)
    for network in (first, second):
        network.place_prompts(torch.tensor([0, 1]).numpy())
    is_held, may_go = threading.Event(), threading.Event()

    def holds() -> None:
        with sharing.lock:
            is_held.set()
            may_go.wait(LONG_S)

    pool = ThreadPoolExecutor(2)
    pool.submit(holds)
    is_held.wait(LONG_S)
    call = pool.submit(first, a_batch(engine, 0, [1, 0], [0]))
    time.sleep(0.2)  # until the thread has taken it
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        second(a_batch(engine, 1, [1, 0], [0]))
    may_go.set()
    call.result(timeout=LONG_S)
    pool.shutdown()
    first(a_batch(engine, 2, [1], [0]))  # of another kind, behind what was there before
    assert sharing.num_forwards == 2
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.mark.parametrize(("seconds", "looks"), [(0.0, ["now"]), (0.5, ["now", 0.5]), (None, ["now", None])])
def test_the_first_look_for_news_takes_no_time(shared: Engine, seconds: float | None, looks: list[Any]) -> None:
    """For Python 3.10 waits for ever where the time of the first one runs out before it has looked."""
    seen: list[Any] = []

    class Inbox:
        def get_nowait(self) -> None:
            seen.append("now")
            raise queue.Empty

        def get(self, timeout: float | None) -> None:
            seen.append(timeout)
            raise queue.Empty

    sharing = meeting.Sharing(shared.bundle, 2)
    sharing._inbox, sharing._seconds_to_wait = Inbox(), lambda: seconds  # type: ignore[assignment, method-assign]
    with pytest.raises(queue.Empty):
        sharing._next()
    assert seen == looks
