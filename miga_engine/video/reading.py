"""Reading back what the sinks wrote: frames for tests and measurements, metadata for people and resumed runs."""

import json
import os
from typing import Any

import av
import numpy as np

from miga_engine.errors import MigaError
from miga_engine.video.paths import reason


def read_video(path: str | os.PathLike[str]) -> "np.ndarray[Any, Any]":
    """All frames of a video file as uint8 [T,H,W,3]."""
    try:
        with av.open(os.fspath(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, av.FFmpegError) as error:
        raise MigaError(f"cannot read {path}: {reason(error)}") from error
    if not frames:
        raise MigaError(f"cannot read {path}: it holds no frames")
    return np.stack(frames)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `open_sink` was given as metadata."""
    try:
        with av.open(os.fspath(path)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
    except (OSError, av.FFmpegError) as error:
        raise MigaError(f"cannot read {path}: {reason(error)}") from error
    try:
        metadata = json.loads(tags["comment"])
    except (KeyError, ValueError) as error:
        raise MigaError(f"{path} carries no metadata of miga_engine") from error
    if not isinstance(metadata, dict):
        raise MigaError(f"{path} carries no metadata of miga_engine")
    return metadata
