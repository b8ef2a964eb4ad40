"""An output is gone on with only where it is provably the run's own; what anybody else wrote is left as it is."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import places
import pytest
from test_video import HEIGHT, METADATA, WIDTH, _frames

from miga_engine.errors import MigaError, OutputError, SessionError
from miga_engine.files import beside
from miga_engine.video.growing_file import FileSink
from miga_engine.video.outputs import open_sink, reopen_sink
from miga_engine.video.png import write_png
from miga_engine.video.reading import read_metadata, read_video
from miga_engine.video.sink import Sink
from miga_engine.video.video_file import VideoFileSink

RATE = 6
NAMES = ("video.mp4", "video.mkv", "video.rgb", "frames/")
FRAMES = _frames(40)
Position = tuple[dict[str, Any], Any]


def _opened(path: str, metadata: dict[str, Any] | None = None, **options: Any) -> Sink:
    return open_sink(path, RATE, WIDTH, HEIGHT, METADATA if metadata is None else metadata, **options)


def _reopened(path: str, position: Position, **options: Any) -> Sink:
    record, frames = position
    return reopen_sink(path, json.loads(json.dumps(record)), frames, RATE, WIDTH, HEIGHT, METADATA, **options)


def _stopped(path: str, num_frames: int = 20, num_behind: int = 4, **options: Any) -> Position:
    """A run of so many frames, with more of them behind the checkpoint, that was stopped there."""
    with _opened(path, **options) as sink:
        if num_frames:
            sink.write(FRAMES[:num_frames])
        position = sink.checkpoint()
        sink.write(FRAMES[num_frames : num_frames + num_behind])
    return position


def _tree(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder, byte for byte; of links where they lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def _pictures(path: str) -> "np.ndarray[Any, Any]":
    if path.endswith("/"):
        return np.stack([read_video(picture)[0] for picture in sorted(Path(path).glob("[0-9]*.png"))])
    if path.endswith(".rgb"):
        return np.fromfile(path, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)
    return read_video(path)


def _refused(folder: Path, path: str, position: Position, sentence: str, **options: Any) -> None:
    before = _tree(folder)
    with pytest.raises(OutputError, match=sentence), _reopened(path, position, **options) as sink:
        sink.write(FRAMES[20:])
    assert _tree(folder) == before


@pytest.mark.parametrize("name", NAMES)
def test_the_position_does_not_say_where_to_write(tmp_path: Path, name: str) -> None:
    for folder in ("mine", "elsewhere", "other"):
        (tmp_path / folder).mkdir()
    path = f"{tmp_path}/mine/{name}"
    position, behind = _stopped(path)
    for kept in tmp_path.joinpath("elsewhere"), tmp_path.joinpath("other"):
        shutil.copytree(tmp_path / "mine", kept, dirs_exist_ok=True)
    before = _tree(tmp_path / "elsewhere")
    for growing in ("../elsewhere/video.mp4", f"{tmp_path}/elsewhere/{name}", "video.0a1b2c3d.part.mp4", 7, [], None):
        elsewhere = position | {"path": f"{tmp_path}/elsewhere/{name}", "growing_name": growing}
        with _reopened(path, (elsewhere, behind)) as sink:
            sink.write(FRAMES[20:])
        assert len(_pictures(path)) == 40
        shutil.rmtree(tmp_path / "mine")
        shutil.copytree(tmp_path / "other", tmp_path / "mine")
    assert _tree(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_growing_file_that_is_a_link_is_not_followed(tmp_path: Path, name: str) -> None:
    """A position that names a link of the right form, beside another file of the user's."""
    path, precious = Path(tmp_path, name), Path(tmp_path, f"precious{Path(name).suffix}")
    path.write_bytes(b"old")
    position, behind = _stopped(str(precious))
    kept = precious.read_bytes()
    growing = beside(path)
    growing.symlink_to(precious)
    _refused(tmp_path, str(path), (position | {"growing_name": growing.name}, behind), "cannot go on with .*video")
    assert precious.read_bytes() == kept


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_was_edited_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    path = f"{tmp_path}/{name}"
    position = _stopped(path)
    edited = Path(path, "000003.png") if name == "frames/" else Path(path)
    if name == "video.rgb":
        data = bytearray(edited.read_bytes())
        data[5000] ^= 1
        edited.write_bytes(data)
    elif name == "frames/":
        write_png(edited, 255 - FRAMES[3])
    else:
        edited.unlink()
        with _opened(path) as sink:  # another video of the same run, one frame of which was mended
            sink.write(np.concatenate([FRAMES[:3], 255 - FRAMES[3:4], FRAMES[4:24]]))
    _refused(tmp_path, path, position, "its content is not what the run wrote; name the file the run wrote, or start")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_kind_or_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    path = f"{tmp_path}/{name}"
    position = _stopped(path)
    for other in NAMES:
        (tmp_path / "other").mkdir()
        there = f"{tmp_path}/other/{other}"
        with open_sink(there, RATE, WIDTH, HEIGHT) as sink:
            sink.write(255 - FRAMES)
        _refused(tmp_path, there, position, "^cannot go on with .*other/.*; name the file the run wrote, or start")
        shutil.rmtree(tmp_path / "other")
    (tmp_path / "notes.mp4").write_bytes(b"not a video")
    if name == "video.mp4":
        _refused(tmp_path, f"{tmp_path}/notes.mp4", position, "its content is not what the run wrote")
    _refused(tmp_path, "-", position, "^cannot go on with -: the run did not write such a file")


def test_pictures_that_are_missing_at_the_beginning_are_noticed(tmp_path: Path) -> None:
    path = f"{tmp_path}/frames/"
    position = _stopped(path)
    Path(path, "000000.png").rename(tmp_path / "away.png")
    _refused(tmp_path, path, position, "it holds fewer than the 20 frames it had")


def test_a_picture_that_is_a_link_is_not_the_runs(tmp_path: Path) -> None:
    path = f"{tmp_path}/frames/"
    position = _stopped(path)
    Path(path, "000004.png").rename(tmp_path / "away.png")
    Path(path, "000004.png").symlink_to(tmp_path / "away.png")
    _refused(tmp_path, path, position, r"cannot go on with .*000004\.png: it is a link; name the file itself")


def test_pictures_of_others_behind_the_run_are_kept(tmp_path: Path) -> None:
    path = f"{tmp_path}/frames/"
    position = _stopped(path, 20, 12)  # 20 to 31 are of the killed run
    write_png(Path(path, "000033.png"), FRAMES[0])
    Path(path, "000030.png").write_bytes(b"mine")
    with _reopened(path, position) as sink:
        sink.write(FRAMES[20:25])
    left = {entry.name for entry in Path(path).iterdir()}
    assert left == {f"{i:06d}.png" for i in (*range(25), 30, 33)}
    assert Path(path, "000030.png").read_bytes() == b"mine"
    position = _stopped(f"{tmp_path}/more/", 20, 0)
    Path(tmp_path, "more", "000022.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"000022\.png: the picture there is not of this run; move it away"):
        _reopened(f"{tmp_path}/more/", position).write(FRAMES[20:25])
    assert Path(tmp_path, "more", "000022.png").read_bytes() == b"mine"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_has_no_frames_yet_goes_over_its_own_file(tmp_path: Path, name: str) -> None:
    path = f"{tmp_path}/{name}"
    record, behind = _stopped(path, 0, 24)  # killed behind its first checkpoint
    assert record["num_frames"] == 0
    with _reopened(path, (record, behind)) as sink:
        sink.write(FRAMES)
    assert len(_pictures(path)) == 40
    (tmp_path / "whole").mkdir()
    with _opened(f"{tmp_path}/whole/{name}") as sink:
        sink.write(FRAMES)
    assert np.array_equal(_pictures(path), _pictures(f"{tmp_path}/whole/{name}"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [8, 40])
def test_a_run_that_has_no_frames_yet_leaves_the_files_of_others(tmp_path: Path, name: str, length: int) -> None:
    path = f"{tmp_path}/{name}"
    position = _stopped(path, 0, 0)
    with _opened(path, METADATA | {"seed": 8}) as sink:
        sink.write(255 - FRAMES[:length])
    before = _tree(tmp_path)
    with pytest.raises(OutputError, match=r"is not what the run wrote|the picture there is not of this run"):
        _reopened(path, position).write(FRAMES)
    assert _tree(tmp_path) == before
    with _reopened(path, position, overwrite=True) as sink:
        sink.write(FRAMES)
    assert len(_pictures(path)) == 40


def test_raw_frames_of_others_are_noticed_wherever_they_part(tmp_path: Path) -> None:
    path = tmp_path / "video.rgb"
    position = _stopped(str(path), 0, 0)
    theirs = np.concatenate([FRAMES[:17], 255 - FRAMES[17:]]).tobytes()
    path.write_bytes(theirs)
    sink = _reopened(str(path), position)
    sink.write(FRAMES[:9])
    sink.write(FRAMES[9:17])
    with pytest.raises(OutputError, match="its content is not what the run wrote"):
        sink.write(FRAMES[17:24])
    sink.abort()
    assert path.read_bytes() == theirs
    path.write_bytes(FRAMES[:17].tobytes()[:-100])  # a killed run's, torn
    with _reopened(str(path), position) as sink:
        for start in range(0, 40, 9):
            sink.write(FRAMES[start : start + 9])
    assert path.read_bytes() == FRAMES.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_what_names_the_frames_is_the_same_while_it_grows_when_killed_and_when_closed(
    tmp_path: Path, name: str
) -> None:
    """The position that a run had is accepted in each of the three, and by a run that was resumed twice."""
    killed = f"{tmp_path}/killed/{name}"
    (tmp_path / "killed").mkdir()
    code = f"""
import json, os, signal, sys
sys.path[:0] = {[str(places.TESTS / "video"), str(places.TESTS), str(places.ROOT)]!r}
from test_resumed_outputs import FRAMES, _opened
sink = _opened({killed!r})
sink.write(FRAMES[:20])
print(json.dumps(sink.checkpoint()[0]), flush=True)
sink.write(FRAMES[20:31])
os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL
    record = json.loads(run.stdout)
    (tmp_path / "closed").mkdir()
    closed = f"{tmp_path}/closed/{name}"
    position = _stopped(closed)
    assert record["digest"] == position[0]["digest"]
    assert record["num_frames"] == position[0]["num_frames"]
    for path in (killed, closed):
        sink = _reopened(path, (record, position[1]))
        sink.write(FRAMES[20:29])
        second = sink.checkpoint()
        sink.abort()
        with _reopened(path, second) as sink:
            sink.write(FRAMES[29:])
    assert np.array_equal(_pictures(killed), _pictures(closed))
    (tmp_path / "whole").mkdir()
    with _opened(f"{tmp_path}/whole/{name}") as sink:
        sink.write(FRAMES)
        assert sink.checkpoint()[0]["digest"] == _checkpoint_of_resumed(killed, position)
    assert np.array_equal(_pictures(killed), _pictures(f"{tmp_path}/whole/{name}"))


def _checkpoint_of_resumed(path: str, position: Position) -> object:
    with _reopened(path, position) as sink:
        sink.write(FRAMES[20:])
        return sink.checkpoint()[0]["digest"]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_frames": "20"},
        {"num_frames": -1},
        {"num_frames": True},
        {"num_frames": None},
        {"num_frames": 1e9},
        {"path": 7},
        {"path": ["a"]},
    ],
)
def test_a_position_that_says_nothing_is_one_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    for name in NAMES:
        path = f"{tmp_path}/{name}"
        record, behind = _stopped(path)
        with pytest.raises(SessionError, match="the session does not say where its video stands"):
            _reopened(path, (record | changes, behind))


@pytest.mark.parametrize("changes", [{"num_frames": 10**15}, {"digest": None}, {"digest": 3}, {"digest": "00" * 16}])
def test_a_position_that_does_not_fit_is_one_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    for name in NAMES:
        path = f"{tmp_path}/{name}"
        record, behind = _stopped(path)
        before = _tree(tmp_path)
        with pytest.raises(MigaError, match="cannot go on with"):
            _reopened(path, (record | changes, behind))
        assert _tree(tmp_path) == before


def test_frames_of_another_size_are_one_sentence(tmp_path: Path) -> None:
    for name in NAMES:
        path = f"{tmp_path}/{name}"
        record, _ = _stopped(path)
        before = _tree(tmp_path)
        with pytest.raises(SessionError, match="the session's frames are not of its video's size"):
            _reopened(path, (record, FRAMES[:2, ::2]))
        assert _tree(tmp_path) == before


# Names -----------------------------------------------------------------------------------------------------------

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
    planted = _tree(tmp_path)
    path = f"{tmp_path}/{name}"
    position = _stopped(path)
    with _reopened(path, position) as sink:
        sink.write(FRAMES[20:])
    with _opened(path, overwrite=True) as sink:
        sink.write(FRAMES)
    made = {f"frames/{i:06d}.png" for i in range(40)} if name == "frames/" else {name}
    assert {key: value for key, value in _tree(tmp_path).items() if key not in made} == planted


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("leads", [True, False])
def test_a_link_in_the_place_of_a_new_file_is_not_followed(tmp_path: Path, name: str, leads: bool) -> None:
    victim = tmp_path / "victim"
    if leads:
        victim.write_bytes(b"hours of work")
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(OutputError, match="it exists already"):
        _opened(f"{tmp_path}/{name}")
    (tmp_path / name).unlink()
    sink = _opened(f"{tmp_path}/{name}")
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(OutputError, match="another program has created it meanwhile"):
        sink.write(FRAMES[:1])
    with _opened(f"{tmp_path}/{name}", overwrite=True) as sink:
        sink.write(FRAMES[:1])
    assert not (tmp_path / name).is_symlink()
    assert victim.exists() == leads
    assert not leads or victim.read_bytes() == b"hours of work"


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_killed_overwriting_run_is_gone_on_with_where_it_grew(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")
    for num_frames in (20, 0):
        sink = _opened(str(path), overwrite=True)
        sink.write(FRAMES[:num_frames])
        position = sink.checkpoint()
        grown = path.with_name(position[0]["growing_name"])
        assert grown.exists()
        data = grown.read_bytes()
        sink.abort()
        grown.write_bytes(data)
        with _reopened(str(path), position) as sink:
            assert path.read_bytes() == b"old"
            sink.write(FRAMES[num_frames:])
            assert path.read_bytes() == b"old"
        assert len(_pictures(str(path))) == 40
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
        with _opened(str(path), METADATA if own else METADATA | {"seed": 8}) as sink:
            position = sink.checkpoint()
            monkeypatch.setattr(VideoFileSink, "_mux", first_packet)
            sink.write(FRAMES)
        headed.replace(path)
        if own:
            with _reopened(str(path), position) as sink:
                sink.write(FRAMES)
            assert len(_pictures(str(path))) == 40
            path.unlink()
        else:
            _refused(tmp_path, str(path), position, "its content is not what the run wrote")


@pytest.mark.parametrize("name", NAMES[:3])
def test_empty_files_of_killed_overwriting_runs_are_removed(tmp_path: Path, name: str) -> None:
    """A file is made before the session file that names it is; but one that a living run has is left to it."""
    path = tmp_path / name
    path.write_bytes(b"old")
    killed, living = (_opened(str(path), overwrite=True) for _ in range(2))
    for sink in (killed, living):
        sink.checkpoint()
    assert len(list(tmp_path.iterdir())) == 3
    assert isinstance(killed, FileSink)
    assert killed._file is not None
    killed._file.close()
    for kept in beside(path), beside(path):
        kept.write_bytes(b"an hour of work")
    with _opened(str(path), overwrite=True) as sink:
        sink.write(FRAMES[:20])
    living.write(FRAMES)
    living.close()
    assert len(_pictures(str(path))) == 40
    assert sorted(entry.read_bytes() for entry in tmp_path.iterdir() if entry != path) == [b"an hour of work"] * 2


def test_what_a_killed_resumed_run_left_beside_is_used_up(tmp_path: Path) -> None:
    path = f"{tmp_path}/video.mp4"
    position = _stopped(path)
    code = f"""
import json, os, signal, sys
sys.path[:0] = {[str(places.TESTS / "video"), str(places.TESTS), str(places.ROOT)]!r}
from test_resumed_outputs import FRAMES, _reopened
from miga_engine.video.video_file import VideoFileSink
VideoFileSink._replace_old = lambda self: os.kill(os.getpid(), signal.SIGKILL)
_reopened({path!r}, ({position[0]!r}, FRAMES[{position[0]["num_frames"]} : 20]))
"""
    run = subprocess.run([sys.executable, "-c", code], check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the copy
    with _reopened(path, position) as sink:
        sink.write(FRAMES[20:])
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]
    assert read_metadata(path) == METADATA


def test_names_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    make: Callable[[str], Path] = lambda suffix: tmp_path / ("ü" * ((255 - len(suffix)) // 2) + suffix)  # noqa: E731
    for suffix in (".mp4", ".mkv", ".rgb"):
        for _ in range(2):
            with _opened(str(make(suffix)), overwrite=True) as sink:
                sink.write(FRAMES[:13])
        assert len(_pictures(str(make(suffix)))) == 13
    assert len(list(tmp_path.iterdir())) == 3
