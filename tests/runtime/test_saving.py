"""Runs that are saved and gone on with, or made longer, at every stage: as if they had never stopped."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import golden_model
import pytest
import torch
from small_run import NUM_FRAMES, OPTIONS, frames_of

from miga_engine.config import fifo_config
from miga_engine.engine import Engine
from miga_engine.errors import SessionError


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunk_frames", [None, 7])
def test_a_resumed_run_gives_the_frames_that_come_next(engine, whole, tmp_path, overlap, chunk_frames) -> None:
    options = {**OPTIONS, "overlap_decode": overlap, "chunk_frames": chunk_frames}
    path = tmp_path / "run.safetensors"
    for num_chunks in (0, 1, 2, 5):
        with engine.stream("a red balloon", NUM_FRAMES, **options) as stream:
            taken = [next(stream).frames for _ in range(num_chunks)]
            stream.save(path)
            assert stream.num_frames_out == sum(map(len, taken))
        resumed = engine.resume(path, overlap_decode=overlap)
        assert resumed.num_frames_out == sum(map(len, taken))
        assert torch.equal(torch.cat([*taken, frames_of(resumed)]), whole)


@pytest.mark.slow
def test_saving_changes_nothing_for_the_run_itself(engine, whole, tmp_path) -> None:
    stream = engine.stream("a red balloon", NUM_FRAMES, **OPTIONS)
    frames = []
    for number, chunk in enumerate(stream):
        frames.append(chunk.frames)
        stream.save(tmp_path / f"{number % 2}.safetensors")
    assert torch.equal(torch.cat(frames), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"refine_steps": 2},
        {"stage2_steps": 0},
        {"self_reflection": True, "score_drop": -1.0},
        {"window_order": "sequential"},
        {"window_batch": 3},
        {"guidance_anchor": True},
        {"commit_offset": 2, "refine_steps": 2},
        {"tail_signal": 0.2},
        {"past_context": True, "commit_offset": 2, "guidance_frames": 0, "history_guidance": "all"},
        {"history_guidance": "distant", "commit_offset": -1, "guidance_anchor": True, "score_drop": -1.0},
    ],
    ids=str,
)
def test_every_stage_can_be_gone_on_with(engine, tmp_path, changes) -> None:
    """Saved at each chunk and resumed from each: with searches, refine passes, and neither."""
    options = {**OPTIONS, "miga": dataclasses.replace(golden_model.MIGA, **changes)}
    _check_resumes_everywhere(engine, options, 41, tmp_path)


@pytest.mark.slow
def test_fifo_and_a_stochastic_solver_can_be_gone_on_with(tmp_path) -> None:
    engine = Engine.from_pretrained(golden_model.build_videocrafter2(tmp_path / "model"), "cpu")
    miga = dataclasses.replace(golden_model.MIGA, reference_groups=1, candidates=2, judge_step=2)
    for config in (miga, fifo_config(miga, 5)):
        options = {"height": 8, "width": 16, "num_inference_steps": 6, "miga": config}
        _check_resumes_everywhere(engine, options, 6, tmp_path, every=3)


def _check_resumes_everywhere(
    engine: Engine, options: dict[str, Any], num_frames: int, tmp_path: Path, every: int = 4
) -> None:
    stream = engine.stream("a red balloon", num_frames, **options)
    frames, saved = [], [tmp_path / "start.safetensors"]
    stream.save(saved[0])
    for number, chunk in enumerate(stream):
        frames.append(chunk.frames)
        saved.append(tmp_path / f"{number}.safetensors")
        stream.save(saved[-1])
    for number, path in list(enumerate(saved))[1::every]:
        resumed = frames_of(engine.resume(path))
        assert torch.equal(torch.cat([*frames[:number], resumed]), torch.cat(frames)), number


@pytest.mark.slow
def test_a_run_can_be_cancelled_from_another_thread_saved_and_resumed(engine, whole, tmp_path) -> None:
    is_cancelled = threading.Event()
    stream = engine.stream("a red balloon", NUM_FRAMES, is_cancelled=is_cancelled.is_set, **OPTIONS)
    frames = [next(stream).frames]
    is_cancelled.set()
    frames += [chunk.frames for chunk in stream]
    assert not stream.is_finished
    stream.save(tmp_path / "run.safetensors")
    assert torch.equal(torch.cat([*frames, frames_of(engine.resume(tmp_path / "run.safetensors"))]), whole)


@pytest.mark.slow
def test_an_endless_run_is_resumed_endless(engine, tmp_path) -> None:
    with engine.stream("a red balloon", **OPTIONS) as stream:
        expected = torch.cat([next(stream).frames for _ in range(9)])
    with engine.stream("a red balloon", **OPTIONS) as stream:
        frames = [next(stream).frames for _ in range(4)]
        stream.save(tmp_path / "run.safetensors")
    with engine.resume(tmp_path / "run.safetensors") as resumed:
        frames += [next(resumed).frames for _ in range(5)]
    assert torch.equal(torch.cat(frames), expected)


# Making it longer ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("miga", [golden_model.MIGA, fifo_config(golden_model.MIGA, 5)], ids=["miga", "fifo"])
def test_a_finished_run_made_longer_is_a_longer_run(engine, tmp_path, miga) -> None:
    options = {**OPTIONS, "miga": miga}
    path = tmp_path / "run.safetensors"
    stream = engine.stream("a red balloon", 97, **options)
    stream.save_every(30, path, keep_extension=True)
    short = frames_of(stream)
    longer = frames_of(engine.stream("a red balloon", 121, **options))
    resumed = engine.resume(path, num_frames=121)
    start = resumed.num_frames_out
    assert 0 < start < 97
    assert torch.equal(torch.cat([short[:start], frames_of(resumed)]), longer)
    assert frames_of(engine.resume(path)).numel() == 0  # and as it was asked for, it is complete


@pytest.mark.slow
@pytest.mark.parametrize("num_frames", [57, 60, 65])
def test_any_length_made_longer_is_a_longer_run(engine, tmp_path, num_frames) -> None:
    """A unified pass near the end of a run cuts otherwise than that of a longer one: over half of all lengths differed
    where the state was kept only as the last frames were handed over."""
    path, options = tmp_path / "run.safetensors", {**OPTIONS, "miga": dataclasses.replace(golden_model.MIGA, stride=4)}
    stream = engine.stream("a red balloon", num_frames, **options)
    stream.save_every(None, path, keep_extension=True)
    short = frames_of(stream)
    for longer in (num_frames + 1, num_frames + 40):
        resumed = engine.resume(path, num_frames=longer)
        whole = torch.cat([short[: resumed.num_frames_out], frames_of(resumed)])
        assert torch.equal(whole, frames_of(engine.stream("a red balloon", longer, **options))), longer


@pytest.mark.slow
@pytest.mark.parametrize(("num_frames", "longer"), [(57, 93)])
def test_the_embedded_model_made_longer(tmp_path, num_frames, longer) -> None:
    engine, size = Engine.from_pretrained("tiny", "cpu"), {"height": 32, "width": 48}
    size |= {"num_inference_steps": 12, "miga": dataclasses.replace(engine.preset.miga, stage2_steps=3, judge_step=4)}
    stream = engine.stream("a red balloon over snowy hills at dawn", num_frames, **size)
    stream.save_every(None, tmp_path / "run.safetensors", keep_extension=True)
    short = frames_of(stream)
    resumed = engine.resume(tmp_path / "run.safetensors", num_frames=longer)
    whole = torch.cat([short[: resumed.num_frames_out], frames_of(resumed)])
    assert torch.equal(whole, frames_of(engine.stream("a red balloon over snowy hills at dawn", longer, **size)))


@pytest.mark.slow
def test_a_run_saved_near_its_end_says_that_it_cannot_be_made_longer(engine, tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    stream = engine.stream("a red balloon", 21, **OPTIONS)
    frames_of(stream)
    stream.save(path)
    with pytest.raises(SessionError, match="can be finished, but not be made longer"):
        engine.resume(path, num_frames=41)
    with pytest.raises(SessionError, match="can be finished, but not"):
        engine.resume(path, num_frames=9)


@pytest.mark.slow
def test_a_run_saved_early_can_be_given_another_length(engine, whole, tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    with engine.stream("a red balloon", 201, **OPTIONS) as stream:
        frames = [next(stream).frames for _ in range(2)]
        stream.save(path)
    resumed = torch.cat([*frames, frames_of(engine.resume(path, num_frames=NUM_FRAMES))])
    assert torch.equal(resumed, whole)
    with pytest.raises(SessionError, match=r"frames already|past the end"):
        engine.resume(path, num_frames=2)


def test_a_closed_stream_is_not_saved(engine, tmp_path) -> None:
    stream = engine.stream("a red balloon", NUM_FRAMES, **OPTIONS)
    stream.close()
    assert list(stream) == []
    with pytest.raises(SessionError, match="the stream is closed"):
        stream.save(tmp_path / "run.safetensors")


@pytest.mark.slow
def test_an_endless_run_ends_where_it_still_can_and_says_where_it_cannot(engine, tmp_path) -> None:
    """What has been made beyond the frames that are out decides: of a length that is too short it says that."""
    path = tmp_path / "run.safetensors"
    with engine.stream("a red balloon", None, **OPTIONS) as stream:
        frames = torch.cat([next(stream).frames for _ in range(12)])
        stream.save(path)
    refused = []
    for num_frames in range(len(frames), len(frames) + 80):
        try:
            resumed = engine.resume(path, num_frames=num_frames)
            break
        except SessionError as error:
            refused.append(str(error))
    said = f"{path} cannot be gone on with: the saved run has gone past the end that is asked for now: "
    assert set(refused) == {f"{said}give a larger --num-frames"}
    assert len(refused) > 20
    whole = frames_of(engine.stream("a red balloon", num_frames, **OPTIONS))
    assert torch.equal(torch.cat([frames, frames_of(resumed)]), whole)
