"""A world of procedural, captioned, endless scenes whose ground truth is known.

A scene is a subject with a colour, floating over three scrolling layers of hills under a sky with a sun or a moon.
Every quantity is a smooth function of the frame number, so any frame of a scene can be rendered at any time and the
video never ends. Edges are anti-aliased analytically from signed distances. Lengths are in pixels of a picture 64
pixels high; other heights scale the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]

SUBJECTS = ("balloon", "kite", "bird", "plane")
COLOURS = ("red", "yellow", "blue", "white", "green")
TERRAINS = ("green", "snowy", "desert", "dark")
TIMES = ("dawn", "noon", "dusk", "night")

_COLOUR_RGB = {
    "red": (0.90, 0.12, 0.12),
    "yellow": (1.00, 0.83, 0.08),
    "blue": (0.12, 0.24, 0.88),
    "white": (0.97, 0.97, 0.97),
    "green": (0.10, 0.72, 0.25),
}
_TERRAIN_RGB = {
    "green": (0.27, 0.60, 0.20),
    "snowy": (0.90, 0.94, 0.98),
    "desert": (0.87, 0.67, 0.36),
    "dark": (0.19, 0.21, 0.27),
}
_TERRAIN_PHRASE = {
    "green": "green hills",
    "snowy": "snowy hills",
    "desert": "desert hills",
    "dark": "dark hills",
}
# zenith, horizon, sun or moon, light on the land, light on the subject
_TIME_RGB = {
    "dawn": ((0.50, 0.60, 0.90), (0.99, 0.80, 0.72), (1.00, 0.86, 0.58), (0.96, 0.86, 0.84), 1.00),
    "noon": ((0.27, 0.58, 0.95), (0.70, 0.88, 0.99), (1.00, 0.98, 0.80), (1.00, 1.00, 1.00), 1.00),
    "dusk": ((0.28, 0.17, 0.42), (0.90, 0.50, 0.38), (1.00, 0.60, 0.25), (0.80, 0.60, 0.55), 0.95),
    "night": ((0.02, 0.03, 0.10), (0.10, 0.14, 0.32), (0.90, 0.90, 0.84), (0.36, 0.40, 0.52), 0.85),
}
_BASKET_RGB = np.array((0.36, 0.22, 0.12), np.float32)
_BEAK_RGB = np.array((1.0, 0.60, 0.10), np.float32)
_WINDOW_RGB = np.array((0.14, 0.18, 0.28), np.float32)

# of the far, middle and near layer: height of its mean, amplitude, wavelength, pixels a frame, share of haze
_LAYERS = (
    (40.5, 2.6, 46.0, 0.12, 0.58),
    (47.5, 2.6, 38.0, 0.28, 0.30),
    (55.0, 2.4, 34.0, 0.60, 0.00),
)


@dataclass(frozen=True)
class Scene:
    """One scene: its four attributes, and the seed that draws its layout and motion."""

    subject: str
    colour: str
    terrain: str
    time: str
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("subject", self.subject, SUBJECTS),
            ("colour", self.colour, COLOURS),
            ("terrain", self.terrain, TERRAINS),
            ("time", self.time, TIMES),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: choose {', '.join(known)}")

    @property
    def labels(self) -> tuple[int, int, int, int]:
        """Indices of subject, colour, terrain and time in the world's tuples."""
        return (
            SUBJECTS.index(self.subject),
            COLOURS.index(self.colour),
            TERRAINS.index(self.terrain),
            TIMES.index(self.time),
        )


def caption(scene: Scene) -> str:
    """The scene in words, such as `a red balloon over snowy hills at dawn`."""
    return f"a {scene.colour} {scene.subject} over {_TERRAIN_PHRASE[scene.terrain]} at {scene.time}"


def all_captions() -> list[str]:
    """The captions of every combination of attributes, in a fixed order."""
    return [caption(Scene(s, c, te, ti)) for s in SUBJECTS for c in COLOURS for te in TERRAINS for ti in TIMES]


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn uniformly over attributes and layouts."""
    return Scene(
        SUBJECTS[rng.integers(len(SUBJECTS))],
        COLOURS[rng.integers(len(COLOURS))],
        TERRAINS[rng.integers(len(TERRAINS))],
        TIMES[rng.integers(len(TIMES))],
        int(rng.integers(2**31)),
    )


@lru_cache(maxsize=8192)
def _layout(seed: int) -> Array:
    """The numbers a seed draws, uniform in [0, 1)."""
    return np.random.default_rng(seed).random(32).astype(np.float32)


def _cover(distance: Array) -> Array:
    """Coverage of a pixel from its signed distance to an edge (negative inside), smooth over 1.6 pixels."""
    x = np.clip(0.5 - distance * (1 / 1.6), 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _ellipse(u: Array, v: Array, a: float, b: float) -> Array:
    """Approximate signed distance to an ellipse with half axes a and b around the origin."""
    k = np.sqrt((u / a) ** 2 + (v / b) ** 2)
    return (k - 1.0) * min(a, b)


def _polygon(u: Array, v: Array, corners: Sequence[tuple[float, float]]) -> Array:
    """Signed distance (a bound outside) to a convex polygon, corners clockwise on the screen."""
    d = np.full_like(u, -1e3)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        length = float(np.hypot(x1 - x0, y1 - y0))
        d = np.maximum(d, ((y1 - y0) * (u - x0) - (x1 - x0) * (v - y0)) / length)
    return d


def _paint(rgb: Array, alpha: Array, cover: Array, colour: Array) -> None:
    """Lays `colour` with the given coverage over a layer of colour and alpha, in place."""
    rgb += cover[..., None] * (colour - rgb)
    np.maximum(alpha, cover, out=alpha)


def _draw_subject(kind: str, u: Array, v: Array, colour: Array, phase: Array) -> tuple[Array, Array]:
    """Colour `[N,H,W,3]` and coverage `[N,H,W]` of subjects of one kind, in coordinates around their centres."""
    shade = 1.0 + 0.012 * np.clip(-u - 1.2 * v, -14, 14)
    body = np.clip(colour[:, None, None, :] * shade[..., None], 0, 1)
    rgb = body.copy()
    alpha = np.zeros_like(u)
    if kind == "balloon":
        envelope = np.minimum(
            _ellipse(u, v + 4.0, 9.0, 9.5), _polygon(u, v, ((-7.6, 1), (7.6, 1), (2.4, 8), (-2.4, 8)))
        )
        _paint(rgb, alpha, _cover(np.maximum(np.abs(u) - 2.6, np.abs(v - 11.0) - 2.2)), _BASKET_RGB)
        _paint(rgb, alpha, _cover(np.maximum(np.abs(u) - 1.6, np.abs(v - 8.5) - 1.5)), _BASKET_RGB)
        _paint(rgb, alpha, _cover(envelope), body)
    elif kind == "kite":
        sway = 2.2 * np.sin(0.55 * v - phase)
        tail = np.maximum(np.abs(u - sway * np.clip((v - 8) / 6, 0, 1)) - 0.9, np.abs(v - 14.0) - 6.0)
        _paint(rgb, alpha, _cover(tail), body)
        diamond = np.maximum(
            np.abs(u) * 0.74 + np.maximum(-(v + 3.0), 0) * 0.74 - 7.2, np.abs(u) * 0.82 + (v + 3.0) * 0.56 - 7.6
        )
        _paint(rgb, alpha, _cover(diamond), body)
        dark = body * np.where(u > 0, 0.68, 1.0)[..., None]
        _paint(rgb, alpha, _cover(np.maximum(diamond, -u)), dark)
    elif kind == "bird":
        lift = 0.15 + 0.45 * np.sin(phase)
        span = np.abs(u)
        centre = -lift * span + 0.022 * lift * span**2
        wing = np.maximum((np.abs(v - centre) - 3.6 * (1 - span / 16.0)) * 0.9, span - 15.0)
        _paint(rgb, alpha, _cover(wing), body * 0.85)
        _paint(rgb, alpha, _cover(_ellipse(u, v - 0.5, 4.6, 5.2)), body)
        _paint(rgb, alpha, _cover(_ellipse(u, v - 1.2, 1.5, 1.5)), _BEAK_RGB)
    else:
        _paint(rgb, alpha, _cover(_polygon(u, v, ((-13.5, -9), (-10, -9), (-5, -1), (-12, -1)))), body * 0.8)
        _paint(rgb, alpha, _cover(_ellipse(u, v, 14.0, 4.2)), body)
        _paint(rgb, alpha, _cover(_polygon(u, v, ((-3.5, 0.5), (5.0, 0.5), (-3.0, 9), (-8.0, 9)))), body * 0.72)
        _paint(rgb, alpha, _cover(_ellipse(u - 8.0, v + 1.6, 2.6, 1.5)), _WINDOW_RGB)
    return rgb, alpha


def render_frames(
    scenes: Sequence[Scene], frames: Sequence[int] | npt.NDArray[np.int64], height: int = 64, width: int = 96
) -> tuple[Array, Array]:
    """Renders frame `frames[i]` of `scenes[i]` for every i.

    Returns the pictures `[N,H,W,3]` in [0,1] and the subject's coverage `[N,H,W]` in [0,1].
    """
    if len(scenes) != len(frames):
        raise ValueError(f"{len(scenes)} scenes are given for {len(frames)} frames: give one scene a frame")
    scale = 64.0 / height
    t = np.asarray(frames, np.float64)
    q = np.stack([_layout(s.seed) for s in scenes]).astype(np.float64)  # [N,32]
    wide = width * scale
    x = ((np.arange(width) + 0.5) * scale).astype(np.float32)[None, None, :]
    y = ((np.arange(height) + 0.5) * scale).astype(np.float32)[None, :, None]
    tau = 2 * np.pi

    def column(values: npt.NDArray[np.float64]) -> Array:
        return values.astype(np.float32)[:, None, None]

    palette = [np.array([_TIME_RGB[s.time][k] for s in scenes], np.float32) for k in range(5)]
    zenith, horizon, lamp, light = palette[:4]
    ramp = np.clip(y / 46.0, 0, 1) ** 1.2  # [1,H,1]
    image = zenith[:, None, None] + ramp[..., None] * (horizon - zenith)[:, None, None]
    image = np.ascontiguousarray(np.broadcast_to(image, (len(scenes), height, width, 3)))

    sun_x = column((0.12 + 0.76 * q[:, 0]) * wide + 6.0 * np.sin(tau * (t / 700 + q[:, 1])))
    sun_y = column(8.0 + 7.0 * q[:, 2])
    r = np.sqrt((x - sun_x) ** 2 + (y - sun_y) ** 2)
    image += (0.30 * np.exp(-((r / 9.0) ** 2)))[..., None] * (lamp[:, None, None] - image)
    image += _cover((r - 4.6) * 0.8)[..., None] * (lamp[:, None, None] - image)

    ground = np.array([_TERRAIN_RGB[s.terrain] for s in scenes], np.float32) * light
    for i, (base, amplitude, wavelength, speed, haze) in enumerate(_LAYERS):
        a, b, c, d, e = (q[:, 3 + 5 * i + k] for k in range(5))
        pos = x[:, 0, :] + (speed * (0.8 + 0.4 * e) * t)[:, None]  # [N,W], float64: endless scrolling stays exact
        k0 = (tau / (wavelength * (0.85 + 0.4 * a)))[:, None]
        crest = base + (3.0 * (b - 0.5))[:, None]
        crest = crest - amplitude * np.sin(k0 * pos + (tau * c)[:, None])
        crest = crest - 0.55 * amplitude * np.sin(1.618 * k0 * pos + (tau * d)[:, None])
        top = crest.astype(np.float32)[:, None, :]
        rgb = ((1 - haze) * ground + haze * (0.55 * horizon + 0.45 * zenith))[:, None, None]
        rgb = rgb * (1.06 - 0.010 * np.clip(y - top, 0, 14))[..., None]
        image += _cover(top - y)[..., None] * (rgb - image)

    cx = column(wide * 0.5 + wide * 0.16 * np.sin(tau * (t / (110 + 60 * q[:, 20]) + q[:, 21])) + 14 * (q[:, 22] - 0.5))
    cy = column(21.5 + 4.0 * (q[:, 23] - 0.5) + 3.2 * np.sin(tau * (t / (44 + 26 * q[:, 24]) + q[:, 25])))
    tilt = column(0.10 * np.sin(tau * (t / (60 + 30 * q[:, 26]) + q[:, 27])))
    phase = column(tau * (t / (22 + 8 * q[:, 28]) + q[:, 29]))
    size = column(1.06 + 0.16 * q[:, 30])
    colour = np.array([_COLOUR_RGB[s.colour] for s in scenes], np.float32) * palette[4][:, None]
    mask = np.zeros((len(scenes), height, width), np.float32)
    # the subject is drawn in a window around it only: rows and columns of that window, of every frame
    side = (min(height, round(46 / scale)), min(width, round(46 / scale)))
    start = [
        np.clip((c[:, 0, 0] / scale - n / 2).astype(np.int64), 0, limit - n)
        for c, n, limit in ((cy + 1.5, side[0], height), (cx, side[1], width))
    ]
    rows = (start[0][:, None] + np.arange(side[0]))[:, :, None]  # [N,h,1]
    columns = (start[1][:, None] + np.arange(side[1]))[:, None, :]  # [N,1,w]
    u0 = (((columns + 0.5) * scale).astype(np.float32) - cx) / size
    v0 = (((rows + 0.5) * scale).astype(np.float32) - cy) / size
    u, v = u0 * np.cos(tilt) + v0 * np.sin(tilt), v0 * np.cos(tilt) - u0 * np.sin(tilt)
    kinds = np.array([s.subject for s in scenes])
    for kind in SUBJECTS:
        n = np.flatnonzero(kinds == kind)
        if n.size:
            drawn, alpha = _draw_subject(kind, u[n], v[n], colour[n], phase[n])
            where = (n[:, None, None], rows[n], columns[n])
            under = image[where]
            image[where] = under + alpha[..., None] * (drawn - under)
            mask[where] = alpha
    return np.clip(image, 0, 1), mask


def render(
    scene: Scene, first_frame: int, num_frames: int, height: int = 64, width: int = 96
) -> tuple[npt.NDArray[np.uint8], Array]:
    """Frames `first_frame … first_frame + num_frames - 1` of a scene.

    Returns uint8 video `[T,H,W,3]` and the subject's coverage `[T,H,W]` in [0,1].
    """
    frames = np.arange(first_frame, first_frame + num_frames)
    image, mask = render_frames([scene] * num_frames, frames, height, width)
    return (image * 255 + 0.5).astype(np.uint8), mask
