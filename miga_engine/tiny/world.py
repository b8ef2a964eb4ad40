"""A world of procedural, captioned, endless scenes whose ground truth is known.

A scene is a subject with a colour, floating over three scrolling layers of hills under a sky with a sun or a moon.
Every quantity is a smooth function of the frame number, so any frame of a scene can be rendered at any time and the
video never ends. Edges are anti-aliased analytically from signed distances. Lengths are in pixels of a picture 64
pixels high; other heights scale the picture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Put = Callable[[npt.NDArray[Any]], Any]
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


@functools.lru_cache(maxsize=8192)
def _layout(seed: int) -> Array:
    """The numbers a seed draws, uniform in [0, 1)."""
    return np.random.default_rng(seed).random(32).astype(np.float32)


def _cover(xp: Any, distance: Any) -> Any:
    """Coverage of a pixel from its signed distance to an edge (negative inside), smooth over 1.6 pixels."""
    x = xp.clip(0.5 - distance * (1 / 1.6), 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _ellipse(xp: Any, u: Any, v: Any, a: float, b: float) -> Any:
    """Approximate signed distance to an ellipse with half axes a and b around the origin."""
    k = xp.sqrt((u / a) ** 2 + (v / b) ** 2)
    return (k - 1.0) * min(a, b)


def _polygon(xp: Any, u: Any, v: Any, corners: Sequence[tuple[float, float]]) -> Any:
    """Signed distance (a bound outside) to a convex polygon, corners clockwise on the screen."""
    d = xp.full_like(u, -1e3)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        length = math.hypot(x1 - x0, y1 - y0)
        d = xp.maximum(d, ((y1 - y0) * (u - x0) - (x1 - x0) * (v - y0)) / length)
    return d


def _draw_subject(xp: Any, kind: str, u: Any, v: Any, colour: Any, phase: Any, put: Put) -> tuple[Any, Any]:
    """Colour `[N,H,W,3]` and coverage `[N,H,W]` of subjects of one kind, in coordinates around their centres."""
    shade = 1.0 + 0.012 * xp.clip(-u - 1.2 * v, -14, 14)
    body = xp.clip(colour[:, None, None, :] * shade[..., None], 0, 1)
    rgb = 1.0 * body
    alpha = xp.zeros_like(u)

    def paint(distance: Any, of: Any) -> None:
        cover = _cover(xp, distance)
        rgb[...] += cover[..., None] * (of - rgb)
        alpha[...] = xp.maximum(alpha, cover)

    if kind == "balloon":
        envelope = xp.minimum(
            _ellipse(xp, u, v + 4.0, 9.0, 9.5), _polygon(xp, u, v, ((-7.6, 1), (7.6, 1), (2.4, 8), (-2.4, 8)))
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
        paint(_ellipse(xp, u, v - 0.5, 4.6, 5.2), body)
        paint(_ellipse(xp, u, v - 1.2, 1.5, 1.5), put(_BEAK_RGB))
    else:
        paint(_polygon(xp, u, v, ((-13.5, -9), (-10, -9), (-5, -1), (-12, -1))), body * 0.8)
        paint(_ellipse(xp, u, v, 14.0, 4.2), body)
        paint(_polygon(xp, u, v, ((-3.5, 0.5), (5.0, 0.5), (-3.0, 9), (-8.0, 9))), body * 0.72)
        paint(_ellipse(xp, u - 8.0, v + 1.6, 2.6, 1.5), put(_WINDOW_RGB))
    return rgb, alpha


def _draw(
    xp: Any, put: Put, scenes: Sequence[Scene], frames: npt.ArrayLike, height: int, width: int, *, motion: bool = False
) -> tuple[Any, Any]:
    """The renderer, for NumPy and for torch: `xp` is the library, `put` makes its arrays of NumPy's.

    What moves is found here in float64, one number a frame or column, and pixels are then drawn in float32 by `xp`.
    Returns pictures `[N,H,W,3]` in [0,1], with `motion` `[N,H,W,5]`, and the subject's coverage `[N,H,W]` in [0,1].
    """
    if len(scenes) != np.size(frames):
        raise ValueError(f"{len(scenes)} scenes are given for {np.size(frames)} frames: give one scene a frame")
    scale = 64.0 / height
    t = np.asarray(frames, np.float64)
    q = np.stack([_layout(s.seed) for s in scenes]).astype(np.float64)  # [N,32]
    wide = width * scale
    x = put(((np.arange(width) + 0.5) * scale).astype(np.float32)[None, None, :])
    y = put(((np.arange(height) + 0.5) * scale).astype(np.float32)[None, :, None])
    tau = 2 * np.pi

    def column(values: npt.NDArray[np.float64]) -> Any:
        return put(values.astype(np.float32)[:, None, None])

    def velocity(place: Callable[[npt.NDArray[np.float64]], tuple[Any, Any]]) -> tuple[Any, Any]:
        """How far a point goes in the frame around t, right and down."""
        (x1, y1), (x0, y0) = place(t + 0.5), place(t - 0.5)
        return x1 - x0, y1 - y0

    def moving(rgb: Array, right: Any = 0.0, down: Any = 0.0) -> Any:
        """Colours `[N,3]`, with `motion` followed by their velocity in pixels a frame of this picture."""
        parts = [rgb] + [np.broadcast_to(v / scale, len(scenes))[:, None] for v in (right, down) if motion]
        return put(np.concatenate(parts, 1, dtype=np.float32))

    palette = [np.array([_TIME_RGB[s.time][k] for s in scenes], np.float32) for k in range(5)]
    zenith, horizon, lamp, light = palette[:4]
    ramp = xp.clip(y / 46.0, 0, 1) ** 1.2  # [1,H,1]
    top_of_sky, change = moving(zenith), moving(horizon - zenith)
    sky = top_of_sky[:, None, None] + ramp[..., None] * change[:, None, None]  # [N,H,1,C]
    image = 1.0 * xp.broadcast_to(sky, (len(scenes), height, width, sky.shape[-1]))

    def sun(t: npt.NDArray[np.float64]) -> tuple[Any, Any]:
        return (0.12 + 0.76 * q[:, 0]) * wide + 6.0 * np.sin(tau * (t / 700 + q[:, 1])), 8.0 + 7.0 * q[:, 2]

    sun_x, sun_y = (column(v) for v in sun(t))
    disc = moving(lamp, *velocity(sun))[:, None, None]
    r = xp.sqrt((x - sun_x) ** 2 + (y - sun_y) ** 2)
    image += (0.30 * xp.exp(-((r / 9.0) ** 2)))[..., None] * (disc - image)
    image += _cover(xp, (r - 4.6) * 0.8)[..., None] * (disc - image)

    ground = np.array([_TERRAIN_RGB[s.terrain] for s in scenes], np.float32) * light
    for i, (base, amplitude, wavelength, speed, haze) in enumerate(_LAYERS):
        a, b, c, d, e = (q[:, 3 + 5 * i + k] for k in range(5))
        scroll = speed * (0.8 + 0.4 * e)
        pos = (np.arange(width) + 0.5)[None] * scale + (scroll * t)[:, None]  # [N,W], float64: endless and exact
        k0 = (tau / (wavelength * (0.85 + 0.4 * a)))[:, None]
        crest = base + (3.0 * (b - 0.5))[:, None]
        crest = crest - amplitude * np.sin(k0 * pos + (tau * c)[:, None])
        crest = crest - 0.55 * amplitude * np.sin(1.618 * k0 * pos + (tau * d)[:, None])
        top = put(crest.astype(np.float32)[:, None, :])
        hill = moving((1 - haze) * ground + haze * (0.55 * horizon + 0.45 * zenith), -scroll)
        shade = 1.06 - 0.010 * xp.clip(y - top, 0, 14)
        lit = hill[:, None, None, :3] * shade[..., None]
        cover = _cover(xp, top - y)[..., None]
        image[..., :3] += cover * (lit - image[..., :3])
        if motion:
            image[..., 3:] += cover * (hill[:, None, None, 3:] - image[..., 3:])

    def centre(t: npt.NDArray[np.float64]) -> tuple[Any, Any]:
        across = wide * 0.5 + wide * 0.16 * np.sin(tau * (t / (110 + 60 * q[:, 20]) + q[:, 21])) + 14 * (q[:, 22] - 0.5)
        return across, 21.5 + 4.0 * (q[:, 23] - 0.5) + 3.2 * np.sin(tau * (t / (44 + 26 * q[:, 24]) + q[:, 25]))

    cx, cy = (v.astype(np.float32)[:, None, None] for v in centre(t))
    tilt = column(0.10 * np.sin(tau * (t / (60 + 30 * q[:, 26]) + q[:, 27])))
    phase = column(tau * (t / (22 + 8 * q[:, 28]) + q[:, 29]))
    size = column(1.06 + 0.16 * q[:, 30])
    colour = put(np.array([_COLOUR_RGB[s.colour] for s in scenes], np.float32) * palette[4][:, None])
    mask = xp.zeros_like(image[..., 0])
    # the subject is drawn in a window around it only: rows and columns of that window, of every frame
    side = (min(height, round(46 / scale)), min(width, round(46 / scale)))
    start = [
        np.clip((c[:, 0, 0] / scale - n / 2).astype(np.int64), 0, limit - n)
        for c, n, limit in ((cy + 1.5, side[0], height), (cx, side[1], width))
    ]
    rows_of = (start[0][:, None] + np.arange(side[0]))[:, :, None]  # [N,h,1]
    columns_of = (start[1][:, None] + np.arange(side[1]))[:, None, :]  # [N,1,w]
    u0 = (put(((columns_of + 0.5) * scale).astype(np.float32)) - put(cx)) / size
    v0 = (put(((rows_of + 0.5) * scale).astype(np.float32)) - put(cy)) / size
    u, v = u0 * xp.cos(tilt) + v0 * xp.sin(tilt), v0 * xp.cos(tilt) - u0 * xp.sin(tilt)
    flying = moving(np.zeros((len(scenes), 0), np.float32), *velocity(centre))
    kinds = np.array([s.subject for s in scenes])
    for kind in SUBJECTS:
        found = np.flatnonzero(kinds == kind)
        if found.size:
            n = put(found)
            drawn, alpha = _draw_subject(xp, kind, u[n], v[n], colour[n], phase[n], put)
            where = (put(found[:, None, None]), put(rows_of[found]), put(columns_of[found]))
            under = image[where]
            under[..., :3] += alpha[..., None] * (drawn - under[..., :3])
            if motion:
                under[..., 3:] += alpha[..., None] * (flying[n][:, None, None] - under[..., 3:])
            image[where] = under
            mask[where] = alpha
    image[..., :3] = xp.clip(image[..., :3], 0, 1)
    return image, mask


def render_frames(
    scenes: Sequence[Scene], frames: Sequence[int] | npt.NDArray[np.int64], height: int = 64, width: int = 96
) -> tuple[Array, Array]:
    """Renders frame `frames[i]` of `scenes[i]` for every i.

    Returns the pictures `[N,H,W,3]` in [0,1] and the subject's coverage `[N,H,W]` in [0,1].
    """
    image, mask = _draw(np, np.asarray, scenes, frames, height, width)
    return image, mask


def render_tensors(
    scenes: Sequence[Scene],
    frames: Sequence[int] | npt.NDArray[np.int64],
    height: int = 64,
    width: int = 96,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """`render_frames` by torch, on any device, equal to rounding; and how everything moves.

    Returns the pictures `[N,H,W,3]` in [0,1], the subject's coverage `[N,H,W]` in [0,1], and the velocity of what each
    pixel shows `[N,H,W,2]`, to the right and downwards in pixels a frame; the subject's own turning is left out.
    """
    image, mask = _draw(
        torch, lambda array: torch.as_tensor(array, device=device), scenes, frames, height, width, motion=True
    )
    return image[..., :3], mask, image[..., 3:]


def render(
    scene: Scene, first_frame: int, num_frames: int, height: int = 64, width: int = 96
) -> tuple[npt.NDArray[np.uint8], Array]:
    """Frames `first_frame … first_frame + num_frames - 1` of a scene.

    Returns uint8 video `[T,H,W,3]` and the subject's coverage `[T,H,W]` in [0,1].
    """
    frames = np.arange(first_frame, first_frame + num_frames)
    image, mask = render_frames([scene] * num_frames, frames, height, width)
    return (image * 255 + 0.5).astype(np.uint8), mask
