"""The session file: everything a run needs to go on, in one safetensors file, written atomically.

The tensors' names begin with ``state/`` or ``extension/``; the metadata hold the format's version, the record (JSON)
and a SHA-256 of record and tensors. A file that is replaced stays beside it as ``name.previous.safetensors``; it is
read where the newer one is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import reprlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miga_engine.errors import MigaError, OutputError, SessionError
from miga_engine.runtime.stages import DONE, FLUSH

VERSION = 1
SUFFIX = ".safetensors"

_FORMAT = "miga_engine session"
_log = logging.getLogger("miga_engine")


@dataclass(frozen=True)
class State:
    """A moment of a run: JSON-able numbers, and tensors on the CPU."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def has_parted(self) -> bool:
        """Whether the end of the run had begun to shape it."""
        return self.numbers["run"]["stage"] in (FLUSH, DONE)


@dataclass(frozen=True)
class Session:
    """What a session file holds.

    ``request`` and ``model`` say what was asked for and what computed it; ``extension`` is the last moment from which
    the run could still be made longer, where ``state`` is past it.
    """

    request: dict[str, Any]
    model: dict[str, Any]
    state: State
    extension: State | None = None


def previous_path(path: Path) -> Path:
    """Where the file is kept that ``path`` replaced."""
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}.previous{SUFFIX}")


def check_session_path(path: str | os.PathLike[str]) -> Path:
    """The path, if a session file can be named so; OutputError otherwise."""
    target = Path(path)
    if target.suffix != SUFFIX or target.is_dir():
        raise OutputError(f"cannot write {target}: name a session file something{SUFFIX}")
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {target}: the folder {target.parent} does not exist")
    return target


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
    folder = _scratch_folder(target)
    beside = folder / target.name
    try:
        try:
            folder.mkdir(exist_ok=True)
            save_file(tensors, beside, metadata)
            _flush_to_disk(beside)
            if target.exists():
                _keep_previous(target)
            beside.replace(target)
            _flush_to_disk(target.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot write the session file {target}: {reason}") from error


def load_session(path: str | os.PathLike[str]) -> Session:
    """Read and check a session file; SessionError with one sentence where it cannot be used.

    A damaged file is passed over for the one before it, with a warning in the log.
    """
    target = Path(path)
    try:
        return _read(target)
    except SessionError as error:
        if not os.path.exists(target) or not os.path.exists(previous_path(target)):
            raise
        session = _read(previous_path(target))
        _log.warning("%s; going on from %s", error, previous_path(target))
        return session


def remove_session(path: str | os.PathLike[str]) -> None:
    """Delete the file, what it replaced, and what a killed process left of a newer one."""
    Path(path).unlink(missing_ok=True)
    previous_path(Path(path)).unlink(missing_ok=True)
    shutil.rmtree(_scratch_folder(Path(path)), ignore_errors=True)


def is_session(path: str | os.PathLike[str]) -> bool:
    """Whether the file says that it is a session file."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return False
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (OSError, RuntimeError, SafetensorError):
        return False


def describe_session(session: Session) -> list[tuple[str, str]]:
    """What a session is, in a few lines, for ``miga info``."""
    request, numbers = session.request, session.state.numbers
    run, output = numbers["run"], numbers["output"] or {}
    prompts = " / ".join(text if frame == "0" else f"{frame}: {text}" for frame, text in request["prompt"].items())
    model = session.model
    made, asked, stored = numbers["num_frames_out"], request["num_frames"] or "endless", output.get("num_frames", 0)
    return [
        ("session of", f"{model['name']} ({model['dtype']}, miga_engine {model['miga_engine']})"),
        ("prompt", prompts),
        ("frames", f"{made} of {asked} made, {stored} of them in the file"),
        ("video", f"{output.get('path')}, {request['width']}×{request['height']}, {request['fps']} fps"),
        ("seed", str(request["seed"])),
        ("stage", f"{run['stage']}, latent frames {run['head']} to {run['tail'] - 1} in the queue"),
        ("searches", str(run["num_searches"])),
        ("can be extended", "yes" if session.extension or not session.state.has_parted else "no"),
    ]  # fmt: skip


def fingerprint(module: torch.nn.Module) -> str:
    """A short name of a network's weights, from sixteen numbers of each tensor: other weights, another name."""
    digest = hashlib.blake2b(digest_size=8)
    samples = []
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // 16)][:16].double())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> Session:
    if os.path.exists(path) and not os.path.isfile(path):
        raise SessionError(f"{path} is not a regular file: give the session file itself")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise SessionError(
                    f"{path} is not a session file: give the file that `miga generate` names when it stops"
                )
            if metadata.get("version") != str(VERSION):
                version = reprlib.repr(metadata.get("version"))
                raise SessionError(
                    f"{path} has version {version} of the session format, and this is version {VERSION}: "
                    "resume it with the miga_engine that wrote it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the handle is no mapping
        record_text = metadata["record"]
        if metadata["sha256"] != _checksum(record_text, tensors):
            raise SessionError(f"{path} is damaged, its checksum does not fit: resume from another copy")
        record = json.loads(record_text)
        states = {
            part: None if record[part] is None else State(dict(record[part]), _part_of(tensors, part))
            for part in ("state", "extension")
        }
        state = states["state"]
        if state is None:
            raise KeyError("state")
        return Session(dict(record["request"]), dict(record["model"]), state, states["extension"])
    except FileNotFoundError as error:
        raise SessionError(
            f"there is no session file at {path}: look for something{SUFFIX} beside the video"
        ) from error
    except SessionError:
        raise
    except (OSError, SafetensorError, RuntimeError, MemoryError, KeyError, TypeError, ValueError) as error:
        raise SessionError(f"{path} is not a session file that can be read: resume from another copy") from error


def guarded(path: str | os.PathLike[str], load: Callable[[], None]) -> None:
    """Run `load`, which takes a session's content apart; whatever is wrong in there is one SessionError."""
    try:
        load()
    except MigaError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise SessionError(f"{path} does not hold a run that can be gone on with: resume from another copy") from error


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


def _scratch_folder(target: Path) -> Path:
    """Where the file is written before it takes its place: a folder, for safetensors has a nameless file of its own
    beside the one it writes, which would stay where a process is killed."""
    return target.with_name(f".{target.name}.part")


def _keep_previous(target: Path) -> None:
    """Give the file its second name while it keeps the first; on file systems without links, move it."""
    previous = previous_path(target)
    beside = previous.with_name(f".{previous.name}.part")
    beside.unlink(missing_ok=True)
    try:
        os.link(target, beside)
    except OSError:
        target.replace(previous)
    else:
        beside.replace(previous)


def _flush_to_disk(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
