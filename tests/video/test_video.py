"""Sinks write what they are given, lose nothing that existed, and refuse with one sentence; contact sheets show it."""

import json
import os
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import places
import pytest
import torch

from miga_engine.errors import MigaError, OutputError
from miga_engine.files import is_beside
from miga_engine.video.contact_sheet import ContactSheet, write_contact_sheet
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import open_sink, reopen_sink
from miga_engine.video.paths import check_output
from miga_engine.video.png import write_png
from miga_engine.video.rate import frame_rate, rate_text
from miga_engine.video.reading import read_metadata, read_video
from miga_engine.video.sink import Sink

WIDTH, HEIGHT, FPS = 96, 64, 24
METADATA = {"prompt": 'a "red" balloon — über hills', "seed": 7, "config": {"zigzag_width": 4}, "version": "0.1.0"}


def _frames(n: int, width: int = WIDTH, height: int = HEIGHT) -> "np.ndarray[Any, Any]":
    """A bright square that moves over a gradient, with the frame number in its colour."""
    y, x = np.mgrid[:height, :width]
    frames = np.empty((n, height, width, 3), np.uint8)
    for i in range(n):
        frames[i] = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 100 + i % 100)], -1)
        frames[i, 8:24, (2 * i) % (width - 16) :][:, :16] = (250, 40, 30)
    return frames


def _psnr(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]") -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9)))


def _write(path: Path | str, frames: "np.ndarray[Any, Any]", **options: Any) -> None:
    with open_sink(path, FPS, frames.shape[2], frames.shape[1], METADATA, **options) as sink:
        for start in range(0, len(frames), 7):
            sink.write(frames[start : start + 7])


def _fail_after(
    frames: "np.ndarray[Any, Any]", error: type[BaseException], path: Path | str, *, overwrite: bool = False
) -> None:
    def run() -> None:
        with open_sink(path, FPS, WIDTH, HEIGHT, overwrite=overwrite) as sink:
            sink.write(frames)
            raise error

    with pytest.raises(error):
        run()


def test_mp4_round_trip(tmp_path: Path) -> None:
    frames = _frames(61)
    _write(tmp_path / "a.mp4", frames)
    read = read_video(tmp_path / "a.mp4")
    assert read.shape == frames.shape
    assert _psnr(read, frames) > 30  # what half the chroma resolution costs at the square's edges; order is right
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


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("fps", [1, 12, 16, 24, 60, 29.97, "24000/1001", "30000/1001", Fraction(1, 2)])
def test_every_length_lasts_as_long_as_its_frames(tmp_path: Path, suffix: str, fps: Any) -> None:
    """An uninterrupted file, one that was resumed, and one that was made longer: frame i at i/fps, N/fps seconds."""
    rate = frame_rate(fps)
    slack = 1 if suffix == ".mp4" else 1001  # Matroska counts milliseconds
    pictures, second = _frames(83, 32, 32), max(1, round(rate))
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
    _write(tmp_path / "a.mp4", frames)
    centres = read_video(tmp_path / "a.mp4")[:, 16::32, 16::32].reshape(5, -1, 3)
    # One level of 8-bit BT.709 chroma is up to 2.1 levels of red or blue; the wrong matrix would be off by 40.
    assert np.abs(centres.astype(int) - colours).max() <= 2


def test_mkv_round_trip_is_lossless(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 33, 35, 3), np.uint8)
    _write(tmp_path / "a.mkv", frames)
    np.testing.assert_array_equal(read_video(tmp_path / "a.mkv"), frames)


def test_images_round_trip(tmp_path: Path) -> None:
    frames = _frames(9)
    _write(f"{tmp_path}/images/", frames)
    _write(tmp_path / "shot_%04d.png", frames)
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == [f"{i:06d}.png" for i in range(9)]
    for i, name in ((0, "images/000000.png"), (8, "shot_0008.png")):
        np.testing.assert_array_equal(read_video(tmp_path / name)[0], frames[i])


def test_raw_round_trip_to_file_and_standard_output(tmp_path: Path) -> None:
    frames = _frames(9)
    _write(tmp_path / "a.rgb", frames)
    assert (tmp_path / "a.rgb").read_bytes() == frames.tobytes()
    code = """
import numpy as np
from miga_engine.video.outputs import open_sink
with open_sink("-", 24, 8, 4) as sink:
    sink.write(np.arange(2 * 4 * 8 * 3, dtype=np.uint8).reshape(2, 4, 8, 3))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert run.stdout == bytes(range(192))


def test_callback_gets_every_frame() -> None:
    seen: list[np.ndarray[Any, Any]] = []
    frames = _frames(9)
    with open_sink(seen.append, FPS, WIDTH, HEIGHT) as sink:
        sink.write(frames[:4])
        sink.write(frames[4:])
    np.testing.assert_array_equal(np.concatenate(seen), frames)
    assert sink.num_frames == 9


def test_torch_and_strided_frames_are_taken(tmp_path: Path) -> None:
    frames = torch.from_numpy(_frames(6))
    with open_sink(tmp_path / "a.mkv", FPS, WIDTH, HEIGHT) as sink:
        sink.write(frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
    np.testing.assert_array_equal(read_video(tmp_path / "a.mkv"), frames.numpy())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_metadata_comes_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    _write(path, _frames(3))
    assert read_metadata(path) == METADATA
    with av.open(str(path)) as container:
        assert container.metadata.get("title", container.metadata.get("TITLE")) == METADATA["prompt"]


def test_timeline_prompt_makes_a_title(tmp_path: Path) -> None:
    with open_sink(tmp_path / "a.mp4", FPS, WIDTH, HEIGHT, {"prompt": {0: "dawn", 160: "night"}}) as sink:
        sink.write(_frames(2))
    assert read_metadata(tmp_path / "a.mp4")["prompt"] == {"0": "dawn", "160": "night"}


def test_files_without_metadata_or_frames_are_reported(tmp_path: Path) -> None:
    with open_sink(tmp_path / "a.mp4", FPS, WIDTH, HEIGHT) as sink:
        sink.write(_frames(2))
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
from test_video import FPS, METADATA, _frames
from miga_engine.video.outputs import open_sink
sink = open_sink({str(path)!r}, FPS, 96, 64, METADATA)
for frame in _frames(150):
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
    assert _psnr(frames, _frames(150)[: len(frames)]) > 30
    assert read_metadata(path) == METADATA


def test_growing_mp4_is_playable(tmp_path: Path) -> None:
    with open_sink(tmp_path / "a.mp4", FPS, WIDTH, HEIGHT, METADATA) as sink:
        sink.write(_frames(120))
        assert len(read_video(tmp_path / "a.mp4")) >= FPS
    assert len(read_video(tmp_path / "a.mp4")) == 120


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.rgb", "images/", "a_%03d.png"])
def test_nothing_is_created_before_the_first_frame(tmp_path: Path, name: str) -> None:
    with open_sink(f"{tmp_path}/{name}", FPS, WIDTH, HEIGHT):
        pass
    _fail_after(_frames(1)[:0], KeyError, f"{tmp_path}/{name}")
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"^cannot write .*a\.mp4: it exists already, and --overwrite"):
        open_sink(path, FPS, WIDTH, HEIGHT)
    assert path.read_bytes() == b"old"


def test_overwriting_replaces_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with open_sink(path, FPS, WIDTH, HEIGHT, overwrite=True) as sink:
        assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
        sink.write(_frames(30))
        assert path.read_bytes() == b"old"
        assert [is_beside(p.name, path) for p in sorted(tmp_path.iterdir())] == [True, False]
    assert len(read_video(path)) == 30
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_failed_run_keeps_old_file_and_new_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    _fail_after(_frames(30), KeyError, path, overwrite=True)
    assert path.read_bytes() == b"old"
    (partial,) = tmp_path.glob("a.*.part.mp4")
    assert len(read_video(partial)) == 30


def test_interrupt_finishes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    _fail_after(_frames(30), KeyboardInterrupt, path, overwrite=True)
    assert len(read_video(path)) == 30


def test_old_images_are_refused_or_replaced(tmp_path: Path) -> None:
    _write(tmp_path / "a_%03d.png", _frames(5))
    (tmp_path / "a_note.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match="it holds images already"):
        open_sink(tmp_path / "a_%03d.png", FPS, WIDTH, HEIGHT)
    _write(tmp_path / "a_%03d.png", _frames(2), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_000.png", "a_001.png", "a_note.png"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing/a.mp4", r"^cannot write \S+/missing/a\.mp4: the folder \S+/missing does not exist$"),
        ("file/a.mp4", r"^cannot write \S+/file/a\.mp4: \S+/file is not a folder$"),
        ("folder", r"^cannot write \S+/folder: it is a folder; end the name with / to write a PNG sequence into it$"),
        ("folder.mp4", r"^cannot write \S+/folder\.mp4: it is a folder; end the name"),
        ("a.avi", r"^cannot write \S+/a\.avi: the suffix '\.avi' is not one of \.mp4, \.mkv, \.rgb$"),
        ("a", r"^cannot write \S+/a: a name without suffix is not one of \.mp4, \.mkv, \.rgb$"),
        ("a.png", r"^cannot write \S+/a\.png: one image cannot hold a video; number the frames, as in a_%06d\.png$"),
        ("a_%s.png", r"one image cannot hold a video"),
        ("missing/images/", r"^cannot write \S+/missing/images/: the folder \S+/missing does not exist$"),
        ("file/", r"^cannot write \S+/file/: \S+/file is not a folder$"),
    ],
)
def test_unwritable_outputs_are_refused_at_once(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=sentence):
        open_sink(f"{tmp_path}/{name}", FPS, WIDTH, HEIGHT)
    assert sorted(tmp_path.rglob("*")) == before


def test_unwritable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"a\.mp4: the folder \S+ is not writable$"):
        open_sink(tmp_path / "a.mp4", FPS, WIDTH, HEIGHT)


def test_odd_sizes_are_refused_for_mp4(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"an mp4 needs even width and height, not 65×64; \.mkv takes any size$"):
        open_sink(tmp_path / "a.mp4", FPS, 65, 64)


@pytest.mark.parametrize("name", ["a.rgb", "a.mp4", "a.mkv", "images/"])
@pytest.mark.parametrize("wrapper", ["", "EncoderThread"])
def test_full_disk_is_one_sentence(tmp_path: Path, name: str, wrapper: str) -> None:
    code = f"""
import resource, signal
import numpy as np
from miga_engine.errors import OutputError
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import open_sink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
noise = np.random.default_rng(0).integers(0, 256, (10, 64, 160, 3), np.uint8)
try:
    with {wrapper}(open_sink({f"{tmp_path}/{name}"!r}, 24, 160, 64)) as sink:
        for _ in range(12):
            sink.write(noise)
except OutputError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(places.ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"cannot write {Path(tmp_path, name)}: File too large"
    assert not list(tmp_path.rglob("*.part"))


def test_closed_reader_is_one_sentence() -> None:
    code = """
import sys
import numpy as np
from miga_engine.errors import OutputError
from miga_engine.video.outputs import open_sink
sink = open_sink("-", 24, 96, 64)
try:
    while True:
        sink.write(np.zeros((9, 64, 96, 3), np.uint8))
except OutputError as error:
    print(error, file=sys.stderr)
    sys.stderr.flush()
    import os
    os._exit(0)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (
        process.stderr.read().strip()
        == "cannot write standard output any further: the program that read it has closed it"
    )
    process.stderr.close()
    process.wait()


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        (np.zeros((2, HEIGHT, WIDTH, 3), np.float32), r"frames are float32 \[2, \d+, \d+, 3\]: give uint8 \[n,H,W,3\]"),
        (np.zeros((HEIGHT, WIDTH, 3), np.uint8), r"frames are uint8 \[64, 96, 3\]: give"),
        (np.zeros((2, WIDTH, HEIGHT, 3), np.uint8), r"frames are 64×96: give 96×64, as the sink was opened"),
    ],
)
def test_wrong_frames_are_refused(tmp_path: Path, frames: "np.ndarray[Any, Any]", sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), open_sink(tmp_path / "a.mp4", FPS, WIDTH, HEIGHT) as sink:
        sink.write(frames)
    assert list(tmp_path.iterdir()) == []


def test_closed_sink_takes_no_frames(tmp_path: Path) -> None:
    sink = open_sink(tmp_path / "a.mp4", FPS, WIDTH, HEIGHT)
    sink.close()
    sink.close()
    sink.abort()
    with pytest.raises(ValueError, match="the sink is closed"):
        sink.write(_frames(1))


class _SlowSink(Sink):
    """Holds every write until `go`; fails at the write of that number."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__(WIDTH, HEIGHT)
        self.go = threading.Event()
        self.fails_at = fails_at
        self.taken: list[np.ndarray[Any, Any]] = []
        self.ended = ""

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        assert self.go.wait(30)
        if len(self.taken) == self.fails_at:
            raise OutputError("cannot write a: No space left on device")
        self.taken.append(frames)

    def _close(self) -> None:
        self.ended = "closed"

    def _abort(self) -> None:
        self.ended = "aborted"


def _encoder_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "miga-encode"]


def test_encoder_thread_writes_the_same_file(tmp_path: Path) -> None:
    frames = _frames(61)
    _write(tmp_path / "a.mkv", frames)
    with EncoderThread(open_sink(tmp_path / "b.mkv", FPS, WIDTH, HEIGHT, METADATA)) as sink:
        for start in range(0, len(frames), 7):
            sink.write(torch.from_numpy(frames[start : start + 7]))
    assert sink.num_frames == 61
    np.testing.assert_array_equal(read_video(tmp_path / "b.mkv"), frames)
    assert read_metadata(tmp_path / "b.mkv") == METADATA
    assert not _encoder_threads()


def test_encoder_thread_takes_frames_while_it_encodes_up_to_its_bound() -> None:
    slow, frames = _SlowSink(), _frames(8)
    sink = EncoderThread(slow, max_chunks=4)
    for i in range(5):  # one that is being written, four that wait; were it synchronous, the first would never return
        sink.write(frames[i : i + 1])
    sixth = threading.Thread(target=sink.write, args=(frames[5:6],))
    sixth.start()
    sixth.join(0.2)
    assert sixth.is_alive()
    slow.go.set()
    sixth.join(30)
    sink.close()
    np.testing.assert_array_equal(np.concatenate(slow.taken), frames[:6])
    assert slow.ended == "closed"
    with pytest.raises(ValueError, match="the sink is closed"):
        sink.write(frames)


@pytest.mark.parametrize("surfaces", ["write", "close"])
def test_encoder_threads_error_surfaces_as_it_is(surfaces: str) -> None:
    slow, frames = _SlowSink(fails_at=1), _frames(1)
    slow.go.set()

    def run() -> None:
        with EncoderThread(slow) as sink:
            for _ in range(2 if surfaces == "close" else 10_000):
                sink.write(frames)

    with pytest.raises(OutputError, match=r"^cannot write a: No space left on device$"):
        run()
    assert (len(slow.taken), slow.ended) == (1, "aborted")
    assert not _encoder_threads()


@pytest.mark.parametrize(("error", "ended"), [(KeyError, "aborted"), (KeyboardInterrupt, "closed")])
def test_encoder_thread_writes_what_waits_before_it_ends(error: type[BaseException], ended: str) -> None:
    slow, frames = _SlowSink(), _frames(4)

    def run() -> None:
        with EncoderThread(slow) as sink:
            for frame in frames:
                sink.write(frame[None])
            slow.go.set()
            raise error

    with pytest.raises(error):
        run()
    np.testing.assert_array_equal(np.concatenate(slow.taken), frames)
    assert slow.ended == ended
    assert not _encoder_threads()


def test_encoder_thread_that_nobody_closed_writes_what_waits_when_the_interpreter_ends(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path[:0] = {[str(places.TESTS / "video"), str(places.TESTS), str(places.ROOT)]!r}
from test_video import FPS, METADATA, _frames
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import open_sink
sink = EncoderThread(open_sink({str(tmp_path / "a.mkv")!r}, FPS, 96, 64, METADATA), max_chunks=150)
for frame in _frames(150):
    sink.write(frame[None])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    np.testing.assert_array_equal(read_video(tmp_path / "a.mkv"), _frames(150))


def test_encoder_thread_refuses_wrong_frames_with_the_sinks_sentence(tmp_path: Path) -> None:
    sink = EncoderThread(open_sink(tmp_path / "a.mp4", FPS, WIDTH, HEIGHT))
    sink.write(np.zeros((2, WIDTH, HEIGHT, 3), np.uint8))
    with pytest.raises(ValueError, match=r"frames are 64×96: give 96×64, as the sink was opened"):
        sink.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_encoder_thread_copies_frames_from_the_gpu() -> None:
    seen: list[np.ndarray[Any, Any]] = []
    frames = torch.from_numpy(_frames(60))
    with EncoderThread(open_sink(lambda array: seen.append(array.copy()), FPS, WIDTH, HEIGHT)) as sink:
        for chunk in frames.split(4):
            sink.write(chunk.cuda(non_blocking=True).bitwise_xor(255))
    np.testing.assert_array_equal(np.concatenate(seen), 255 - frames.numpy())


@pytest.mark.parametrize("n", [1, 5, 12, 13, 24, 25, 26, 300, 1000])
def test_contact_sheet_of_an_endless_stream_is_even_and_bounded(n: int) -> None:
    sheet = ContactSheet(num_tiles=12)
    for start in range(0, n, 7):
        frames = np.zeros((min(7, n - start), 4, 8, 3), np.uint16)
        frames[:] = np.arange(start, start + len(frames)).reshape(-1, 1, 1, 1)
        sheet.add(frames)
        assert len(sheet._kept) <= 24
    shown = [int(tile[0, 0, 0]) for tile in sheet.tiles()]
    assert len(shown) == min(n, 12)
    assert shown[0] == 0
    steps = np.diff(shown)
    assert n <= 12 or (steps.max() <= 2 * steps.min() and shown[-1] >= n * 0.85)


def test_contact_sheet_of_a_known_length_shows_first_and_last() -> None:
    sheet = ContactSheet(num_tiles=5, num_frames=241)
    sheet.add(torch.arange(241).reshape(-1, 1, 1, 1).expand(-1, 2, 2, 3))
    assert [int(tile[0, 0, 0]) for tile in sheet.tiles()] == [0, 60, 120, 180, 240]


def test_contact_sheet_picture(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    frames = _frames(10)
    sheet = ContactSheet(num_tiles=10, num_columns=4)
    sheet.add(torch.from_numpy(frames))
    sheet.save(path)
    picture = read_video(path)[0]
    # 96 px wide tiles are doubled to 192; gaps of 4 px around; three rows of at most four.
    assert picture.shape == (3 * (2 * HEIGHT + 4) + 4, 4 * (2 * WIDTH + 4) + 4, 3)
    second_row, second_column = 4 + 2 * HEIGHT + 4, 4 + 2 * WIDTH + 4
    tile = picture[second_row : second_row + 2 * HEIGHT, second_column : second_column + 2 * WIDTH]
    np.testing.assert_array_equal(tile[::2, ::2], frames[5])
    np.testing.assert_array_equal(tile[1::2, 1::2], frames[5])


def test_side_by_side_sheet_has_labels(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    rows = [_frames(3), _frames(2, 200, 50)]
    write_contact_sheet(path, rows)
    plain = read_video(path)[0]
    write_contact_sheet(path, rows, ["FIFO, frames 0-240", "MIGA é"])
    labelled = read_video(path)[0]
    assert labelled.shape[0] - plain.shape[0] == 2 * 27
    assert (labelled[:27] == 232).any()
    with pytest.raises(ValueError, match="1 labels are given for 2 rows: give one a row"):
        write_contact_sheet(path, rows, ["one"])


def test_unwritable_sheets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"sheet\.jpg: the suffix '\.jpg' is not one of \.png$"):
        write_contact_sheet(tmp_path / "sheet.jpg", [_frames(1)])
    with pytest.raises(OutputError, match="there are no frames to show"):
        ContactSheet().save(tmp_path / "sheet.png")
    (tmp_path / "sheet.png").write_bytes(b"old")
    with pytest.raises(OutputError, match="it exists already"):
        check_output(tmp_path / "sheet.png", (".png",))
    with pytest.raises(OutputError, match=r"it is a folder, and a file name ending in \.png is expected$"):
        check_output(f"{tmp_path}/", (".png",))


WITHOUT_AV = """
import dataclasses, sys
sys.modules["av"] = None  # as if it were not installed
import torch
from miga_engine import Engine, MigaError
from miga_engine.video.reading import read_video
from miga_engine.video.outputs import open_sink

options = {"height": 32, "width": 48, "num_inference_steps": 8, "guidance_scale": 1.0}
engine = Engine.from_pretrained("tiny", "cpu")
miga = dataclasses.replace(engine.preset.miga, self_reflection=False, stage2_steps=1, refine_steps=0)
video = engine.generate("a red balloon", num_frames=5, miga=miga, **options)
video.save("a.rgb")
open("b.mp4", "wb").close()
for call, *arguments in ((video.save, "a.mp4"), (open_sink, "images/", 8, 48, 32), (read_video, "b.mp4")):
    try:
        call(*arguments)
    except MigaError as error:
        print(error)
"""


def test_video_is_made_without_pyav_and_an_mp4_names_the_package(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(places.ROOT)}
    command = [sys.executable, "-c", WITHOUT_AV]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    missing = "the package av (PyAV) is not installed; install it"
    assert run.stdout.splitlines() == [
        f"cannot write a.mp4: {missing}, or write .rgb",
        f"cannot write images/: {missing}, or write .rgb",
        f"cannot read b.mp4: {missing}",
    ]
    assert (tmp_path / "a.rgb").stat().st_size == 5 * 32 * 48 * 3


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 96)])
def test_pictures_are_read_back_as_they_were(tmp_path: Path, size: tuple[int, int]) -> None:
    for name, image in (
        ("noise", np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)),
        ("white", np.full((*size, 3), 255, np.uint8)),
    ):
        write_png(tmp_path / f"{name}.png", image)
        np.testing.assert_array_equal(read_video(tmp_path / f"{name}.png")[0], image)
