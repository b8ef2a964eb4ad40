"""Weight files as named, lazily read tensors, and the one function that puts them into a module.

Reads safetensors, sharded or not, and torch's own format with code execution ruled out. Every failure is a
CheckpointError of one sentence with the file, the key, both shapes where shapes are the trouble, and the remedy.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from miga_engine.errors import CheckpointError

PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")

Module = TypeVar("Module", bound=nn.Module)


class Checkpoint(ABC):
    """Tensors of one component: `shapes` by key without reading data, `read(key)` for one tensor on the CPU."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """The tensor under `key`, possibly still mapped from its file."""

    def key_in_file(self, key: str) -> str:
        """What the file itself calls `key`."""
        return key


class SafetensorsCheckpoint(Checkpoint):
    """One or more safetensors files; the header's sizes are checked against the file's before anything is allocated."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        super().__init__(path)
        self._handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt", device="cpu")
            except SafetensorError as error:
                raise CheckpointError(
                    f"{file} is cut short or not a safetensors file ({error}); download it again."
                ) from error
            for key in handle.keys():  # noqa: SIM118 - the handle is no mapping
                self.shapes[key] = tuple(handle.get_slice(key).get_shape())
                self._handles[key] = handle

    def read(self, key: str) -> Tensor:
        return self._handles[key].get_tensor(key)


class PickleCheckpoint(Checkpoint):
    """A file of torch.save, memory-mapped where the format allows, never executing what it may contain."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        is_archive = zipfile.is_zipfile(path)
        with path.open("rb") as stream:
            is_cut_archive = not is_archive and stream.read(2) == b"PK"
        if is_cut_archive:
            raise CheckpointError(f"{path} is cut short: its end is missing; download it again.")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds more than tensors, which could run code, or is no weights file; "
                "use a safetensors version of it."
            ) from error
        except (RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError(
                f"{path} is cut short or damaged ({_first_line(error)}); download it again."
            ) from error
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        is_named = isinstance(content, dict) and all(isinstance(key, str) for key in content)
        if not is_named or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"{path} is not a table of named tensors; give the model's weights file.")
        self._tensors: dict[str, Tensor] = content
        self.shapes = {key: tuple(tensor.shape) for key, tensor in content.items()}

    def read(self, key: str) -> Tensor:
        return self._tensors[key]


class RenamedCheckpoint(Checkpoint):
    """Another checkpoint under other keys; `rename` gives the new key, or None for an entry to leave out."""

    def __init__(self, source: Checkpoint, rename: Callable[[str], str | None]) -> None:
        super().__init__(source.path)
        self._source = source
        self._names = {new: old for old in source.shapes if (new := rename(old)) is not None}
        self.shapes = {new: source.shapes[old] for new, old in self._names.items()}

    def read(self, key: str) -> Tensor:
        return self._source.read(self._names[key])

    def key_in_file(self, key: str) -> str:
        return self._source.key_in_file(self._names[key])


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a weights file or a `*.index.json`. Raises CheckpointError."""
    if path.name.endswith(".index.json"):
        return SafetensorsCheckpoint(path, _indexed_files(path))
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path, [path])
    if path.suffix in PICKLE_SUFFIXES:
        return PickleCheckpoint(path)
    raise CheckpointError(
        f"{path} is no known weights file; give a .safetensors, .index.json or {', '.join(PICKLE_SUFFIXES)} file."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`. Raises CheckpointError when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({_first_line(error)}); download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again.")
    return content


def stored_dtype(checkpoint: Checkpoint, key: str) -> torch.dtype:
    """Dtype a checkpoint's tensors are in, where networks can run in it."""
    if key not in checkpoint.shapes:
        return torch.float32  # the missing key will be named when the module is filled
    dtype = checkpoint.read(key).dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{checkpoint.path} stores {name}, in which it cannot run; choose a dtype like bfloat16.")
    return dtype


def load_module(
    build: Callable[[], Module],
    checkpoint: Checkpoint,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype,
    keeps_fp32: Callable[[str], bool] = lambda name: False,
) -> Module:
    """Build a module without memory, then give it the checkpoint's tensors one by one, cast on arrival.

    Keys and shapes must agree exactly. The module comes back in evaluation mode, without gradients. For the `meta`
    device no data are read.
    Raises CheckpointError.
    """
    with torch.device("meta"):
        module = build()
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check_keys(checkpoint, expected)
    target = torch.device(device or "cpu")
    state = {}
    for name in expected:
        wanted = torch.float32 if keeps_fp32(name) else dtype
        if target.type == "meta":  # shapes are all that is wanted: touch no data
            state[name] = torch.empty(expected[name], dtype=wanted, device=target)
            continue
        # Copied off the map: the file may later change, and its alignment would decide how kernels round.
        state[name] = checkpoint.read(name).to(device=target, dtype=wanted, copy=True)
    module.load_state_dict(state, strict=True, assign=True)
    return module.to(target).eval().requires_grad_(False)


def _check_keys(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    path, shapes = checkpoint.path, checkpoint.shapes
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{path} lacks {missing[0]} {list(expected[missing[0]])}{_and_more(missing)}; "
            "give the complete weights that belong to its config.json."
        )
    unexpected = [name for name in shapes if name not in expected]
    if unexpected:
        first = unexpected[0]
        raise CheckpointError(
            f"{path} holds {checkpoint.key_in_file(first)} {list(shapes[first])}{_and_more(unexpected)}, "
            "which this model has no place for; give weights of the model that its config.json describes."
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            key = checkpoint.key_in_file(name)
            raise CheckpointError(
                f"{path} holds {key} as {list(shapes[name])} where the model has {list(shape)}; "
                "give weights and config.json of one and the same model."
            )


def _indexed_files(index: Path) -> list[Path]:
    """Files that an index names, each of them beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} names no files in a weight_map; download it again.")
    files = []
    for name in sorted({str(name) for name in weight_map.values()}):
        if name != Path(name).name or "\\" in name:
            raise CheckpointError(
                f"{index} points outside its folder, at {name}; use an index that names files beside it."
            )
        file = index.parent / name
        if not file.is_file():
            raise CheckpointError(f"{index} names {name}, which is not in {index.parent}; download the missing file.")
        files.append(file)
    return files


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
