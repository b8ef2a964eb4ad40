"""Reading back what the sinks wrote: frames for tests and measurements, metadata for people and resumed runs."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from miga_engine.errors import MigaError
from miga_engine.video.paths import reason
from miga_engine.video.pyav import require_av

FORMATS = {".mp4": "mp4", ".mkv": "matroska", ".png": "png_pipe"}
"""What FFmpeg takes a file for, whatever its content claims: a playlist would make it open other files and hosts."""


def read_video(path: str | os.PathLike[str]) -> "np.ndarray[Any, Any]":
    """All frames of a video file as uint8 [T,H,W,3]."""
    with _opened(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if not frames:
        raise MigaError(f"cannot read {path}: it holds no frames")
    if len({frame.shape for frame in frames}) > 1:
        raise MigaError(f"cannot read {path}: its frames differ in size")
    return np.stack(frames)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `open_sink` was given as metadata."""
    with _opened(path) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}
    try:
        metadata = json.loads(tags["comment"])
    except (KeyError, ValueError, RecursionError) as error:
        raise MigaError(f"{path} carries no metadata of miga_engine") from error
    if not isinstance(metadata, dict):
        raise MigaError(f"{path} carries no metadata of miga_engine")
    return metadata


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The file as a container; what fails while it is open is a MigaError."""
    name = os.fspath(path)
    kind = FORMATS.get(os.path.splitext(name)[1].lower())
    if kind is None:
        raise MigaError(f"cannot read {path}: a name ending in {', '.join(FORMATS)} is expected")
    if not os.path.isfile(name):
        raise MigaError(f"cannot read {path}: it is not a file")
    av = require_av(f"read {path}")
    try:
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{name}", format=kind, options=options, metadata_errors="replace") as container:
            yield container
    except (OSError, ValueError, IndexError, MemoryError, av.FFmpegError) as error:
        raise MigaError(f"cannot read {path}: {reason(error)}") from error
