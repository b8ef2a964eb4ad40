"""What a session asks of the engine that goes on with it, and what it is gone on with."""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from miga_engine.config import ATTENTION_BACKENDS, Request
from miga_engine.errors import SessionError
from miga_engine.options import as_recorded
from miga_engine.runtime.session import Session, State


def differences(
    path: str | os.PathLike[str], saved: Mapping[str, Any], here: Mapping[str, Any], name: str
) -> list[str]:
    """What makes last bits differ from the saved run's; SessionError where more than that would.

    saved, here: `Engine.identity` of the session and of the engine, whose model has this name.
    """
    networks = ("transformer", "VAE")
    for field in (*(option for option in as_recorded(here) if option != "preset"), *networks):
        if saved.get(field) != here[field]:
            what = f"other weights of the {field}" if field in networks else f"{field} {reprlib.repr(saved.get(field))}"
            raise SessionError(
                f"the session {path} was made with {what} ({name!r} has {here[field]!r} here): load the model "
                "as it was, or start a new run"
            )
    return [
        f"the session {path} was made with {field} {saved[field][:100]}, and here it is {here[field]}: frames may "
        "differ in their last bits"
        for field in ("device", "CPU", "torch", "miga_engine")
        if field in saved and field in here and saved[field] != here[field]
    ]


def request_and_state(
    path: str | os.PathLike[str], session: Session, num_frames: int | None, resolve: Callable[[Request], Request]
) -> tuple[Request, State]:
    """What to go on with and from where, for a video of `num_frames`, None for that of the session."""
    asked = resolve(Request.from_record(session.request))  # of the file, before what is asked for now
    request = asked if num_frames is None else resolve(dataclasses.replace(asked, num_frames=num_frames))
    state = session.state
    if state.has_parted and request.num_frames != asked.num_frames:
        if session.extension is None:
            raise SessionError(
                f"the session {path} can be finished, but not be made longer or shorter: its run had come near "
                "its end, and it was not saved to be extended"
            )
        state = session.extension
    out = int(state.numbers["num_frames_out"])
    if request.num_frames is not None and request.num_frames < out:
        raise SessionError(f"the session {path} has {out} frames already: give --num-frames of at least {out}")
    return request, state


def attention_choices(path: str | os.PathLike[str], session: Session) -> dict[str, str]:
    """What "auto" took on the GPU of the saved run."""
    choices = session.model.get("attention_choices", {})
    known = [name for name in ATTENTION_BACKENDS if name != "auto"]
    if not isinstance(choices, dict) or not all(choice in known for choice in choices.values()):
        raise SessionError(f"{path} names attention that there is not: resume from another copy")
    return dict(choices)
