"""A stream that is told something while it runs: where it takes it up, and that it can be repeated."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import small_models
import steer
import torch
from refusals import refusal
from small_run import frames_of, rewritten

from miga_engine import ConfigError, Engine, MigaError, SessionError
from miga_engine.request import Change, Request
from miga_engine.runtime.progress import ticks_to_first_frame
from miga_engine.runtime.session import load_session
from miga_engine.runtime.stages import DONE
from miga_engine.runtime.stream import Event

DAY, NIGHT = "a red balloon by day", "a red balloon by night"


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    made: dict[str, Engine] = {}

    def engine(name: str) -> Engine:
        if name not in made:
            made[name] = Engine.from_pretrained(small_models.MODELS[name].build(tmp_path_factory.mktemp(name)))
        return made[name]

    return engine


def _options(name: str, **more: Any) -> dict[str, Any]:
    return {**small_models.MODELS[name].options, "seed": 3, **more}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "blend"), [("wan", 0), ("wan", 8), ("videocrafter2", 2)])
def test_a_prompt_ahead_of_the_queue_is_one_of_a_timeline(engines, name: str, blend: int) -> None:
    options = _options(name)
    options["miga"] = dataclasses.replace(options["miga"], prompt_blend_frames=blend)
    at, num_frames = (45, 60) if name == "wan" else (7, 9)
    stream = engines(name).stream(DAY, num_frames, **options)
    stream.set_prompt(NIGHT, at, blend=blend)
    steered = frames_of(stream)
    assert torch.equal(steered, frames_of(engines(name).stream({0: DAY, at: NIGHT}, num_frames, **options)))
    (change,) = stream.request.changes
    assert (change.tick, change.prompt, change.blend_frames) == (0, NIGHT, blend)
    assert at <= change.frame < at + 4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(small_models.MODELS))
def test_replays_are_what_was_seen(engines, name: str, tmp_path: Path) -> None:
    """Changes of every kind at random passes, the stream broken off and gone on with in between."""
    path, given = tmp_path / "run.safetensors", {}
    num_frames = 60 if name != "videocrafter2" else 9
    seen = steer.steered(engines(name), path, 8, random.Random(name), num_frames, **_options(name))
    assert seen.num_changes >= (3 if num_frames == 60 else 1)
    for kind in ("image", "video"):
        if kind in _options(name):
            given[kind] = _options(name)[kind]
    assert torch.equal(steer.replayed(engines(name), path, **given), seen.frames)


@pytest.mark.slow
def test_an_endless_stream_is_replayed_as_far_as_it_was_seen(engines, tmp_path: Path) -> None:
    engine, path = engines("wan"), tmp_path / "run.safetensors"
    stream, frames = engine.stream(DAY, None, **_options("wan"), chunk_frames=3), []
    for chunk in stream:
        frames.append(chunk.frames)
        if chunk.index == 4:
            stream.set_prompt(NIGHT)
        if chunk.index == 19:
            break
    stream.save(path)
    rest = [next(stream).frames for _ in range(5)]
    for chunk_frames in (None, 7):
        replay = engine.replay(path, chunk_frames=chunk_frames)
        assert torch.equal(frames_of(replay), torch.cat(frames))
        assert replay.num_frames_out == 60
        assert replay.request == stream.request
    again = engine.replay(path)
    again.save_every(None, tmp_path / "again.safetensors")
    frames_of(again)
    resumed = engine.resume(tmp_path / "again.safetensors", chunk_frames=3)
    assert torch.equal(torch.cat([next(resumed).frames for _ in range(5)]), torch.cat(rest))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "skyreels"])
def test_frames_above_a_level_take_it_at_once(engines, name: str) -> None:
    """The cleaner frames may be that are to take it, the sooner it begins; never in one that is made."""
    begins = []
    for above in (1.0, 0.9, 0.5, 0.0):
        events: list[Event] = []
        stream = engines(name).stream(DAY, 150, **_options(name), on_event=events.append, chunk_frames=1)
        for _ in range(12):
            out = next(stream).first_frame
        stream.set_prompt(NIGHT, above=above)
        while not stream.request.changes:
            out = next(stream).first_frame
        stream.close()
        (told,) = [event.data for event in events if event.kind == "prompt"]
        assert told["prompt"] == NIGHT
        assert told["frame"] > out
        begins.append(told["frame"])
    assert begins == sorted(begins, reverse=True)
    assert begins[0] > begins[-1]


@pytest.mark.slow
def test_a_restart_is_seen_sooner_and_what_has_left_the_queue_stays(engines, tmp_path: Path) -> None:
    engine, path, options = engines("wan"), tmp_path / "run.safetensors", _options("wan", num_inference_steps=10)
    plain = frames_of(engine.stream(DAY, 90, **options))
    shown = {}
    for restart in (False, True):
        stream = engine.stream(DAY, 90, **options, chunk_frames=1)
        frames = [next(stream).frames for _ in range(13)]
        stream.set_prompt(NIGHT, restart=restart)
        frames.append(next(stream).frames)
        while not stream.request.changes:
            frames.append(next(stream).frames)
        (change,) = stream.request.changes
        assert change.restarts == restart
        frames = torch.cat([*frames, frames_of(stream)])
        stream.close()
        shown[restart] = int((frames != plain).flatten(1).any(1).nonzero()[0])
        assert shown[restart] > 12
        assert len(frames) == 90
    assert shown[True] < shown[False]
    frames = steer.steered(engine, path, 0, random.Random(0), 30, **options).frames
    assert torch.equal(frames, plain[:30]) or len(frames) == 30


@pytest.mark.slow
def test_guidance_changes_with_the_frames_it_is_told_of(engines) -> None:
    """From the first frame on it is the run that begins so; later frames alone leave the earlier as they were."""
    engine, options = engines("wan"), _options("wan", guidance_scale=3.0)
    stream = engine.stream(DAY, 60, **options)
    stream.set_guidance_scale(6.0)
    steered = frames_of(stream).int()
    other = frames_of(engine.stream(DAY, 60, **{**options, "guidance_scale": 6.0})).int()
    assert (steered - other).abs().max() <= 1  # a table of weights a frame in the place of one number
    assert (steered - frames_of(engine.stream(DAY, 60, **options)).int()).abs().max() > 1
    stream = engine.stream(DAY, 60, **options)
    stream.set_guidance_scale(6.0, at=45)
    assert stream.request.changes == ()
    steered = frames_of(stream).int()
    assert stream.request.changes[0].frame in range(45, 49)
    plain = frames_of(engine.stream(DAY, 60, **options)).int()
    assert (steered[:9] - plain[:9]).abs().max() <= 1
    assert (steered[50:] - plain[50:]).abs().max() > 1


@pytest.mark.slow
def test_any_thread_may_tell_and_each_change_is_taken_up_once(engines, tmp_path: Path) -> None:
    engine, path = engines("wan"), tmp_path / "run.safetensors"
    stream = engine.stream(DAY, 120, **_options("wan"), chunk_frames=1)
    frames = [next(stream).frames]
    threads = [
        threading.Thread(target=lambda n=n: [stream.set_prompt(f"{NIGHT} {n} {i}", 100 + n) for i in range(5)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while not stream.request.changes:
        frames.append(next(stream).frames)
    assert len({change.prompt for change in stream.request.changes}) == 20
    frames += [next(stream).frames for _ in range(4)]
    stream.save(path)
    assert torch.equal(steer.replayed(engine, path), torch.cat(frames))


def test_a_change_is_on_the_disk_before_anybody_sees_it(engines, tmp_path: Path) -> None:
    engine, path = engines("wan"), tmp_path / "run.safetensors"
    stream = engine.stream(DAY, 90, **_options("wan"), chunk_frames=1)
    stream.save_every(1000, path)
    frames = [next(stream).frames for _ in range(9)]
    stream.set_prompt(NIGHT, above=0.0)
    while not stream.request.changes:
        frames.append(next(stream).frames)
    saved = load_session(path)
    assert [change["prompt"] for change in saved.request["changes"]] == [NIGHT]
    assert saved.state.numbers["num_frames_out"] < len(frames) + 1
    frames = torch.cat([*frames, frames_of(stream)])
    resumed = engine.resume(path)
    assert torch.equal(torch.cat([frames[: resumed.num_frames_out], frames_of(resumed)]), frames)


@pytest.mark.slow
def test_a_longer_video_is_told_the_same(engines, tmp_path: Path) -> None:
    """A run that had come to its end is made longer: what it was told after the moment it is made longer from, too."""
    engine, path = engines("wan"), tmp_path / "run.safetensors"
    stream = engine.stream(DAY, 80, **_options("wan"), chunk_frames=1)
    stream.save_every(5, path, keep_extension=True)
    for chunk in stream:
        if chunk.index in (4, 20):
            stream.set_prompt(NIGHT if chunk.index == 4 else DAY, above=0.0)
    longer = frames_of(engine.resume(path, 110))
    start = 110 - len(longer)
    assert start <= 80
    changes = load_session(path).request["changes"]
    assert len(changes) == 2
    request = dataclasses.replace(
        engine.resolve(DAY, 110, **_options("wan")), changes=tuple(map(Change.from_record, changes))
    )
    assert torch.equal(frames_of(engine.run(request))[start:], longer)


def test_what_comes_too_late_is_said_and_dropped(engines) -> None:
    events: list[Event] = []
    stream = engines("wan").stream(DAY, 30, **_options("wan"), on_event=events.append)
    stream.set_prompt(NIGHT, 1000)
    plain = frames_of(engines("wan").stream(DAY, 30, **_options("wan")))
    assert torch.equal(frames_of(stream), plain)
    assert stream.request.changes == ()
    assert ["too late" in event.data["message"] for event in events if event.kind == "warning"] == [True]


def test_what_cannot_be_told_is_one_sentence(engines) -> None:
    stream = engines("wan").stream(DAY, 30, **_options("wan", guidance_scale=1.0))
    for told, words in (
        (lambda: stream.set_prompt(""), "the prompt is empty"),
        (lambda: stream.set_prompt(3), "the prompt is empty or no text"),
        (lambda: stream.set_prompt("a\0b"), "no character of a text"),
        (lambda: stream.set_prompt("x" * 20_000), "has 20000 characters"),
        (lambda: stream.set_prompt(NIGHT, -1), "at must be 'now' or a video frame"),
        (lambda: stream.set_prompt(NIGHT, "soon"), "at must be 'now' or a video frame"),
        (lambda: stream.set_prompt(NIGHT, True), "at must be 'now' or a video frame"),
        (lambda: stream.set_prompt(NIGHT, blend=-1), "blend must be a whole number"),
        (lambda: stream.set_prompt(NIGHT, above=1.5), "above must be a noise level"),
        (lambda: stream.set_prompt(NIGHT, above=float("nan")), "above must be a noise level"),
        (lambda: stream.set_prompt(NIGHT, 5, restart=True), "restart is for a change at 'now'"),
        (lambda: stream.set_guidance_scale(float("inf")), "guidance_scale must be a finite number"),
        (lambda: stream.set_guidance_scale("3"), "guidance_scale must be a finite number"),
        (lambda: stream.set_guidance_scale(3.0), "runs without guidance"),
    ):
        assert words in refusal(told, ConfigError)
    stream.close()
    assert "the stream is closed" in refusal(lambda: stream.set_prompt(NIGHT), MigaError)


def test_a_strangers_changes_are_checked(engines, tmp_path: Path) -> None:
    engine, path = engines("wan"), tmp_path / "run.safetensors"
    stream = engine.stream(DAY, 60, **_options("wan"), chunk_frames=1)
    next(stream)
    stream.set_prompt(NIGHT, above=0.0)
    next(stream)
    while not stream.request.changes:
        next(stream)

    def saved(change: dict[str, Any], num_changes: int = 1) -> Path:
        stream.save(path)

        def rewrite(record: dict[str, Any], tensors: object) -> None:
            record["request"]["changes"][0].update(change)
            record["state"]["run"]["num_changes"] = num_changes

        return rewritten(path, rewrite)

    frames_of(engine.resume(saved({})))
    for change, num_changes in (
        ({"tick": -1}, 1), ({"frame": 2**62}, 1), ({"prompt": None}, 1), ({"prompt": "\0"}, 1), ({"more": 1}, 1),
        ({"blend_frames": 0.5}, 1), ({"restarts": 1}, 1), ({"guidance_scale": 2.0}, 1), ({}, 2), ({}, -1),
        ({"frame": 1000}, 1),
    ):  # fmt: skip
        with pytest.raises(SessionError):
            engine.resume(saved(change, num_changes))
    assert Request.from_record(json.loads(json.dumps(stream.request.to_record()))) == stream.request


def test_a_replay_needs_what_the_video_began_with(engines, tmp_path: Path) -> None:
    engine, path = engines("ti2v"), tmp_path / "run.safetensors"
    stream = engine.stream(DAY, 30, **_options("ti2v"))
    frames = frames_of(stream)
    stream.save(path)
    assert "began with a given image: give that again" in refusal(lambda: engine.replay(path))
    other = small_models.PICTURE.flip(0)
    assert "began with another image" in refusal(lambda: engine.replay(path, image=other), SessionError)
    assert torch.equal(steer.replayed(engine, path, image=small_models.PICTURE), frames)


def test_streams_that_share_the_network_are_steered_each_by_itself(engines, tmp_path: Path) -> None:
    """Alone in its group a stream is told as it is elsewhere; with another beside it, each hears its own."""
    engine, path = engines("wan"), tmp_path / "run.safetensors"

    def told(engine: Engine, words: str) -> torch.Tensor:
        with engine.stream(DAY, 60, **_options("wan")) as stream:
            stream.set_prompt(words, above=0.0)
            frames = frames_of(stream)
            stream.save(path.with_stem(words))
        return frames

    alone = {words: told(engine, words) for words in (NIGHT, "snow and a long road")}
    shared = engine.shared()
    assert torch.equal(told(shared, NIGHT), alone[NIGHT])
    assert torch.equal(steer.replayed(engine, path.with_stem(NIGHT)), alone[NIGHT])
    found: dict[str, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda w=words: found.update({w: told(shared, w)})) for words in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for words, frames in alone.items():
        assert (found[words].int() - frames.int()).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, -1])
def test_texts_are_held_as_long_as_they_are_read_and_no_longer(engines, offset: int) -> None:
    """A prompt a latent frame, and a change a pass: Stage 2 still reads frames that have left it, where windows keep
    their noisier end."""
    engine, options = engines("wan"), _options("wan")
    options["miga"] = dataclasses.replace(options["miga"], commit_offset=offset, past_context=offset < 0)
    prompts = {0: DAY, **{4 * i + 1: f"kite {i}" for i in range(60)}}
    held: list[int] = []

    def on_event(event: Event) -> None:
        if event.kind == "progress":
            stream.set_prompt("the end", 10_000)
            held.append(len(stream._pump.run.denoiser.network._prompts._texts))

    stream = engine.stream(prompts, None, **options, on_event=on_event)
    plain = engine.stream(prompts, None, **options)
    while stream.num_frames_out < 72:
        assert torch.equal(next(stream).frames, next(plain).frames)
    assert held[0] == 62
    assert held[-1] <= 62 - 72 // 4 + 5


# How far a run is, and what it shows before its first frame ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(small_models.MODELS))
@pytest.mark.parametrize("changes", [{}, {"warmup": "clip"}, {"num_frames": 10}, {"method": "fifo"}])
def test_the_first_frame_comes_when_it_was_said(engines, name: str, changes: dict[str, Any]) -> None:
    options = _options(name)
    if "warmup" in changes:
        options["miga"] = dataclasses.replace(options["miga"], **changes)
    elif name == "experts" and "method" in changes:
        return  # refused
    else:
        options |= changes
    options.setdefault("num_frames", 60)
    events: list[Event] = []
    stream = engines(name).stream(DAY, **options, on_event=events.append)
    next(stream)
    told = [event.data for event in events if event.kind == "progress"]
    assert [data["passes"] for data in told] == list(range(len(told)))
    assert {data["passes_to_first_frame"] for data in told} == {len(told) - 1}
    assert told[0]["seconds_to_first_frame"] == (None if told[1:] else 0)
    assert all(data["seconds_to_first_frame"] > 0 for data in told[1:-1])
    assert told[-1]["seconds_to_first_frame"] == 0
    assert {data["frames_per_second"] for data in told} == {None}
    events.clear()
    stream.set_prompt(NIGHT)
    latency = told[-1]["latency_frames"]
    for _ in range(3):
        next(stream, None)
    begins = [event.data["frame"] for event in events if event.kind == "prompt"]
    assert latency is None or begins == [latency + told[-1]["num_frames_out"]]


def test_what_is_read_up_to_the_first_frame_is_what_the_network_reads(engines) -> None:
    request = engines("wan").resolve(DAY, 60, **_options("wan"))
    run = engines("wan").start(request)
    read, forward = [0], run.denoiser._forward_all

    def counted(windows: Any) -> None:
        read[-1] += sum(len(window.slots) for window in windows)
        forward(windows)

    run.denoiser._forward_all = counted
    run.reflection = None
    while run.tick() is None:
        read.append(0)
    assert read == ticks_to_first_frame(run.layout)
    assert run.stage != DONE


def test_a_preview_is_the_frame_to_come_as_it_is_predicted(engines) -> None:
    pictures: list[torch.Tensor | None] = []

    def on_event(event: Event) -> None:
        if event.kind == "progress":
            pictures.append(stream.preview())

    stream = engines("wan").stream(DAY, 30, **_options("wan"), on_event=on_event)
    plain = frames_of(engines("wan").stream(DAY, 30, **_options("wan")))
    first = next(stream).frames
    assert pictures[0] is None
    shown = torch.stack([picture for picture in pictures[1:] if picture is not None])
    assert shown.shape == (len(pictures) - 1, 32, 48, 3)
    distances = (shown.float() - first[0].float()).abs().mean((1, 2, 3))
    assert distances[0] > 1.5 * distances[-2]  # the last is of the frame behind those that have come
    assert torch.equal(torch.cat([first, frames_of(stream)]), plain)
