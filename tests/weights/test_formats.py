"""A new format of weights is one file and one line of the table: a toy one, made here."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.models import load_transformer
from miga_engine.tiny import WEIGHTS_DIR
from miga_engine.weights import files
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.files import Format, open_checkpoint
from miga_engine.weights.untrusted import WeightsFile


class ToyCheckpoint(Checkpoint):
    """A line of JSON with names and shapes, then all the numbers, float32."""

    def __init__(self, file: WeightsFile) -> None:
        super().__init__(file.path)
        self._file = file
        self.shapes = {key: tuple(shape) for key, shape in json.loads(file.stream.readline()).items()}
        self._numbers = torch.from_numpy(np.frombuffer(file.stream.read(), np.float32).copy())

    def read(self, key: str) -> Tensor:
        self._file.check()
        names = list(self.shapes)
        sizes = [int(np.prod(self.shapes[name])) for name in names]
        return self._numbers.split(sizes)[names.index(key)].view(self.shapes[key])

    def close(self) -> None:
        super().close()
        self._file.close()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FORMATS", (*files.FORMATS, Format((".toy",), ToyCheckpoint)))


def test_a_toy_format_loads_the_embedded_transformer_bit_for_bit(toy: None, tmp_path: Path) -> None:
    source = open_checkpoint(WEIGHTS_DIR / "diffusion_pytorch_model.safetensors")
    shutil.copy(WEIGHTS_DIR / "config.json", tmp_path)
    with (tmp_path / "tiny.toy").open("wb") as stream:
        stream.write(json.dumps(source.shapes).encode() + b"\n")
        for key in source.shapes:
            stream.write(source.read(key).float().numpy().tobytes())
    ours = load_transformer(tmp_path / "tiny.toy", dtype=torch.float32).state_dict()
    theirs = load_transformer(WEIGHTS_DIR, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_every_format_is_named_where_a_file_is_of_none(toy: None, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK")
    suffixes = r"\.safetensors, \.sft, \.pth, \.pt, \.ckpt, \.bin, \.gguf, \.toy or \.index"
    with pytest.raises(CheckpointError, match=f"give a {suffixes}"):
        open_checkpoint(tmp_path / "a.npz")
    (tmp_path / "a.toy").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a\.toy is empty: download it again$"):
        open_checkpoint(tmp_path / "a.toy")
