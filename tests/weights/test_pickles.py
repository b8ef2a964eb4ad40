"""Pickles are data: what would run code, or only asks for memory, is refused with one sentence."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal
from runs_code import RunsCode

from miga_engine.errors import CheckpointError
from miga_engine.models import load_vae
from miga_engine.weights.files import open_checkpoint
from miga_engine.weights.untrusted import MAX_TABLE_BYTES


def test_pickles_that_only_ask_for_memory(tmp_path: Path) -> None:
    """Nothing in them is forbidden to torch: a constructor of so many bytes, a view with strides of 0, packed zeros."""
    path = tmp_path / "Wan2.1_VAE.pth"
    path.write_bytes(b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.")
    assert "holds more than tensors" in refusal(lambda: load_vae(path), CheckpointError)
    torch.save({"a": torch.zeros(1).as_strided((2**40,), (0,))}, path)
    assert "names more numbers than it holds" in refusal(lambda: load_vae(path), CheckpointError)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"]0" * 10_000_000 + b"].")
        archive.writestr("a/version", "3")
    assert "is cut short or damaged (no archive of torch.save)" in refusal(lambda: load_vae(path), CheckpointError)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(MAX_TABLE_BYTES + 1))
    assert f"(a pickle of {MAX_TABLE_BYTES + 1} bytes)" in refusal(lambda: load_vae(path), CheckpointError)


@pytest.mark.parametrize("is_archive", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, is_archive: bool) -> None:
    file, marker = tmp_path / "Wan2.1_VAE.pth", tmp_path / "ran"
    if is_archive:
        torch.save({"weight": RunsCode(str(marker))}, file)
    else:
        file.write_bytes(pickle.dumps(RunsCode(str(marker)), protocol=2))
    with pytest.raises(
        CheckpointError, match=r"VAE\.pth holds more than tensors, which could run code.*: use a safeten"
    ):
        load_vae(file)
    assert not marker.exists()


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_looked_at", [True, False])
def test_a_pickle_runs_no_code_though_nobody_had_looked_at_it(tmp_path: Path, monkeypatch, is_looked_at: bool) -> None:
    """Two defences, each of which holds alone."""
    from miga_engine.weights import pickle

    canary = tmp_path / "canary"
    torch.save({"weight": torch.ones(2), "more": _Payload(canary)}, tmp_path / "model.pth")
    if not is_looked_at:
        monkeypatch.setattr(pickle, "_check_pickle", lambda *_: None)
    with pytest.raises(CheckpointError, match="could run code"):
        open_checkpoint(tmp_path / "model.pth")
    assert not canary.exists()
