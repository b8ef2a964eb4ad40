"""Raw rgb24, frame after frame and without a header: into a file, or into an open stream."""

import io
from typing import IO, Any

import numpy as np

from miga_engine.video.growing_file import FileSink
from miga_engine.video.paths import reported
from miga_engine.video.sink import Sink, not_own, too_short


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
