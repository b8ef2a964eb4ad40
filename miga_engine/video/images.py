"""Numbered pictures: one PNG a frame, each complete when it appears."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from miga_engine.errors import OutputError
from miga_engine.files import flush_file, open_own, write_whole
from miga_engine.video.paths import check_folder, reported
from miga_engine.video.png import encode_png, has_identity
from miga_engine.video.pyav import require_av
from miga_engine.video.sink import Sink, identity, not_own, too_short

_PICTURE_BYTES = 2**30
_NUMBER_FIELD = re.compile(r"%0(\d)d")


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
