"""How long videos go wrong, in the terms of the papers about them: drift between the ends, sink collapse, cuts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

VideoArray = npt.NDArray[np.uint8]
Curve = npt.NDArray[np.float64]

END_SHARE = 0.15
"""Of a video's frames, at either end."""

_HUES = 36  # cells of 10°
_COLOURLESS = 0.01  # mean chroma of [0,1] below which a picture has no hue
_ABRUPT = 8  # frames in which a video collapses
_AWAY, _BACK = 0.5, 0.25  # of the largest distance to the first frame
_AROUND = 12  # pairs of frames before and after the one that is judged
_FAR_ABOVE = 8  # a cut's difference over the usual one
_LEAST_USUAL = 0.5  # levels of 255


def _ends(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    n = max(1, round(END_SHARE * len(values)))
    return values[:n], values[-n:]


def start_end_contrast(curve: Curve) -> float:
    """|M(first 15 % of the frames) − M(last 15 %)| of a measure M, of which curve [T] has the frames' values.

    Source: FramePack (arXiv 2504.12626), eq. 7, where M are measures of quality.
    """
    first, last = _ends(curve)
    return float(abs(first.mean() - last.mean()))


def hue_histograms(frames: VideoArray) -> npt.NDArray[np.float64]:
    """Chroma of each frame of uint8 [T,H,W,3] by hue, in 36 cells of 10° around the circle: [T,36].

    A pixel's chroma, its largest minus its smallest channel of [0,1], is shared between the two cells nearest to its
    hue, so that their mean is its hue; the sum over cells is the frame's mean chroma. Grey has no hue and adds
    nothing.
    """

    def of(frame: VideoArray) -> npt.NDArray[np.float64]:
        red, green, blue = (frame[..., i].ravel().astype(np.float32) for i in range(3))
        highest = np.maximum(np.maximum(red, green), blue)
        chroma = highest - np.minimum(np.minimum(red, green), blue)
        is_red, is_green = highest == red, highest == green
        turned = np.where(is_red, green - blue, np.where(is_green, blue - red, red - green)) / np.maximum(chroma, 1)
        sixth = turned + np.where(is_red, 6, np.where(is_green, 2, 4)).astype(np.float32)  # of the circle, 1 … 7
        place = sixth * (_HUES / 6)
        cell = place.astype(np.int64)
        upper = chroma * (place - cell)
        counts = np.bincount(cell, chroma - upper, 2 * _HUES) + np.bincount(cell + 1, upper, 2 * _HUES)
        return np.asarray((counts[:_HUES] + counts[_HUES:]) / (255 * len(red)))

    return np.stack([of(frame) for frame in frames])


def hue_drift(histograms: npt.NDArray[np.float64]) -> float:
    """How far the hues of the last 15 % of the frames lie from those of the first, in degrees, 0 … 180.

    histograms: of `hue_histograms`. The earth mover's distance on the circle between their sums over either end:
    the mean angle by which a hue, weighted by its chroma, has turned; for cumulative histograms F and G it is
    Σ|F − G − median(F − G)|. NaN where an end has no colour. Source: Delon, Rabin and Gousseau, Transportation
    Distances on the Circle (JMIV 2011), who compare the hues of pictures by it.
    """
    first, last = (end.mean(0) for end in _ends(histograms))
    if min(first.sum(), last.sum()) < _COLOURLESS:
        return float("nan")
    difference = np.cumsum(first / first.sum() - last / last.sum())
    return float(np.abs(difference - np.median(difference)).sum() * (360 / _HUES))


def similarity_drop(features: npt.NDArray[np.float64]) -> float:
    """By how much the cosine of features [T,D] to the first frame's has fallen where it is lowest, 0 … 2."""
    x = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return float(1 - (x[1:] @ x[0]).min())


def distances_to(first: VideoArray, frames: VideoArray) -> Curve:
    """Root mean squared difference in levels of 255 of frames uint8 [T,H,W,3] to one frame [H,W,3]: [T]."""
    start = first.astype(np.float32)
    return np.array([float(np.sqrt(np.square(frame - start).mean(dtype=np.float64))) for frame in frames])


def sink_collapse(distances: Curve) -> float:
    """The largest fall within 8 frames of the distances to the first frame [T], over the largest of them.

    0 where a video only goes on, 1 where it is suddenly its first frame again. LoL's Sink-Collapse, of one video: the
    largest drop of the normalised L2 distance to the first frames, at which a video is drawn back to them. Within 8
    frames, half a second of LoL's, for what moves to and fro comes back as well, but slowly. Source: LoL
    (arXiv 2601.16914), after RIFLEx's NoRepeat score (arXiv 2502.15894).
    """
    furthest = float(distances.max())
    padded = np.pad(distances, (_ABRUPT, 0), mode="edge")
    before = np.lib.stride_tricks.sliding_window_view(padded, _ABRUPT + 1).max(1)
    return float((before - distances).max()) / furthest if furthest > 0 else 0.0


def returns(distances: Curve) -> int:
    """How often a video comes back to its first frame: its distance falls below a quarter of the largest, and was
    above a half of it before. LoL (arXiv 2601.16914) shows such falls at one and the same frames of every video."""
    furthest, is_away, num = float(distances.max()), False, 0
    for distance in distances:
        if distance > _AWAY * furthest:
            is_away = True
        elif is_away and distance < _BACK * furthest:
            is_away, num = False, num + 1
    return num


def count_cuts(differences: Curve) -> int:
    """Shot cuts: pairs whose frames differ more than 8 times as much as usual, of differences in levels [T-1].

    Usual is the median of the 25 pairs around it, at least 0.5 levels: a threshold that follows the video. A single
    foreign frame is two cuts.
    """
    padded = np.pad(differences, _AROUND, mode="reflect")
    usual = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * _AROUND + 1), axis=1)
    return int((differences > _FAR_ABOVE * np.maximum(usual, _LEAST_USUAL)).sum())
