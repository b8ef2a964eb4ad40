"""What a sink is: it takes frames as they are made, says where its output stands, and goes on from there."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from miga_engine.errors import OutputError

if TYPE_CHECKING:
    import torch

FrameArray: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"
"""uint8 [n,H,W,3]."""

_MAY_CHANGE = ("num_frames", "model", "miga_engine", "attention_choices")
"""Of a run's metadata: what another length, another place, version or machine makes of the same video."""


class Sink(ABC):
    """Where frames go. As a context manager it closes at the end and on Ctrl-C, and aborts on any other exception."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.num_frames = 0
        self.is_closed = False
        self._behind: deque[np.ndarray[Any, Any]] = deque()  # frames taken, and not sure to be on the disk
        self._num_taken = 0  # of this sink, or of the one it goes on from

    def write(self, frames: FrameArray) -> None:
        """Append frames uint8 [n,H,W,3], numpy or torch on any device; OutputError if they cannot be stored."""
        if self.is_closed:
            raise ValueError("the sink is closed")
        array = as_frames(frames)
        if array.shape[1:3] != (self.height, self.width):
            raise ValueError(
                f"frames are {array.shape[2]}×{array.shape[1]}: give {self.width}×{self.height}, as the sink was opened"
            )
        if array.shape[0]:
            self._behind.extend(array)
            self._num_taken += array.shape[0]
            try:
                self._write(array)
                self.num_frames += array.shape[0]
                self._settle()
            finally:  # what stays must not be a view of memory that the caller writes into
                for i in range(1, 1 + min(len(array), len(self._behind))):
                    self._behind[-i] = self._behind[-i].copy()

    def checkpoint(self) -> tuple[dict[str, Any], "torch.Tensor"]:
        """Where the output stands, for `reopen_sink`: (position, frames behind it uint8 [n,H,W,3]).

        The position is JSON-able: `num_frames`, that are on the disk for good, and the `digest` of what the file
        holds for them; `path`, None where there is no file, and `growing_name`, of the file that is to take its
        place, beside it. It may be asked after a failed write too; OutputError where the disk does not take the frames.
        """
        import torch

        self._flush_to_disk()
        frames = np.stack(self._behind) if self._behind else np.empty((0, self.height, self.width, 3), np.uint8)
        return self._position(), torch.from_numpy(frames)

    def close(self) -> None:
        """Finish the output with the frames it has; calling it again does nothing."""
        if not self.is_closed:
            self.is_closed = True
            self._close()

    def abort(self) -> None:
        """Give up after a failure: frames already written stay readable, a file that was to be replaced stays."""
        if not self.is_closed:
            self.is_closed = True
            self._abort()

    @abstractmethod
    def _write(self, frames: "np.ndarray[Any, Any]") -> None: ...

    def _settle(self) -> None:
        """Forget the frames that need not be written again, whatever happens."""
        self._behind.clear()

    def _flush_to_disk(self) -> None:
        return None

    def _position(self) -> dict[str, Any]:
        return {"path": None, "growing_name": None, "num_frames": self.num_frames, "digest": None}

    def _close(self) -> None:
        return None

    def _abort(self) -> None:
        self._close()

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt | GeneratorExit):
            self.close()
        else:
            self.abort()


class CallbackSink(Sink):
    def __init__(self, function: Callable[["np.ndarray[Any, Any]"], object], width: int, height: int) -> None:
        super().__init__(width, height)
        self._function = function

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        self._function(frames)


def as_frames(frames: FrameArray) -> "np.ndarray[Any, Any]":
    """uint8 [n,H,W,3] as a contiguous numpy array on the CPU."""
    array = frames if isinstance(frames, np.ndarray) else frames.detach().cpu().numpy()
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise ValueError(f"frames are {array.dtype} {list(array.shape)}: give uint8 [n,H,W,3]")
    return np.ascontiguousarray(array)


def identity(metadata: Mapping[str, Any]) -> str | None:
    """A short name of what a run was asked for, the same however often it is resumed; None without metadata."""
    if not metadata:
        return None
    record = json.loads(json.dumps(metadata))
    kept = {key: value for key, value in record.items() if key not in _MAY_CHANGE}
    if isinstance(kept.get("miga"), dict):
        kept["miga"] = {key: value for key, value in kept["miga"].items() if key != "window_batch"}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16).hexdigest()


def too_short(path: Path, num_frames: int) -> OutputError:
    return OutputError(
        f"cannot go on with {path}: it holds fewer than the {num_frames} frames it had; name the file they are in"
    )


def not_own(path: Path) -> OutputError:
    return OutputError(
        f"cannot go on with {path}: its content is not what the run wrote; name the file the run wrote, or start a "
        "new run"
    )
