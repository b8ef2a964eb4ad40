"""What a sink is, and those that need no codec: raw files, pipes, images, functions."""

import hashlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np

from miga_engine.errors import MigaError, OutputError
from miga_engine.files import WholeFile, beside, create, hold, open_own, remove_abandoned, write_whole
from miga_engine.video.paths import check_folder, reason
from miga_engine.video.png import encode_png, has_identity
from miga_engine.video.pyav import require_av

if TYPE_CHECKING:
    import torch

Frames: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"

_MAY_CHANGE = ("num_frames", "model", "miga_engine", "attention_choices")
"""Of a run's metadata: what another length, another place, version or machine makes of the same video."""
_PICTURE_BYTES = 2**30
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
        """Where the output stands, for `reopen_sink`: (position, frames behind it uint8 [n,H,W,3]).

        The position is JSON-able: ``num_frames``, that are on the disk for good, and the ``digest`` of what the file
        holds for them; ``path``, None where there is no file, and ``growing_name``, of the file that is to take its
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
    """Raw rgb24 bytes to an open stream, at once."""

    def __init__(self, stream: IO[bytes], name: str, width: int, height: int) -> None:
        super().__init__(width, height)
        # What a buffer holds after a failed write would be tried again, and fail again, when the interpreter ends.
        self._stream: Any = stream.raw if isinstance(stream, io.BufferedWriter) else stream
        self._name = name

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        with reported(self._name):
            rest = memoryview(frames.data).cast("B")
            while rest:
                rest = rest[self._stream.write(rest) or 0 :]
            self._stream.flush()


class FileSink(Sink):
    """One file: created at the first frame, in place if nothing is there, else beside it until closed."""

    _failures: tuple[type[BaseException], ...] = (OSError,)
    """What a failed write raises."""

    def __init__(self, path: Path, width: int, height: int) -> None:
        super().__init__(width, height)
        self.path = path
        self._replaces = os.path.lexists(path)
        self.growing_path = beside(path) if self._replaces else path
        self._file: WholeFile | None = None
        self._is_open = False
        self._is_resumed = False
        self._is_created = False
        self._is_named = False  # in a position: who reads that must find the file, even an empty one
        self._digest = hashlib.blake2b(digest_size=16)
        """Of what the file holds for the frames that it has."""

    def go_on(self, growing_path: Path, num_frames: int, digest: object) -> None:
        """Go on behind the first frames of a file, whose content must bear out that it is the run's own.

        OutputError leaves it as it is.
        """
        self._is_resumed = True
        self.growing_path, self._replaces = growing_path, growing_path != self.path
        self.num_frames = num_frames
        with reported(growing_path, self._failures, "go on with"):
            if os.path.lexists(growing_path):
                self._file = open_own(growing_path, "r+")
                hold(self._file)
                try:
                    is_own = self._is_own(digest)
                except BaseException:
                    self._file.close()
                    raise
                if not is_own:
                    self._file.close()
                    raise not_own(growing_path)
            elif num_frames:
                raise OutputError(
                    f"cannot go on with {growing_path}: it is gone; name the file with the frames made so far"
                )

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        with reported(self.path, self._failures):
            if not self._is_open:
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
        if self._is_resumed and not self._is_open and self.num_frames:
            with reported(self.path, self._failures):
                self._open()  # which drops the frames behind the last that counts
                self._is_open = True
        if self._is_open:
            with reported(self.path, self._failures):
                self._finish()
                if self._replaces:
                    self.growing_path.replace(self.path)
                    self.growing_path, self._replaces = self.path, False
        elif self._file is not None:
            self._file.close()

    def _abort(self) -> None:
        if self._is_open:
            with suppress(OutputError), reported(self.path, self._failures):
                self._finish()
        elif self._file is not None:
            self._file.close()

    def _discard(self) -> None:
        self.is_closed, self._is_open = True, False
        with suppress(Exception):
            self._finish()
        if self._file is not None:
            self._file.close()
        if self._is_created and not (self._replaces and self._is_named):
            self.growing_path.unlink(missing_ok=True)

    def _create(self) -> None:
        if self._file is None:
            try:
                if self._replaces:
                    remove_abandoned(self.path)
                self._file = create(self.growing_path)
                hold(self._file)
                self._is_created = True
            except FileExistsError as error:
                raise OutputError(f"cannot write {self.path}: another program has created it meanwhile") from error

    def _position(self) -> dict[str, Any]:
        num_frames, digest = self._stored()
        return {
            "path": os.path.abspath(self.path),
            "growing_name": self.growing_path.name if self._replaces else None,
            "num_frames": num_frames,
            "digest": digest.hexdigest(),
        }

    def _stored(self) -> tuple[int, Any]:
        """How many frames are in the file, whatever happens, and their digest."""
        return self.num_frames, self._digest

    def _flush_to_disk(self) -> None:
        with reported(self.path, self._failures):
            if self._replaces and not self.is_closed:
                self._create()
                self._is_named = True
            if self._is_open and not self.is_closed and self._file is not None:
                os.fsync(self._file.fileno())
            elif self._is_open:
                flush_file(self.growing_path)

    @abstractmethod
    def _is_own(self, digest: object) -> bool:
        """Whether `_file`, which was there, begins with num_frames frames of this digest; it is not written to."""

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _append(self, frames: "np.ndarray[Any, Any]") -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class RawFileSink(FileSink):
    """rgb24, frame after frame, no header."""

    _is_compared = False  # what is there already must be what is written

    def _is_own(self, digest: object) -> bool:
        assert self._file is not None
        left = self.num_frames * self.height * self.width * 3
        self._is_compared = left == 0
        while left:
            data = self._file.read(min(left, 2**20))
            if not data:
                raise too_short(self.growing_path, self.num_frames)
            self._digest.update(data)
            left -= len(data)
        return self.num_frames == 0 or self._digest.hexdigest() == digest

    def _open(self) -> None:
        self._create()
        if not self._is_compared and self._file is not None:
            self._file.truncate()  # behind the frames that count

    def _append(self, frames: "np.ndarray[Any, Any]") -> None:
        assert self._file is not None
        data = memoryview(frames.data).cast("B")
        rest = data
        while rest and self._is_compared:
            there = self._file.read(len(rest))
            if there != rest[: len(there)]:
                self._is_compared = False
                raise not_own(self.growing_path)
            rest = rest[len(there) :]
            self._is_compared = bool(there)
        self._file.write(rest)
        self._digest.update(data)

    def _close(self) -> None:
        if self._is_open and self._is_compared and self._file is not None:
            with reported(self.path):
                self._file.truncate()  # all of it was the same, and there was more
        super()._close()

    def _finish(self) -> None:
        if self._file is not None:
            self._file.close()


class ImageSequenceSink(Sink):
    """One PNG per frame, numbered from 0; each appears complete."""

    def __init__(
        self, name: str, width: int, height: int, metadata: Mapping[str, Any] | None = None, *, overwrite: bool
    ) -> None:
        super().__init__(width, height)
        require_av(f"write {name}", OutputError, ", or write .rgb")  # before the first picture is made
        self._metadata = metadata or {}
        self._num_flushed = 0
        self._is_resumed = False
        self._digest = hashlib.blake2b(digest_size=16)
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

    def go_on(self, num_frames: int, digest: object) -> None:
        """Go on behind the first images, whose content must bear out that they are the run's own; else OutputError."""
        self._is_resumed = True
        for number in range(num_frames):
            path = self.folder / (self._pattern % number)
            if not os.path.lexists(path):
                raise too_short(path.parent, num_frames)
            self._digest.update(_picture(path))
        if num_frames and self._digest.hexdigest() != digest:
            raise not_own(self.folder / self._pattern)
        for path in self._old_images().values() if num_frames == 0 else ():  # before any frame is made
            if not self._is_of_the_run(path):
                raise OutputError(
                    f"cannot write {path}: the picture there is not of this run; move it away, or give --overwrite "
                    "(overwrite=True) to replace all that are there"
                )
        self.num_frames = self._num_flushed = num_frames

    def _old_images(self) -> dict[int, Path]:
        start, digits, end = _NUMBER_FIELD.split(self._pattern)
        numbered = re.compile(re.escape(start) + rf"(\d{{{digits},}})" + re.escape(end))
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return {int(match[1]): path for path in found if (match := numbered.fullmatch(path.name))}

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        with reported(self.folder):
            if self.num_frames == 0:
                self.folder.mkdir(exist_ok=True)
                if not self._is_resumed:
                    for path in self._old_images().values():
                        path.unlink()
            digest, name = self._digest.copy(), identity(self._metadata)
            for number, image in enumerate(frames, self.num_frames):
                path, data = self.folder / (self._pattern % number), encode_png(image, name)
                if not (os.path.lexists(path) and self._is_there(path, data)):
                    write_whole(path, data)
                digest.update(data)
            self._digest = digest

    def _is_there(self, path: Path, data: bytes) -> bool:
        """Whether this very picture is there; False for another one of this run, OutputError for one of others."""
        there = _picture(path)
        if there != data and not has_identity(there, identity(self._metadata)):
            raise OutputError(
                f"cannot write {path}: the picture there is not of this run; move it away, or start a new run"
            )
        return there == data

    def _close(self) -> None:
        if self._is_resumed:
            with reported(self.folder):
                for number, path in self._old_images().items():
                    if number >= self.num_frames and self._is_of_the_run(path):
                        path.unlink()

    def _abort(self) -> None:
        return None

    def _is_of_the_run(self, path: Path) -> bool:
        return path.is_file() and not path.is_symlink() and has_identity(_picture(path), identity(self._metadata))

    def _position(self) -> dict[str, Any]:
        path = os.path.abspath(self.folder / self._pattern)
        digest = self._digest.hexdigest()
        return {"path": path, "growing_name": None, "num_frames": self.num_frames, "digest": digest}

    def _flush_to_disk(self) -> None:
        with reported(self.folder):
            for number in range(self._num_flushed, self.num_frames):
                flush_file(self.folder / (self._pattern % number))
        self._num_flushed = self.num_frames


def _picture(path: Path) -> bytes:
    """The bytes of a picture that was there."""
    with reported(path, verb="go on with"), open_own(path) as file:
        return file.read(min(os.fstat(file.fileno()).st_size, _PICTURE_BYTES))


def identity(metadata: Mapping[str, Any]) -> str | None:
    """A short name of what a run was asked for, the same however often it is resumed; None without metadata."""
    if not metadata:
        return None
    record = json.loads(json.dumps(metadata))
    kept = {key: value for key, value in record.items() if key not in _MAY_CHANGE}
    if isinstance(kept.get("miga"), dict):
        kept["miga"] = {key: value for key, value in kept["miga"].items() if key != "window_batch"}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16).hexdigest()


def flush_file(path: Path) -> None:
    with open_own(path) as file:
        os.fsync(file.fileno())


def too_short(path: Path, num_frames: int) -> OutputError:
    return OutputError(
        f"cannot go on with {path}: it holds fewer than the {num_frames} frames it had; name the file they are in"
    )


def not_own(path: Path) -> OutputError:
    return OutputError(
        f"cannot go on with {path}: its content is not what the run wrote; name the file the run wrote, or start a "
        "new run"
    )


@contextmanager
def reported(
    name: str | os.PathLike[str], failures: tuple[type[BaseException], ...] = (OSError,), verb: str = "write"
) -> Iterator[None]:
    """A failed write as one OutputError sentence."""
    try:
        yield
    except MigaError:
        raise
    except BrokenPipeError as error:
        raise OutputError(f"cannot {verb} {name} any further: the program that read it has closed it") from error
    except failures as error:
        raise OutputError(f"cannot {verb} {name}: {reason(error)}") from error
