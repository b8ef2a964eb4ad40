"""What a stream gives and tells: chunks of frames, and what happens while they are made."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from miga_engine.errors import printable

_log = logging.getLogger("miga_engine")


@dataclass(frozen=True)
class Chunk:
    """Frames that left the decoder together: `frames` uint8 `[n,H,W,3]` on the engine's device.

    `index` counts chunks from 0, `first_frame` is the video frame number of `frames[0]`.
    """

    index: int
    first_frame: int
    frames: Tensor


@dataclass(frozen=True)
class Event:
    """Something that happened in a run: `kind` is stage, score, search_started, search_finished, window_batch,
    capture, prompt, guidance_scale, chunk, drift, saved, warning or progress. `number` counts a run's events from 1, on
    from a session file's, but for progress: there is one a pass, and it says when, which a repetition says otherwise.
    """

    kind: str
    data: Mapping[str, Any]
    number: int = 0

    def to_json(self) -> str:
        return json.dumps({"event": self.kind, "number": self.number, **self.data})


class Events:
    """Tells what happens in a run to whoever listens. The run may be saved, and gone on with, at each of them."""

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        self.on_event = on_event
        self.count = 0

    def __call__(self, kind: str, **data: Any) -> None:
        if self.on_event is not None:
            self.count += 1
            self.on_event(Event(kind, data, self.count))

    def warn(self, message: str) -> None:
        """Say in the log, and as an event, what is amiss and does not keep the run from going on."""
        message = printable(message)
        _log.warning("%s", message)
        self("warning", message=message)

    def progress(self, data: Mapping[str, Any]) -> None:
        """How far the run is; not counted."""
        if self.on_event is not None:
            self.on_event(Event("progress", data, self.count))
