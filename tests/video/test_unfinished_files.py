"""A file that grows has a name that nobody uses, follows no link, and is gone on with or used up after a kill."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import places
import pytest
from clips import METADATA
from stopped_runs import FRAMES, NAMES, opened, pictures, refused, reopened, stopped, tree

from miga_engine.errors import OutputError
from miga_engine.files import beside
from miga_engine.video.growing_file import FileSink
from miga_engine.video.reading import read_metadata
from miga_engine.video.video_file import VideoFileSink

PRECIOUS = ("video.part", "video.resumed", "video.new")


def _plant(folder: Path, name: str) -> None:
    """A user's files, and links to another's file, of every name that was ever used for unfinished ones."""
    suffix = Path(name).suffix
    (folder / "precious").write_bytes(b"hours of work")
    if name == "frames/":
        (folder / "frames").mkdir(exist_ok=True)
        for number in (0, 3):
            (folder / "frames" / f"{number:06d}.png.part").symlink_to(folder / "precious")
        (folder / "frames" / "000001.png.part").write_bytes(b"mine")
        return
    for number, stem in enumerate(PRECIOUS):
        if number % 2:
            (folder / f"{stem}{suffix}").write_bytes(b"mine")
        else:
            (folder / f"{stem}{suffix}").symlink_to(folder / "precious")


@pytest.mark.parametrize("name", NAMES)
def test_unfinished_files_never_have_a_name_that_somebody_uses(tmp_path: Path, name: str) -> None:
    _plant(tmp_path, name)
    planted = tree(tmp_path)
    path = f"{tmp_path}/{name}"
    position = stopped(path)
    with reopened(path, position) as sink:
        sink.write(FRAMES[20:])
    with opened(path, overwrite=True) as sink:
        sink.write(FRAMES)
    made = {f"frames/{i:06d}.png" for i in range(40)} if name == "frames/" else {name}
    assert {key: value for key, value in tree(tmp_path).items() if key not in made} == planted


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("leads", [True, False])
def test_a_link_in_the_place_of_a_new_file_is_not_followed(tmp_path: Path, name: str, leads: bool) -> None:
    victim = tmp_path / "victim"
    if leads:
        victim.write_bytes(b"hours of work")
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(OutputError, match="it exists already"):
        opened(f"{tmp_path}/{name}")
    (tmp_path / name).unlink()
    sink = opened(f"{tmp_path}/{name}")
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(OutputError, match="another program has created it meanwhile"):
        sink.write(FRAMES[:1])
    with opened(f"{tmp_path}/{name}", overwrite=True) as sink:
        sink.write(FRAMES[:1])
    assert not (tmp_path / name).is_symlink()
    assert victim.exists() == leads
    assert not leads or victim.read_bytes() == b"hours of work"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[:3])
def test_a_killed_overwriting_run_is_gone_on_with_where_it_grew(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")
    for num_frames in (20, 0):
        sink = opened(str(path), overwrite=True)
        sink.write(FRAMES[:num_frames])
        position = sink.checkpoint()
        grown = path.with_name(position[0]["growing_name"])
        assert grown.exists()
        data = grown.read_bytes()
        sink.abort()
        grown.write_bytes(data)
        with reopened(str(path), position) as sink:
            assert path.read_bytes() == b"old"
            sink.write(FRAMES[num_frames:])
            assert path.read_bytes() == b"old"
        assert len(pictures(str(path))) == 40
        assert [entry.name for entry in tmp_path.iterdir()] == [name]
        path.write_bytes(b"old")


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_run_killed_behind_its_header_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, headed = tmp_path / name, tmp_path / "headed"
    mux = VideoFileSink._mux

    def first_packet(self: VideoFileSink, packets: list[Any]) -> None:
        monkeypatch.setattr(VideoFileSink, "_mux", mux)
        shutil.copy(path, headed)
        mux(self, packets)

    for own in (True, False):
        with opened(str(path), METADATA if own else METADATA | {"seed": 8}) as sink:
            position = sink.checkpoint()
            monkeypatch.setattr(VideoFileSink, "_mux", first_packet)
            sink.write(FRAMES)
        headed.replace(path)
        if own:
            with reopened(str(path), position) as sink:
                sink.write(FRAMES)
            assert len(pictures(str(path))) == 40
            path.unlink()
        else:
            refused(tmp_path, str(path), position, "its content is not what the run wrote")


@pytest.mark.parametrize("name", NAMES[:3])
def test_empty_files_of_killed_overwriting_runs_are_removed(tmp_path: Path, name: str) -> None:
    """A file is made before the session file that names it is; but one that a living run has is left to it."""
    path = tmp_path / name
    path.write_bytes(b"old")
    killed, living = (opened(str(path), overwrite=True) for _ in range(2))
    for sink in (killed, living):
        sink.checkpoint()
    assert len(list(tmp_path.iterdir())) == 3
    assert isinstance(killed, FileSink)
    assert killed._file is not None
    killed._file.close()
    for kept in beside(path), beside(path):
        kept.write_bytes(b"an hour of work")
    with opened(str(path), overwrite=True) as sink:
        sink.write(FRAMES[:20])
    living.write(FRAMES)
    living.close()
    assert len(pictures(str(path))) == 40
    assert sorted(entry.read_bytes() for entry in tmp_path.iterdir() if entry != path) == [b"an hour of work"] * 2


def test_what_a_killed_resumed_run_left_beside_is_used_up(tmp_path: Path) -> None:
    path = f"{tmp_path}/video.mp4"
    position = stopped(path)
    code = f"""
import json, os, signal, sys
sys.path[:0] = {[str(places.TESTS / "video"), str(places.TESTS), str(places.ROOT)]!r}
from stopped_runs import FRAMES, reopened
from miga_engine.video.video_file import VideoFileSink
VideoFileSink._replace_old = lambda self: os.kill(os.getpid(), signal.SIGKILL)
reopened({path!r}, ({position[0]!r}, FRAMES[{position[0]["num_frames"]} : 20]))
"""
    run = subprocess.run([sys.executable, "-c", code], check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the copy
    with reopened(path, position) as sink:
        sink.write(FRAMES[20:])
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]
    assert read_metadata(path) == METADATA


def test_names_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    make: Callable[[str], Path] = lambda suffix: tmp_path / ("ü" * ((255 - len(suffix)) // 2) + suffix)  # noqa: E731
    for suffix in (".mp4", ".mkv", ".rgb"):
        for _ in range(2):
            with opened(str(make(suffix)), overwrite=True) as sink:
                sink.write(FRAMES[:13])
        assert len(pictures(str(make(suffix)))) == 13
    assert len(list(tmp_path.iterdir())) == 3
