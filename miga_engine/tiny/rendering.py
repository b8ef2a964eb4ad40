"""The renderer of the embedded world: any frame of any scene, by NumPy, or by torch on any device.

Every quantity is a smooth function of the frame number, so that any frame of a scene can be rendered at any time and
the video never ends. Edges are anti-aliased analytically from signed distances. Lengths are in pixels of a picture 64
pixels high; other heights scale the picture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from miga_engine.tiny import drawing
from miga_engine.tiny.drawing import Put, cover
from miga_engine.tiny.scene import COLOUR_RGB, LAYERS, TERRAIN_RGB, TIME_RGB, Scene

Array = npt.NDArray[np.floating[Any]]
Times = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Shape = Callable[[Any, Any, Rows], Iterable[tuple[Any, Any, Any]]]
"""Of u, v and the cells: distance, colour and whether it is shown there, of each part."""

_TAU = 2 * np.pi
_PACE = {"": (0.8, 0.4), "slow": (0.6, 0.2), "fast": (1.5, 0.2)}  # of a layer's speed: least, and what is added
_TURN = 28  # frames in which the subject goes away or comes back
_LAMPLIGHT = np.array((1.0, 0.82, 0.42), np.float32)  # of windows, after dark
_CLOUD = ((0.0, 0.0, 9.0, 3.6), (-5.5, 1.6, 5.0, 2.6), (5.0, 1.2, 6.0, 2.8))  # middle and half axes


@functools.lru_cache(maxsize=16384)
def _layout(seed: int, stream: int) -> Array:
    """The numbers a seed draws, uniform in [0, 1): stream 0 for the plain world, 1 for what the rich has beside it, 2
    for the ring."""
    return np.random.default_rng(seed + (stream << 32)).random(32).astype(np.float32)


def _layouts(scenes: Sequence[Scene], stream: int = 0) -> Times:
    return np.stack([_layout(s.seed, stream) for s in scenes]).astype(np.float64)  # [N,32]


class _Picture:
    """Pictures `[N,H,W,C]` that are being drawn, C = 3 or, with motion, 5: colour, then flow in pixels a frame."""

    def __init__(self, xp: Any, put: Put, count: int, height: int, width: int, motion: bool) -> None:
        self.xp, self.put, self.motion = xp, put, motion
        self.count, self.height, self.width = count, height, width
        self.scale = 64.0 / height
        self.x_ = (np.arange(width) + 0.5) * self.scale  # of each column, float64
        self.x = put(self.x_.astype(np.float32)[None, None, :])
        self.y = put(((np.arange(height) + 0.5) * self.scale).astype(np.float32)[None, :, None])
        self.image: Any = None
        self.mask: Any = None  # the subject's coverage [N,H,W]

    def column(self, values: Times) -> Any:
        """A number a frame `[N]` as `[N,1,1]`."""
        return self.put(values.astype(np.float32)[:, None, None])

    def across(self, values: Times) -> Any:
        """A number a frame and column `[N,W]` as `[N,1,W]`."""
        return self.put(values.astype(np.float32)[:, None, :])

    def moving(self, rgb: Array, right: Any = 0.0, down: Any = 0.0) -> Any:
        """Colours `[N,3]`, with motion followed by their flow, which is given in pixels of a picture 64 high."""
        parts = [rgb] + [np.broadcast_to(v / self.scale, len(rgb))[:, None] for v in (right, down) if self.motion]
        return self.put(np.concatenate(parts, 1, dtype=np.float32))

    def lay(self, share: Any, colour: Any, flow: Any, rows: Rows | None = None) -> None:
        """Lays `colour` `[n,H,W,3]` and its `flow` `[n,1,1,2]` over the pictures `rows` by `share` `[n,H,W]`."""
        n = slice(None) if rows is None else self.put(rows)
        part = self.image[n]
        part[..., :3] += share[..., None] * (colour - part[..., :3])
        if self.motion:
            part[..., 3:] += share[..., None] * (flow - part[..., 3:])
        if rows is not None:
            self.image[n] = part
        if self.mask is not None:
            self.mask[n] = self.mask[n] * (1 - share)


def _where(flags: Iterable[bool]) -> Rows:
    return np.flatnonzero(list(flags))


def _flow(place: Callable[[Times], tuple[Any, Any]], t: Times) -> tuple[Any, Any]:
    """How far a point goes in the frame around t, right and down."""
    (x1, y1), (x0, y0) = place(t + 0.5), place(t - 0.5)
    return x1 - x0, y1 - y0


def _draw_sky(picture: _Picture, scenes: Sequence[Scene], t: Times, palette: list[Array]) -> None:
    xp, q, wide = picture.xp, _layouts(scenes), picture.width * picture.scale
    zenith, horizon, lamp = palette[:3]
    ramp = drawing.sky_ramp(xp, picture.y)  # [1,H,1]
    top, change = picture.moving(zenith), picture.moving(horizon - zenith)
    sky = top[:, None, None] + ramp[..., None] * change[:, None, None]  # [N,H,1,C]
    picture.image = 1.0 * xp.broadcast_to(sky, (picture.count, picture.height, picture.width, sky.shape[-1]))
    place = 0.12 + 0.76 * q[:, 0]
    for side, low in (("left", 0.12), ("right", 0.64)):
        place = np.where([s.side == side for s in scenes], low + 0.24 * q[:, 0], place)

    def sun(t: Times) -> tuple[Any, Any]:
        return place * wide + 6.0 * np.sin(_TAU * (t / 700 + q[:, 1])), 8.0 + 7.0 * q[:, 2]

    sun_x, sun_y = (picture.column(v) for v in sun(t))
    disc = picture.moving(lamp, *_flow(sun, t))[:, None, None]
    r = xp.sqrt((picture.x - sun_x) ** 2 + (picture.y - sun_y) ** 2)
    for share in (0.30 * xp.exp(-((r / 9.0) ** 2)), cover(xp, (r - 4.6) * 0.8)):
        picture.lay(share, disc[..., :3], disc[..., 3:])


def _draw_clouds(picture: _Picture, scenes: Sequence[Scene], t: Times, palette: list[Array]) -> None:
    """Small clouds, three ellipses each, that drift slowly behind the subject."""
    n = _where(s.sky == "clouds" for s in scenes)
    if not n.size:
        return
    xp, drift, spacing = picture.xp, -0.10, 34.0
    pos = picture.x_[None] - (drift * t[n])[:, None]
    cells = np.floor(pos / spacing).astype(np.int64)
    seeds = np.array([scenes[i].seed for i in n])
    a, b, c = (drawing.hashed(seeds, cells, 10 + k) for k in range(3))
    u = picture.across(pos - (cells + 0.5) * spacing - 6.0 * (a - 0.5))
    v = picture.y - picture.across(6.0 + 16.0 * b)
    wide = picture.across(0.7 + 0.4 * c)
    parts = [drawing.ellipse(xp, (u - du) / wide, v - dv, ra, rb) for du, dv, ra, rb in _CLOUD]
    distance = functools.reduce(xp.minimum, parts)
    rgb = 0.75 * _cloud_rgb(palette, n) + 0.25 * palette[1][n]
    picture.lay(0.9 * cover(xp, distance * 0.6), picture.put(rgb)[:, None, None], _level(picture, n, drift), n)


def _draw_birds(picture: _Picture, scenes: Sequence[Scene], t: Times, palette: list[Array]) -> None:
    """A flock at a distance that crosses the sky, comes round again, and beats its wings."""
    n = _where(s.sky == "birds" for s in scenes)
    if not n.size:
        return
    xp, q, wide = picture.xp, _layouts([scenes[i] for i in n], 1), picture.width * picture.scale
    speed = 0.25 + 0.2 * q[:, 0]
    rgb = picture.put(0.25 * palette[0][n])[:, None, None]
    for k in range(5):
        lead = (q[:, 1] * (wide + 12) + speed * t[n] - 7.0 * k) % (wide + 12) - 6
        height = 6.0 + 14.0 * q[:, 2] + 3.5 * abs(k - 2) + 0.6 * np.sin(_TAU * (t[n] / 40 + q[:, 3 + k]))
        beat = picture.column(0.35 + 0.4 * np.sin(_TAU * (t[n] / 14 + q[:, 8 + k])))
        u, v = picture.x - picture.column(lead), picture.y - picture.column(height)
        span = xp.abs(u)
        distance = xp.maximum(xp.abs(v + beat * span) - 0.55, span - 2.8)
        picture.lay(cover(xp, distance), rgb, _level(picture, n, speed), n)


def _level(picture: _Picture, n: Rows, speed: Any) -> Any:
    """The flow `[n,1,1,2]` of what goes sideways; nothing of it without motion."""
    return picture.moving(np.zeros((len(n), 0), np.float32), speed)[:, None, None]


def _cloud_rgb(palette: list[Array], n: Rows) -> Array:
    return np.asarray(0.35 * palette[2][n] + 0.65 * palette[3][n], np.float32)


def _draw_layer(picture: _Picture, scenes: Sequence[Scene], t: Times, palette: list[Array], i: int) -> None:
    """One layer of hills, with what stands on its crest."""
    xp, q = picture.xp, _layouts(scenes)
    zenith, horizon, _, light = palette[:4]
    base, amplitude, wavelength, speed, haze = LAYERS[i]
    a, b, c, d, e = (q[:, 3 + 5 * i + k] for k in range(5))
    slowest, spread = np.array([_PACE[s.pace] for s in scenes]).T
    scroll = speed * (slowest + spread * e)
    k0 = (_TAU / (wavelength * (0.85 + 0.4 * a)))[:, None]

    def crest(pos: Times, n: Any = slice(None)) -> Times:
        level = (base + (3.0 * (b - 0.5))[:, None])[n]
        level = level - amplitude * np.sin(k0[n] * pos + (_TAU * c)[n, None])
        return np.asarray(level - 0.55 * amplitude * np.sin(1.618 * k0[n] * pos + (_TAU * d)[n, None]))

    pos = picture.x_[None] + (scroll * t)[:, None]  # [N,W], float64: endless and exact
    ground = np.array([TERRAIN_RGB[s.terrain] for s in scenes], np.float32) * light
    air = 0.55 * horizon + 0.45 * zenith
    dark = np.array([[s.time in ("dusk", "night")] for s in scenes])

    def stand(rows: Rows, spacing: float, size: float, stream: int, ring: bool, shape: Shape) -> None:
        """Stands one thing in each cell of the ground: everywhere on a ring, else by chance."""
        seeds = np.array([scenes[k].seed for k in rows])
        cells = np.floor(pos[rows] / spacing).astype(np.int64)
        chance, shift, larger = (drawing.hashed(seeds, cells, stream + k) for k in range(3))
        middle = (cells + 0.5 + (0.0 if ring else 0.3) * (shift - 0.5)) * spacing
        wide = size * (1.0 if ring else 0.85 + 0.4 * larger)
        u = picture.across((pos[rows] - middle) / wide)
        v = (picture.across(crest(middle, rows)) - picture.y) / picture.across(np.broadcast_to(wide, middle.shape))
        here = chance > (-1.0 if ring else 0.35)
        for distance, rgb, shown in shape(u, v, cells):
            share = cover(xp, distance * size) * picture.across((here & shown).astype(np.float64))
            lit = np.array(rgb, np.float32) * light[rows] * (1 - haze) + haze * air[rows]
            if rgb == drawing.WINDOW:
                lit = np.where(dark[rows], (1 - haze) * _LAMPLIGHT + haze * air[rows], lit)
            picture.lay(share, picture.put(lit)[:, None, None], _level(picture, rows, -scroll[rows]), rows)

    def landmarks(u: Any, v: Any, cells: Rows) -> Iterator[tuple[Any, Any, Any]]:
        kinds = np.take_along_axis(np.array([ring_of(s) for s in scenes if s.ring]), cells % len(drawing.LANDMARKS), 1)
        for kind in drawing.LANDMARKS:
            for distance, rgb in drawing.landmark(xp, kind, u, v):
                yield distance, rgb, kinds == kind

    def simple(shape: Callable[[Any, Any, Any], Any]) -> Shape:
        return lambda u, v, cells: ((distance, rgb, True) for distance, rgb in shape(xp, u, v))

    if i == 1 and (rows := _where(s.ring for s in scenes)).size:
        stand(rows, 46.0, 0.9, 20, True, landmarks)
    for name, spacing, shape in (("trees", 6.0, drawing.tree), ("houses", 15.0, drawing.house)):
        if i and (rows := _where(s.land == name for s in scenes)).size:
            stand(rows, spacing * (0.7, 1.0)[i - 1], (0.7, 1.0)[i - 1], 30 + 10 * i, False, simple(shape))

    hill = picture.moving((1 - haze) * ground + haze * air, -scroll)[:, None, None]
    top = picture.across(crest(pos))
    shade = 1.06 - 0.010 * xp.clip(picture.y - top, 0, 14)
    picture.lay(cover(xp, top - picture.y), hill[..., :3] * shade[..., None], hill[..., 3:])
    if i == 2 and (rows := _where(s.land == "river" for s in scenes)).size:
        bank = picture.across(57.0 + 0.9 * np.sin(_TAU * pos[rows] / 50 + 1.0))
        blue = light[rows] * np.array((0.20, 0.42, 0.62), np.float32)
        water = picture.put(0.6 * air[rows] + 0.4 * blue)[:, None, None]
        ripple = xp.sin(picture.across(_TAU * pos[rows] / 16) + 1.1 * picture.y) * xp.sin(1.5 * picture.y)
        bright = water * (1.0 + 0.12 * ripple)[..., None]
        picture.lay(cover(xp, bank - picture.y), bright, _level(picture, rows, -scroll[rows]), rows)


def ring_of(scene: Scene) -> tuple[str, ...]:
    """The landmarks of a scene's ring in the order in which they come by, again and again."""
    order = np.argsort(_layout(scene.seed, 2)[: len(drawing.LANDMARKS)])
    return tuple(drawing.LANDMARKS[i] for i in order)


def away(scenes: Sequence[Scene], frames: npt.ArrayLike) -> Times:
    """How far each scene's subject is behind what hides it at its frame: 0 in the open, 1 hidden, smooth between.

    It is hidden for 16 to 192 frames, then in the open for 120 to 240, again and again.
    """
    t = np.asarray(frames, np.float64)
    q = _layouts(scenes, 1)
    hidden, seen = np.round(16 * 12 ** q[:, 16]), np.round(120 + 120 * q[:, 17])
    moment = (t + q[:, 18] * (hidden + seen + 2 * _TURN)) % (hidden + seen + 2 * _TURN)
    share = np.clip(np.minimum(moment - seen, seen + hidden + 2 * _TURN - moment) / _TURN, 0, 1)
    return np.asarray(np.where([bool(s.behind) for s in scenes], share * share * (3 - 2 * share), 0.0))


def _draw_subject(
    picture: _Picture,
    scenes: Sequence[Scene],
    t: Times,
    palette: list[Array],
    rows: Rows,
) -> None:
    xp, put, scale = picture.xp, picture.put, picture.scale
    if not rows.size:
        return
    scenes, t = [scenes[i] for i in rows], t[rows]
    q, wide = _layouts(scenes), picture.width * scale
    dives = np.array([s.behind == "hills" for s in scenes])

    def centre(t: Times) -> tuple[Any, Any]:
        x = wide * 0.5 + wide * 0.16 * np.sin(_TAU * (t / (110 + 60 * q[:, 20]) + q[:, 21])) + 14 * (q[:, 22] - 0.5)
        y = 21.5 + 4.0 * (q[:, 23] - 0.5) + 3.2 * np.sin(_TAU * (t / (44 + 26 * q[:, 24]) + q[:, 25]))
        return x, y + 56.0 * away(scenes, t) * dives

    cx, cy = (v.astype(np.float32)[:, None, None] for v in centre(t))
    tilt = picture.column(0.10 * np.sin(_TAU * (t / (60 + 30 * q[:, 26]) + q[:, 27])))
    phase = picture.column(_TAU * (t / (22 + 8 * q[:, 28]) + q[:, 29]))
    size = picture.column(1.06 + 0.16 * q[:, 30])
    colour = put(np.array([COLOUR_RGB[s.colour] for s in scenes], np.float32) * palette[4][rows][:, None])
    # the subject is drawn in a window around it only: rows and columns of that window, of every frame
    side = (min(picture.height, round(46 / scale)), min(picture.width, round(46 / scale)))
    start = [
        np.clip((c[:, 0, 0] / scale - n / 2).astype(np.int64), 0, limit - n)
        for c, n, limit in ((cy + 1.5, side[0], picture.height), (cx, side[1], picture.width))
    ]
    rows_of = (start[0][:, None] + np.arange(side[0]))[:, :, None]  # [N,h,1]
    columns_of = (start[1][:, None] + np.arange(side[1]))[:, None, :]  # [N,1,w]
    u0 = (put(((columns_of + 0.5) * scale).astype(np.float32)) - put(cx)) / size
    v0 = (put(((rows_of + 0.5) * scale).astype(np.float32)) - put(cy)) / size
    u, v = u0 * xp.cos(tilt) + v0 * xp.sin(tilt), v0 * xp.cos(tilt) - u0 * xp.sin(tilt)
    flying = picture.moving(np.zeros((len(scenes), 0), np.float32), *_flow(centre, t))
    looks = np.array([f"{s.subject} {s.pattern}" for s in scenes])
    for look in np.unique(looks):
        found = np.flatnonzero(looks == look)
        n = put(found)
        kind, pattern = look.split()
        drawn, alpha = drawing.subject(xp, kind, u[n], v[n], colour[n], phase[n], put, pattern)
        where = (put(rows[found][:, None, None]), put(rows_of[found]), put(columns_of[found]))
        under = picture.image[where]
        under[..., :3] += alpha[..., None] * (drawn - under[..., :3])
        if picture.motion:
            under[..., 3:] += alpha[..., None] * (flying[n][:, None, None] - under[..., 3:])
        picture.image[where] = under
        picture.mask[where] = alpha


def _draw_bank(picture: _Picture, scenes: Sequence[Scene], t: Times, palette: list[Array]) -> None:
    """A bank of cloud that covers the sky from the right while the subject is away, and leaves to the left."""
    n = _where(s.behind == "clouds" for s in scenes)
    if not n.size:
        return
    xp, wide = picture.xp, picture.width * picture.scale
    now, before, after = (away([scenes[i] for i in n], t[n] + k) for k in (0, -0.5, 0.5))
    coming = after >= before  # the front edge is in the picture, else the rear one
    reach = (wide + 30) * now
    edge = picture.column(np.where(coming, wide + 15 - reach, reach - 15))
    outwards = picture.column(np.where(coming, 1.0, -1.0))
    drift = 0.3 * t[n][:, None]
    puffs = 3.5 * xp.abs(xp.sin(0.34 * picture.y + picture.column(0.02 * t[n])))
    below = 51.0 + 3.0 * np.abs(np.sin(np.pi * (picture.x_[None] + drift) / 15))
    distance = xp.maximum(outwards * (edge - picture.x) - puffs, picture.y - picture.across(below))
    reached = picture.column((now > 0).astype(np.float64))
    rgb = picture.put(0.8 * _cloud_rgb(palette, n) + 0.2 * palette[1][n])[:, None, None]
    shade = 1.02 - 0.002 * picture.y
    for row, (middle, width) in enumerate(((9, 21), (20, 27), (32, 19))):  # rows of puffs, each lit from above
        arch = middle - 4.0 * np.abs(np.sin(np.pi * (picture.x_[None] + (1 + 0.2 * row) * drift) / width + row))
        shade = shade - 0.06 * cover(xp, (picture.across(arch) - picture.y) * 0.35)
        shade = shade + 0.06 * cover(xp, (picture.across(arch + 7) - picture.y) * 0.25)
    speed = -(wide + 30) * np.abs(after - before)
    picture.lay(cover(xp, distance * 0.5) * reached, rgb * shade[..., None], _level(picture, n, speed), n)


def _draw(
    xp: Any, put: Put, scenes: Sequence[Scene], frames: npt.ArrayLike, height: int, width: int, *, motion: bool = False
) -> tuple[Any, Any]:
    """The renderer, for NumPy and for torch: `xp` is the library, `put` makes its arrays of NumPy's.

    What moves is found in float64, one number a frame or column, and pixels are then drawn in float32 by `xp`.
    Returns pictures `[N,H,W,3]` in [0,1], with `motion` `[N,H,W,5]`, and the subject's coverage `[N,H,W]` in [0,1].
    """
    if len(scenes) != np.size(frames):
        raise ValueError(f"{len(scenes)} scenes are given for {np.size(frames)} frames: give one scene a frame")
    t = np.asarray(frames, np.float64)
    palette = [np.array([TIME_RGB[s.time][k] for s in scenes], np.float32) for k in range(5)]
    picture = _Picture(xp, put, len(scenes), height, width, motion)
    dives = np.array([s.behind == "hills" for s in scenes])
    _draw_sky(picture, scenes, t, palette)
    _draw_clouds(picture, scenes, t, palette)
    _draw_birds(picture, scenes, t, palette)
    _draw_layer(picture, scenes, t, palette, 0)
    picture.mask = xp.zeros_like(picture.image[..., 0])
    _draw_subject(picture, scenes, t, palette, np.flatnonzero(dives))
    for i in (1, 2):
        _draw_layer(picture, scenes, t, palette, i)
    _draw_subject(picture, scenes, t, palette, np.flatnonzero(~dives))
    _draw_bank(picture, scenes, t, palette)
    picture.image[..., :3] = xp.clip(picture.image[..., :3], 0, 1)
    return picture.image, picture.mask


def render_frames(
    scenes: Sequence[Scene], frames: Sequence[int] | Rows, height: int = 64, width: int = 96
) -> tuple[Array, Array]:
    """Renders frame `frames[i]` of `scenes[i]` for every i.

    Returns the pictures `[N,H,W,3]` in [0,1] and the subject's coverage `[N,H,W]` in [0,1].
    """
    image, mask = _draw(np, np.asarray, scenes, frames, height, width)
    return image, mask


def render_tensors(
    scenes: Sequence[Scene],
    frames: Sequence[int] | Rows,
    height: int = 64,
    width: int = 96,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """`render_frames` by torch, on any device, equal to rounding; and how everything moves.

    Returns the pictures `[N,H,W,3]` in [0,1], the subject's coverage `[N,H,W]` in [0,1], and the flow `[N,H,W,2]`: how
    what a pixel shows moves, to the right and downwards in pixels a frame; the subject's own turning is left out.
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
