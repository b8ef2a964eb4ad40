"""Whatever breaks off a run, it goes on: interrupts anywhere, memory that is short, callbacks that fail, threads."""

from __future__ import annotations

import dataclasses
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import golden_model
import numpy as np
import pytest
import torch
from torch import Tensor

from miga_engine.engine import Engine
from miga_engine.errors import MigaError, SessionError
from miga_engine.noise import CounterNoise
from miga_engine.runtime.interrupts import uninterrupted
from miga_engine.runtime.network import NEGATIVE_ROW, PromptedTransformer
from miga_engine.runtime.stages import VideoRun
from miga_engine.runtime.stream import Stream

NUM_FRAMES = 33
MIGA = dataclasses.replace(golden_model.MIGA, score_drop=-1.0, candidates=2, refine_steps=2, guidance_anchor=True)
OPTIONS = {"height": 32, "width": 32, "num_inference_steps": 8, "seed": 3, "miga": MIGA}
PROMPT = {0: "a red balloon", 17: "a kite"}


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """Also where the tests run in the background, which ignores them."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="module")
def whole(engine: Engine) -> Tensor:
    return torch.cat([chunk.frames for chunk in _stream(engine)])


def _stream(engine: Engine, **options: Any) -> Stream:
    return engine.stream(PROMPT, NUM_FRAMES, **{**OPTIONS, **options})


def _rest(engine: Engine, path: Path, taken: list[Tensor]) -> Tensor:
    return torch.cat([*taken, *(chunk.frames for chunk in engine.resume(path))])


# Interrupts ------------------------------------------------------------------------------------------------------


class _SignalAtLine:
    """Sends this process SIGINT at the k-th line of the runtime that is executed, as often as `lines` says."""

    def __init__(self, lines: list[int]) -> None:
        self._lines = sorted(lines, reverse=True)
        self.count = 0

    def __enter__(self) -> _SignalAtLine:
        self.resume()
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def resume(self) -> None:
        """Python forgets the function that traces when that raises."""
        sys.settrace(self._call)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if "/miga_engine/runtime/" not in name or name.endswith(("interrupts.py", "session.py")):
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if event == "line":
            self.count += 1
            if self._lines and self.count >= self._lines[-1]:
                self._lines.pop()
                signal.raise_signal(signal.SIGINT)
        return self._line


@pytest.fixture(scope="module")
def num_lines(engine: Engine) -> int:
    with _SignalAtLine([]) as tracer:
        list(_stream(engine))
    return tracer.count


def test_an_interrupt_between_two_lines_loses_no_prompt_row() -> None:
    """Rows that come and go through a table of three slots, with a signal at each line in turn."""
    order = [[1], [1, 2], [2], [3, 2], [1, 3], [2, 3], [2]]
    num_lines = at = 1
    while at <= num_lines:
        network = PromptedTransformer.__new__(PromptedTransformer)
        network._num_slots, network._slot_of, table = 3, {NEGATIVE_ROW: NEGATIVE_ROW}, {}
        network._context = SimpleNamespace(write=table.__setitem__)
        network._encode = lambda row: row
        with _SignalAtLine([at]) as tracer:
            for rows in order:
                while True:
                    try:
                        slots = network.place_prompts(np.array(rows))
                    except KeyboardInterrupt:
                        tracer.resume()
                    else:
                        break
                assert [table[slot] for slot in slots.tolist()] == rows, at
                assert len(set(network._slot_of.values())) == len(network._slot_of) <= 3
        num_lines, at = tracer.count, at + 1
    assert at > 40


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("part", range(2))
def test_an_interrupt_at_any_line_changes_nothing(engine, whole, num_lines, tmp_path, overlap, part) -> None:
    chance = random.Random(f"{overlap} {part}")
    for trial in range(6):
        at = sorted(chance.randrange(num_lines) for _ in range(chance.choice((1, 1, 3))))
        saves = trial % 2 == 0
        taken, interrupts = [], 0
        stream = _stream(engine, overlap_decode=overlap)
        with _SignalAtLine(at) as tracer:
            while True:
                try:
                    taken.append(next(stream).frames)
                except StopIteration:
                    break
                except KeyboardInterrupt:
                    interrupts += 1
                    if saves:
                        break
                    tracer.resume()
        if saves and interrupts:
            stream.save(tmp_path / "run.safetensors")
            stream.close()
            assert torch.equal(_rest(engine, tmp_path / "run.safetensors", taken), whole), at
        else:
            assert torch.equal(torch.cat(taken), whole), at
        stream.close()


@pytest.mark.slow
def test_an_interrupt_in_the_middle_of_a_change_finds_it_done(engine, whole, tmp_path) -> None:
    """At lines of the changes themselves, which are few among all."""
    stream = _stream(engine)
    with _SignalInChange([], stream) as tracer:
        list(stream)
    chance = random.Random(0)
    for at in sorted(chance.sample(range(1, tracer.count), 10)):
        stream, taken = _stream(engine), []
        with pytest.raises(KeyboardInterrupt), _SignalInChange([at], stream):
            taken.extend(chunk.frames for chunk in stream)
        stream.save(tmp_path / "run.safetensors")
        assert torch.equal(_rest(engine, tmp_path / "run.safetensors", taken), whole), at


class _SignalInChange(_SignalAtLine):
    """Counts only the lines at which the state is not whole."""

    def __init__(self, lines: list[int], stream: Stream) -> None:
        super().__init__(lines)
        self._stream = stream

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        pump = self._stream._pump
        if pump is None or pump.run.store.is_intact:
            return self._line
        super()._line(frame, event, argument)
        return self._line


def test_within_the_block_handlers_wait() -> None:
    steps = []

    def at_alarm(number: int, frame: FrameType | None) -> None:
        steps.append("handled")
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, at_alarm)
    try:
        with pytest.raises(TimeoutError):  # noqa: PT012, SIM117 - raised by the end of the inner block
            with uninterrupted():
                signal.raise_signal(signal.SIGALRM)
                with uninterrupted():
                    signal.raise_signal(signal.SIGALRM)
                steps.append("done")
        assert steps == ["done", "handled", "handled"]
        assert signal.getsignal(signal.SIGALRM) is at_alarm
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Memory and callbacks ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "error"), [(1, torch.OutOfMemoryError("out of memory")), (4, MemoryError()), (6, KeyboardInterrupt())]
)
def test_noise_that_cannot_be_drawn_loses_nothing(engine, whole, tmp_path, first, error, monkeypatch) -> None:
    """At drawings of noise of every kind: seed clip, warm-up, queue, candidates, refine."""
    draw, counts = CounterNoise.__call__, [0]

    def counted(self: CounterNoise, *arguments: Any, **options: Any) -> Tensor:
        counts[0] += 1
        if counts[0] == fails_at:
            raise error
        return draw(self, *arguments, **options)

    fails_at = -1
    monkeypatch.setattr(CounterNoise, "__call__", counted)
    list(_stream(engine))
    num_drawings = counts[0]
    assert num_drawings > 20
    for fails_at in range(first, num_drawings + 1, 8):
        counts[0] = 0
        stream, taken = _stream(engine), []
        with pytest.raises((MigaError, KeyboardInterrupt)):
            taken.extend(chunk.frames for chunk in stream)
        stream.save(tmp_path / "run.safetensors")
        assert torch.equal(_rest(engine, tmp_path / "run.safetensors", taken), whole), fails_at


def _events(engine: Engine, **options: Any) -> list[str]:
    kinds: list[str] = []
    list(_stream(engine, on_event=lambda event: kinds.append(event.kind), **options))
    assert {"stage", "score", "search_started", "search_finished", "chunk", "drift"} <= set(kinds)
    return kinds


@pytest.mark.slow
def test_a_run_saved_at_any_event_goes_on(engine, whole, tmp_path) -> None:
    for number, kind in list(enumerate(_events(engine)))[::8]:
        taken: list[Tensor] = []
        count = iter(range(10**6))

        def save(event: Any, number=number, count=count) -> None:
            if event.kind != "saved" and next(count) == number:
                stream.save(tmp_path / "run.safetensors")  # noqa: B023 - called before the next one is made

        stream = _stream(engine, on_event=save)
        given = []
        for chunk in stream:
            given.append(chunk.frames)
        resumed = engine.resume(tmp_path / "run.safetensors")
        taken = [torch.cat(given)[: resumed.num_frames_out]]
        assert torch.equal(torch.cat([*taken, *(chunk.frames for chunk in resumed)]), whole), (number, kind)


@pytest.mark.slow
def test_a_callback_that_fails_at_any_event_loses_nothing(engine, whole, tmp_path) -> None:
    class _CallbackError(Exception):
        pass

    for number, kind in list(enumerate(_events(engine)))[4::8]:
        count = iter(range(10**6))

        def fail(event: Any, number=number, count=count) -> None:
            if next(count) == number:
                raise _CallbackError

        stream, taken = _stream(engine, on_event=fail), []
        with pytest.raises(_CallbackError):
            taken.extend(chunk.frames for chunk in stream)
        stream.save(tmp_path / "run.safetensors")
        assert torch.equal(_rest(engine, tmp_path / "run.safetensors", taken), whole), (number, kind)


def test_what_is_broken_off_in_the_middle_of_a_change_neither_goes_on_nor_is_saved(
    engine, tmp_path, monkeypatch
) -> None:
    """An error where none can be, inside the update itself."""
    stream = _stream(engine)
    next(stream)
    store = stream._pump.run.store  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError), store.changing():
        raise ZeroDivisionError
    with pytest.raises(SessionError, match="stopped in the middle of an update and cannot be saved"):
        stream.save(tmp_path / "run.safetensors")
    with pytest.raises(SessionError, match="cannot go on: resume it from its last session file"):
        list(stream)
    assert list(tmp_path.iterdir()) == []


# Threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Two flags: a tick has begun, and it may end."""
    begun, go = threading.Event(), threading.Event()
    tick = VideoRun.tick

    def waits(self: VideoRun) -> Any:
        begun.set()
        assert go.wait(30)
        return tick(self)

    monkeypatch.setattr(VideoRun, "tick", waits)
    yield begun, go
    go.set()


def test_one_thread_at_a_time_asks_for_the_next_chunk(engine, whole, slow, tmp_path) -> None:
    begun, go = slow
    stream, taken = _stream(engine), []
    thread = threading.Thread(target=lambda: taken.extend(chunk.frames for chunk in stream))
    thread.start()
    assert begun.wait(30)
    with pytest.raises(MigaError, match="is being made already, in another thread"):
        next(stream)
    saving = threading.Thread(target=lambda: stream.save(tmp_path / "run.safetensors"))  # waits for its turn
    saving.start()
    go.set()
    thread.join()
    saving.join()
    assert torch.equal(torch.cat(taken), whole)
    assert engine.resume(tmp_path / "run.safetensors").num_frames_out <= NUM_FRAMES


def test_closing_waits_for_the_pass_at_hand(engine, slow) -> None:
    begun, go = slow
    stream, errors = _stream(engine), []

    def take() -> None:
        try:
            list(stream)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    assert begun.wait(30)
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    go.set()
    thread.join(60)
    closing.join(60)
    assert errors == []
    assert list(stream) == []


def test_a_callback_may_close_the_stream_and_may_not_ask_for_more(engine) -> None:
    seen: list[BaseException | None] = []

    def on_event(event: Any) -> None:
        if event.kind == "chunk" and not seen:
            with pytest.raises(MigaError, match="by what is calling back"):
                next(stream)
            stream.close()
            seen.append(None)

    stream = _stream(engine, on_event=on_event)
    assert len(list(stream)) == 1
    assert seen == [None]
    with pytest.raises(SessionError, match="the stream is closed"):
        stream.save("run.safetensors")


def test_a_callback_that_closes_the_stream_and_fails_has_closed_it(engine) -> None:
    def on_event(event: Any) -> None:
        if event.kind == "chunk":
            stream.close()
            raise ZeroDivisionError

    stream = _stream(engine, on_event=on_event, overlap_decode=True)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert stream.window_batch == 0
    assert "miga-decode" not in [thread.name for thread in threading.enumerate()]
