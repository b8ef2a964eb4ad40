"""Outputs that go on from where a session says: the file of one that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miga_engine.errors import OutputError
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import open_sink, reopen_sink
from miga_engine.video.reading import read_video

METADATA = {"prompt": "a red balloon", "seed": 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["video.mp4", "video.mkv", "video.rgb", "frames/"])
@pytest.mark.parametrize("in_thread", [False, True])
def test_an_output_goes_on_from_its_checkpoint(tmp_path, name, in_thread) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), np.uint8)

    def opened(folder: str) -> Any:
        (tmp_path / folder).mkdir()
        path = f"{tmp_path / folder}/{name}"
        return open_sink(path, 6, 48, 32, METADATA)

    with opened("whole") as sink:
        for i in range(0, 40, 7):
            sink.write(pictures[i : i + 7])
    expected = _bytes_or_frames(tmp_path / "whole" / name)
    for cut in (1, 6, 13, 24, 40):
        sink = EncoderThread(opened(f"part{cut}")) if in_thread else opened(f"part{cut}")
        for i in range(0, cut, 5):
            buffer = pictures[i : min(i + 5, cut)].copy()
            sink.write(buffer)
            if not in_thread:
                buffer[:] = 0  # the caller may use its memory again
        position, behind = sink.checkpoint()
        sink.write(pictures[:9])  # what came after the checkpoint does not count
        sink.abort()
        assert position["num_frames"] + len(behind) == cut
        with reopen_sink(f"{tmp_path / f'part{cut}'}/{name}", position, behind, 6, 48, 32, METADATA) as sink:
            sink.write(pictures[cut:])
        assert np.array_equal(_bytes_or_frames(tmp_path / f"part{cut}" / name), expected), cut


def _bytes_or_frames(path: Path) -> np.ndarray:
    if path.is_dir():
        return np.stack([read_video(image)[0] for image in sorted(path.iterdir())])
    return np.fromfile(path, np.uint8) if path.suffix == ".rgb" else read_video(path)


def test_an_output_that_was_cut_short_is_refused(tmp_path) -> None:
    pictures = np.zeros((40, 32, 48, 3), np.uint8)
    for name in ("video.mkv", "video.rgb"):
        with open_sink(tmp_path / name, 6, 48, 32) as sink:
            sink.write(pictures)
            position, _ = sink.checkpoint()
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 4])
        with pytest.raises(OutputError, match="it holds fewer than the"):
            reopen_sink(tmp_path / name, position, np.zeros((1, 32, 48, 3), np.uint8), 6, 48, 32)
        assert (tmp_path / name).stat().st_size == len(data) // 4


def test_the_same_frames_are_always_the_same_mp4(tmp_path) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (13, 64, 96, 3), np.uint8)
    files = set()
    for number in range(8):
        with open_sink(tmp_path / f"{number}.mp4", 12, 96, 64) as sink:
            sink.write(pictures)
        files.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(files) == 1
