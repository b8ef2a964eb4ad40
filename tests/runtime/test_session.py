"""The session file: what is in it, what may be wrong with it, and what is kept where it cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_run import NUM_FRAMES, OPTIONS, frames_of, rewritten

from miga_engine.engine import Engine
from miga_engine.errors import OutputError, SessionError
from miga_engine.runtime import session as session_file
from miga_engine.runtime.session import load_session, previous_path


@pytest.fixture
def saved(engine: Engine, tmp_path: Path) -> Path:
    path = tmp_path / "run.safetensors"
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS) as stream:
        next(stream)
        stream.save(path)
    return path


@pytest.mark.slow
def test_a_damaged_file_is_refused_and_the_one_before_it_is_taken(engine, saved, caplog) -> None:
    data = bytearray(saved.read_bytes())
    data[-100] ^= 1
    saved.write_bytes(data)
    with pytest.raises(SessionError, match="damaged, its checksum does not fit"):
        engine.resume(saved)
    previous_path(saved).write_bytes(b"")
    with pytest.raises(SessionError, match="session file that can be read"):
        engine.resume(saved)
    data[-100] ^= 1
    previous_path(saved).write_bytes(data)
    assert engine.resume(saved).num_frames_out > 0
    assert "going on from" in caplog.text


@pytest.mark.slow
def test_the_file_that_was_replaced_is_kept(engine, tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS) as stream:
        counts = []
        for _ in range(3):
            next(stream)
            stream.save(path)
            counts.append(stream.num_frames_out)
        assert load_session(path).state.numbers["num_frames_out"] == counts[2]
        assert load_session(previous_path(path)).state.numbers["num_frames_out"] == counts[1]
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.previous.safetensors", "run.safetensors"]
        # Killed between its second name and the new file's coming.
        previous_path(path).unlink()
        os.link(path, previous_path(path))
        stream.save(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.previous.safetensors", "run.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("dtype", "bfloat16", "made with dtype 'bfloat16'"),
        ("vae_dtype", "float16", "made with vae_dtype 'float16'"),
        ("attention", "sdpa", "made with attention 'sdpa'"),
        ("transformer", "0" * 16, "other weights of the transformer"),
        ("VAE", "0" * 16, "other weights of the VAE"),
    ],
)
def test_what_has_changed_is_named(engine, saved, field, value, sentence) -> None:
    rewritten(saved, lambda record, _: record["model"].update({field: value}))
    with pytest.raises(SessionError, match=sentence):
        engine.resume(saved)


@pytest.mark.slow
def test_another_machine_or_version_is_a_warning(engine, whole, saved, caplog) -> None:
    rewritten(saved, lambda record, _: record["model"].update(torch="1.0", device="cuda", CPU="AVX9, threads: 64"))
    resumed = engine.resume(saved)
    start = resumed.num_frames_out
    assert torch.equal(frames_of(resumed), whole[start:])
    assert "made with torch 1.0" in caplog.text
    assert "made with device cuda" in caplog.text
    assert "made with CPU AVX9, threads: 64, and here it is " in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda record, _: record.update(request=3),
        lambda record, _: record["request"].pop("seed"),
        lambda record, _: record["request"]["miga"].update(zigzag_width="wide"),
        lambda record, _: record["request"]["miga"].update(unknown=1),
        lambda record, _: record["request"].update(prompt={"x": "a balloon"}),
        lambda record, _: record["state"].pop("run"),
        lambda record, _: record["state"]["run"].update(tail=10**15),
        lambda record, _: record["state"]["run"].update(unified=[1]),
        lambda record, _: record["state"]["run"].update(stage=7, first="a"),
        lambda record, _: record["state"].update(num_frames_out="many"),
        lambda record, _: record.update(state=None),
        lambda record, tensors: tensors.pop("state/run/sample"),
        lambda record, tensors: tensors.update({"state/run/sample": torch.zeros(3)}),
        lambda record, tensors: tensors.update({"state/decoder/conv9": torch.zeros(3)}),
    ],
)
def test_a_file_with_nonsense_in_it_is_one_sentence(engine, saved, change) -> None:
    rewritten(saved, change)
    with pytest.raises((SessionError, ValueError)) as caught:
        frames_of(engine.resume(saved))
    assert type(caught.value).__module__ == "miga_engine.errors"


def test_no_file_and_no_session_file(engine, tmp_path) -> None:
    with pytest.raises(SessionError, match="there is no session file at"):
        engine.resume(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(SessionError, match="is not a session file"):
        engine.resume(tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(SessionError, match="is not a session file that can be read"):
        engine.resume(tmp_path / "text.safetensors")


@pytest.mark.slow
def test_a_session_file_that_cannot_be_written_leaves_the_old_one(engine, saved, monkeypatch) -> None:
    before = saved.read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(session_file, "save_file", full)
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS) as stream:
        with pytest.raises(OutputError, match=r"cannot write the session file .*: No space left on device"):
            stream.save(saved)
        with pytest.raises(OutputError, match=r"name a session file something\.safetensors"):
            stream.save(saved.with_suffix(".pt"))
    assert saved.read_bytes() == before
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]
