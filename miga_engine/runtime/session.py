"""The session file: everything a run needs to go on, in one safetensors file, written atomically.

The tensors' names begin with `state/` or `extension/`; the metadata hold the format's version, the record (JSON)
and a SHA-256 of record and tensors. A file that is replaced stays beside it as `name.previous.safetensors`; it is
read where the newer one is damaged. Nothing else is ever replaced.

A session file may be a stranger's. Reading it checks the types of all that it holds, and `run_state` the values, before
anything is built from it; where the run may write is not for the file to say (docs/files.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from miga_engine.config import PARTS
from miga_engine.device import is_out_of_memory
from miga_engine.errors import ConfigError, MigaError, OutputError, SessionError
from miga_engine.files import beside, hold, is_beside, open_own, path_written_whole
from miga_engine.prompts import MAX_CHANGES, MAX_PROMPTS
from miga_engine.runtime.drift import NUM_LEVELS

VERSION = 3
SUFFIX = ".safetensors"

_FORMAT = "miga_engine session"
_MOST_HEADER = 100_000_000  # bytes, as safetensors has it


@dataclass(frozen=True)
class State:
    """A moment of a run: JSON-able numbers, and tensors on the CPU."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def has_parted(self) -> bool:
        """Whether the end of the run had begun to shape it."""
        return bool(self.numbers["run"]["has_parted"])


@dataclass(frozen=True)
class Session:
    """What a session file holds.

    `request` and `model` say what was asked for and what computed it; `extension` is the last moment from which
    the run could still be made longer, where `state` is past it. `warning` says what was amiss with the file.
    """

    request: dict[str, Any]
    model: dict[str, Any]
    state: State
    extension: State | None = None
    warning: str | None = None


def previous_path(path: Path) -> Path:
    """Where the file is kept that `path` replaced."""
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}.previous{SUFFIX}")


def check_session_path(path: str | os.PathLike[str]) -> Path:
    """The path, if a session file can be written there that replaces nothing but others; OutputError if not."""
    target = Path(path)
    if target.suffix != SUFFIX or target.is_dir():
        raise OutputError(f"cannot write {target}: name a session file something{SUFFIX}")
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {target}: the folder {target.parent} does not exist")
    for known in (target, previous_path(target)):
        if os.path.lexists(known) and not _may_be_replaced(known):
            raise OutputError(f"cannot write {target}: {known} is there and is no session file; choose another name")
    return target


def _may_be_replaced(path: Path) -> bool:
    """A session file, one of which the newer one was found damaged, or an empty file, as `mkstemp` makes them."""
    if path.is_symlink() or not path.is_file():
        return False
    return path.stat().st_size == 0 or is_session(path) or is_session(previous_path(path))


def save_session(path: str | os.PathLike[str], session: Session) -> None:
    """Write the file: beside the old one, to the disk, then into its place. OutputError leaves the old one there."""
    target = check_session_path(path)
    states = {"state": session.state, "extension": session.extension}
    tensors = {
        f"{part}/{name}": tensor.contiguous()
        for part, state in states.items()
        if state is not None
        for name, tensor in state.tensors.items()
    }
    record = json.dumps(
        {
            "request": session.request,
            "model": session.model,
            **{part: None if state is None else state.numbers for part, state in states.items()},
        }
    )
    metadata = {"format": _FORMAT, "version": str(VERSION), "record": record, "sha256": _checksum(record, tensors)}
    try:
        # In a folder, for safetensors has a nameless file of its own beside the one it writes, which would stay where a
        # process is killed.
        with path_written_whole(target) as partial:
            save_file(tensors, partial, metadata)
            with (partial.parent / "mode").open("x") as file:  # safetensors' own is for nobody else to read
                partial.chmod(os.fstat(file.fileno()).st_mode & 0o777)
            _flush_to_disk(partial)
            if is_session(target):  # a damaged one is not to take the place of one that is not
                _keep_previous(target)
        _flush_to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot write the session file {target}: {reason}") from error


def load_session(path: str | os.PathLike[str]) -> Session:
    """Read and check a session file; SessionError with one sentence where it cannot be used.

    A damaged file is passed over for the one before it, which `Session.warning` says.
    """
    target = Path(path)
    try:
        return _read(target)
    except SessionError as error:
        if not os.path.exists(target) or not os.path.exists(previous_path(target)):
            raise
        session = _read(previous_path(target))
        return dataclasses.replace(session, warning=f"{error}; going on from {previous_path(target)}")


def remove_session(path: str | os.PathLike[str]) -> None:
    """Delete the file and what it replaced; nothing but session files."""
    target = Path(path)
    for known in (target, previous_path(target)):
        if os.path.lexists(known) and _may_be_replaced(known):
            known.unlink(missing_ok=True)
    _remove_leftovers(target)


def _remove_leftovers(target: Path) -> None:
    """Delete what a killed process left of a session file that it was writing."""
    for entry in os.scandir(target.parent):
        if entry.name.startswith(".") and is_beside(entry.name[1:], target):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """The session file for this process alone; SessionError where another one is at it.

    The lock lies beside it, goes with the process however that ends, and is deleted. Where the file system has no
    locks, nothing is locked. What a killed process left of a file that it was writing is deleted.
    """
    name = Path(path).with_name(f".{Path(path).name}.lock")
    with contextlib.ExitStack() as stack:
        while True:
            try:
                lock = stack.enter_context(open_own(name, "a"))
            except OSError:  # a folder that is read-only, which is for the session file itself to say
                break
            if hold(lock) is False:
                raise SessionError(
                    f"another process is making the video of {path}: wait until it has ended, or stop it"
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(name, follow_symlinks=False)):
                    stack.callback(name.unlink, missing_ok=True)
                    break
            lock.close()  # it was deleted by the one that had it before
        _remove_leftovers(Path(path))
        yield


def is_session(path: str | os.PathLike[str]) -> bool:
    """Whether the file says that it is a session file."""
    try:
        with open_own(path, follows_links=True) as file:
            return _metadata(file).get("format") == _FORMAT
    except (OSError, RuntimeError, ValueError):
        return False


def fingerprint(module: torch.nn.Module) -> str:
    """A short name of a network's weights, from sixteen numbers of each tensor: other weights, another name."""
    digest = hashlib.blake2b(digest_size=8)
    samples = []
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // 16)][:16].double())
    digest.update(torch.cat(samples).cpu().numpy().tobytes() if samples else type(module).__name__.encode())
    return digest.hexdigest()


def _read(path: Path) -> Session:
    if os.path.exists(path) and not os.path.isfile(path):
        raise SessionError(f"{path} is not a regular file: give the session file itself")
    try:
        with open_own(path, follows_links=True) as file:
            metadata = _metadata(file)
            file.seek(0)
            content = file.readall()  # and not mapped: a file that is cut meanwhile would end the process
        if metadata.get("format") != _FORMAT:
            raise SessionError(f"{path} is not a session file: give the file that `miga generate` names when it stops")
        if metadata.get("version") != str(VERSION):
            version = reprlib.repr(metadata.get("version"))
            raise SessionError(
                f"{path} has version {version} of the session format, and this is version {VERSION}: "
                "resume it with the miga_engine that wrote it"
            )
        tensors = load(content)
        del content
        record_text = metadata["record"]
        if metadata["sha256"] != _checksum(record_text, tensors):
            raise SessionError(f"{path} is damaged, its checksum does not fit: resume from another copy")
        record = json.loads(record_text)
        _check_types(record)
        states = {
            part: None if record[part] is None else State(dict(record[part]), _part_of(tensors, part))
            for part in ("state", "extension")
        }
        state = states["state"]
        assert state is not None
        return Session(dict(record["request"]), dict(record["model"]), state, states["extension"])
    except FileNotFoundError as error:
        raise SessionError(
            f"there is no session file at {path}: look for something{SUFFIX} beside the video"
        ) from error
    except SessionError:
        raise
    except (OSError, SafetensorError, RuntimeError, MemoryError, LookupError, TypeError, ValueError) as error:
        raise SessionError(f"{path} is not a session file that can be read: resume from another copy") from error


def _metadata(file: IO[bytes]) -> dict[str, Any]:
    """Of the header of a safetensors file: its length in eight bytes, then JSON. ValueError where it is none."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= _MOST_HEADER:
        raise ValueError("no header of safetensors")
    header = json.loads(file.read(length))
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}


@contextlib.contextmanager
def taking_apart(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever turns out to be wrong with a session's content is one SessionError that names the file."""
    try:
        yield
    except ConfigError as error:
        raise SessionError(f"{path} asks for what cannot be: {error}") from error
    except SessionError as error:
        if os.fspath(path) in str(error):
            raise
        raise SessionError(f"{path} cannot be gone on with: {error}") from error
    except (MigaError, MemoryError):
        raise
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise SessionError(f"{path} does not hold a run that can be gone on with: resume from another copy") from error


_MOST_CHARACTERS = 4096
_MOST_NUMBER = 2**53
_MOST_ENTRIES = MAX_PROMPTS + MAX_CHANGES
_MOST_LORAS = 100
_MODEL_TEXTS = ("name", "preset", "dtype", "vae_dtype", "attention", "transformer", "VAE", "device", "torch",
                "miga_engine")  # fmt: skip
_RUN_NUMBERS = ("head", "tail", "first", "num_passes", "num_ticks", "num_changes", "emitted", "num_searches",
                "num_forwards", "parts_done", "window_batch", "share_windows")  # fmt: skip


def _check_types(record: dict[str, Any]) -> None:
    """ValueError or KeyError unless everything that is read of a record is there and of its type."""
    request, model = record["request"], record["model"]
    _require(isinstance(request, dict) and isinstance(model, dict))
    for name in ("prompt", "miga"):
        _require(isinstance(request[name], dict))
    _require(all(isinstance(text, str) and len(frame) < 20 for frame, text in request["prompt"].items()))
    for name in _MODEL_TEXTS:
        _require(_is_name(model[name]))
    _require(isinstance(model.get("CPU", ""), str) and isinstance(model["compile"], bool))
    _require(_is_name(model.get("decoder", "vae")) and _is_name(model.get("text encoder", "")))
    files, merged = model.get("files", {}), model.get("lora", [])
    _require(isinstance(files, dict) and set(files) <= set(PARTS) and all(map(_is_name, files.values())))
    hub = model.get("hub", {})
    _require(isinstance(hub, dict) and set(hub) <= {"revision", "cache_dir"} and all(map(_is_name, hub.values())))
    _require(isinstance(merged, list) and len(merged) <= _MOST_LORAS)
    for path, strength, weights in merged:
        _require(_is_name(path) and _is_name(weights) and type(strength) is float and abs(strength) < _MOST_NUMBER)
    _require("attention_choices" in model)
    _check_state_types(record["state"])
    if record["extension"] is not None:
        _check_state_types(record["extension"])


def _check_state_types(numbers: Any) -> None:
    run = numbers["run"]
    for name in _RUN_NUMBERS:
        _require(_is_whole(run[name], -_MOST_NUMBER))
    _require(isinstance(run["stage"], str) and isinstance(run["next"], str) and isinstance(run["has_parted"], bool))
    for name in ("num_frames_out", "num_chunks", "num_events"):
        _require(_is_whole(numbers[name], 0))
    _require(isinstance(numbers["keeps_extension"], bool) and isinstance(numbers["drift"], dict))
    for entry, levels in numbers["drift"].items():
        _require(
            0 <= int(entry) <= _MOST_ENTRIES and len(levels) == 3 and all(len(row) == NUM_LEVELS for row in levels)
        )
        _require(all(type(share) is float and 0 <= share <= 1.001 for row in levels for share in row))
    warned = numbers["drift_warned"]
    _require(isinstance(warned, list) and len(warned) <= _MOST_ENTRIES and all(_is_whole(entry, 0) for entry in warned))
    output = numbers["output"]
    if output is not None:
        _require(_is_whole(output["num_frames"], 0))
        for name, value in output.items():
            _require(value is None or name == "num_frames" or _is_name(value))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_CHARACTERS and "\0" not in value


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST_NUMBER


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("a record of a session")


def _part_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    start = part + "/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _checksum(record: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _keep_previous(target: Path) -> None:
    """Give the file its second name while it keeps the first; on file systems without links, move it."""
    previous = previous_path(target)
    second_name = target.with_name(f".{beside(target).name}")
    try:
        os.link(target, second_name)
    except OSError:
        target.replace(previous)
    else:
        second_name.replace(previous)
        second_name.unlink(missing_ok=True)  # both may be names of one file, after a kill just here


def _flush_to_disk(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
