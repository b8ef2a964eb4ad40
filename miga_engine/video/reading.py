"""The one place that opens media: videos frame by frame within bounds, metadata for people and resumed runs."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import numpy as np

from miga_engine.errors import MigaError
from miga_engine.files import open_own
from miga_engine.video.paths import reason
from miga_engine.video.pyav import require_av

FORMATS = {
    **dict.fromkeys((".mp4", ".m4v", ".mov"), "mp4"),
    **dict.fromkeys((".mkv", ".webm"), "matroska"),
    **dict.fromkeys((".jpg", ".jpeg"), "jpeg_pipe"),
    **{".avi": "avi", ".gif": "gif", ".png": "png_pipe", ".bmp": "bmp_pipe", ".webp": "webp_pipe"},
}
"""What FFmpeg takes a file for, whatever its content claims: a playlist would make it open other files and hosts."""

MAX_PIXELS = 2**25
"""Of a frame: 8192×4096."""
MAX_BYTES = 2**31
"""Of the frames that are held at once; a video of any length can be read frame by frame."""


@dataclass(frozen=True)
class OpenedVideo:
    """A video that is being read: its frames uint8 [H,W,3] as they are decoded, all of one size, and its rate."""

    frames: Iterator["np.ndarray[Any, Any]"]
    fps: Fraction | None


@contextmanager
def opened_video(path: str | os.PathLike[str]) -> Iterator[OpenedVideo]:
    """The frames of a video or picture file, one at a time; MigaError where it cannot be read, then or later."""
    with _opened(path) as container:
        stream = _video_stream(path, container)
        yield OpenedVideo(_frames(path, container, stream), stream.guessed_rate or stream.average_rate)


def read_video(path: str | os.PathLike[str]) -> "np.ndarray[Any, Any]":
    """All frames of a video file as uint8 [T,H,W,3]; MigaError where they take more than `MAX_BYTES`."""
    with _opened(path) as container:
        stream = _video_stream(path, container)
        size = stream.codec_context.width * stream.codec_context.height * 3
        check_bytes(path, size * sum(packet.size > 0 for packet in container.demux(stream)))
    frames: list[np.ndarray[Any, Any]] = []
    with opened_video(path) as video:
        for frame in video.frames:
            frames.append(frame)
            check_bytes(path, frame.nbytes * len(frames))  # a packet may hold more than one
    if not frames:
        raise MigaError(f"cannot read {path}: it holds no frames")
    return np.stack(frames)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `open_sink` was given as metadata."""
    with _opened(path) as container:
        return metadata_of(path, container)


def metadata_of(path: str | os.PathLike[str], container: Any) -> dict[str, Any]:
    tags = {key.lower(): value for key, value in container.metadata.items()}
    try:
        metadata = json.loads(tags["comment"])
    except (KeyError, ValueError, RecursionError) as error:
        raise MigaError(f"{path} carries no metadata of miga_engine") from error
    if not isinstance(metadata, dict):
        raise MigaError(f"{path} carries no metadata of miga_engine")
    return metadata


def check_bytes(path: str | os.PathLike[str], num_bytes: int) -> None:
    """MigaError where frames of so many bytes are not to be held at once."""
    if num_bytes > MAX_BYTES:
        raise MigaError(
            f"cannot read {path}: all its frames take more than {MAX_BYTES >> 30} GiB; give a shorter or smaller video"
        )


@contextmanager
def opened_container(path: str | os.PathLike[str], file: IO[bytes]) -> Iterator[Any]:
    """An open file as a container of the format that the name tells; what fails meanwhile is a MigaError.

    FFmpeg is given the file and not its name, and no protocol with which it could open another.
    """
    av = require_av(f"read {path}")
    options = {"protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
    try:
        with av.open(
            file, format=_format(path), options=options, metadata_errors="replace", buffer_size=1 << 18
        ) as container:
            for stream in container.streams.video:
                if stream.codec_context is None:
                    raise MigaError(f"cannot read {path}: its video is in a format that FFmpeg does not know")
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            yield container
    except av.error.MemoryError:  # FFmpeg's word for a table that is longer than it lets any be: it has asked nobody
        raise MigaError(f"cannot read {path}: it names more than a video can hold; give an undamaged copy") from None
    except (OSError, ValueError, IndexError, MemoryError, av.FFmpegError) as error:
        if isinstance(error, MigaError):
            raise
        raise MigaError(f"cannot read {path}: {reason(error)}") from error


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    _format(path)
    if not os.path.isfile(path):
        raise MigaError(f"cannot read {path}: it is not a file")
    try:
        file = open_own(path, follows_links=True)
    except OSError as error:
        raise MigaError(f"cannot read {path}: {reason(error)}") from error
    with file, opened_container(path, file) as container:
        yield container


def _format(path: str | os.PathLike[str]) -> str:
    kind = FORMATS.get(os.path.splitext(os.fspath(path))[1].lower())
    if kind is None:
        raise MigaError(f"cannot read {path}: a name ending in {', '.join(FORMATS)} is expected")
    return kind


def _video_stream(path: str | os.PathLike[str], container: Any) -> Any:
    if not container.streams.video:
        raise MigaError(f"cannot read {path}: it holds no video")
    stream = container.streams.video[0]
    width, height = stream.codec_context.width, stream.codec_context.height
    if not width * height:  # so does FFmpeg refuse a picture whose size is told by the picture alone
        raise MigaError(f"cannot read {path}: it has no frames, or such of more than {MAX_PIXELS} pixels")
    _check_pixels(path, width, height)
    return stream


def _check_pixels(path: str | os.PathLike[str], width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MigaError(
            f"cannot read {path}: its frames are {width}×{height}, and at most {MAX_PIXELS} pixels are read; "
            "make them smaller"
        )


def _frames(path: str | os.PathLike[str], container: Any, stream: Any) -> Iterator["np.ndarray[Any, Any]"]:
    size = None
    for frame in container.decode(stream):
        _check_pixels(path, frame.width, frame.height)
        size = size or (frame.width, frame.height)
        if size != (frame.width, frame.height):
            raise MigaError(f"cannot read {path}: its frames differ in size")
        yield frame.to_ndarray(format="rgb24")
