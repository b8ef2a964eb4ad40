"""Every output takes what it is given, loses nothing that existed, and refuses with one sentence."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import places
import pytest
import torch
from clips import FPS, HEIGHT, WIDTH, moving_square, write_clip

from miga_engine.errors import OutputError
from miga_engine.files import is_beside
from miga_engine.video.outputs import open_sink
from miga_engine.video.reading import read_video


def _fail_after(
    frames: "np.ndarray[Any, Any]", error: type[BaseException], path: Path | str, *, overwrite: bool = False
) -> None:
    def run() -> None:
        with open_sink(path, FPS, WIDTH, HEIGHT, overwrite=overwrite) as sink:
            sink.write(frames)
            raise error

    with pytest.raises(error):
        run()


def test_raw_round_trip_to_file_and_standard_output(tmp_path: Path) -> None:
    frames = moving_square(9)
    write_clip(tmp_path / "a.rgb", frames)
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
    frames = moving_square(9)
    with open_sink(seen.append, FPS, WIDTH, HEIGHT) as sink:
        sink.write(frames[:4])
        sink.write(frames[4:])
    np.testing.assert_array_equal(np.concatenate(seen), frames)
    assert sink.num_frames == 9


def test_torch_and_strided_frames_are_taken(tmp_path: Path) -> None:
    frames = torch.from_numpy(moving_square(6))
    with open_sink(tmp_path / "a.mkv", FPS, WIDTH, HEIGHT) as sink:
        sink.write(frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))
    np.testing.assert_array_equal(read_video(tmp_path / "a.mkv"), frames.numpy())


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.rgb", "images/", "a_%03d.png"])
def test_nothing_is_created_before_the_first_frame(tmp_path: Path, name: str) -> None:
    with open_sink(f"{tmp_path}/{name}", FPS, WIDTH, HEIGHT):
        pass
    _fail_after(moving_square(1)[:0], KeyError, f"{tmp_path}/{name}")
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
        sink.write(moving_square(30))
        assert path.read_bytes() == b"old"
        assert [is_beside(p.name, path) for p in sorted(tmp_path.iterdir())] == [True, False]
    assert len(read_video(path)) == 30
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_failed_run_keeps_old_file_and_new_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    _fail_after(moving_square(30), KeyError, path, overwrite=True)
    assert path.read_bytes() == b"old"
    (partial,) = tmp_path.glob("a.*.part.mp4")
    assert len(read_video(partial)) == 30


def test_interrupt_finishes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    _fail_after(moving_square(30), KeyboardInterrupt, path, overwrite=True)
    assert len(read_video(path)) == 30


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


@pytest.mark.slow
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
        sink.write(moving_square(1))


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


@pytest.mark.slow
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
