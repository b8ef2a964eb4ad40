"""An output is gone on with only where it is provably the run's own; what anybody else wrote is left as it is."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import places
import pytest
from clips import HEIGHT, METADATA, WIDTH
from stopped_runs import FRAMES, NAMES, RATE, Position, opened, pictures, refused, reopened, stopped, tree

from miga_engine.errors import MigaError, OutputError, SessionError
from miga_engine.files import beside
from miga_engine.video.outputs import open_sink
from miga_engine.video.png import write_png


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_position_does_not_say_where_to_write(tmp_path: Path, name: str) -> None:
    for folder in ("mine", "elsewhere", "other"):
        (tmp_path / folder).mkdir()
    path = f"{tmp_path}/mine/{name}"
    position, behind = stopped(path)
    for kept in tmp_path.joinpath("elsewhere"), tmp_path.joinpath("other"):
        shutil.copytree(tmp_path / "mine", kept, dirs_exist_ok=True)
    before = tree(tmp_path / "elsewhere")
    for growing in ("../elsewhere/video.mp4", f"{tmp_path}/elsewhere/{name}", "video.0a1b2c3d.part.mp4", 7, [], None):
        elsewhere = position | {"path": f"{tmp_path}/elsewhere/{name}", "growing_name": growing}
        with reopened(path, (elsewhere, behind)) as sink:
            sink.write(FRAMES[20:])
        assert len(pictures(path)) == 40
        shutil.rmtree(tmp_path / "mine")
        shutil.copytree(tmp_path / "other", tmp_path / "mine")
    assert tree(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_growing_file_that_is_a_link_is_not_followed(tmp_path: Path, name: str) -> None:
    """A position that names a link of the right form, beside another file of the user's."""
    path, precious = Path(tmp_path, name), Path(tmp_path, f"precious{Path(name).suffix}")
    path.write_bytes(b"old")
    position, behind = stopped(str(precious))
    kept = precious.read_bytes()
    growing = beside(path)
    growing.symlink_to(precious)
    refused(tmp_path, str(path), (position | {"growing_name": growing.name}, behind), "cannot go on with .*video")
    assert precious.read_bytes() == kept


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_was_edited_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    path = f"{tmp_path}/{name}"
    position = stopped(path)
    edited = Path(path, "000003.png") if name == "frames/" else Path(path)
    if name == "video.rgb":
        data = bytearray(edited.read_bytes())
        data[5000] ^= 1
        edited.write_bytes(data)
    elif name == "frames/":
        write_png(edited, 255 - FRAMES[3])
    else:
        edited.unlink()
        with opened(path) as sink:  # another video of the same run, one frame of which was mended
            sink.write(np.concatenate([FRAMES[:3], 255 - FRAMES[3:4], FRAMES[4:24]]))
    refused(tmp_path, path, position, "its content is not what the run wrote; name the file the run wrote, or start")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_kind_or_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    path = f"{tmp_path}/{name}"
    position = stopped(path)
    for other in NAMES:
        (tmp_path / "other").mkdir()
        there = f"{tmp_path}/other/{other}"
        with open_sink(there, RATE, WIDTH, HEIGHT) as sink:
            sink.write(255 - FRAMES)
        refused(tmp_path, there, position, "^cannot go on with .*other/.*; name the file the run wrote, or start")
        shutil.rmtree(tmp_path / "other")
    (tmp_path / "notes.mp4").write_bytes(b"not a video")
    if name == "video.mp4":
        refused(tmp_path, f"{tmp_path}/notes.mp4", position, "its content is not what the run wrote")
    refused(tmp_path, "-", position, "^cannot go on with -: the run did not write such a file")


def test_pictures_that_are_missing_at_the_beginning_are_noticed(tmp_path: Path) -> None:
    path = f"{tmp_path}/frames/"
    position = stopped(path)
    Path(path, "000000.png").rename(tmp_path / "away.png")
    refused(tmp_path, path, position, "it holds fewer than the 20 frames it had")


def test_a_picture_that_is_a_link_is_not_the_runs(tmp_path: Path) -> None:
    path = f"{tmp_path}/frames/"
    position = stopped(path)
    Path(path, "000004.png").rename(tmp_path / "away.png")
    Path(path, "000004.png").symlink_to(tmp_path / "away.png")
    refused(tmp_path, path, position, r"cannot go on with .*000004\.png: it is a link; name the file itself")


def test_pictures_of_others_behind_the_run_are_kept(tmp_path: Path) -> None:
    path = f"{tmp_path}/frames/"
    position = stopped(path, 20, 12)  # 20 to 31 are of the killed run
    write_png(Path(path, "000033.png"), FRAMES[0])
    Path(path, "000030.png").write_bytes(b"mine")
    with reopened(path, position) as sink:
        sink.write(FRAMES[20:25])
    left = {entry.name for entry in Path(path).iterdir()}
    assert left == {f"{i:06d}.png" for i in (*range(25), 30, 33)}
    assert Path(path, "000030.png").read_bytes() == b"mine"
    position = stopped(f"{tmp_path}/more/", 20, 0)
    Path(tmp_path, "more", "000022.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"000022\.png: the picture there is not of this run; move it away"):
        reopened(f"{tmp_path}/more/", position).write(FRAMES[20:25])
    assert Path(tmp_path, "more", "000022.png").read_bytes() == b"mine"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_has_no_frames_yet_goes_over_its_own_file(tmp_path: Path, name: str) -> None:
    path = f"{tmp_path}/{name}"
    record, behind = stopped(path, 0, 24)  # killed behind its first checkpoint
    assert record["num_frames"] == 0
    with reopened(path, (record, behind)) as sink:
        sink.write(FRAMES)
    assert len(pictures(path)) == 40
    (tmp_path / "whole").mkdir()
    with opened(f"{tmp_path}/whole/{name}") as sink:
        sink.write(FRAMES)
    assert np.array_equal(pictures(path), pictures(f"{tmp_path}/whole/{name}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [8, 40])
def test_a_run_that_has_no_frames_yet_leaves_the_files_of_others(tmp_path: Path, name: str, length: int) -> None:
    path = f"{tmp_path}/{name}"
    position = stopped(path, 0, 0)
    with opened(path, METADATA | {"seed": 8}) as sink:
        sink.write(255 - FRAMES[:length])
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"is not what the run wrote|the picture there is not of this run"):
        reopened(path, position).write(FRAMES)
    assert tree(tmp_path) == before
    with reopened(path, position, overwrite=True) as sink:
        sink.write(FRAMES)
    assert len(pictures(path)) == 40


def test_raw_frames_of_others_are_noticed_wherever_they_part(tmp_path: Path) -> None:
    path = tmp_path / "video.rgb"
    position = stopped(str(path), 0, 0)
    theirs = np.concatenate([FRAMES[:17], 255 - FRAMES[17:]]).tobytes()
    path.write_bytes(theirs)
    sink = reopened(str(path), position)
    sink.write(FRAMES[:9])
    sink.write(FRAMES[9:17])
    with pytest.raises(OutputError, match="its content is not what the run wrote"):
        sink.write(FRAMES[17:24])
    sink.abort()
    assert path.read_bytes() == theirs
    path.write_bytes(FRAMES[:17].tobytes()[:-100])  # a killed run's, torn
    with reopened(str(path), position) as sink:
        for start in range(0, 40, 9):
            sink.write(FRAMES[start : start + 9])
    assert path.read_bytes() == FRAMES.tobytes()


@pytest.mark.slow
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
from stopped_runs import FRAMES, opened
sink = opened({killed!r})
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
    position = stopped(closed)
    assert record["digest"] == position[0]["digest"]
    assert record["num_frames"] == position[0]["num_frames"]
    for path in (killed, closed):
        sink = reopened(path, (record, position[1]))
        sink.write(FRAMES[20:29])
        second = sink.checkpoint()
        sink.abort()
        with reopened(path, second) as sink:
            sink.write(FRAMES[29:])
    assert np.array_equal(pictures(killed), pictures(closed))
    (tmp_path / "whole").mkdir()
    with opened(f"{tmp_path}/whole/{name}") as sink:
        sink.write(FRAMES)
        assert sink.checkpoint()[0]["digest"] == _checkpoint_of_resumed(killed, position)
    assert np.array_equal(pictures(killed), pictures(f"{tmp_path}/whole/{name}"))


def _checkpoint_of_resumed(path: str, position: Position) -> object:
    with reopened(path, position) as sink:
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
        record, behind = stopped(path)
        with pytest.raises(SessionError, match="the session does not say where its video stands"):
            reopened(path, (record | changes, behind))


@pytest.mark.parametrize("changes", [{"num_frames": 10**15}, {"digest": None}, {"digest": 3}, {"digest": "00" * 16}])
def test_a_position_that_does_not_fit_is_one_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    for name in NAMES:
        path = f"{tmp_path}/{name}"
        record, behind = stopped(path)
        before = tree(tmp_path)
        with pytest.raises(MigaError, match="cannot go on with"):
            reopened(path, (record | changes, behind))
        assert tree(tmp_path) == before


def test_frames_of_another_size_are_one_sentence(tmp_path: Path) -> None:
    for name in NAMES:
        path = f"{tmp_path}/{name}"
        record, _ = stopped(path)
        before = tree(tmp_path)
        with pytest.raises(SessionError, match="the session's frames are not of its video's size"):
            reopened(path, (record, FRAMES[:2, ::2]))
        assert tree(tmp_path) == before
