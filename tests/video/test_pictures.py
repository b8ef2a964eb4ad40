"""Pictures and contact sheets are what they show; old ones are refused or replaced."""

from pathlib import Path

import numpy as np
import pytest
import torch
from clips import FPS, HEIGHT, WIDTH, moving_square, write_clip

from miga_engine.errors import OutputError
from miga_engine.video.contact_sheet import ContactSheet, write_contact_sheet
from miga_engine.video.outputs import open_sink
from miga_engine.video.paths import check_output
from miga_engine.video.png import write_png
from miga_engine.video.reading import read_video


def test_images_round_trip(tmp_path: Path) -> None:
    frames = moving_square(9)
    write_clip(f"{tmp_path}/images/", frames)
    write_clip(tmp_path / "shot_%04d.png", frames)
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == [f"{i:06d}.png" for i in range(9)]
    for i, name in ((0, "images/000000.png"), (8, "shot_0008.png")):
        np.testing.assert_array_equal(read_video(tmp_path / name)[0], frames[i])


def test_old_images_are_refused_or_replaced(tmp_path: Path) -> None:
    write_clip(tmp_path / "a_%03d.png", moving_square(5))
    (tmp_path / "a_note.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match="it holds images already"):
        open_sink(tmp_path / "a_%03d.png", FPS, WIDTH, HEIGHT)
    write_clip(tmp_path / "a_%03d.png", moving_square(2), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_000.png", "a_001.png", "a_note.png"]


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
    frames = moving_square(10)
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
    rows = [moving_square(3), moving_square(2, 200, 50)]
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
        write_contact_sheet(tmp_path / "sheet.jpg", [moving_square(1)])
    with pytest.raises(OutputError, match="there are no frames to show"):
        ContactSheet().save(tmp_path / "sheet.png")
    (tmp_path / "sheet.png").write_bytes(b"old")
    with pytest.raises(OutputError, match="it exists already"):
        check_output(tmp_path / "sheet.png", (".png",))
    with pytest.raises(OutputError, match=r"it is a folder, and a file name ending in \.png is expected$"):
        check_output(f"{tmp_path}/", (".png",))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 96)])
def test_pictures_are_read_back_as_they_were(tmp_path: Path, size: tuple[int, int]) -> None:
    for name, image in (
        ("noise", np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)),
        ("white", np.full((*size, 3), 255, np.uint8)),
    ):
        write_png(tmp_path / f"{name}.png", image)
        np.testing.assert_array_equal(read_video(tmp_path / f"{name}.png")[0], image)
