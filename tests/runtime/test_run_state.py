"""What a stranger's session file holds: every value that no run writes is one sentence, before anything is built."""

from __future__ import annotations

import os
from typing import Any

import golden_model
import pytest
import torch
from small_run import OPTIONS, Change, miga, rewritten
from torch import Tensor

from miga_engine.engine import Engine
from miga_engine.errors import DeviceError, MigaError
from miga_engine.runtime import session as session_file

NUM_FRAMES = 33


def _run(**changes: Any) -> Change:
    return lambda record, _: record["state"]["run"].update(changes)


def _state(**changes: Any) -> Change:
    return lambda record, _: record["state"].update(changes)


def _request(**changes: Any) -> Change:
    return lambda record, _: record["request"].update(changes)


def _integers(name: str, value: int) -> Change:
    return lambda _, tensors: tensors[f"state/run/{name}"].fill_(value)


CHANGES: dict[str, Change] = {
    "unknown stage": _run(stage="stage9"),
    "stage of another moment": _run(stage="warmup"),
    "next of another stage": _run(next="push"),
    "a list for a text": _run(stage=["stage1"]),
    "unified counter beyond the queue": _run(unified=[10**6, 10**6, 10**6]),
    "unified counters that rise": _run(unified=[0, 1, 2]),
    "unified counter below zero": _run(unified=[-1, -1, -1]),
    "a text among the counters": _run(unified=["1", 0, 0]),
    "too few counters": _run(unified=[]),
    "window batch of nothing": _run(window_batch=0),
    "window batch beyond memory": _run(window_batch=10**9),
    "windows that ranks share": _run(share_windows=0),
    "head": _run(head=10**15),
    "tail before head": _run(tail=-(10**6)),
    "first": _run(first=-(10**9)),
    "emitted": _run(emitted=10**9),
    "passes": _run(num_passes=-3),
    "forwards": _run(num_forwards=-1),
    "parts that were done": _run(parts_done=2),
    "searches beyond the noise's counter": _run(num_searches=2**40),
    "score": _run(previous_score=float("nan")),
    "a score of text": _run(previous_score="high"),
    "has parted": _run(has_parted=False),
    "true for one": _run(window_batch=True),
    "frames out": _state(num_frames_out=10**9),
    "frames out, below zero": _state(num_frames_out=-5),
    "chunks": _state(num_chunks="many"),
    "events": _state(num_events=-1),
    "drift": _state(drift={"0": [[1.0]]}),
    "drift of no prompt": _state(drift={"7": [[0.5] * 256] * 3}),
    "drift of NaN": _state(drift={"0": [[float("nan")] * 256] * 3}),
    "warned of no prompt": _state(drift_warned=[1]),
    "warned of a text": _state(drift_warned=["0"]),
    "output": _state(output={"path": 3, "num_frames": 0}),
    "step index out of its table": _integers("step_index", 10**6),
    "step index below zero": _integers("step_index", -1),
    "step index of another moment": _integers("step_index", 3),
    "history length": _integers("history_length", 99),
    "prompt row of no prompt": _integers("prompt_row", 10**9),
    "prompt row below zero": _integers("prompt_row", -7),
    "frame number": _integers("frame_number", 2**40),
    "frames in a billion": _request(num_frames="33"),
    "height of another picture": _request(height=4096),
    "steps": _request(num_inference_steps=1000),
    "steps, none": _request(num_inference_steps=0),
    "seed": _request(seed=-1),
    "rate": _request(fps=0),
    "an unknown option": _request(magic=1),
    "a beginning of no kind": _request(condition={"kind": ["image"], "num_frames": 1}),
    "a beginning longer than the queue": _request(condition={"kind": "video", "num_frames": 10**9}),
    "a prompt of no text": _request(prompt={"0": 5}),
    "a timeline without a beginning": _request(prompt={"5": "a kite"}),
    "solver": _request(solver="magic"),
    "zigzag width": lambda record, _: record["request"]["miga"].update(zigzag_width=4),
    "queue of fewer frames": lambda _, tensors: tensors.update({"state/run/sample": torch.zeros(1, 16, 4, 6)}),
    "integers of another kind": lambda _, tensors: tensors.update(
        {"state/run/step_index": tensors["state/run/step_index"].float()}
    ),
    "a tensor too many": lambda _, tensors: tensors.update({"state/more": torch.zeros(1)}),
    "decoder of another picture": lambda _, tensors: tensors.update(
        {name: tensor[:, :, :1].clone() for name, tensor in tensors.items() if name.startswith("state/decoder/")}
    ),
    "decoder that has seen nothing": lambda _, tensors: [
        tensors.pop(name) for name in list(tensors) if name.startswith("state/decoder/")
    ],
    "frames given twice": lambda _, tensors: tensors.update(
        {"state/frames": torch.zeros(4, 32, 48, 3, dtype=torch.uint8)}
    ),
    "model of a list": lambda record, _: record["model"].update(preset=["tiny"]),
    "no model": lambda record, _: record.update(model=None),
}


@pytest.fixture(scope="module")
def saved_bytes(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "run.safetensors"
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS) as stream:
        next(stream)
        next(stream)
        stream.save(path)
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_value_that_no_run_writes_is_one_sentence(engine, tmp_path, saved_bytes, change, capsys) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(saved_bytes)
    rewritten(path, change)
    with pytest.raises(MigaError) as caught:
        engine.resume(path)
    assert str(caught.value).isprintable()
    assert "run.safetensors" in str(caught.value) or isinstance(caught.value, DeviceError)
    assert miga("info", path) in (0, 2)
    assert miga("resume", path, "--model", engine.name, "-q", "-o", tmp_path / "video.rgb") == 2
    assert capsys.readouterr().err.count("\n") <= 2
    assert not (tmp_path / "video.rgb").exists()


def test_a_session_that_asks_for_all_memory_is_refused_before_it_is_allocated(engine) -> None:
    miga = golden_model.MIGA
    with pytest.raises(DeviceError, match=r"the queue of this run alone would need .* GiB of memory"):
        engine.stream("a kite", 9, **{**OPTIONS, "height": 16384, "width": 16384, "miga": miga})


def test_nothing_from_a_file_reaches_the_terminal_raw(engine, tmp_path, saved_bytes, capsys, caplog) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(saved_bytes)
    evil = "\x1b]0;owned\x07\x1b[2J"
    rewritten(path, lambda record, _: (record["model"].update(torch=evil), record["request"].update(solver=evil)))
    assert miga("info", path) == 0
    assert miga("resume", path, "--model", engine.name, "-q", "-o", tmp_path / "video.rgb") == 2
    path.write_bytes(saved_bytes)
    rewritten(path, lambda record, _: record["model"].update(torch=evil))
    engine.resume(path).close()
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err + caplog.text
    assert "\\x1b]0;owned" in caplog.text


def test_a_session_that_is_cut_while_it_is_read_is_no_signal(engine, tmp_path, saved_bytes, monkeypatch) -> None:
    """A file that is mapped ends the process where it is cut meanwhile."""
    path = tmp_path / "run.safetensors"
    path.write_bytes(saved_bytes)
    checksum = session_file._checksum

    def cut(record: str, tensors: dict[str, Tensor]) -> str:
        os.truncate(path, 100)
        return checksum(record, tensors)

    monkeypatch.setattr(session_file, "_checksum", cut)
    assert engine.resume(path).num_frames_out > 0
