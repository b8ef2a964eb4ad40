"""What a session file tells the command that is given it: a few lines, and where its model and its video lie.

It may be a stranger's: nothing is opened or written because the file says so, but only what lies beside it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miga_engine.errors import ConfigError
from miga_engine.runtime.session import Session


def describe_session(session: Session) -> list[tuple[str, str]]:
    """What a session is, in a few lines, for `miga info`."""
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
        *((part.replace("_", " "), file) for part, file in model.get("files", {}).items()),
        *(("LoRA", weighted(file, strength)) for file, strength, _ in model.get("lora", [])),
        ("searches", str(run["num_searches"])),
        ("can be extended", "yes" if session.extension or not session.state.has_parted else "no"),
    ]  # fmt: skip


def weighted(file: str, strength: float) -> str:
    """A file and its strength as `--lora` takes them, of which the same number is read."""
    text = f"{strength:g}"
    return f"{file}:{text if float(text) == strength else repr(strength)}"


def model_of_session(path: str | os.PathLike[str], session: Session) -> str:
    """The model to go on with where the caller names none: the embedded one, or one beside or below the session file.

    What else the file says may be a stranger's: ConfigError, with what to give.
    """
    recorded = str(session.model["name"])
    return recorded if recorded == "tiny" else _beside(path, recorded, "model")


def parts_of_session(path: str | os.PathLike[str], session: Session, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that lay apart from the model and the LoRAs, by their options: those `given`, and where the caller
    names none, those of their names beside or below the session file. ConfigError, with what to give."""
    parts = dict(given)
    for part, recorded in session.model.get("files", {}).items():
        if parts.get(part) is None:
            parts[part] = _beside(path, recorded, part)
    if parts.get("lora") is None and (merged := session.model.get("lora")):
        parts["lora"] = [
            (_beside(path, file, "lora", weighted("", strength)), strength) for file, strength, _ in merged
        ]
    return parts


def _beside(path: str | os.PathLike[str], recorded: str, part: str, behind: str = "") -> str:
    """A recorded path that lies beside or below the session file, or one of its name that does. ConfigError."""
    folder = os.path.realpath(Path(path).absolute().parent)
    if os.path.isabs(recorded) and os.path.commonpath([folder, os.path.realpath(recorded)]) == folder:
        return recorded
    name = os.path.basename(recorded)
    if name and os.path.exists(beside := os.path.join(folder, name)):
        return beside
    word, flag = "LoRA" if part == "lora" else part.replace("_", " "), "--" + part.replace("_", "-")
    raise ConfigError(
        f"the session {path} was made with the {word} at {recorded}, which does not lie beside it: name the {word} "
        f"with {flag} {shlex.quote(recorded + behind)}"
    )


def video_of_session(path: str | os.PathLike[str], session: Session) -> str:
    """The video to go on with where the caller names none: the one of its name beside the session file.

    Where else the file says that it is may be a stranger's: ConfigError, with what to give.
    """
    recorded = (session.state.numbers["output"] or {}).get("path") or ""
    num_parts = 2 if recorded.lower().endswith(".png") else 1  # a sequence lies in a folder of its own
    if not os.path.isabs(recorded) or len(Path(recorded).parts) <= num_parts:
        raise ConfigError(f"the session {path} does not say where its video is: give --output")
    folder = Path(os.path.realpath(Path(path).absolute().parent))
    parts = Path(recorded).parts[-num_parts:]
    beside = folder.joinpath(*parts)
    is_there = (beside.parent if num_parts == 2 else beside).exists()
    if ".." in parts or (os.path.realpath(Path(recorded).parents[num_parts - 1]) != str(folder) and not is_there):
        raise ConfigError(
            f"the session {path} has its video at {recorded}, which does not lie beside it: name the video with "
            f"--output {shlex.quote(recorded)}"
        )
    for known in (beside, beside.parent) if num_parts == 2 else (beside,):
        if known.is_symlink():
            raise ConfigError(f"{known} is a link: name the video of the session {path} with --output")
    return str(beside)
