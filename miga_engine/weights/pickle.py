"""Weights in a file of `torch.save`, of which nothing is executed: code is ruled out twice, each time by itself."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from typing import BinaryIO

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.untrusted import MAX_TABLE_BYTES, WeightsFile, check_key, first_line, not_mapped

PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")

# Where a training left the network among other things, the running average before what was trained.
_TABLES = ("generator_ema", "generator", "model", "state_dict", "model_state_dict", "module")

# All that the pickles of published weights name; torch alone would also let a few bytes ask for any amount of memory.
_PICKLE_NAMES = re.compile(
    r"collections OrderedDict|torch Size|torch\._utils _rebuild_(tensor(_v[23])?|parameter)"
    r"|torch (\w+Storage|b?float\w+|u?int\d+|bool)|torch\.storage (\w+Storage)"
)


class PickleCheckpoint(Checkpoint):
    """The tensors of one file, memory-mapped where the format allows. Raises CheckpointError."""

    def __init__(self, file: WeightsFile) -> None:
        path = file.path
        super().__init__(path)
        try:
            is_archive = zipfile.is_zipfile(file.stream)
            file.stream.seek(0)
            if not is_archive and file.stream.read(2) == b"PK":
                raise CheckpointError(f"{path} is cut short, its end is missing: download it again")
            file.stream.seek(0)
            _check_pickle(file.stream, is_archive)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds more than tensors, which could run code, or is no weights file: "
                "use a safetensors version of it"
            ) from error
        except CheckpointError:
            raise
        except (OSError, MemoryError) as error:
            raise not_mapped(path, error) from error
        except Exception as error:  # an unpickler raises whatever its bytes lead to
            if "mmap" in str(error):
                raise not_mapped(path, error) from error
            raise CheckpointError(f"{path} is cut short or damaged ({first_line(error)}): download it again") from error
        if isinstance(content, dict):
            table = next((name for name in _TABLES if isinstance(content.get(name), dict)), None)
            content = content if table is None else content[table]
            self.metadata = {} if table is None else {"table": table}
        is_named = isinstance(content, dict) and all(isinstance(key, str) for key in content)
        if not is_named or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"{path} is not a table of named tensors: give the model's weights file")
        self._tensors: dict[str, Tensor] = content
        self._file = file
        for key, tensor in content.items():
            check_key(path, key)
            self.shapes[key] = tuple(tensor.shape)
        # Strides of 0 and shared storages let a short file name tensors of any size.
        if sum(tensor.nbytes for tensor in content.values()) > 2 * file.size:
            raise CheckpointError(f"{path} names more numbers than it holds: use a safetensors version of it")

    def read(self, key: str) -> Tensor:
        self._file.check()
        return self._tensors[key]

    def close(self) -> None:
        super().close()
        self._tensors = {}
        self._file.close()


def _check_pickle(file: BinaryIO, is_archive: bool) -> None:
    """Raise UnpicklingError where a pickle names more than tensors are made of, ValueError where it is damaged."""
    if is_archive:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
            if len(pickles) != 1 or any(entry.file_size > entry.compress_size for entry in entries):
                raise ValueError("no archive of torch.save")
            if pickles[0].file_size > MAX_TABLE_BYTES:
                raise ValueError(f"a pickle of {pickles[0].file_size} bytes")
            content = archive.read(pickles[0])
        num_pickles = 1
    else:
        content = file.read(MAX_TABLE_BYTES + 1)
        num_pickles = 4  # magic number, protocol, system, then the tensors
    pickles_in_order = io.BytesIO(content)
    for i in range(num_pickles):
        try:
            for code, argument, _ in pickletools.genops(pickles_in_order):
                is_other = code.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
                if is_other or (code.name == "GLOBAL" and not _PICKLE_NAMES.fullmatch(str(argument))):
                    raise pickle.UnpicklingError(f"{code.name} {argument}")
        except ValueError:
            if len(content) > MAX_TABLE_BYTES:
                raise ValueError(f"a pickle of more than {MAX_TABLE_BYTES >> 20} MiB") from None
            if i == 0:
                raise pickle.UnpicklingError("no pickle") from None
            raise
