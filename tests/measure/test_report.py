"""The command `miga eval` and its tables and pictures."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from measured import SCENE, miga

from bench.study import damage
from miga_engine.measure import measure, report
from miga_engine.tiny import world
from miga_engine.video.outputs import open_sink
from miga_engine.video.reading import read_video


def _write(path: Path, frames: np.ndarray, **metadata: object) -> Path:
    with open_sink(path, 12, frames.shape[2], frames.shape[1], metadata=metadata) as sink:
        sink.write(frames)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A video of the embedded model's world, the same standing still, and both as folders of pictures."""
    folder = tmp_path_factory.mktemp("videos")
    frames, _ = world.render(SCENE, 100, 40)
    found = {"moving": _write(folder / "moving.mp4", frames, model="tiny", prompt=world.caption(SCENE))}
    found["still"] = _write(folder / "still.mkv", damage.DAMAGES["still"](frames), model="other", prompt="a cat")
    (folder / "pictures").mkdir()
    _write(folder / "pictures" / "%06d.png", frames[:6])
    found["pictures"] = folder / "pictures"
    return found


@pytest.mark.slow
def test_command_prints_the_table_with_motion_beside_consistency(files, capsys):
    assert miga("eval", files["moving"], files["still"], "--features", "descriptor", "--flow", "lucas-kanade") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["moving.mp4", "still.mkv"]
    assert "40 frames, 96×64, 12 fps" in lines[1]
    rows = {line.strip().partition("  ")[0]: line.split()[-2:] for line in lines[2:]}
    names = [line.strip() for line in lines]
    consistency = next(i for i, name in enumerate(names) if name.startswith("consistency of features"))
    assert names[consistency + 1].startswith("motion, px/frame")
    assert float(rows["consistency of features ↑"][1]) == 1
    assert float(rows["motion, px/frame"][0]) > 0.5 > float(rows["motion, px/frame"][1])
    assert rows["subject as asked, % ↑"] == ["100.0", "–"], "the truth is taken of the embedded model's video only"
    assert any(line.startswith("! still.mkv: STILL") for line in lines)
    assert any(line.startswith("! still.mkv: FROZEN") for line in lines)
    assert "Lucas-Kanade, built in" in lines[-4] + lines[-3] + lines[-5]


@pytest.mark.slow
def test_command_writes_tables_and_a_picture(files, tmp_path, capsys):
    outputs = {suffix: tmp_path / f"table{suffix}" for suffix in (".json", ".csv")}
    quick = ["--features", "descriptor", "--flow", "lucas-kanade", "--num-frames", 20]
    seams = ["--block", 8, "--block-offset", 5, "--period", 4]
    arguments = [files["still"], "--baseline", files["moving"], *quick, *seams, "--model", "tiny"]
    with pytest.raises(AssertionError):  # 20 frames are too few latent frames for the score
        assert miga("eval", *arguments) == 0
    assert "the consistency score needs 12" in capsys.readouterr().err
    arguments = arguments[:-2]
    assert miga("eval", *arguments, "-o", outputs[".json"], "--picture", tmp_path / "picture.png") == 0
    table = capsys.readouterr().out
    assert table.split()[:2] == ["moving.mp4", "still.mkv"]
    assert re.search(r"motion, px/frame +[\d.]+ +0.00 \(-[\d.]+\)", table)
    assert "! still.mkv: LESS MOTION: 0.00 of the baseline's" in table
    assert miga("eval", *arguments, "--json", "-o", outputs[".csv"]) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads(outputs[".json"].read_text())
    assert stored == printed
    assert stored["moving.mp4"]["frames"] == 20
    assert len(stored["moving.mp4"]["curves"]["motion"]) == 19
    rows = {(row["video"], row["measure"]): row for row in csv.DictReader(outputs[".csv"].open())}
    assert float(rows["moving.mp4", "motion"]["value"]) == stored["moving.mp4"]["measures"]["motion"]
    assert rows["moving.mp4", "motion"]["computed_by"] == "Lucas-Kanade, built in"
    picture = read_video(tmp_path / "picture.png")[0]
    assert picture.shape[1] == 1440
    for colour in report._COLOURS[:2]:
        assert (np.abs(picture.astype(int) - colour) <= 1).all(-1).sum() > 500, "a curve of each video"


def test_picture_draws_the_curve_where_its_values_are(tmp_path):
    frames, _ = world.render(SCENE, 0, 9)
    result = measure(frames, features="descriptor", flow="lucas-kanade")
    ramp = list(np.linspace(0, 1, 9))
    panel = report._panel(
        ("luminance", "x", 0, 1, 1),
        {"a": {**result, "curves": {"luminance": ramp}}},
        {"a": np.array([255.0, 0, 0], np.float32)},
        400,
        (),
    )
    plot = panel[report._HEAD : report._PANEL_HEIGHT - report._FOOT, report._LEFT : 400 - 14]
    for share in (0.1, 0.5, 0.9):
        column = plot[:, round(share * (plot.shape[1] - 1)), 0]
        assert 1 - column.argmax() / (len(column) - 1) == pytest.approx(share, abs=0.02)


@pytest.mark.slow
def test_folders_are_read_in_order_and_bad_input_is_named(files, tmp_path, capsys):
    quick = ["--features", "descriptor", "--flow", "lucas-kanade"]
    assert miga("eval", files["pictures"], "--json", *quick) == 0
    result = json.loads(capsys.readouterr().out)["pictures"]
    assert (result["frames"], result["fps"]) == (6, None)
    assert result["measures"]["frozen_share"] == 0
    (tmp_path / "empty").mkdir()
    single = _write(tmp_path / "single.mp4", world.render(SCENE, 0, 1)[0])
    for arguments, message in (
        ([tmp_path / "absent.mp4"], "cannot read"),
        ([tmp_path / "empty"], "holds no pictures"),
        ([single], "2 frames or more"),
        ([files["moving"], "--prompt", "a cat"], "names no subject"),
        ([files["moving"], "--block", "100"], "0 borders of blocks of 100"),
        ([files["moving"], "-o", tmp_path / "table.txt"], "not one of .json, .csv"),
        ([files["moving"], "--picture", tmp_path / "no" / "p.png"], "does not exist"),
        ([files["moving"], "--model", tmp_path / "absent"], "there is no model at"),
        ([files["moving"], "--num-frames", 1], "give 2 or more"),
        ([], "the following arguments are required: FILE"),
    ):
        assert miga("eval", *arguments, *quick) == 2, arguments
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
