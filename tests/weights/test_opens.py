"""A weights file is opened once for all who look at it, and never in the state that it was in before."""

import os
import shutil
from collections import Counter
from pathlib import Path

import golden_model
import pytest
import torch
from safetensors.torch import load_file, save_file

from miga_engine.cli import main
from miga_engine.models import load_bundle
from miga_engine.weights import files, load
from miga_engine.weights.files import open_checkpoint, opened_once

FEW_STEPS = ["--num-frames", "5", "--num-inference-steps", "9", "--stage2-steps", "2", "--judge-step", "3"]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Files opened by name, and networks filled by device."""
    counted: Counter[str] = Counter()
    opened, filled = files._open, load._filled

    def count_open(path: Path, format: files.Format) -> object:
        counted[path.name] += 1
        return opened(path, format)

    def count_fill(module: torch.nn.Module, checkpoint: object, device: torch.device, *rest: object) -> object:
        counted[device.type] += 1
        return filled(module, checkpoint, device, *rest)

    monkeypatch.setattr(files, "_open", count_open)
    monkeypatch.setattr(load, "_filled", count_fill)
    return counted


@pytest.mark.slow
def test_a_run_of_the_command_opens_each_file_once_and_builds_each_network_once(count, tmp_path: Path) -> None:
    """With its estimate and its checks, of which the first knew nothing of the second."""
    assert main(["generate", "a red kite", "--device", "cpu", *FEW_STEPS, "-q", "-o", str(tmp_path / "a.mp4")]) == 0
    devices = {name: count.pop(name) for name in ("cpu", "meta")}
    assert count == {
        "diffusion_pytorch_model.safetensors": 1,
        "Wan2.1_VAE.safetensors": 1,
        "models_t5_umt5-xxl-enc-bf16.safetensors": 1,
    }
    assert devices["cpu"] == 3


@pytest.mark.parametrize("family", golden_model.FAMILIES)
def test_loading_a_model_opens_no_file_for_each_question(count, tmp_path: Path, family: str) -> None:
    folder = golden_model.FAMILIES[family].build(tmp_path / "model")
    load_bundle(folder, "meta")
    assert count.pop("meta") == 2
    assert set(count.values()) == {1}
    count.clear()
    load_bundle(folder)
    assert count.pop("cpu") == 2
    # Of one file with several networks each is mapped by itself, so that no more of it lies in memory than one needs.
    assert set(count.values()) == {1 if family == "wan" else 2}


def test_what_changed_on_the_disk_is_opened_anew(tmp_path: Path) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    save_file({"x": torch.ones(3)}, other)
    with opened_once():
        first = open_checkpoint(path)
        assert open_checkpoint(path) is first
        with opened_once():
            assert open_checkpoint(path) is first
        stamp = path.stat()
        other.replace(path)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # of the same size and time
        second = open_checkpoint(path)
        assert torch.equal(second.read("x"), torch.ones(3))
        assert torch.equal(first.read("x"), torch.zeros(3))  # as it was when it was opened
        with path.open("r+b") as stream:  # in its place
            stream.seek(-4, os.SEEK_END)
            stream.write(b"\0\0\0\0")
        assert open_checkpoint(path) is not second
        assert open_checkpoint(path).read("x").tolist() == [1.0, 1.0, 0.0]
        open_checkpoint(path).close()
        assert open_checkpoint(path).read("x").tolist() == [1.0, 1.0, 0.0]
    assert open_checkpoint(path) is not open_checkpoint(path)


def test_a_file_that_is_replaced_while_it_is_open_gives_the_old_weights(tmp_path: Path) -> None:
    source = golden_model.GOLDENS / "wan_dit" / "official" / "diffusion_pytorch_model.safetensors"
    path = tmp_path / "weights.safetensors"
    shutil.copy(source, path)
    checkpoint = open_checkpoint(path)
    (tmp_path / "new").write_bytes(b"other")
    (tmp_path / "new").replace(path)
    for key, value in load_file(source).items():
        assert torch.equal(checkpoint.read(key), value)
