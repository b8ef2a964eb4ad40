"""Contact sheets: a whole video, or several side by side, in one PNG."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from miga_engine.errors import OutputError
from miga_engine.video.outputs import suffixes_of
from miga_engine.video.paths import check_output, reported
from miga_engine.video.png import write_png
from miga_engine.video.sink import FrameArray

_MIN_TILE_WIDTH = 160
_GAP = 4
_BACKGROUND, _INK = 24, 232
_LABEL_SCALE = 3
_LABEL_HEIGHT = 5 * _LABEL_SCALE + 3 * _GAP
# Letters five dots high: a character, then a base-32 digit a row, whose bits are the dots from the left.
_FONT = """
A25755 B65656 C34443 D65556 E74647 F74644 G34553 H55755 I72227 J11152 K55655 L44447 Mhrlhh N9db99 O25552 P65644 Q25563
R65655 S34216 T72222 U55557 V55552 Whhlrh X55255 Y55222 Z71247 075557 126227 271747 371717 455711 574717 674757 771122
875757 975717 .00002 ,00024 :02020 -00700 +02720 /11244 =07070 (12221 )42224 %51245 _00007
"""
_GLYPHS = {entry[0]: [int(digit, 32) for digit in entry[1:]] for entry in _FONT.split()}


class ContactSheet:
    """Collects evenly spaced frames of a stream, of known or unknown length, in memory for 2·num_tiles of them."""

    def __init__(self, num_tiles: int = 24, num_columns: int = 6, num_frames: int | None = None) -> None:
        if num_tiles < 1 or num_columns < 1:
            raise ValueError(f"num_tiles is {num_tiles} and num_columns {num_columns}: give at least 1 of both")
        self.num_tiles, self.num_columns = num_tiles, num_columns
        self._wanted = (
            None if num_frames is None else {int(i) for i in np.linspace(0, max(num_frames - 1, 0), num_tiles).round()}
        )
        self._stride = 1
        self._count = 0
        self._kept: list[np.ndarray[Any, Any]] = []

    def add(self, frames: FrameArray) -> None:
        """Look at the next frames uint8 [n,H,W,3]; only those that are kept leave their device."""
        for i in range(frames.shape[0]):
            if self._is_wanted(self._count):
                frame = frames[i]
                self._kept.append(np.array(frame if isinstance(frame, np.ndarray) else frame.detach().cpu().numpy()))
                if self._wanted is None and len(self._kept) > 2 * self.num_tiles:
                    del self._kept[1::2]
                    self._stride *= 2
            self._count += 1

    def _is_wanted(self, index: int) -> bool:
        return index % self._stride == 0 if self._wanted is None else index in self._wanted

    def tiles(self) -> list["np.ndarray[Any, Any]"]:
        """The frames to show, at most num_tiles, first and last kept ones included."""
        if len(self._kept) <= self.num_tiles:
            return self._kept
        return [self._kept[int(i)] for i in np.linspace(0, len(self._kept) - 1, self.num_tiles).round()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sheet, in reading order; an older one is replaced."""
        tiles = self.tiles()
        rows = [np.stack(tiles[i : i + self.num_columns]) for i in range(0, len(tiles), self.num_columns)]
        write_contact_sheet(path, rows)


def write_contact_sheet(
    path: str | os.PathLike[str], rows: Sequence[FrameArray], labels: Sequence[str] | None = None
) -> None:
    """Write one PNG with a row of tiles per entry, uint8 [n,H,W,3], and a label above each row.

    Frames are enlarged by whole numbers until a tile is at least 160 pixels wide. Rows may differ in length and frame
    size. Labels show ASCII letters as capitals, digits and .,:-+/=()%_
    """
    check_output(path, suffixes_of("picture"), overwrite=True)
    if not rows or any(row.shape[0] == 0 for row in rows):
        raise OutputError(f"cannot write {path}: there are no frames to show")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels are given for {len(rows)} rows: give one a row")
    strips = []
    for i, row in enumerate(rows):
        strip = _strip(row if isinstance(row, np.ndarray) else row.detach().cpu().numpy())
        strips.append(strip if labels is None else np.concatenate([_label(labels[i], strip.shape[1]), strip]))
    width = max(strip.shape[1] for strip in strips)
    sheet = _blank(sum(strip.shape[0] for strip in strips) + _GAP, width)
    top = 0
    for strip in strips:
        sheet[top : top + strip.shape[0], : strip.shape[1]] = strip
        top += strip.shape[0]
    with reported(path):
        write_png(path, sheet)


def _blank(height: int, width: int) -> "np.ndarray[Any, Any]":
    return np.full((height, width, 3), _BACKGROUND, np.uint8)


def _strip(frames: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """[n,H,W,3] side by side, enlarged, with a gap left, right, between and above."""
    scale = -(-_MIN_TILE_WIDTH // frames.shape[2])
    tiles = frames.repeat(scale, 1).repeat(scale, 2)
    n, height, width = tiles.shape[:3]
    strip = _blank(height + _GAP, n * (width + _GAP) + _GAP)
    for i, tile in enumerate(tiles):
        left = _GAP + i * (width + _GAP)
        strip[_GAP:, left : left + width] = tile
    return strip


def text_dots(text: str) -> "np.ndarray[Any, Any]":
    """One line of text as dots, bool [5,n]: ASCII letters as capitals; unknown characters are left blank."""
    letters = [np.zeros((5, 0), np.int64)]
    for character in text.upper():
        rows = np.array(_GLYPHS.get(character, [0] * 5))
        num_columns = max(3, int(rows.max()).bit_length())
        letters.append(
            rows[:, None] >> np.arange(num_columns - 1, -2, -1).clip(0) & 1
        )  # the last column becomes the gap
        letters[-1][:, -1] = 0
    return np.concatenate(letters, 1).astype(bool)


def _label(text: str, width: int) -> "np.ndarray[Any, Any]":
    """One line of text, cut off at the width."""
    band = _blank(_LABEL_HEIGHT, width)
    dots = text_dots(text).repeat(_LABEL_SCALE, 0).repeat(_LABEL_SCALE, 1)[:, : max(0, width - 2 * _GAP)]
    band[2 * _GAP : 2 * _GAP + dots.shape[0], _GAP : _GAP + dots.shape[1]][dots] = _INK
    return band
