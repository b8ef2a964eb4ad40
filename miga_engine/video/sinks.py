"""Sinks take uint8 frames as they are made and write them at once: mp4, lossless mkv, PNG sequence, raw, or a callback.

Nothing is created before the first frame. A new file then grows under its own name and is playable at any moment, also
after a kill: an mp4 is a chain of one-second fragments, a Matroska file one of one-second clusters. An existing file is
refused, or with `overwrite=True` kept until the new one, growing beside it as `name.part.suffix`, is closed.

`Sink.checkpoint` tells how many frames are on the disk and which are not yet; `reopen_sink` goes on from there.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from miga_engine.errors import OutputError
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.paths import check_output
from miga_engine.video.reading import read_metadata
from miga_engine.video.sink import CallbackSink, Frames, ImageSequenceSink, RawFileSink, Sink, StreamSink
from miga_engine.video.video_file import VideoFileSink

__all__ = [
    "CallbackSink",
    "EncoderThread",
    "ImageSequenceSink",
    "RawFileSink",
    "Sink",
    "StreamSink",
    "VideoFileSink",
    "open_sink",
    "read_metadata",
    "reopen_sink",
]

FILE_SUFFIXES = (".mp4", ".mkv", ".rgb")


def open_sink(
    path: str | os.PathLike[str] | Callable[["np.ndarray[Any, Any]"], object],
    fps: float,
    width: int,
    height: int,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Sink:
    """Choose a sink by name and check that it can be written, before any frame is made.

    `.mp4` (H.264), `.mkv` (FFV1, lossless), `folder/` or `name_%06d.png` (PNG sequence), `.rgb` (raw rgb24), `-` (raw
    to standard output), or a function called with each uint8 [n,H,W,3] array. mp4 and mkv carry `metadata`: `prompt` as
    the title and all of it as JSON in the comment, for `read_metadata`.
    """
    if callable(path):
        return CallbackSink(path, width, height)
    name = os.fspath(path)
    if name == "-":
        return StreamSink(sys.stdout.buffer, "standard output", width, height)
    if name.endswith("/") or name.lower().endswith(".png"):
        return ImageSequenceSink(name, width, height, overwrite=overwrite)
    if os.path.isdir(name):
        raise OutputError(f"cannot write {name}: it is a folder; end the name with / to write a PNG sequence into it")
    target = check_output(name, FILE_SUFFIXES, overwrite=overwrite)
    if target.suffix.lower() == ".rgb":
        return RawFileSink(target, width, height)
    if target.suffix.lower() == ".mp4" and (width % 2 or height % 2):
        raise OutputError(
            f"cannot write {name}: an mp4 needs even width and height, not {width}×{height}; .mkv takes any size"
        )
    return VideoFileSink(target, fps, width, height, metadata or {})


def reopen_sink(
    position: Mapping[str, Any],
    frames: Frames,
    fps: float,
    width: int,
    height: int,
    metadata: Mapping[str, Any] | None = None,
) -> Sink:
    """Go on with a file as `Sink.checkpoint` left it, whatever was written to it afterwards.

    OutputError where the file is gone or holds fewer frames than it did; it is as it was then.
    """
    path, growing, num_frames = Path(position["path"]), Path(position["growing_path"]), int(position["num_frames"])
    if growing != path and not growing.exists():
        growing = path  # it was closed after all
    last_file = growing.with_name(growing.name % (num_frames - 1)) if path.suffix.lower() == ".png" else growing
    if num_frames and not last_file.exists():
        raise OutputError(f"cannot go on with {last_file}: it is gone; name the file with the frames made so far")
    sink: Sink
    if path.suffix.lower() == ".rgb":
        sink = RawFileSink(path, width, height, growing, num_frames)
    elif path.suffix.lower() == ".png":
        sink = ImageSequenceSink(str(path), width, height, overwrite=True, num_frames=num_frames)
    else:
        sink = VideoFileSink(path, fps, width, height, metadata or {}, growing, num_frames)
    sink.write(frames)
    return sink
