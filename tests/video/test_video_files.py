"""Video files play at their rate while they grow, after a kill and once they are closed, and carry their metadata."""

import json
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import places
import pytest
from clips import FPS, HEIGHT, METADATA, WIDTH, moving_square, psnr, write_clip

from miga_engine.errors import MigaError, OutputError
from miga_engine.video.outputs import open_sink, reopen_sink
from miga_engine.video.rate import frame_rate, rate_text
from miga_engine.video.reading import read_metadata, read_video


def test_mp4_round_trip(tmp_path: Path) -> None:
    frames = moving_square(61)
    write_clip(tmp_path / "a.mp4", frames)
    read = read_video(tmp_path / "a.mp4")
    assert read.shape == frames.shape
    assert psnr(read, frames) > 30  # what half the chroma resolution costs at the square's edges; order is right
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == FPS
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        keyframes = [float(packet.pts * packet.time_base) for packet in container.demux(stream) if packet.is_keyframe]
        assert len(keyframes) >= 2
        assert max(np.diff(keyframes)) <= 2


def _timing(path: Path) -> tuple[Fraction, Fraction, list[tuple[int, int, int]]]:
    """Average rate, duration in seconds, and pts, dts and duration of each packet in seconds/1000000."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        tick = Fraction(stream.time_base) * 10**6
        packets = [
            (round(packet.pts * tick), round(packet.dts * tick), round(packet.duration * tick))
            for packet in container.demux(stream)
            if packet.size
        ]
        duration = stream.duration * stream.time_base if stream.duration else Fraction(container.duration, 10**6)
        return Fraction(stream.average_rate), Fraction(duration), packets


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("fps", [1, 12, 16, 24, 60, 29.97, "24000/1001", "30000/1001", Fraction(1, 2)])
def test_every_length_lasts_as_long_as_its_frames(tmp_path: Path, suffix: str, fps: Any) -> None:
    """An uninterrupted file, one that was resumed, and one that was made longer: frame i at i/fps, N/fps seconds."""
    rate = frame_rate(fps)
    slack = 1 if suffix == ".mp4" else 1001  # Matroska counts milliseconds
    pictures, second = moving_square(83, 32, 32), max(1, round(rate))
    for n in sorted({1, 2, 3, second, second + 1, second + 2, 2 * second + 1, 81, 83}):
        if n > len(pictures):
            continue
        whole, resumed = tmp_path / f"{n}{suffix}", tmp_path / f"{n}_resumed{suffix}"
        with open_sink(whole, fps, 32, 32, METADATA) as sink:
            sink.write(pictures[:n])
        cut = max(1, 2 * n // 3)
        with open_sink(resumed, fps, 32, 32, METADATA) as sink:
            sink.write(pictures[:cut])
            position = sink.checkpoint()
        with reopen_sink(resumed, *position, fps, 32, 32, METADATA) as sink:
            sink.write(pictures[cut:n])
        average, duration, packets = timing = _timing(whole)
        assert average == rate, n
        assert abs(duration - n / rate) * 10**6 <= 2 * slack, n
        assert len(packets) == n
        for i, (pts, dts, lasts) in enumerate(packets):
            assert pts == dts, (n, i)
            assert abs(pts - i / rate * 10**6) <= slack, (n, i)
            assert abs(lasts - 10**6 / rate) <= 2 * slack, (n, i)
        assert _timing(resumed) == timing, n
        assert np.array_equal(read_video(resumed), read_video(whole))


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (24, "24"),
        ("24", "24"),
        (24.0, "24"),
        (29.97, "2997/100"),
        ("29.97", "2997/100"),
        ("30000/1001", "30000/1001"),
        (24000 / 1001, "24000/1001"),
        ("0.5", "1/2"),
    ],
)
def test_rates_are_read_as_ffmpeg_reads_them(fps: Any, rate: str) -> None:
    assert str(frame_rate(fps)) == rate
    assert frame_rate(json.loads(json.dumps(rate_text(frame_rate(fps))))) == Fraction(rate)


def test_mp4_keeps_colours(tmp_path: Path) -> None:
    colours = np.array(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 30, 90], [20, 160, 240], [255, 255, 255]], np.uint8
    )
    frames = colours.reshape(1, 2, 3, 3).repeat(32, 1).repeat(32, 2).repeat(5, 0)
    write_clip(tmp_path / "a.mp4", frames)
    centres = read_video(tmp_path / "a.mp4")[:, 16::32, 16::32].reshape(5, -1, 3)
    # One level of 8-bit BT.709 chroma is up to 2.1 levels of red or blue; the wrong matrix would be off by 40.
    assert np.abs(centres.astype(int) - colours).max() <= 2


def test_mkv_round_trip_is_lossless(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 33, 35, 3), np.uint8)
    write_clip(tmp_path / "a.mkv", frames)
    np.testing.assert_array_equal(read_video(tmp_path / "a.mkv"), frames)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_metadata_comes_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_clip(path, moving_square(3))
    assert read_metadata(path) == METADATA
    with av.open(str(path)) as container:
        assert container.metadata.get("title", container.metadata.get("TITLE")) == METADATA["prompt"]


def test_timeline_prompt_makes_a_title(tmp_path: Path) -> None:
    with open_sink(tmp_path / "a.mp4", FPS, WIDTH, HEIGHT, {"prompt": {0: "dawn", 160: "night"}}) as sink:
        sink.write(moving_square(2))
    assert read_metadata(tmp_path / "a.mp4")["prompt"] == {"0": "dawn", "160": "night"}


def test_files_without_metadata_or_frames_are_reported(tmp_path: Path) -> None:
    with open_sink(tmp_path / "a.mp4", FPS, WIDTH, HEIGHT) as sink:
        sink.write(moving_square(2))
    with pytest.raises(MigaError, match=r"a\.mp4 carries no metadata of miga_engine"):
        read_metadata(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    with pytest.raises(MigaError, match=r"cannot read .*b\.mp4: Invalid data"):
        read_video(tmp_path / "b.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_killed_writer_leaves_a_playable_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"killed{suffix}"
    code = f"""
import sys
sys.path[:0] = {[str(places.TESTS / "video"), str(places.TESTS), str(places.ROOT)]!r}
from clips import FPS, METADATA, moving_square
from miga_engine.video.outputs import open_sink
sink = open_sink({str(path)!r}, FPS, 96, 64, METADATA)
for frame in moving_square(150):
    sink.write(frame[None])
print("written", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    frames = read_video(path)
    # Lost at most: the fragment being filled and the encoder's look-ahead, a second each, and its frame threads.
    assert len(frames) >= 150 - 3 * FPS
    assert psnr(frames, moving_square(150)[: len(frames)]) > 30
    assert read_metadata(path) == METADATA


def test_growing_mp4_is_playable(tmp_path: Path) -> None:
    with open_sink(tmp_path / "a.mp4", FPS, WIDTH, HEIGHT, METADATA) as sink:
        sink.write(moving_square(120))
        assert len(read_video(tmp_path / "a.mp4")) >= FPS
    assert len(read_video(tmp_path / "a.mp4")) == 120


def test_odd_sizes_are_refused_for_mp4(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"an mp4 needs even width and height, not 65×64; \.mkv takes any size$"):
        open_sink(tmp_path / "a.mp4", FPS, 65, 64)
