"""A sink that is one file, which grows: in place if nothing is there, else beside what it shall replace."""

import hashlib
import os
from abc import abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from miga_engine.errors import OutputError
from miga_engine.files import WholeFile, beside, create, flush_file, hold, open_own, remove_abandoned
from miga_engine.video.paths import reported
from miga_engine.video.sink import Sink, not_own


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
