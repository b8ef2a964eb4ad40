"""What a sink is, and those that need no codec: raw files, pipes, images, functions."""

import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np

from miga_engine.errors import OutputError
from miga_engine.video.paths import check_folder, reason
from miga_engine.video.png import write_png
from miga_engine.video.pyav import require_av

if TYPE_CHECKING:
    import torch

Frames: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"

_DIGITS = re.compile(r"\d+")
_NUMBER_FIELD = re.compile(r"%0(\d)d")


class Sink(ABC):
    """Where frames go. As a context manager it closes at the end and on Ctrl-C, and aborts on any other exception."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.num_frames = 0
        self.is_closed = False
        self._behind: deque[np.ndarray[Any, Any]] = deque()  # frames taken, and not sure to be on the disk
        self._num_taken = 0  # of this sink, or of the one it goes on from

    def write(self, frames: Frames) -> None:
        """Append frames uint8 [n,H,W,3], numpy or torch on any device; OutputError if they cannot be stored."""
        if self.is_closed:
            raise ValueError("the sink is closed")
        array = as_frames(frames)
        if array.shape[1:3] != (self.height, self.width):
            raise ValueError(
                f"frames are {array.shape[2]}×{array.shape[1]}, and the sink was opened for {self.width}×{self.height}"
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
        """Where the output stands, for `reopen_sink`: ({"path", "growing_path", "num_frames"}, frames behind those
        uint8 [n,H,W,3]). Frames before `num_frames` are on the disk for good; path is None where there is no file.
        It may be asked after a failed write too.
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
        return {"path": None, "growing_path": None, "num_frames": self.num_frames}

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


def as_frames(frames: Frames) -> "np.ndarray[Any, Any]":
    """uint8 [n,H,W,3] as a contiguous numpy array on the CPU."""
    array = frames if isinstance(frames, np.ndarray) else frames.detach().cpu().numpy()
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise ValueError(f"frames have shape {array.shape} and dtype {array.dtype}, expected [n, H, W, 3] and uint8")
    return np.ascontiguousarray(array)


class CallbackSink(Sink):
    def __init__(self, function: Callable[["np.ndarray[Any, Any]"], object], width: int, height: int) -> None:
        super().__init__(width, height)
        self._function = function

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        self._function(frames)


class StreamSink(Sink):
    """Raw rgb24 bytes to an open stream, flushed after every write."""

    def __init__(self, stream: IO[bytes], name: str, width: int, height: int) -> None:
        super().__init__(width, height)
        self._stream, self._name = stream, name

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        with reported(self._name):
            self._stream.write(frames.data)
            self._stream.flush()


class FileSink(Sink):
    """One file: created at the first frame, in place if nothing is there, else beside it until closed."""

    _failures: tuple[type[BaseException], ...] = (OSError,)
    """What a failed write raises."""

    def __init__(
        self, path: Path, width: int, height: int, growing_path: Path | None = None, num_frames: int = 0
    ) -> None:
        """With growing_path: go on with that file behind its first num_frames frames."""
        super().__init__(width, height)
        self.path = path
        self.is_resumed = growing_path is not None
        if growing_path is None:
            growing_path = path.with_name(f"{path.stem}.part{path.suffix}") if path.exists() else path
        self.growing_path = growing_path
        self.num_frames = num_frames
        self._replaces = growing_path != path
        self._is_open = False

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        with reported(self.path, self._failures):
            if not self._is_open:
                if not self._replaces and not self.is_resumed and self.path.exists():
                    raise OutputError(f"cannot write {self.path}: another program has created it meanwhile")
                try:
                    self._open()
                    self._is_open = True
                    self._append(frames)
                except BaseException:
                    self._discard()
                    raise
            else:
                self._append(frames)

    def _close(self) -> None:
        if self.is_resumed and not self._is_open and self.num_frames:
            with reported(self.path, self._failures):
                self._open()  # which drops the frames behind the last that counts
                self._is_open = True
        if self._is_open:
            with reported(self.path, self._failures):
                self._finish()
                if self._replaces:
                    self.growing_path.replace(self.path)

    def _abort(self) -> None:
        if self._is_open:
            with suppress(OutputError), reported(self.path, self._failures):
                self._finish()

    def _discard(self) -> None:
        self.is_closed = True
        with suppress(Exception):
            self._finish()
        if not self.is_resumed:
            self.growing_path.unlink(missing_ok=True)

    def _position(self) -> dict[str, Any]:
        return {
            "path": os.path.abspath(self.path),
            "growing_path": os.path.abspath(self.growing_path),
            "num_frames": self._num_stored,
        }

    @property
    def _num_stored(self) -> int:
        return self.num_frames

    def _flush_to_disk(self) -> None:
        if self._is_open:
            flush_file(self.growing_path)

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _append(self, frames: "np.ndarray[Any, Any]") -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class RawFileSink(FileSink):
    """rgb24, frame after frame, no header."""

    _file: IO[bytes]

    def _open(self) -> None:
        self._file = self.growing_path.open("r+b" if self.num_frames else "wb", buffering=0)
        if self.num_frames:
            length = self.num_frames * self.height * self.width * 3
            if self._file.seek(0, os.SEEK_END) < length:
                raise too_short(self.growing_path, self.num_frames)
            self._file.truncate(length)
            self._file.seek(length)

    def _append(self, frames: "np.ndarray[Any, Any]") -> None:
        rest = memoryview(frames.data).cast("B")
        while rest:
            rest = rest[self._file.write(rest) :]

    def _finish(self) -> None:
        self._file.close()


class ImageSequenceSink(Sink):
    """One PNG per frame, numbered from 0; each appears complete."""

    def __init__(self, name: str, width: int, height: int, *, overwrite: bool, num_frames: int = 0) -> None:
        """With num_frames: go on behind that many images."""
        super().__init__(width, height)
        require_av(f"write {name}", OutputError, ", or write .rgb")  # before the first picture is made
        self.num_frames = self._num_flushed = num_frames
        self._is_resumed = num_frames > 0
        pattern = Path(name) / "%06d.png" if name.endswith("/") else Path(name)
        if len(_NUMBER_FIELD.findall(pattern.name)) != 1 or pattern.name.count("%") != 1:
            raise OutputError(
                f"cannot write {name}: one image cannot hold a video; number the frames, as in {pattern.stem}_%06d.png"
            )
        self.folder, self._pattern = pattern.parent, pattern.name
        check_folder(self.folder if self.folder.exists() else self.folder.parent, name)
        if self._old_images() and not overwrite:
            raise OutputError(
                f"cannot write {name}: it holds images already, and --overwrite (overwrite=True) was not given"
            )

    def _old_images(self) -> list[Path]:
        start, digits, end = _NUMBER_FIELD.split(self._pattern)
        numbered = re.compile(re.escape(start) + rf"\d{{{digits},}}" + re.escape(end))
        return [path for path in self.folder.iterdir() if numbered.fullmatch(path.name)] if self.folder.is_dir() else []

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        with reported(self.folder):
            if self.num_frames == 0:
                self.folder.mkdir(exist_ok=True)
                for path in self._old_images():
                    path.unlink()
            for number, image in enumerate(frames, self.num_frames):
                write_png(self.folder / (self._pattern % number), image)

    def _close(self) -> None:
        if self._is_resumed:
            with reported(self.folder):
                for path in self._old_images():
                    if (
                        int(_DIGITS.findall(path.name.removeprefix(self._pattern.partition("%")[0]))[0])
                        >= self.num_frames
                    ):
                        path.unlink()

    def _position(self) -> dict[str, Any]:
        path = os.path.abspath(self.folder / self._pattern)
        return {"path": path, "growing_path": path, "num_frames": self.num_frames}

    def _flush_to_disk(self) -> None:
        for number in range(self._num_flushed, self.num_frames):
            flush_file(self.folder / (self._pattern % number))
        self._num_flushed = self.num_frames


def flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def too_short(path: Path, num_frames: int) -> OutputError:
    return OutputError(
        f"cannot go on with {path}: it holds fewer than the {num_frames} frames it had; name the file they are in"
    )


@contextmanager
def reported(name: str | os.PathLike[str], failures: tuple[type[BaseException], ...] = (OSError,)) -> Iterator[None]:
    """A failed write as one OutputError sentence."""
    try:
        yield
    except OutputError:
        raise
    except BrokenPipeError as error:
        raise OutputError(f"cannot write {name} any further: the program that read it has closed it") from error
    except failures as error:
        raise OutputError(f"cannot write {name}: {reason(error)}") from error
