"""Several streams on one engine share batches of windows: each gives its own frames, and nobody holds up another.

MIGA_STRESS=N makes the random test that many times as long.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import golden_model
import places
import pytest
import small_models
import torch
from torch import Tensor

from miga_engine.engine import Engine
from miga_engine.errors import ConfigError, DeviceError, MigaError
from miga_engine.resolve import schedule_of
from miga_engine.runtime import sharing as meeting
from miga_engine.runtime.joining import Texts, joined, split
from miga_engine.runtime.network import Batch, PromptedTransformer
from miga_engine.runtime.ranks import Ranks
from miga_engine.runtime.sharing import SharedTransformer, Sharing
from miga_engine.runtime.stream import Stream

OPTIONS = {"height": 32, "width": 32, "num_inference_steps": 8, "miga": golden_model.MIGA}
LEVELS = 2
"""Of 255: what another batch of windows changes at most in these runs, as with `window_batch`."""
LONG_S = 60.0
"""Whoever waits so long here is held up by another."""


def _frames(stream: Stream, *, slow: float = 0.0) -> Tensor:
    with stream:
        chunks = []
        for chunk in stream:
            chunks.append(chunk.frames)
            time.sleep(slow)
    return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)


def _apart(one: Tensor, other: Tensor) -> int:
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


def _together(*works: Callable[[], Any]) -> list[Any]:
    """What they give, each in a thread of its own."""
    pool = ThreadPoolExecutor(len(works))
    try:
        futures: list[Future[Any]] = [pool.submit(work) for work in works]
        return [future.result(timeout=LONG_S) for future in futures]
    finally:
        pool.shutdown(wait=False)


def _is_there() -> bool:
    return any(thread.name == "miga-sharing" for thread in threading.enumerate())


def _until(condition: Callable[[], bool], seconds: float = LONG_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    yield
    gc.collect()
    _until(lambda: not _is_there(), seconds=5)


@pytest.fixture
def shared(engine: Engine) -> Engine:
    return engine.shared()


@pytest.fixture(scope="module")
def alone(engine: Engine) -> Tensor:
    return _frames(engine.stream("a red balloon", 30, **OPTIONS))


def _sharing(engine: Engine) -> Sharing:
    assert engine._sharing is not None
    return engine._sharing


# The same frames -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "videocrafter2", "experts"])
def test_streams_of_every_kind_give_their_own_frames(name: str, tmp_path: Path) -> None:
    """Prompts, seeds, scales, lengths and beginnings differ; of Wan one has no guidance and one another schedule.

    Alone in a group each is that of the engine to the bit.
    """
    family = small_models.MODELS[name]
    engine = Engine.from_pretrained(family.build(tmp_path / name))
    shared, length = engine.shared(), family.num_frames
    given: list[tuple[Any, int, dict[str, Any]]] = [
        ({0: "a red balloon", 5: "a kite over a wide plain"}, length, {}),
        ("a red balloon", length // 2 + 1, {"seed": 3, "guidance_scale": 4.0}),
    ]
    if name == "wan":
        given += [("night", 20, {"guidance_scale": 1.0}), ("night", 20, {"num_inference_steps": 9}), ("a kite", 50, {})]

    def stream(engine: Engine, i: int) -> Stream:
        prompt, num_frames, changes = given[i]
        return engine.stream(prompt, num_frames, **{**family.options, **changes})

    def late(i: int) -> Tensor:
        time.sleep(0.05 * i)
        return _frames(stream(shared, i))

    expected, num_forwards = [], 0
    for i in range(len(given)):
        one = engine.shared()
        expected.append(_frames(stream(one, i)))
        num_forwards += _sharing(one).num_forwards
    assert torch.equal(expected[0], _frames(stream(engine, 0)))
    found = _together(*(functools.partial(late, i) for i in range(len(given))))
    assert max(map(_apart, found, expected)) <= LEVELS
    assert _sharing(shared).num_forwards < num_forwards  # they did meet


def _networks(engine: Engine) -> tuple[PromptedTransformer, SharedTransformer, SharedTransformer, Sharing]:
    """One of two prompts, and two of one each that share."""
    request = engine.resolve({0: "a red balloon", 40: "a kite at sea"}, num_frames=80, **OPTIONS)
    sharing = _sharing(engine.shared())
    timesteps = schedule_of(request).network_timesteps

    def texts(prompt: dict[int, str]) -> Any:
        return engine._timeline(dataclasses.replace(request, prompt=prompt)).encode("", engine.bundle.encode_prompts)

    both = PromptedTransformer(engine.bundle, texts({0: "a red balloon", 40: "a kite at sea"}), timesteps, {})
    each = [
        SharedTransformer(sharing, engine.bundle, texts({0: prompt}), timesteps, {})
        for prompt in ("a red balloon", "a kite at sea")
    ]
    return both, each[0], each[1], sharing


def _batch(engine: Engine, seed: int, rows: list[Any], keep: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, engine.bundle.latent_channels, 5, 4, 4, generator=generator)
    steps = torch.randint(0, 8, (1, 5), generator=generator)
    return Batch(latents, steps.float(), steps, torch.tensor(rows), torch.tensor([keep]))


def test_a_shared_batch_is_to_the_bit_that_of_two_windows_of_one_stream(engine: Engine) -> None:
    both, first, second, sharing = _networks(engine)
    both.place_prompts(torch.tensor([0, 1, 2]).numpy())
    for network in (first, second):
        network.place_prompts(torch.tensor([0, 1]).numpy())
    one, other = _batch(engine, 1, [1, 0], [1, 2]), _batch(engine, 2, [1, 0], [0, 4])
    latents, steps, keep = (torch.cat(pair) for pair in ((one[0], other[0]), (one[2], other[2]), (one[4], other[4])))
    expected = both(Batch(latents, steps.float(), steps, torch.tensor([1, 2, 0, 0]), keep))
    with sharing.lock:  # the thread takes the first call, and is held up until the other two are there
        pool = ThreadPoolExecutor(3)
        calls = [pool.submit(first, _batch(engine, 0, [1, 0], [0]))]
        _until(lambda: bool(sharing._served or calls[0].running()) and sharing._inbox.empty())
        time.sleep(0.05)
        calls += [pool.submit(first, one), pool.submit(second, other)]
        time.sleep(0.05)
    found = [call.result(timeout=LONG_S) for call in calls[1:]]
    pool.shutdown()
    assert sharing.num_forwards == 2
    assert torch.equal(torch.cat(found).view(2, 2, *found[0].shape[1:]).transpose(0, 1).flatten(0, 1), expected)


def test_batches_that_keep_other_frames_and_other_forms_of_prompts_are_joined(engine: Engine) -> None:
    both, _, _, _ = _networks(engine)
    both.place_prompts(torch.tensor([0, 1, 2]).numpy())
    batches = [
        _batch(engine, 1, [1, 0], [1]),
        _batch(engine, 2, [[1, 1, 1, 0, 0], [0] * 5], [0, 2, 4]),
        _batch(engine, 3, [0, 0], [3, 4]),
    ]
    batch = joined(batches, [0, 1, 0])
    assert batch.latents.shape[0] == 3
    assert batch.keep.tolist() == [[1, 1, 1], [0, 2, 4], [3, 4, 4]]
    assert batch.prompt_rows.tolist() == [[1] * 5, [2, 2, 2, 1, 1], [0] * 5, [0] * 5, [1] * 5, [0] * 5]
    for found, given, first in zip(split(both(batch), batches), batches, (0, 1, 0), strict=True):
        expected = both(given._replace(prompt_rows=given.prompt_rows + first))
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.slow
def test_latents_of_streams_together_are_those_alone_up_to_rounding(engine: Engine) -> None:
    """In float32 by 1e-4 of their spread at most, over a whole run."""
    requests = [engine.resolve(prompt, num_frames=40, seed=seed, **OPTIONS) for seed, prompt in enumerate("ab")]
    shared = engine.shared()

    def latents(engine: Engine, i: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([clean.latents for clean in engine.start(requests[i])])

    expected = [latents(engine, i) for i in range(2)]
    found = _together(*(lambda i=i: latents(shared, i) for i in range(2)))
    assert max(float((a - b).abs().max() / b.std()) for a, b in zip(found, expected, strict=True)) < 1e-4


# Nobody holds up another ---------------------------------------------------------------------------------------------


def test_streams_asked_in_turns_by_one_thread_wait_for_nobody(shared: Engine, alone: Tensor) -> None:
    streams = [shared.stream("a red balloon", 30, **OPTIONS) for _ in range(2)]
    taken: list[list[Tensor]] = [[], []]
    for _ in range(3):
        for stream, mine in zip(streams, taken, strict=True):
            mine.append(next(stream).frames)
    for stream, mine in zip(streams, taken, strict=True):
        assert torch.equal(torch.cat([*mine, _frames(stream)]), alone)


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
    found, kept = _together(lambda: _frames(shared.stream("a red balloon", 30, **OPTIONS)), lambda: work(shared))
    assert _apart(found, alone) <= LEVELS
    del kept


def test_nobody_waits_for_one_that_is_silent_longer_than_patience(shared: Engine, alone: Tensor) -> None:
    """A callback that lasts for as long as the other stream, in the middle of a run: of which nobody is told."""
    is_done, kinds = threading.Event(), []

    def stands_still(event: Any) -> None:
        kinds.append(event.kind)
        if event.kind == "score":
            assert is_done.wait(LONG_S)

    def fast() -> Tensor:
        _until(lambda: "score" in kinds)
        found = _frames(shared.stream("a red balloon", 30, **OPTIONS))
        is_done.set()
        return found

    found, _ = _together(fast, lambda: _frames(shared.stream("a kite", 30, on_event=stands_still, **OPTIONS)))
    assert _apart(found, alone) <= LEVELS


def test_one_that_says_so_is_not_waited_for_at_all(
    shared: Engine, alone: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding, or with its chunk given out: with all the patience in the world."""
    monkeypatch.setattr(meeting, "PATIENCE", 1e6)
    still = shared.stream("a kite", **OPTIONS)
    next(still)
    found, _ = _together(
        lambda: _frames(shared.stream("a red balloon", 30, **OPTIONS)),
        lambda: shared.generate("a kite", 5, **OPTIONS),
    )
    assert _apart(found, alone) <= LEVELS
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

    found, _ = _together(lambda: _frames(shared.stream("a red balloon", 30, **OPTIONS)), marked)
    assert _apart(found, alone) <= LEVELS


def test_nan_of_one_stream_is_not_another_s(shared: Engine, alone: Tensor) -> None:
    def poisoned() -> None:
        stream = shared.stream("a kite", seed=9, **OPTIONS)
        next(stream)
        assert stream._pump is not None
        stream._pump.run.store.sample.fill_(float("nan"))
        with pytest.raises(MigaError, match="NaN or infinity"):
            list(stream)

    found, _ = _together(lambda: _frames(shared.stream("a red balloon", 30, **OPTIONS)), poisoned)
    assert _apart(found, alone) <= LEVELS


def test_where_memory_is_short_for_windows_together_they_go_alone(
    shared: Engine, alone: Tensor, fails: _Fails, caplog: pytest.LogCaptureFixture
) -> None:
    fails.where(lambda latents, _: torch.OutOfMemoryError("CUDA out of memory.") if len(latents) > 1 else None)
    found = _together(*[lambda: _frames(shared.stream("a red balloon", 30, **OPTIONS))] * 3)
    assert all(torch.equal(frames, alone) for frames in found)  # one window at a time, as alone
    assert _sharing(shared).most_windows == 1
    assert "windows of several streams: at most 1 go together now" in caplog.text


def test_where_memory_is_short_for_one_window_every_stream_hears_of_it(shared: Engine, fails: _Fails) -> None:
    fails.where(lambda latents, _: torch.OutOfMemoryError("CUDA out of memory."))

    def refused() -> None:
        with pytest.raises(DeviceError, match="out of memory on cpu in the network, with one window of 5 latent"):
            list(shared.stream("a red balloon", 30, **OPTIONS))

    _together(refused, refused)


def test_a_stream_halves_its_own_batch_where_that_is_too_large(shared: Engine, alone: Tensor, fails: _Fails) -> None:
    fails.where(lambda latents, _: MemoryError() if len(latents) > 2 else None)
    miga = dataclasses.replace(golden_model.MIGA, window_batch=4)
    events: list[Any] = []

    def work(seed: int) -> Tensor:
        return _frames(shared.stream("a red balloon", 30, on_event=events.append, **{**OPTIONS, "miga": miga}))

    found = _together(lambda: work(0), lambda: work(0))
    assert max(_apart(frames, alone) for frames in found) <= LEVELS
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
    other = pool.submit(lambda: _frames(shared.stream("a red balloon", 30, **OPTIONS)))
    try:
        found, num_interrupts = _interrupted(shared, lambda: sys.settrace(call))
    finally:
        sys.settrace(None)
    assert num_interrupts > 10
    assert _apart(found, alone) <= LEVELS
    assert _apart(other.result(timeout=LONG_S), alone) <= LEVELS
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
    other = pool.submit(lambda: _frames(shared.stream("a red balloon", 30, **OPTIONS)))
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
    assert _apart(found[: len(alone)], alone[: len(found)]) <= LEVELS
    assert _apart(other.result(timeout=LONG_S), alone) <= LEVELS
    stream.close()
    pool.shutdown()


@pytest.mark.usefixtures("_sigint")
def test_a_batch_whose_caller_was_interrupted_is_not_computed(engine: Engine) -> None:
    _, first, second, sharing = _networks(engine)
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
    call = pool.submit(first, _batch(engine, 0, [1, 0], [0]))
    time.sleep(0.2)  # until the thread has taken it
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(KeyboardInterrupt):
        second(_batch(engine, 1, [1, 0], [0]))
    may_go.set()
    call.result(timeout=LONG_S)
    pool.shutdown()
    first(_batch(engine, 2, [1], [0]))  # of another kind, behind what was there before
    assert sharing.num_forwards == 2
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


# What is held --------------------------------------------------------------------------------------------------------


def test_texts_take_the_rows_of_the_streams_that_are_there(shared: Engine, alone: Tensor) -> None:
    sharing = _sharing(shared)
    first = shared.stream("a red balloon", 30, **OPTIONS)
    taken = next(first).frames

    def width() -> int:
        table: Any = sharing._texts.table
        return table.bias.shape[3]

    narrow = width()
    for seed in range(20):  # that come and go
        shared.stream({0: "a kite", 9: "snow at night"}, 30, seed=seed, **OPTIONS).close()
        _until(lambda: len(sharing._texts.places) == 1)
        assert sharing._texts.num_rows <= 2 + 3
    kept = [shared.stream("a much longer text " * 4, 30, **OPTIONS) for _ in range(8)]
    assert sharing._texts.num_rows == 9 * 2
    assert width() > narrow
    del kept
    gc.collect()
    _until(lambda: sharing._texts.num_rows == 2)
    assert width() == narrow
    # of texts that have been moved from table to table
    assert _apart(torch.cat([taken, _frames(first)]), alone) <= LEVELS
    _until(lambda: sharing._texts.table is None)


def test_texts_keep_their_rows_where_the_table_is_made_anew(engine: Engine) -> None:
    both, _, _, _ = _networks(engine)
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

    taken, _ = _together(saved, lambda: _frames(shared.stream("a kite", 30, seed=2, **OPTIONS)))
    assert _apart(torch.cat([taken, _frames(engine.resume(path))]), alone) <= LEVELS
    assert _apart(torch.cat([taken, _frames(shared.resume(path))]), alone) <= LEVELS


def test_the_engine_itself_shares_nothing(engine: Engine, shared: Engine, alone: Tensor) -> None:
    stream = shared.stream("a kite", seed=2, **OPTIONS)
    next(stream)
    before = _sharing(shared).num_forwards
    assert torch.equal(_frames(engine.stream("a red balloon", 30, **OPTIONS)), alone)
    assert _sharing(shared).num_forwards == before
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
    _until(lambda: not _is_there())
    with pytest.raises(MigaError, match="the network of a stream that is over was asked once more"):
        run.tick()


PROGRAM = """
import sys, threading, golden_model
from miga_engine import Engine
engine = Engine.from_pretrained(sys.argv[1]).shared()
options = {**golden_model.OPTIONS, "miga": golden_model.MIGA}
streams = [engine.stream("a red balloon", seed=seed, **options) for seed in range(3)]
def work(stream):
    for chunk in stream:
        pass
threading.Thread(target=work, args=(streams[0],), daemon=True).start()
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
        _together(*(functools.partial(_at_random, shared, alone, 10 * number + i) for i in range(3)))
        gc.collect()
        _until(lambda: not _is_there())


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
        assert _apart(found, alone[: len(found)]) <= LEVELS
        assert how != "whole" or len(found) == 30
