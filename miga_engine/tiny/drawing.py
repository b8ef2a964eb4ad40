"""The shapes of the embedded world, drawn by NumPy or torch: `xp` is the library, its arrays come in and go out.

A shape is a signed distance to its edge, negative inside, in pixels of a picture 64 high; `cover` makes of it the share
of a pixel that it covers. Shapes on the ground have u to the right of their middle and v upwards from their foot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Put = Callable[[npt.NDArray[Any]], Any]
"""Makes an array of the library of one of NumPy's."""

_BASKET_RGB = np.array((0.36, 0.22, 0.12), np.float32)
_BEAK_RGB = np.array((1.0, 0.60, 0.10), np.float32)
WINDOW = (0.28, 0.28, 0.36)  # of houses and towers, where no light burns
_WINDOW_RGB = np.array((0.14, 0.18, 0.28), np.float32)


def cover(xp: Any, distance: Any) -> Any:
    """Coverage of a pixel from its signed distance to an edge, smooth over 1.6 pixels."""
    x = xp.clip(0.5 - distance * (1 / 1.6), 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def ellipse(xp: Any, u: Any, v: Any, a: float, b: float) -> Any:
    """Approximate signed distance to an ellipse with half axes a and b around the origin."""
    k = xp.sqrt((u / a) ** 2 + (v / b) ** 2)
    return (k - 1.0) * min(a, b)


def polygon(xp: Any, u: Any, v: Any, corners: Sequence[tuple[float, float]]) -> Any:
    """Signed distance (a bound outside) to a convex polygon, corners clockwise on the screen."""
    d = xp.full_like(u, -1e3)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        length = math.hypot(x1 - x0, y1 - y0)
        d = xp.maximum(d, ((y1 - y0) * (u - x0) - (x1 - x0) * (v - y0)) / length)
    return d


_WAIST = {"balloon": -5.0, "kite": -3.0, "bird": 0.0, "plane": 0.0}  # where a band goes round, v


def _patterned(xp: Any, kind: str, pattern: str, u: Any, v: Any, body: Any) -> Any:
    """The subject's body `[N,H,W,3]` in its pattern: parts of it are much darker, or white."""
    if pattern == "striped":  # upright stripes, dark
        return body * (1.0 - 0.55 * cover(xp, 2.2 * xp.sin(1.05 * u)))[..., None]
    if pattern == "spotted":  # white spots
        spots = xp.sqrt(((u + 2.6) % 5.2 - 2.6) ** 2 + ((v + 6.1) % 5.2 - 2.6) ** 2) - 1.5
        return body + cover(xp, spots)[..., None] * (0.95 - body)
    if pattern == "banded":  # a level dark band
        return body * (1.0 - 0.55 * cover(xp, xp.abs(v - _WAIST[kind]) - 1.8))[..., None]
    return body


def subject(
    xp: Any, kind: str, u: Any, v: Any, colour: Any, phase: Any, put: Put, pattern: str = "plain"
) -> tuple[Any, Any]:
    """Colour `[N,H,W,3]` and coverage `[N,H,W]` of one kind of subject, around its centre, v downwards."""
    shade = 1.0 + 0.012 * xp.clip(-u - 1.2 * v, -14, 14)
    body = _patterned(xp, kind, pattern, u, v, xp.clip(colour[:, None, None, :] * shade[..., None], 0, 1))
    rgb = 1.0 * body
    alpha = xp.zeros_like(u)

    def paint(distance: Any, of: Any) -> None:
        share = cover(xp, distance)
        rgb[...] += share[..., None] * (of - rgb)
        alpha[...] = xp.maximum(alpha, share)

    if kind == "balloon":
        envelope = xp.minimum(
            ellipse(xp, u, v + 4.0, 9.0, 9.5), polygon(xp, u, v, ((-7.6, 1), (7.6, 1), (2.4, 8), (-2.4, 8)))
        )
        basket = put(_BASKET_RGB)
        paint(xp.maximum(xp.abs(u) - 2.6, xp.abs(v - 11.0) - 2.2), basket)
        paint(xp.maximum(xp.abs(u) - 1.6, xp.abs(v - 8.5) - 1.5), basket)
        paint(envelope, body)
    elif kind == "kite":
        sway = 2.2 * xp.sin(0.55 * v - phase)
        paint(xp.maximum(xp.abs(u - sway * xp.clip((v - 8) / 6, 0, 1)) - 0.9, xp.abs(v - 14.0) - 6.0), body)
        diamond = xp.maximum(
            xp.abs(u) * 0.74 + xp.clip(-(v + 3.0), 0, None) * 0.74 - 7.2, xp.abs(u) * 0.82 + (v + 3.0) * 0.56 - 7.6
        )
        paint(diamond, body)
        dark = body * (1.0 - 0.32 * (u > 0))[..., None]
        paint(xp.maximum(diamond, -u), dark)
    elif kind == "bird":
        lift = 0.15 + 0.45 * xp.sin(phase)
        span = xp.abs(u)
        centre = -lift * span + 0.022 * lift * span**2
        paint(xp.maximum((xp.abs(v - centre) - 3.6 * (1 - span / 16.0)) * 0.9, span - 15.0), body * 0.85)
        paint(ellipse(xp, u, v - 0.5, 4.6, 5.2), body)
        paint(ellipse(xp, u, v - 1.2, 1.5, 1.5), put(_BEAK_RGB))
    else:
        paint(polygon(xp, u, v, ((-13.5, -9), (-10, -9), (-5, -1), (-12, -1))), body * 0.8)
        paint(ellipse(xp, u, v, 14.0, 4.2), body)
        paint(polygon(xp, u, v, ((-3.5, 0.5), (5.0, 0.5), (-3.0, 9), (-8.0, 9))), body * 0.72)
        paint(ellipse(xp, u - 8.0, v + 1.6, 2.6, 1.5), put(_WINDOW_RGB))
    return rgb, alpha


def sky_ramp(xp: Any, y: Any) -> Any:
    """How far the sky is from zenith to horizon at rows y, 0 to 1."""
    return xp.clip(y / 46.0, 0, 1) ** 1.2


def _box(xp: Any, u: Any, v: Any, left: float, right: float, foot: float, top: float) -> Any:
    return xp.maximum(
        xp.abs(u - (left + right) / 2) - (right - left) / 2, xp.abs(v - (foot + top) / 2) - (top - foot) / 2
    )


def _roof(xp: Any, u: Any, v: Any, half: float, foot: float, top: float) -> Any:
    slope = half / (top - foot)
    return xp.maximum((xp.abs(u) - slope * (top - v)) / math.hypot(1, slope), foot - v)


def tree(xp: Any, u: Any, v: Any) -> list[tuple[Any, tuple[float, float, float]]]:
    """A fir, 7 high and 4.4 wide: distances and colours of its parts, those behind first."""
    crown = xp.minimum(_roof(xp, u, v, 2.2, 1.2, 5.2), _roof(xp, u, v, 1.7, 3.4, 7.0))
    return [(_box(xp, u, v, -0.5, 0.5, -1.5, 1.6), (0.30, 0.20, 0.12)), (crown, (0.10, 0.36, 0.18))]


def house(xp: Any, u: Any, v: Any) -> list[tuple[Any, tuple[float, float, float]]]:
    """A house, 5.8 high and 6 wide."""
    return [
        (_box(xp, u, v, -2.4, 2.4, -1.5, 3.0), (0.93, 0.88, 0.78)),
        (_roof(xp, u, v, 3.1, 3.0, 5.8), (0.70, 0.22, 0.16)),
        (_box(xp, u, v, -0.7, 0.9, 0.4, 2.0), WINDOW),
    ]


def landmark(xp: Any, kind: str, u: Any, v: Any) -> list[tuple[Any, tuple[float, float, float]]]:
    """One of the things on the ring: a tower, a mill, a church, a dome or a mast, 9 to 14 high."""
    stone, dark, white = (0.62, 0.58, 0.55), (0.28, 0.26, 0.32), (0.94, 0.93, 0.90)
    if kind == "tower":
        battlements = xp.maximum(_box(xp, u, v, -2.8, 2.8, 8.5, 11.0), -_box(xp, u, v, -0.8, 0.8, 9.8, 12.0))
        return [
            (_box(xp, u, v, -2.1, 2.1, -2, 9.0), stone),
            (battlements, stone),
            (_box(xp, u, v, -0.7, 0.7, 4, 6.4), WINDOW),
        ]
    if kind == "mill":
        turned = ((u + v - 8.5) * math.sqrt(0.5), (u - v + 8.5) * math.sqrt(0.5))
        sails = xp.minimum(*(_box(xp, *pair, -5.5, 5.5, -0.7, 0.7) for pair in (turned, turned[::-1])))
        return [(_roof(xp, u, v, 3.4, -2.0, 16.0), white), (_roof(xp, u, v, 2.2, 7.6, 10.6), dark), (sails, dark)]
    if kind == "church":
        return [
            (_box(xp, u, v, -0.5, 5.5, -2, 4.0), white),
            (_roof(xp, u - 2.5, v, 3.5, 4.0, 6.4), (0.55, 0.25, 0.20)),
            (_box(xp, u, v, -3.4, -0.4, -2, 8.0), white),
            (_roof(xp, u + 1.9, v, 2.0, 8.0, 13.5), (0.55, 0.25, 0.20)),
        ]
    if kind == "dome":
        bowl = xp.maximum(ellipse(xp, u, v - 3.5, 5.0, 5.0), 3.2 - v)
        return [(_box(xp, u, v, -5.2, 5.2, -2, 3.6), stone), (bowl, (0.85, 0.66, 0.20))]
    stripes = (0.85, 0.16, 0.14)
    return [
        (_box(xp, u, v, -0.9, 0.9, -2, 14.0), white),
        (_box(xp, u, v, -0.9, 0.9, 3.0, 6.0), stripes),
        (_box(xp, u, v, -0.9, 0.9, 9.0, 12.0), stripes),
    ]


LANDMARKS = ("tower", "mill", "church", "dome", "mast")


def hashed(seeds: npt.NDArray[np.int64], cells: npt.NDArray[np.int64], stream: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each cell `[N,W]` of the endless ground of seed `[N]`: the same whenever it is asked."""
    with np.errstate(over="ignore"):
        z = cells.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seeds.astype(np.uint64)[:, None]
        z = z * np.uint64(0xD1342543DE82EF95) + np.uint64(stream)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2**53
