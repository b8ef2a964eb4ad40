"""Faults of network, decoder, memory and ranks, and drift: each stops a run with a sentence and loses nothing.

Of drift a run can also only warn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_run import NUM_FRAMES, OPTIONS, frames_of
from torch import Tensor

from miga_engine.engine import Engine
from miga_engine.errors import ConfigError, DeviceError, DriftError, NumericsError, SessionError
from miga_engine.runtime.drift import DriftMeter
from miga_engine.runtime.stream import Event


class _Fault:
    """Makes a bundle's transformer fail, or answer wrongly, from its n-th call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        self._patch, self._network = monkeypatch, engine.bundle.transformer

    def at_call(self, number: int, act: Callable[[Tensor], Tensor]) -> None:
        forward, count = self._network.forward, iter(range(10**6))
        self._patch.setattr(
            self._network,
            "forward",
            lambda *args, **kwargs: (act if next(count) >= number else lambda x: x)(forward(*args, **kwargs)),
        )


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> _Fault:
    return _Fault(monkeypatch, engine)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_the_run_with_frame_level_and_window(engine, whole, tmp_path, fault, value, monkeypatch) -> None:
    def poisoned(output: Tensor) -> Tensor:
        output = output.clone()
        output[0, 0, -1, 0, 0] = value
        return output

    path = tmp_path / "run.safetensors"
    fault.at_call(80, poisoned)
    stream = engine.stream("a red balloon", NUM_FRAMES, **OPTIONS)
    stream.save_every(4, path)
    frames = []
    with pytest.raises(NumericsError, match=r"NaN or infinity for latent frame \d+ at step \d+ .* window \d+ of its"):
        frames.extend(chunk.frames for chunk in stream)
    with pytest.raises(SessionError, match="in the middle of an update and cannot be saved"):
        stream.save(path)
    assert next(stream, None) is None
    monkeypatch.undo()  # the cause is gone: the state from before goes on as if nothing had happened
    resumed = engine.resume(path)
    start = resumed.num_frames_out
    assert torch.equal(torch.cat([torch.cat(frames)[:start], frames_of(resumed)]), whole)


@pytest.mark.slow
def test_the_flag_is_read_once_a_tick(engine, monkeypatch) -> None:
    reads, ticks = [], []
    from miga_engine.runtime.denoise import Denoiser
    from miga_engine.runtime.stages import VideoRun

    check, tick = Denoiser.check_finite, VideoRun.tick
    monkeypatch.setattr(Denoiser, "check_finite", lambda self: (reads.append(1), check(self))[1])
    monkeypatch.setattr(VideoRun, "tick", lambda self: (ticks.append(1), tick(self))[1])
    frames_of(engine.stream("a red balloon", 21, **OPTIONS))
    assert len(reads) == len(ticks) > 10


@pytest.mark.slow
@pytest.mark.parametrize("call", [3, 70, 95])
def test_out_of_memory_in_the_network_loses_nothing(engine, whole, tmp_path, fault, call, monkeypatch) -> None:
    def no_memory(output: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    fault.at_call(call, no_memory)
    stream = engine.stream("a red balloon", NUM_FRAMES, **OPTIONS)
    frames = []
    with pytest.raises(DeviceError, match="out of memory on cpu in the network"):
        frames.extend(chunk.frames for chunk in stream)
    stream.save(tmp_path / "run.safetensors")
    monkeypatch.undo()
    resumed = frames_of(engine.resume(tmp_path / "run.safetensors"))
    assert torch.equal(torch.cat([*frames, resumed]), whole)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
def test_out_of_memory_in_the_decoder_loses_nothing(engine, whole, tmp_path, overlap, monkeypatch) -> None:
    core, count = engine.bundle.vae.decode_core, iter(range(10**6))

    def no_memory(*arguments: Any) -> Tensor:
        if next(count) >= 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return core(*arguments)

    monkeypatch.setattr(engine.bundle.vae, "decode_core", no_memory)
    stream = engine.stream("a red balloon", NUM_FRAMES, overlap_decode=overlap, **OPTIONS)
    frames = []
    with pytest.raises(DeviceError, match="out of memory while decoding"):
        frames.extend(chunk.frames for chunk in stream)
    assert sum(map(len, frames)) == 1 + 6 * 4  # all that was decoded came out first
    stream.save(tmp_path / "run.safetensors")
    monkeypatch.undo()
    resumed = frames_of(engine.resume(tmp_path / "run.safetensors"))
    assert torch.equal(torch.cat([*frames, resumed]), whole)


class _LosesARank:
    """Stands for the process group of a run whose other rank dies at the n-th exchange."""

    rank, count = 0, 1

    def __init__(self, num_exchanges: int) -> None:
        self.num_left = num_exchanges

    def share(self, num_batches: int, rank: int | None = None) -> range:
        return range(num_batches)

    def agree(self, answer: Any) -> Any:
        return answer

    def exchange(self, outputs: Tensor, bounds: list[int]) -> None:
        self.num_left -= 1
        if self.num_left < 0:
            raise DeviceError("rank 0 of 2 lost touch with the others (Connection closed by peer): start the run again")


@pytest.mark.slow
@pytest.mark.parametrize("num_exchanges", [12, 40])
def test_a_lost_rank_leaves_a_state_to_go_on_from(engine, whole, tmp_path, num_exchanges, monkeypatch) -> None:
    monkeypatch.setattr(engine, "ranks", _LosesARank(num_exchanges))
    stream = engine.stream("a red balloon", NUM_FRAMES, **OPTIONS)
    frames = []
    with pytest.raises(DeviceError, match="lost touch with the others"):
        frames.extend(chunk.frames for chunk in stream)
    stream.save(tmp_path / "run.safetensors")
    monkeypatch.undo()
    resumed = frames_of(engine.resume(tmp_path / "run.safetensors"))
    assert torch.equal(torch.cat([*frames, resumed]), whole)


def test_out_of_memory_before_the_first_pass(engine, monkeypatch) -> None:
    def no_memory(*arguments: Any, **named: Any) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("miga_engine.runtime.frame_store.torch.zeros", no_memory)
    with pytest.raises(DeviceError, match="out of memory on cpu before the first pass of a video of 48×32"):
        engine.stream("a red balloon", 9, **OPTIONS)


def test_drift_is_how_far_values_have_moved() -> None:
    torch.manual_seed(0)
    frames = torch.randint(40, 160, (3, 16, 24, 3), dtype=torch.uint8)
    meter = DriftMeter()
    first = meter.measure(frames)
    assert first["drift"] == 0
    assert first["luminance"] == pytest.approx(
        float((frames.double() @ torch.tensor([0.2126, 0.7152, 0.0722]).double()).mean()) / 255
    )
    assert meter.measure(frames + 51)["drift"] == pytest.approx(51 / 255)
    assert meter.measure(frames.flip(1))["drift"] == 0  # where things are does not matter
    grey = frames.double().mean(3, keepdim=True).expand(frames.shape).to(torch.uint8)
    assert meter.measure(grey)["saturation"] == 0
    assert DriftMeter(json.loads(json.dumps(meter.reference))).measure(frames)["drift"] == 0


@pytest.mark.slow
def test_a_run_that_drifts_is_stopped_and_can_be_gone_on_with(engine, whole, tmp_path) -> None:
    events: list[dict[str, Any]] = []
    stream = engine.stream(
        "a red balloon", NUM_FRAMES, on_event=lambda event: events.append(json.loads(event.to_json())), **OPTIONS
    )
    frames_of(stream)
    drifts = [event["drift"] for event in events if event["event"] == "drift"]
    assert len(drifts) == sum(event["event"] == "chunk" for event in events)
    assert drifts[0] == 0
    limit = sorted(drifts)[len(drifts) // 2]
    stopped = engine.stream("a red balloon", NUM_FRAMES, stop_on_drift=limit, **OPTIONS)
    frames = []
    with pytest.raises(DriftError, match=r"have moved by 0\.\d+ from the beginning, more than stop_on_drift"):
        frames.extend(chunk.frames for chunk in stopped)
    assert len(frames) == next(i for i, drift in enumerate(drifts) if drift > limit) + 1
    stopped.save(tmp_path / "run.safetensors")
    assert torch.equal(torch.cat([*frames, frames_of(engine.resume(tmp_path / "run.safetensors"))]), whole)


@pytest.mark.slow
def test_a_run_that_drifts_warns_once_and_goes_on(engine, whole, tmp_path, caplog) -> None:
    events: list[dict[str, Any]] = []

    def on_event(event: Event) -> None:
        events.append(json.loads(event.to_json()))

    stream = engine.stream("a red balloon", NUM_FRAMES, warn_on_drift=0, stop_on_drift=1, on_event=on_event, **OPTIONS)
    first = [next(stream).frames for _ in range(3)]
    assert sum(event["event"] == "warning" for event in events) == 1
    told = next(i for i, event in enumerate(events) if event["event"] == "warning")
    assert (events[told - 1]["event"], events[told - 1]["index"]) == ("drift", 1)
    assert re.search(r"moved by 0\.\d+ from the beginning, more than warn_on_drift 0, and", events[told]["message"])
    assert caplog.messages == [events[told]["message"]]
    stream.save(tmp_path / "run.safetensors")
    assert torch.equal(torch.cat([*first, frames_of(stream)]), whole)
    resumed = engine.resume(tmp_path / "run.safetensors", warn_on_drift=0, on_event=on_event)
    assert torch.equal(torch.cat([*first, frames_of(resumed)]), whole)
    assert len(caplog.messages) == 1, "a resumed run does not warn of what it has warned of"


@pytest.mark.slow
def test_a_run_warns_of_drift_once_a_prompt_and_before_it_stops(engine, caplog) -> None:
    stream = engine.stream({0: "a red balloon", 13: "a kite"}, NUM_FRAMES, warn_on_drift=0, **OPTIONS)
    chunks = list(stream)
    starts = [int(re.search(r"of frames (\d+) to", message)[1]) for message in caplog.messages]
    assert starts == [chunks[1].first_frame, next(c.first_frame for c in chunks if c.first_frame > 13)]
    caplog.clear()
    with pytest.raises(DriftError, match="more than stop_on_drift 0: try another seed"):
        list(engine.stream("a red balloon", NUM_FRAMES, warn_on_drift=0, stop_on_drift=0, **OPTIONS))
    assert len(caplog.messages) == 1
    with pytest.raises(ConfigError, match=r"^warn_on_drift must be a finite number of at least 0, got -1$"):
        engine.stream("a red balloon", NUM_FRAMES, warn_on_drift=-1, **OPTIONS)
