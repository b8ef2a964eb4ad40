"""Saving a running stream: what goes into its session file and when, and the moment kept to make it longer from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from miga_engine.request import Request
from miga_engine.runtime.pump import Pump
from miga_engine.runtime.session import Session, State, load_session, save_session


class Output(Protocol):
    """Where the caller writes the frames, as far as a session file must know it."""

    def checkpoint(self) -> tuple[dict[str, Any], Tensor]:
        """(JSON-able position up to which frames are on the disk, the frames behind it uint8 `[n,H,W,3]`)."""


@dataclass
class Autosave:
    """To `path` after every `num_frames` video frames (None: only at the end), last done at frame `saved_at`."""

    path: Path
    num_frames: int | None
    output: Output | None
    keeps_extension: bool
    saved_at: int

    def is_due(self, num_frames_out: int) -> bool:
        return self.num_frames is not None and num_frames_out - self.saved_at >= self.num_frames


class Saving:
    """Session files of one stream. `model` says what computes it, and is asked when it is saved."""

    def __init__(self, model: Callable[[], dict[str, Any]]) -> None:
        self.autosave: Autosave | None = None
        self.extension: Path | None = None
        """The file that holds the last moment from which the run could still be made longer."""
        self._model = model

    def write(
        self,
        path: str | os.PathLike[str],
        pump: Pump,
        request: Request,
        given: Mapping[str, Any],
        output: Output | None,
    ) -> bool:
        """Save the run of a request, and what its stream has `given` so far; whether this process is the one that does.

        Raises SessionError where there is nothing consistent to save, OutputError where it cannot be written.
        """
        if not pump.settle():
            return False
        extension = None
        if pump.run.has_parted and self.extension is not None:
            earlier = load_session(self.extension)
            extension = earlier.extension if earlier.state.has_parted else earlier.state
        model = self._model()
        tensors, run = pump.state()
        position = None
        if output is not None:
            position, tensors["output_frames"] = output.checkpoint()
        keeps_extension = self.autosave is not None and self.autosave.keeps_extension
        state = State({"run": run, **given, "output": position, "keeps_extension": keeps_extension}, tensors)
        save_session(path, Session(request.to_record(), model, state, extension))
        return True
