"""A sink behind a thread: the same file, bounded, with the sink's own errors."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import places
import pytest
import torch
from clips import FPS, HEIGHT, METADATA, WIDTH, moving_square, write_clip

from miga_engine.errors import OutputError
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import open_sink
from miga_engine.video.reading import read_metadata, read_video
from miga_engine.video.sink import Sink


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
    frames = moving_square(61)
    write_clip(tmp_path / "a.mkv", frames)
    with EncoderThread(open_sink(tmp_path / "b.mkv", FPS, WIDTH, HEIGHT, METADATA)) as sink:
        for start in range(0, len(frames), 7):
            sink.write(torch.from_numpy(frames[start : start + 7]))
    assert sink.num_frames == 61
    np.testing.assert_array_equal(read_video(tmp_path / "b.mkv"), frames)
    assert read_metadata(tmp_path / "b.mkv") == METADATA
    assert not _encoder_threads()


def test_encoder_thread_takes_frames_while_it_encodes_up_to_its_bound() -> None:
    slow, frames = _SlowSink(), moving_square(8)
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
    slow, frames = _SlowSink(fails_at=1), moving_square(1)
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
    slow, frames = _SlowSink(), moving_square(4)

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
from clips import FPS, METADATA, moving_square
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import open_sink
sink = EncoderThread(open_sink({str(tmp_path / "a.mkv")!r}, FPS, 96, 64, METADATA), max_chunks=150)
for frame in moving_square(150):
    sink.write(frame[None])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    np.testing.assert_array_equal(read_video(tmp_path / "a.mkv"), moving_square(150))


def test_encoder_thread_refuses_wrong_frames_with_the_sinks_sentence(tmp_path: Path) -> None:
    sink = EncoderThread(open_sink(tmp_path / "a.mp4", FPS, WIDTH, HEIGHT))
    sink.write(np.zeros((2, WIDTH, HEIGHT, 3), np.uint8))
    with pytest.raises(ValueError, match=r"frames are 64×96: give 96×64, as the sink was opened"):
        sink.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_encoder_thread_copies_frames_from_the_gpu() -> None:
    seen: list[np.ndarray[Any, Any]] = []
    frames = torch.from_numpy(moving_square(60))
    with EncoderThread(open_sink(lambda array: seen.append(array.copy()), FPS, WIDTH, HEIGHT)) as sink:
        for chunk in frames.split(4):
            sink.write(chunk.cuda(non_blocking=True).bitwise_xor(255))
    np.testing.assert_array_equal(np.concatenate(seen), 255 - frames.numpy())
