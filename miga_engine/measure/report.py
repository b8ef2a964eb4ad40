"""What was measured, for people: a table in text, CSV or JSON, and a picture of curves over time and frames."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from miga_engine.files import write_whole
from miga_engine.measure.catalogue import MEASURES
from miga_engine.video.contact_sheet import text_dots
from miga_engine.video.outputs import suffixes_of
from miga_engine.video.paths import check_output, reported
from miga_engine.video.png import write_png

_ARROWS = {"higher": "↑", "lower": "↓", "": " "}

# table -----------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Mapping[str, Any]], baseline: str | None = None) -> str:
    """Results of `measure` by name, one column each; with a baseline, what each differs from it by is added."""
    names = sorted(results, key=lambda name: name != baseline)
    shown = [name for name in MEASURES if any(name in results[n]["measures"] for n in names)]
    rows = [["", *names], ["", *(_size(results[name]) for name in names)]]
    group = ""
    for measure in shown:
        entry = MEASURES[measure]
        if entry.group != group:
            group = entry.group
            rows.append([group])
        unit = f", {entry.unit}" if entry.unit else ""
        label = f"  {entry.label}{unit} {_ARROWS[entry.better]}"
        rows.append([label, *(_cell(results, measure, name, baseline) for name in names)])
    widths = [max(len(row[i]) for row in rows if len(row) > i > 0 or i == 0) for i in range(len(names) + 1)]
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("   ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())
    lines += ["", *_notes(results, names, baseline)]
    return "\n".join(lines)


def _size(result: Mapping[str, Any]) -> str:
    fps = "" if result["fps"] is None else f", {result['fps']:.3g} fps"
    return f"{result['frames']} frames, {result['width']}×{result['height']}{fps}"


def _cell(results: Mapping[str, Mapping[str, Any]], measure: str, name: str, baseline: str | None) -> str:
    entry = MEASURES[measure]
    value = results[name]["measures"].get(measure)
    text = entry.text(value)
    if baseline is None or name == baseline:
        return text
    other = results[baseline]["measures"].get(measure)
    if value is None or other is None:
        return text + " " * 12
    change = (value - other) * entry.factor
    return f"{text} ({change:+.{entry.digits}f})".ljust(len(text) + 12)


def _notes(results: Mapping[str, Mapping[str, Any]], names: Sequence[str], baseline: str | None) -> list[str]:
    """Who computed what, and the flags."""
    by = {f"{MEASURES[m].label} by {who}" for name in names for m, who in results[name]["computed_by"].items()}
    lines = ["; ".join(sorted(by)) + ". ↑ higher is better, ↓ lower is better.", _CAUTION]
    for name in names:
        flags = list(results[name]["flags"])
        if baseline is not None and name != baseline:
            flags += compared_flags(results[name], results[baseline])
        lines += [f"! {name}: {flag}" for flag in flags]
    return lines


_CAUTION = "Consistency is to be read beside motion: a still picture has the most of it."


def compared_flags(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """What must be read beside a comparison of two results of `measure`."""
    share = result["measures"]["motion"] / max(baseline["measures"]["motion"], 1e-6)
    flags = []
    if share < 0.8:
        flags.append(f"LESS MOTION: {share:.2f} of the baseline's; a gain in consistency may be stillness")
    for name in ("consistency", "motion"):
        if result["computed_by"][name] != baseline["computed_by"][name]:
            flags.append(f"NOT COMPARABLE: {name} was computed by another method than the baseline's")
    return flags


def write_table(path: str | os.PathLike[str], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes results of `measure` by name: everything as .json, or a row a name and measure as .csv."""
    target = Path(path)
    if target.suffix == ".json":
        with reported(target):
            write_whole(target, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        return
    with io.StringIO(newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["video", "measure", "value", "better", "computed_by", "meaning"])
        for name, result in results.items():
            for measure, value in result["measures"].items():
                entry = MEASURES[measure]
                who = result["computed_by"].get(measure, "")
                rows.writerow([name, measure, "" if value is None else repr(value), entry.better, who, entry.meaning])
        with reported(target):
            write_whole(target, stream.getvalue())


# picture ---------------------------------------------------------------------------------------------------------

_WIDTH, _MARGIN, _GAP, _COLUMNS, _TILES = 1440, 28, 20, 3, 8
_PANEL_HEIGHT, _HEAD, _FOOT, _LEFT = 190, 40, 26, 58
_PAPER, _PANEL, _GRID, _FAINT, _INK, _ALARM = (
    np.array(rgb, np.float32)
    for rgb in ((18, 20, 24), (28, 31, 37), (52, 57, 66), (140, 148, 160), (232, 235, 240), (255, 107, 94))
)
_COLOURS = np.array(  # told apart by most colour-blind eyes (Okabe and Ito)
    [(86, 180, 233), (240, 170, 50), (0, 190, 140), (220, 130, 180), (240, 228, 66), (213, 94, 0)], np.float32
)
_Panel = tuple[str, str, float | None, float | None, float]
# curve, title, the axis: lowest end and highest end where they are given, and its smallest length
_PANELS: tuple[_Panel, ...] = (
    ("consistency", "consistency", None, 1, 0.04),
    ("motion", "motion, px/frame", 0, None, 0.5),
    ("difference", "frame difference, levels", 0, None, 1),
    ("subject_consistency", "subject consistency", None, 1, 0.04),
    ("background_consistency", "background consistency", None, 1, 0.04),
    ("warping_error", "warping error", 0, None, 1e-3),
    ("colour_overlap", "colours as at first", None, 1, 0.2),
    ("distance", "distance to the first frame, levels", 0, None, 5),
    ("saturation", "saturation", None, None, 0.1),
    ("luminance", "luminance", None, None, 0.1),
    ("sharpness", "sharpness", 0, None, 1),
    ("noise", "noise, levels", 0, None, 0.5),
    ("truth_accuracy", "read as asked, share", 0, 1, 1),
    ("truth_colour_profile_distance", "colours off the true world", 0, None, 0.05),
)


def shown_frames(num_frames: int) -> list[int]:
    """Numbers of the frames of a video that its picture shows."""
    return [int(i) for i in np.linspace(0, num_frames - 1, min(_TILES, num_frames)).round()]


def write_picture(
    path: str | os.PathLike[str],
    results: Mapping[str, Mapping[str, Any]],
    videos: Mapping[str, npt.NDArray[np.uint8]],
    borders: Sequence[int] = (),
) -> None:
    """Writes a PNG: frames of each video, and the curves of all results of `measure` over time.

    videos: all frames of each uint8 [T,H,W,3], or those of `shown_frames` alone.
    borders: frame numbers before which committed blocks end, marked under the frame differences.
    Raises OutputError where the file cannot be written.
    """
    check_output(path, suffixes_of("picture"), overwrite=True)
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(results)}
    strips = [_film(name, results[name], videos[name], colours[name]) for name in results]
    panels = [panel for panel in _PANELS if any(panel[0] in result["curves"] for result in results.values())]
    width = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) // _COLUMNS
    lines = []
    for start in range(0, len(panels), _COLUMNS):
        line = _sheet(_PANEL_HEIGHT + _GAP, _WIDTH)
        for i, panel in enumerate(panels[start : start + _COLUMNS]):
            left = _MARGIN + i * (width + _GAP)
            marks = borders if panel[0] == "difference" else ()
            line[:_PANEL_HEIGHT, left : left + width] = _panel(panel, results, colours, width, marks)
        lines.append(line)
    sheet = np.concatenate([_sheet(_MARGIN, _WIDTH), *strips, *lines, _sheet(_MARGIN - _GAP, _WIDTH)])
    with reported(path):
        write_png(path, sheet.round().clip(0, 255).astype(np.uint8))


def write_curves(
    path: str | os.PathLike[str], title: str, labels: Sequence[str], curves: Mapping[str, Sequence[float]]
) -> None:
    """Writes a PNG of curves over named places, zero marked, each with its name; NaN is left out.

    Raises OutputError where the file cannot be written.
    """
    check_output(path, suffixes_of("picture"), overwrite=True)
    values = np.array([list(curve) for curve in curves.values()], np.float64)
    low, high = _axis(np.append(values[np.isfinite(values)], 0.0), None, None, 1.0)
    height, legend = 460, 28 * len(curves)
    sheet = _sheet(_HEAD + height + _FOOT + legend + 2 * _MARGIN, 960)
    _write(sheet, title, _MARGIN, 13, _INK)
    plot = sheet[_HEAD : _HEAD + height, _MARGIN + _LEFT : -_MARGIN]
    plot[:] = _PANEL
    for value in (low, 0.0, high):
        row = round((high - value) / (high - low) * (height - 1))
        plot[row] = _GRID if value else _FAINT
        text = _number(value, high - low)
        _write(sheet, text, _MARGIN + _LEFT - 8 - _text_width(text), _HEAD + row - 5, _FAINT)
    for i, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        if i >= len(_COLOURS):  # the colour of another curve already
            colour = (colour + _PANEL) / 2
        _draw(plot, (np.array(curve, np.float64) - low) / (high - low), 0, len(labels), colour)
        top = _HEAD + height + _FOOT + _MARGIN + 28 * i
        sheet[top : top + 14, _MARGIN : _MARGIN + 14] = colour
        _write(sheet, name, _MARGIN + 26, top, _INK)
    for i, label in enumerate(labels):
        left = _MARGIN + _LEFT + round(i / max(len(labels) - 1, 1) * (plot.shape[1] - 1)) - _text_width(label) // 2
        _write(sheet, label, min(left, 960 - _MARGIN - _text_width(label)), _HEAD + height + 8, _FAINT)
    with reported(path):
        write_png(path, sheet.round().clip(0, 255).astype(np.uint8))


def _sheet(height: int, width: int, colour: npt.NDArray[Any] = _PAPER) -> npt.NDArray[np.float32]:
    return np.broadcast_to(colour, (height, width, 3)).astype(np.float32)


def _film(
    name: str, result: Mapping[str, Any], frames: npt.NDArray[np.uint8], colour: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """A heading and evenly spaced frames with their numbers."""
    import torch
    import torch.nn.functional as F

    chosen = shown_frames(result["frames"])
    if len(frames) != len(chosen):
        frames = frames[chosen]
    width = (_WIDTH - 2 * _MARGIN - (_TILES - 1) * 8) // _TILES
    height = max(1, round(width * frames.shape[1] / frames.shape[2]))
    picked = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    tiles = F.interpolate(picked, (height, width), mode="bicubic", antialias=True).permute(0, 2, 3, 1).numpy()
    flags = [flag.partition(":")[0] for flag in result["flags"]]
    strip = _sheet(_HEAD + height + _FOOT, _WIDTH)
    strip[2:16, _MARGIN : _MARGIN + 14] = colour
    end = _write(strip, name, _MARGIN + 26, 2, _INK, 3)
    end = _write(strip, _size(result).replace("×", " x "), end + 24, 5, _FAINT)
    _write(strip, "  ".join(flags), end + 24, 5, _ALARM)
    for i, tile in enumerate(tiles):
        left = _MARGIN + i * (width + 8)
        strip[_HEAD - 12 : _HEAD - 12 + height, left : left + width] = tile
        _write(strip, str(chosen[i]), left, _HEAD + height - 4, _FAINT)
    return strip


def _panel(
    panel: _Panel,
    results: Mapping[str, Mapping[str, Any]],
    colours: Mapping[str, npt.NDArray[Any]],
    width: int,
    borders: Sequence[int],
) -> npt.NDArray[np.float32]:
    """One curve of every result, with two labelled ends, frame numbers and each one's mean."""
    key, title, lowest, highest, shortest = panel
    curves = {
        name: np.array([np.nan if x is None else x for x in result["curves"][key]], np.float64)
        for name, result in results.items()
        if key in result["curves"]
    }
    values = np.concatenate(list(curves.values()))
    values = values[np.isfinite(values)]
    low, high = _axis(values, lowest, highest, shortest)
    num_frames = max(result["frames"] for result in results.values())
    sheet = _sheet(_PANEL_HEIGHT, width, _PANEL)
    plot = sheet[_HEAD : _PANEL_HEIGHT - _FOOT, _LEFT : width - 14]
    for share in (0.0, 0.5, 1.0):
        row = round((1 - share) * (len(plot) - 1))
        plot[row] = _GRID
        text = _number(low + share * (high - low), high - low)
        _write(sheet, text, _LEFT - 8 - _text_width(text), _HEAD + row - 5, _FAINT)
    for border in borders:
        column = round(border / max(num_frames - 1, 1) * (plot.shape[1] - 1))
        plot[:, column : column + 1] = _GRID
    for name, curve in curves.items():
        first = results[name]["frames"] - len(curve)  # a value of a pair stands at its later frame
        _draw(plot, (curve - low) / (high - low), first, num_frames, colours[name])
    _write(sheet, "0", _LEFT, _PANEL_HEIGHT - 17, _FAINT)
    last = str(num_frames - 1)
    _write(sheet, last, width - 14 - _text_width(last), _PANEL_HEIGHT - 17, _FAINT)
    end = _write(sheet, title, 14, 13, _INK)
    right = width - 14
    for name, curve in reversed(list(curves.items())):
        mean = float(np.nanmean(curve)) if np.isfinite(curve).any() else 0.0
        text = _number(mean, abs(mean) / 10)
        right -= _text_width(text)
        if right > end + 10:
            _write(sheet, text, right, 13, colours[name])
        right -= 14
    return sheet


def _axis(
    values: npt.NDArray[Any], lowest: float | None, highest: float | None, shortest: float
) -> tuple[float, float]:
    """Ends of an axis: as given, else all values with some air, at least `shortest` long."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    air = max(0.06 * (high - low), (shortest - (high - low)) / 2)
    if lowest is not None:
        return lowest, highest if highest is not None else max(high + air, lowest + shortest)
    if highest is not None:
        return min(low - air, highest - shortest), highest
    return low - air, high + air


def _draw(
    plot: npt.NDArray[np.float32], heights: npt.NDArray[Any], first: int, num_frames: int, colour: npt.NDArray[Any]
) -> None:
    """A curve with heights in [0,1] from frame `first` on, two pixels thick and smooth, in place."""
    rows, columns = plot.shape[:2]
    places = first + np.arange(len(heights))
    seen = np.isfinite(heights)
    if not seen.any():
        return
    inside = np.linspace(-0.5, 0.5, 1 + max(4, 2 * -(-num_frames // columns)))  # of a column, both of its edges
    x = (np.arange(columns)[:, None] + inside) / max(columns - 1, 1) * (num_frames - 1)
    y = (1 - np.interp(x, places[seen], heights[seen]).clip(-0.05, 1.05)) * (rows - 1) + 0.5
    drawn = (x[:, -1] >= places[0]) & (x[:, 0] <= places[-1])
    top, bottom = y[drawn].min(1) - 1, y[drawn].max(1) + 1
    r = np.arange(rows)[:, None]
    cover = np.clip(np.minimum(r + 1, bottom) - np.maximum(r, top), 0, 1)[..., None].astype(np.float32)
    plot[:, drawn] += cover * (colour - plot[:, drawn])


def _number(value: float, span: float) -> str:
    """As many digits as tell values apart over the length of an axis, two of its leading ones."""
    digits = max(0, min(5, 1 - int(np.floor(np.log10(max(span, 1e-9))))))
    return f"{value:.{digits}f}"


def _write(
    sheet: npt.NDArray[np.float32], text: str, left: int, top: int, colour: npt.NDArray[Any], scale: int = 2
) -> int:
    """Text in place, cut off at the edge; where it ends."""
    dots = text_dots(text).repeat(scale, 0).repeat(scale, 1)
    top, left = max(top, 0), max(left, 0)
    area = sheet[top : top + len(dots), left : left + dots.shape[1]]
    area[dots[: area.shape[0], : area.shape[1]]] = colour
    return left + dots.shape[1]


def _text_width(text: str, scale: int = 2) -> int:
    return text_dots(text).shape[1] * scale - scale
