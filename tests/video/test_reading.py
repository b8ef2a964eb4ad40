"""Whatever opens media opens that one file, frame by frame, within bounds."""

import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import places
import pytest
from clips import METADATA, moving_square

from miga_engine.cli import main
from miga_engine.cli.measure import read_clip
from miga_engine.errors import ConfigError, MigaError
from miga_engine.measure import measures
from miga_engine.video import reading
from miga_engine.video.outputs import open_sink
from miga_engine.video.reading import opened_video, read_metadata, read_video

FRAMES = moving_square(41)
QUICK = ["--features", "descriptor", "--flow", "lucas-kanade"]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "video.mkv"
    with open_sink(path, 8, FRAMES.shape[2], FRAMES.shape[1], METADATA) as sink:
        sink.write(FRAMES)
    return path


def _flat_png(path: Path, width: int, height: int) -> None:
    """A black picture whose file is small."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@pytest.mark.parametrize("name", ["list.mp4", "list.mkv", "list.png", "list.avi", "list.webm"])
def test_a_playlist_is_not_followed(tmp_path: Path, video: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (f"ffconcat version 1.0\nfile {video.name}\n", f"#EXTM3U\n#EXTINF:1,\n{video.name}\n#EXT-X-ENDLIST\n"):
        (tmp_path / name).write_text(text)
        assert main(["eval", str(tmp_path / name), *QUICK]) == 2
        told = capsys.readouterr().err
        assert "cannot read" in told
        assert told.count("\n") == 1
        for read in (read_video, read_metadata, read_clip):
            with pytest.raises(MigaError, match=r"cannot read|carries no metadata"):
                read(tmp_path / name)


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:9/a.mp4", "concat:a.mp4", "file:a.mp4", "pipe:0", "lavfi.mp4", "/dev/zero", "/dev/stdin"],
)
def test_an_address_is_not_a_file(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", address, *QUICK]) == 2
    assert "miga: cannot read" in capsys.readouterr().err


def test_no_host_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()
                    asked.append(1)

        threading.Thread(target=answer, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4"
        assert main(["eval", address, *QUICK]) == 2
        server.shutdown(socket.SHUT_RDWR)
    assert "it is not a file" in capsys.readouterr().err
    assert not asked


@pytest.mark.slow
def test_a_picture_of_16000_squared_is_refused_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    _flat_png(tmp_path / "frames" / "0.png", 16_000, 16_000)
    code = f"""
import resource, sys
from miga_engine.cli import main
import miga_engine.measure.measures, miga_engine.measure.report, av
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
codes = main(["eval", {str(tmp_path / "frames")!r}]), main(["eval", {str(tmp_path / "frames" / "0.png")!r}])
print(codes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=places.ROOT)
    assert run.stderr.count("it has no frames, or such of more than 33554432 pixels") == 2
    codes, _, grown = run.stdout.strip().rpartition(" ")
    assert codes == "(2, 2)"
    assert int(grown) < 200  # MiB


@pytest.mark.slow
def test_a_video_is_refused_before_its_frames_are_held(
    video: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", FRAMES.nbytes - 1)
    decoded = []
    monkeypatch.setattr(reading, "_frames", lambda *_: decoded.append(1))
    with pytest.raises(MigaError, match=r"video\.mkv: all its frames take more than \d+ GiB; give a shorter"):
        read_video(video)
    assert not decoded
    monkeypatch.undo()
    monkeypatch.setattr(reading, "MAX_BYTES", FRAMES.nbytes - 1)
    with pytest.raises(MigaError, match="all its frames take more than"):
        read_clip(video)
    with opened_video(video) as opened:  # frame by frame any length can be read
        assert opened.fps == 8
        assert all(np.array_equal(a, b) for a, b in zip(opened.frames, FRAMES, strict=True))
    assert main(["eval", str(video), *QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["video.mkv"]["frames"] == len(FRAMES)
    monkeypatch.setattr(reading, "MAX_BYTES", FRAMES.nbytes)
    assert np.array_equal(read_video(video), FRAMES)


def test_frames_of_more_pixels_than_are_read_are_refused(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_PIXELS", FRAMES.shape[1] * FRAMES.shape[2] - 1)
    for read in (read_video, read_clip):
        with pytest.raises(MigaError, match=r"cannot read .*video\.mkv: "):
            read(video)


@pytest.mark.slow
def test_a_video_in_parts_is_measured_as_the_whole(video: Path) -> None:
    options = {"features": "descriptor", "flow": "lucas-kanade", "block": 4}
    whole = measures.measure(FRAMES, 8.0, **options)
    for length in (measures.PART_FRAMES,):
        parts = (FRAMES[i : i + length] for i in range(0, len(FRAMES), length))
        assert measures.measure(parts, 8.0, **options) == whole
    odd = measures.measure([FRAMES[:1], FRAMES[1:8], FRAMES[8:8], FRAMES[8:]], 8.0, **options)
    assert odd["curves"]["motion"] == pytest.approx(whole["curves"]["motion"], rel=1e-4)
    assert odd["curves"]["difference"] == whole["curves"]["difference"]
    with pytest.raises(ConfigError, match="give frames of one size"):
        measures.measure([FRAMES[:4], FRAMES[4:8, :32]], **options)
    with pytest.raises(ConfigError, match="2 frames or more"):
        measures.measure([], **options)


def test_what_must_be_held_whole_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "MAX_HELD_BYTES", FRAMES.nbytes - 1)
    with pytest.raises(ConfigError, match="all are held to measure against a prompt"):
        measures.measure(FRAMES, prompt="a red balloon", features="descriptor", flow="lucas-kanade")


@pytest.mark.slow
def test_long_videos_are_measured_in_the_memory_of_a_few_frames(tmp_path: Path) -> None:
    """160 frames of 512×512, 120 MiB of them, in a small file."""
    path = tmp_path / "long.mp4"
    with open_sink(path, 24, 512, 512) as sink:
        for _ in range(16):
            sink.write(np.zeros((10, 512, 512, 3), np.uint8))
    assert path.stat().st_size < 2**18
    code = f"""
import resource
from miga_engine.cli import main
main(["eval", {str(path)!r}, "--num-frames", "20", "--json", *{QUICK!r}])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(main(["eval", {str(path)!r}, "--json", *{QUICK!r}]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=places.ROOT)
    assert run.stdout.splitlines()[-2] == "0"
    assert int(run.stdout.splitlines()[-1]) < 80  # MiB
