"""Runs whose output was stopped behind a checkpoint, and what is there then."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import HEIGHT, METADATA, WIDTH, moving_square

from miga_engine.errors import OutputError
from miga_engine.video.outputs import open_sink, reopen_sink
from miga_engine.video.reading import read_video
from miga_engine.video.sink import Sink

RATE = 6
NAMES = ("video.mp4", "video.mkv", "video.rgb", "frames/")
FRAMES = moving_square(40)
Position = tuple[dict[str, Any], Any]


def opened(path: str, metadata: dict[str, Any] | None = None, **options: Any) -> Sink:
    return open_sink(path, RATE, WIDTH, HEIGHT, METADATA if metadata is None else metadata, **options)


def reopened(path: str, position: Position, **options: Any) -> Sink:
    record, frames = position
    return reopen_sink(path, json.loads(json.dumps(record)), frames, RATE, WIDTH, HEIGHT, METADATA, **options)


def stopped(path: str, num_frames: int = 20, num_behind: int = 4, **options: Any) -> Position:
    """A run of so many frames, with more of them behind the checkpoint, that was stopped there."""
    with opened(path, **options) as sink:
        if num_frames:
            sink.write(FRAMES[:num_frames])
        position = sink.checkpoint()
        sink.write(FRAMES[num_frames : num_frames + num_behind])
    return position


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder, byte for byte; of links where they lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def pictures(path: str) -> "np.ndarray[Any, Any]":
    if path.endswith("/"):
        return np.stack([read_video(picture)[0] for picture in sorted(Path(path).glob("[0-9]*.png"))])
    if path.endswith(".rgb"):
        return np.fromfile(path, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)
    return read_video(path)


def refused(folder: Path, path: str, position: Position, sentence: str, **options: Any) -> None:
    before = tree(folder)
    with pytest.raises(OutputError, match=sentence), reopened(path, position, **options) as sink:
        sink.write(FRAMES[20:])
    assert tree(folder) == before
