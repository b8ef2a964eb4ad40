"""What the first frame will be, while it is being made: a strip of predictions, in a PNG or in the terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miga_engine.cli.terminal import Screen
from miga_engine.errors import OutputError
from miga_engine.runtime.stream import Event, Stream
from miga_engine.video.outputs import suffixes_of
from miga_engine.video.paths import check_output, reported
from miga_engine.video.png import write_png

NUM_TILES = 6
_TILE_COLUMNS = 20  # of the terminal
TERMINAL = "-"


def check_preview(name: str, *, overwrite: bool) -> str:
    """Where the strip goes, if it can: OutputError otherwise."""
    if name != TERMINAL:
        return str(check_output(name, suffixes_of("picture"), overwrite=overwrite))
    if not Screen().isatty() or os.environ.get("COLORTERM") not in ("truecolor", "24bit"):
        raise OutputError(
            "this terminal shows no pictures (no COLORTERM=truecolor): give a PNG, as --preview first.png"
        )
    return name


class Preview:
    """Takes `NUM_TILES` predictions, evenly spaced over the passes to the first frame."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tiles: list[np.ndarray[Any, Any]] = []
        self._rows_shown = 0

    def on_event(self, event: Event, stream: Stream) -> None:
        """Look at an event of the stream, of kind progress; OutputError where the strip cannot be written."""
        passes, num_passes = event.data["passes"], event.data["passes_to_first_frame"]
        is_due = (len(self._tiles) + 1) * num_passes <= passes * NUM_TILES
        if event.data["num_frames_out"] or not is_due or len(self._tiles) == NUM_TILES:
            return
        picture = stream.preview()
        if picture is None:
            return
        self._tiles.append(picture.cpu().numpy())
        if self._name == TERMINAL:
            self._show()
        else:
            with reported(Path(self._name)):
                write_png(self._name, np.concatenate(self._tiles, axis=1))

    def _show(self) -> None:
        rows = blocks(np.concatenate([_scaled(tile) for tile in self._tiles], axis=1))
        up = f"\x1b[{self._rows_shown}F" if self._rows_shown else "\r\x1b[K"
        Screen().write(up + "".join(f"{row}\x1b[K\n" for row in rows))
        self._rows_shown = len(rows)


def blocks(picture: np.ndarray[Any, Any]) -> list[str]:
    """A picture uint8 `[2n,W,3]` as n rows of W half blocks in 24-bit colours."""
    rows = []
    for upper, lower in zip(picture[::2].tolist(), picture[1::2].tolist(), strict=True):
        cells = [
            f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{below_r};{below_g};{below_b}m▀"
            for (r, g, b), (below_r, below_g, below_b) in zip(upper, lower, strict=True)
        ]
        rows.append("".join(cells) + "\x1b[0m")
    return rows


def _scaled(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A frame uint8 `[H,W,3]` as wide as a tile of the terminal, with an even number of rows."""
    height, width = picture.shape[:2]
    rows = max(2, 2 * round(_TILE_COLUMNS * height / width / 2))
    made = torch.nn.functional.interpolate(
        torch.from_numpy(picture).permute(2, 0, 1)[None].float(), (rows, _TILE_COLUMNS), mode="area"
    )
    return made[0].round().byte().permute(1, 2, 0).numpy()
