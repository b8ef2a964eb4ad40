"""Every output by its suffix, and sinks by name: mp4, lossless mkv, PNG sequence, raw, or a callback.

Nothing is created before the first frame. A new file then grows under its own name and is playable at any moment, also
after a kill: an mp4 is a chain of one-second fragments, a Matroska file one of one-second clusters. An existing file is
refused, or with `overwrite=True` kept until the new one, growing beside it as `name.1f2e3d4c.part.suffix`, is closed.

`Sink.checkpoint` tells how many frames are on the disk and which are not yet; `reopen_sink` goes on from there, with
the file that its caller names, if what is in it is what the checkpoint says.
"""

import os
import stat
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from miga_engine.errors import OutputError, SessionError
from miga_engine.files import is_beside
from miga_engine.video.growing_file import FileSink
from miga_engine.video.images import ImageSequenceSink
from miga_engine.video.paths import check_output
from miga_engine.video.raw import RawFileSink, StreamSink
from miga_engine.video.sink import CallbackSink, FrameArray, Sink
from miga_engine.video.video_file import VideoFileSink


def _raw(path: Path, fps: object, width: int, height: int, metadata: Mapping[str, Any]) -> Sink:
    return RawFileSink(path, width, height)


@dataclass(frozen=True)
class OutputFormat:
    """What a suffix says of an output.

    What it holds; of a video that is one file, who writes it, which sizes it takes, and whether it carries metadata.
    """

    holds: str
    sink: Callable[[Path, object, int, int, Mapping[str, Any]], Sink] | None = None
    needs_even_size: bool = False
    has_metadata: bool = False


OUTPUTS: Mapping[str, OutputFormat] = {
    ".mp4": OutputFormat("video", VideoFileSink, needs_even_size=True, has_metadata=True),
    ".mkv": OutputFormat("video", VideoFileSink, has_metadata=True),
    ".rgb": OutputFormat("video", _raw),
    ".png": OutputFormat("picture"),  # or, numbered, a video
    ".jsonl": OutputFormat("events"),
    ".json": OutputFormat("table"),
    ".csv": OutputFormat("table"),
}
"""Outputs by suffix; weights and session files are not among them."""


def suffixes_of(holds: str) -> tuple[str, ...]:
    """Suffixes of the outputs that hold this, as `check_output` takes them."""
    return tuple(suffix for suffix, output in OUTPUTS.items() if output.holds == holds)


def suffix_of(path: str | os.PathLike[str]) -> str:
    """The suffix in small letters; that of a picture for a folder of them, which ends with /."""
    name = os.fspath(path)
    return ".png" if name.endswith("/") else os.path.splitext(name)[1].lower()


def has_metadata(path: str | os.PathLike[str]) -> bool:
    """Whether `read_metadata` finds in such a file what its sink was given."""
    output = OUTPUTS.get(suffix_of(path))
    return output is not None and output.has_metadata


def is_sequence(path: str | os.PathLike[str]) -> bool:
    """Whether a video under this name is a sequence of pictures, in a folder of its own."""
    return suffix_of(path) in suffixes_of("picture")


def open_sink(
    path: str | os.PathLike[str] | Callable[["np.ndarray[Any, Any]"], object],
    fps: float | str | Fraction,
    width: int,
    height: int,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Sink:
    """Choose a sink by name and check that it can be written, before any frame is made.

    `.mp4` (H.264), `.mkv` (FFV1, lossless), `folder/` or `name_%06d.png` (PNG sequence), `.rgb` (raw rgb24), `-` (raw
    to standard output), or a function called with each uint8 [n,H,W,3] array. fps may be a number or text, as
    "24000/1001". mp4 and mkv carry `metadata`: `prompt` as the title and all of it as JSON in the comment, for
    `read_metadata`; each picture carries a name made of it.
    """
    if callable(path):
        return CallbackSink(path, width, height)
    name = os.fspath(path)
    if name == "-":
        if sys.stdout is None:
            raise OutputError("cannot write standard output: it is closed; give a file, or a program that reads it")
        sys.stdout.flush()
        return StreamSink(sys.stdout.buffer, "standard output", width, height)
    if is_sequence(name):
        return ImageSequenceSink(name, width, height, metadata, overwrite=overwrite)
    if os.path.isdir(name):
        raise OutputError(f"cannot write {name}: it is a folder; end the name with / to write a PNG sequence into it")
    target = check_output(name, suffixes_of("video"), overwrite=overwrite)
    output = OUTPUTS[suffix_of(name)]
    assert output.sink is not None
    if output.needs_even_size and (width % 2 or height % 2):
        raise OutputError(
            f"cannot write {name}: an mp4 needs even width and height, not {width}×{height}; .mkv takes any size"
        )
    return output.sink(target, fps, width, height, metadata or {})


def sink_for(
    path: str | os.PathLike[str] | Callable[["np.ndarray[Any, Any]"], object],
    left: tuple[Mapping[str, Any], FrameArray] | None,
    fps: float | str | Fraction,
    width: int,
    height: int,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Sink:
    """A new file, or one that is gone on with where a run left it: `left` is position and frames, as `reopen_sink`
    takes them."""
    if left is None:
        return open_sink(path, fps, width, height, metadata, overwrite=overwrite)
    return reopen_sink(path, *left, fps, width, height, metadata, overwrite=overwrite)


def reopen_sink(
    path: str | os.PathLike[str] | Callable[["np.ndarray[Any, Any]"], object],
    position: Mapping[str, Any],
    frames: FrameArray,
    fps: float | str | Fraction,
    width: int,
    height: int,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Sink:
    """Go on with the file at `path` as `Sink.checkpoint` left it, whatever the run wrote to it afterwards.

    Where to write is the caller's word alone; the position only says what must be found there. OutputError, with
    everything left as it is, where the file is gone, holds fewer frames than it did, or other content than the run's:
    frames that count are held against the position's digest, a file without any such against the metadata in it or
    against the frames that are written. `overwrite` lets a run without frames that count begin as a new one.
    SessionError for a position that says nothing.
    """
    if frames.shape[0] and tuple(frames.shape[1:]) != (height, width, 3):
        raise SessionError("the session's frames are not of its video's size: resume from another copy")
    recorded, num_frames, digest = (position.get(key) for key in ("path", "num_frames", "digest"))
    if recorded is None or callable(path):
        return _and_write(open_sink(path, fps, width, height, metadata, overwrite=overwrite), frames)
    if not isinstance(recorded, str) or type(num_frames) is not int or num_frames < 0:
        raise SessionError("the session does not say where its video stands: resume from another copy")
    name = os.fspath(path)
    if suffix_of(name) != suffix_of(recorded):
        raise OutputError(
            f"cannot go on with {name}: the run did not write such a file; name the file the run wrote, or start a new "
            "run"
        )
    if is_sequence(name):
        images = ImageSequenceSink(name, width, height, metadata, overwrite=True)
        if num_frames or not overwrite:
            images.go_on(num_frames, digest)
        return _and_write(images, frames)
    target = check_output(name, suffixes_of("video"), overwrite=True)
    growing = _growing(target, position.get("growing_name"))
    sink = open_sink(target, fps, width, height, metadata, overwrite=True)
    if isinstance(sink, FileSink) and (num_frames or growing != target or not overwrite):
        sink.go_on(growing, num_frames, digest)
    return _and_write(sink, frames)


def _growing(path: Path, name: object) -> Path:
    """Where a file grew that is to become `path`: beside it, if the engine made the name and a plain file has it."""
    if is_beside(name, path):
        growing = path.with_name(str(name))
        with suppress(OSError):
            if stat.S_ISREG(os.lstat(growing).st_mode):
                return growing
    return path  # it was closed after all


def _and_write(sink: Sink, frames: FrameArray) -> Sink:
    try:
        sink.write(frames)
    except BaseException:
        sink.abort()
        raise
    return sink
