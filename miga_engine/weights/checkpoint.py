"""Weight files as named, lazily read tensors, and the one function that puts them into a module.

Reads safetensors, sharded or not, and torch's own format with code execution ruled out. Every failure is a
CheckpointError of one sentence with the file, the key, both shapes where shapes are the trouble, and the remedy. Files
are taken to be hostile: what they claim is compared with their size before memory is asked for.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miga_engine.errors import CheckpointError

PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")

MAX_TABLE_BYTES = 8 * 2**20
"""Of a JSON file, a safetensors header or a pickle without its tensors: twenty times those of the published models."""
MAX_KEY_CHARS = 500

# All that the pickles of published weights name; torch alone would also let a few bytes ask for any amount of memory.
_PICKLE_NAMES = re.compile(
    r"collections OrderedDict|torch Size|torch\._utils _rebuild_(tensor(_v[23])?|parameter)"
    r"|torch (\w+Storage|b?float\w+|u?int\d+|bool)|torch\.storage (\w+Storage)"
)

Module = TypeVar("Module", bound=nn.Module)


class _Watched:
    """A mapped file that must keep its length: where it is cut, what lies behind is no memory any more.

    A look before each tensor; a file that is cut during the copy of one still ends the process with a signal, which
    reading instead of mapping would avoid at four fifths of the speed. Weights are to be replaced by renaming new ones
    into their place, which maps outlive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def check(self) -> None:
        """CheckpointError where the file is shorter than it was."""
        if os.fstat(self._file.fileno()).st_size < self._size:
            raise CheckpointError(f"{self.path} was cut while it was read; download it again.")


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
        super().__init__(path)
        self._handles: dict[str, tuple[Any, _Watched]] = {}
        for file in files:
            handle = _open_safetensors(file)
            watched = _Watched(file)
            for key in handle.keys():  # noqa: SIM118 - the handle is no mapping
                _check_key(file, key)
                if key in self.shapes:
                    raise CheckpointError(
                        f"{path} holds {key} in two files, {file.name} being one; keep the files of one set of weights."
                    )
                self.shapes[key] = tuple(handle.get_slice(key).get_shape())
                self._handles[key] = handle, watched

    def read(self, key: str) -> Tensor:
        handle, watched = self._handles[key]
        watched.check()
        try:
            return handle.get_tensor(key)
        except Exception as error:  # the library's own error, and whatever torch makes of an odd dtype or shape
            raise CheckpointError(
                f"{self.path} holds {key} in a form that cannot be read ({first_line(error)}); download it again."
            ) from error


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    refuse_spoilt(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > size - 8:
                raise ValueError(f"a header of {header_bytes} bytes in {size}")
            if header_bytes > MAX_TABLE_BYTES:
                raise ValueError(f"a header of {header_bytes} bytes")
            json.loads(stream.read(header_bytes), object_pairs_hook=_without_duplicates)
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is cut short or not a safetensors file ({first_line(error)}); download it again."
        ) from error
    except (OSError, RuntimeError, MemoryError) as error:
        raise _not_mapped(file, error) from error


class PickleCheckpoint(Checkpoint):
    """A file of torch.save, memory-mapped where the format allows, never executing what it may contain."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            is_archive = zipfile.is_zipfile(path)
            with path.open("rb") as stream:
                is_cut_archive = not is_archive and stream.read(2) == b"PK"
            if is_cut_archive:
                raise CheckpointError(f"{path} is cut short: its end is missing; download it again.")
            _check_pickle(path, is_archive)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds more than tensors, which could run code, or is no weights file; "
                "use a safetensors version of it."
            ) from error
        except CheckpointError:
            raise
        except (OSError, MemoryError) as error:
            raise _not_mapped(path, error) from error
        except Exception as error:  # an unpickler raises whatever its bytes lead to
            if "mmap" in str(error):
                raise _not_mapped(path, error) from error
            raise CheckpointError(
                f"{path} is cut short or damaged ({first_line(error)}); download it again."
            ) from error
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            content = content["state_dict"]
        is_named = isinstance(content, dict) and all(isinstance(key, str) for key in content)
        if not is_named or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"{path} is not a table of named tensors; give the model's weights file.")
        self._tensors: dict[str, Tensor] = content
        self._watched = _Watched(path)
        for key, tensor in content.items():
            _check_key(path, key)
            self.shapes[key] = tuple(tensor.shape)
        # Strides of 0 and shared storages let a short file name tensors of any size.
        if sum(tensor.nbytes for tensor in content.values()) > 2 * path.stat().st_size:
            raise CheckpointError(f"{path} names more numbers than it holds; use a safetensors version of it.")

    def read(self, key: str) -> Tensor:
        self._watched.check()
        return self._tensors[key]


def _check_pickle(path: Path, is_archive: bool) -> None:
    """Raise UnpicklingError where a pickle names more than tensors are made of, ValueError where it is damaged."""
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
            if len(pickles) != 1 or any(entry.file_size > entry.compress_size for entry in entries):
                raise ValueError("no archive of torch.save")
            if pickles[0].file_size > MAX_TABLE_BYTES:
                raise ValueError(f"a pickle of {pickles[0].file_size} bytes")
            content = archive.read(pickles[0])
        num_pickles = 1
    else:
        with path.open("rb") as stream:
            content = stream.read(MAX_TABLE_BYTES + 1)
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
    if not os.path.isfile(path):  # a pipe or device would be read for ever
        raise CheckpointError(f"{path} is not a regular file; give a weights file.")
    is_known = path.name.endswith(".index.json") or path.suffix in (".safetensors", *PICKLE_SUFFIXES)
    if is_known:
        refuse_spoilt(path)
    if path.name.endswith(".index.json"):
        return SafetensorsCheckpoint(path, _indexed_files(path))
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path, [path])
    if path.suffix in PICKLE_SUFFIXES:
        return PickleCheckpoint(path)
    raise CheckpointError(
        f"{path} is no known weights file; give a .safetensors, .index.json or {', '.join(PICKLE_SUFFIXES)} file."
    )


def refuse_spoilt(path: Path) -> None:
    """CheckpointError for what a download that went wrong leaves under the name of the file."""
    try:
        with path.open("rb") as stream:
            start = stream.read(200)
    except OSError:
        return  # named where it is read
    is_empty, start = not start, start.lstrip()
    if is_empty:
        reason = "is empty"
    elif start.startswith(b"version https://git-lfs.github.com/spec/"):
        reason = "is only Git LFS's pointer to the file (git lfs pull)"
    elif start[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        reason = "is a web page, and not the file that it was saved as"
    else:
        return
    raise CheckpointError(f"{path} {reason}; download it again.")


def read_bounded(path: Path, max_bytes: int = MAX_TABLE_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises CheckpointError."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is not a regular file; download it again.")
    try:
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); make it readable.") from error
    if len(content) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes >> 20} MiB, as no such file is; download it again.")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`. Raises CheckpointError when it is not one."""
    if os.path.isfile(path):  # a pipe would be waited for
        refuse_spoilt(path)
    try:
        content = json.loads(read_bounded(path).decode())
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({first_line(error)}); download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again.")
    return content


def count_numbered(keys: Collection[str], pattern: str, holder: object) -> int:
    r"""One more than the largest number that `pattern`, with `(\d+)` in it, captures at the start of a key.

    Raises CheckpointError, blaming the `holder` of the keys, where the numbers go beyond the number of keys.
    """
    found = (match[1] for key in keys if (match := re.match(pattern, key)))
    last = max((int(digits) if len(digits) < 9 else 10**9 for digits in found), default=-1)
    if last >= len(keys):
        raise CheckpointError(f"Layers in {holder} are numbered beyond its {len(keys)} tensors; download it again.")
    return last + 1


def stored_dtype(checkpoint: Checkpoint, key: str) -> torch.dtype:
    """Dtype a checkpoint's tensors are in, where networks can run in it."""
    if key not in checkpoint.shapes:
        return torch.float32  # the missing key will be named when the module is filled
    dtype = checkpoint.read(key).dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{checkpoint.path} stores {name}, in which it cannot run; choose a dtype like bfloat16.")
    return dtype


def check_fit(root: Path, what: str, **sizes: int) -> None:
    """CheckpointError where networks of one folder differ in a size that they must share."""
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} ({name.replace('_', ' ')})" for name, size in sizes.items())
        raise CheckpointError(
            f"The networks in {root} do not fit together, with {what} of {found}; give those of one and the same model."
        )


class _Uninitialised(TorchFunctionMode):
    """`torch.nn.init` does nothing: on the meta device torch would import its compiler to draw numbers for nobody."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


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
    try:
        with torch.device("meta"), _Uninitialised():
            module = build()
    except CheckpointError:
        raise
    except Exception as error:  # sizes that fit no network fail anywhere in its layers
        raise CheckpointError(
            f"{checkpoint.path} does not describe a network ({first_line(error)}); download it again."
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _check_keys(checkpoint, expected)
    target = torch.device(device or "cpu")
    state = {}
    for name in expected:
        wanted = torch.float32 if keeps_fp32(name) else dtype
        if target.type == "meta":  # shapes are all that is wanted: touch no data
            state[name] = torch.empty(expected[name], dtype=wanted, device=target)
            continue
        state[name] = _copied(checkpoint, name, target, wanted)
    module.load_state_dict(state, strict=True, assign=True)
    return module.to(target).eval().requires_grad_(False)


def _copied(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copied off the map: the file may later change, and its alignment would decide how kernels round."""
    tensor = checkpoint.read(name)
    key, stored = checkpoint.key_in_file(name), str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{checkpoint.path} holds {key} as {stored}, from which no weights follow; give float weights."
        )
    try:
        return tensor.to(device=device, dtype=dtype, copy=True)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{checkpoint.path} holds {key} as {stored} {list(tensor.shape)}, which cannot be brought to {device} as "
            f"{str(dtype).removeprefix('torch.')} ({first_line(error)}); free memory or choose a smaller dtype."
        ) from error


def _check_keys(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    path, shapes = checkpoint.path, checkpoint.shapes
    has_config = any((folder / "config.json").is_file() for folder in (path, path.parent))
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{path} lacks {missing[0]} {list(expected[missing[0]])}{_and_more(missing)}; "
            f"give the complete weights {'that belong to its config.json' if has_config else 'of the model'}."
        )
    unexpected = [name for name in shapes if name not in expected]
    if unexpected:
        first = unexpected[0]
        raise CheckpointError(
            f"{path} holds {checkpoint.key_in_file(first)} {list(shapes[first])}{_and_more(unexpected)}, "
            "which this model has no place for; "
            f"give weights of the model {'that its config.json describes' if has_config else 'alone'}."
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            key = checkpoint.key_in_file(name)
            raise CheckpointError(
                f"{path} holds {key} as {list(shapes[name])} where the model has {list(shape)}; "
                f"give weights {'and config.json ' if has_config else ''}of one and the same model."
            )


def _indexed_files(index: Path) -> list[Path]:
    """Files that an index names, each of them beside it. They may be links, as in the caches of hubs."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} names no files in a weight_map; download it again.")
    files = []
    for name in sorted({str(name) for name in weight_map.values()}):
        if name != Path(name).name or "\\" in name:
            raise CheckpointError(
                f"{index} points outside its folder, at {short(name)}; use an index that names files beside it."
            )
        file = index.parent / name
        if not os.path.isfile(file):
            raise CheckpointError(
                f"{index} names {short(name)}, which is not in {index.parent}; download the missing file."
            )
        files.append(file)
    return files


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return table


def _check_key(path: Path, key: str) -> None:
    if len(key) > MAX_KEY_CHARS or not key.isprintable():
        raise CheckpointError(f"{path} holds a tensor called {short(key)}, as in no model; download it again.")


def _not_mapped(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be mapped into memory ({getattr(error, 'strerror', None) or first_line(error)}); "
        "make it readable, free memory, or give the weights in several smaller files."
    )


def short(name: str, max_chars: int = 100) -> str:
    """A name out of a file, fit for a message."""
    name = name if len(name) <= max_chars else name[:max_chars] + "…"
    return name if name.isprintable() else ascii(name)


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def first_line(error: BaseException) -> str:
    return short(str(error).strip().partition("\n")[0], 300) or type(error).__name__
