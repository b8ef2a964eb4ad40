"""What the embedded world's truth says of a video: the prompt's attributes, the true colours, motion as it must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.errors import ConfigError
from miga_engine.measure.features import consistency_curve
from miga_engine.measure.flow import box
from miga_engine.measure.hazard import hazard, losses
from miga_engine.tiny import world
from miga_engine.tiny.classifier import ATTRIBUTES, load_classifier, to_tensor
from miga_engine.tiny.text import read_prompt

_HEIGHT, _WIDTH = 64, 96  # every measure is taken at the size the world is made for
_LAYOUTS = 64
_BEGINNING = 12  # frames that say what a prompt leaves open
_SIDE = 27  # of a subject, pixels
_LAG = 8  # frames between two looks at the hills
_HILLS = 52  # first row of the near hills


@dataclass(frozen=True)
class TruthCurves:
    """Curves over the frames of a video of T frames.

    accuracy: attribute → [T], 1 where the classifier reads what the prompt says, or, of what it leaves open,
        what the first frames show.
    subject_consistency, background_consistency: [T-1], VBench's rule on the classifier's features of subject and
        colour, and of terrain and time of day.
    colour_profile_distance: [T], mean absolute difference in [0,1] between the median colour of each row of the
        picture and that of the true world.
    profile: [T,64,3], those medians.
    position: [T,2], the subject's column and row in pixels of a picture 64×96.
    scroll: [T-8], speed of the near hills in the same pixels a frame; empty for videos of 8 frames or less.
    starts: the first frame of each prompt.
    """

    accuracy: dict[str, npt.NDArray[np.float64]]
    subject_consistency: npt.NDArray[np.float64]
    background_consistency: npt.NDArray[np.float64]
    colour_profile_distance: npt.NDArray[np.float64]
    profile: npt.NDArray[np.float64]
    position: npt.NDArray[np.float64]
    scroll: npt.NDArray[np.float64]
    starts: tuple[int, ...] = (0,)

    def means(self) -> dict[str, float]:
        """One number each: means of the curves, and these.

        colour_drift: mean absolute difference in [0,1] of the row medians between first and last eighth;
        subject_jitter: mean length of the subject's acceleration in pixels a frame²;
        scroll_speed, scroll_variation: median of the hills' speed, and its standard deviation over that median (only
        where the video is longer than 8 frames).
        """
        n = max(1, len(self.profile) // 8)
        figures = {
            "subject_consistency": self.subject_consistency.mean(),
            "background_consistency": self.background_consistency.mean(),
            "colour_profile_distance": self.colour_profile_distance.mean(),
            "colour_drift": np.abs(self.profile[-n:].mean(0) - self.profile[:n].mean(0)).mean(),
            **{f"accuracy_{name}": curve.mean() for name, curve in self.accuracy.items()},
        }
        if len(self.position) > 2:
            figures["subject_jitter"] = np.linalg.norm(np.diff(self.position, 2, axis=0), axis=1).mean()
        if len(self.scroll):
            figures["scroll_speed"] = np.median(self.scroll)
            figures["scroll_variation"] = self.scroll.std() / max(abs(figures["scroll_speed"]), 1e-3)
        return {name: float(value) for name, value in figures.items()}

    def losses(self) -> dict[str, tuple[int, int]]:
        """Attribute → how often it was lost, and in how many frames it was there (`hazard.losses`)."""
        return {name: losses(curve, self.starts) for name, curve in self.accuracy.items()}

    def hazards(self) -> dict[str, float]:
        """hazard, hazard_low, hazard_high: losses per 100 frames in which an attribute was there, all attributes
        together, and the 95 % interval (`hazard.hazard`)."""
        num_losses, num_frames = np.sum(list(self.losses().values()), 0)
        names = ("hazard", "hazard_low", "hazard_high")
        return dict(zip(names, hazard(int(num_losses), int(num_frames)), strict=True))


def scenes_of(
    prompt: str | Mapping[int, str], num_frames: int, read: npt.NDArray[np.integer] | None = None
) -> list[world.Scene]:
    """The scene, of any layout, that each frame of a prompt or timeline {first frame: prompt} is to show.

    read [T,4], indices of subject, colour, terrain and time of day: what a prompt leaves open is to stay what most of
    its first 12 frames show. Raises ConfigError for a prompt that names nothing of the embedded world, or, without
    read, not all of it.
    """
    timeline = {0: prompt} if isinstance(prompt, str) else {int(k): v for k, v in prompt.items()}
    scenes = {}
    for start, text in sorted(timeline.items()):
        named = read_prompt(text)
        missing = [name for name in ATTRIBUTES if name not in named]
        if missing and (read is None or not named):
            raise ConfigError(
                f"the prompt {text!r} names no {' and no '.join(missing)} of the embedded world: "
                f"word it like {world.all_captions()[0]!r}"
            )
        if missing and read is not None:
            first = read[min(start, num_frames - 1) :][:_BEGINNING]
            shown = [
                values[np.bincount(column).argmax()]
                for values, column in zip(ATTRIBUTES.values(), first.T, strict=True)
            ]
            named = dict(zip(ATTRIBUTES, shown, strict=True)) | named
        scenes[start] = world.Scene(named["subject"], named["colour"], named["terrain"], named["time"])
    starts = np.array(sorted(scenes))
    which = starts[np.searchsorted(starts, np.arange(num_frames), side="right") - 1]
    return [scenes[int(start)] for start in which]


@torch.no_grad()
def truth_curves(frames: npt.NDArray[np.uint8], prompt: str | Mapping[int, str]) -> TruthCurves:
    """Measures a video uint8 [T,H,W,3] of the embedded world against its prompt or timeline {first frame: prompt}.

    What a prompt leaves open is measured against the video's own beginning, see `scenes_of`. Raises ConfigError where a
    prompt names nothing of the embedded world.
    """
    video = to_tensor(np.ascontiguousarray(frames))
    if video.shape[2:] != (_HEIGHT, _WIDTH):
        video = F.interpolate(video, (_HEIGHT, _WIDTH), mode="area")
    model = load_classifier()
    body = torch.cat([model.body(part).flatten(2) for part in video.split(64)])
    pooled = torch.cat([body.mean(2), body.amax(2)], dim=1)
    hidden = [head[1](head[0](pooled)) for head in model.heads]  # type: ignore[index]
    read = [head[2](x).argmax(-1) for head, x in zip(model.heads, hidden, strict=True)]  # type: ignore[index]
    scenes = scenes_of(prompt, len(frames), torch.stack(read, 1).numpy())
    labels = torch.tensor([scene.labels for scene in scenes]).T
    accuracy = {name: (x == label).double().numpy() for name, x, label in zip(ATTRIBUTES, read, labels, strict=True)}
    subject, colour, terrain, time = (x.numpy() for x in hidden)
    rgb = (video + 1) / 2
    medians = rgb.median(dim=3, keepdim=True).values.double()  # [T,3,64,1]
    rgb = rgb.double()
    profile = medians.squeeze(3).transpose(1, 2).numpy()  # [T,64,3]
    true = np.stack([_true_profile(scene.terrain, scene.time) for scene in scenes])
    return TruthCurves(
        accuracy=accuracy,
        subject_consistency=consistency_curve(np.concatenate([subject, colour], 1)),
        background_consistency=consistency_curve(np.concatenate([terrain, time], 1)),
        colour_profile_distance=np.abs(profile - true).mean((1, 2)),
        profile=profile,
        position=_positions(rgb, medians, scenes),
        scroll=_scroll(rgb),
        starts=(0,) if isinstance(prompt, str) else tuple(sorted(int(start) for start in prompt)),
    )


@lru_cache
def _true_profile(terrain: str, time: str) -> npt.NDArray[np.float64]:
    """Median colour of each row [64,3], averaged over layouts, subjects and moments of the true world."""
    rng = np.random.default_rng(0)
    scenes = [
        world.Scene(world.SUBJECTS[i % 4], world.COLOURS[i % 5], terrain, time, int(rng.integers(2**31)))
        for i in range(_LAYOUTS)
    ]
    pictures, _ = world.render_frames(scenes, rng.integers(0, 5000, _LAYOUTS), _HEIGHT, _WIDTH)
    return np.asarray(np.median(pictures, axis=2).mean(0), np.float64)


def _subject_rgb(scene: world.Scene) -> npt.NDArray[np.float64]:
    return np.asarray(world.COLOUR_RGB[scene.colour], np.float64) * world.TIME_RGB[scene.time][4]


def _positions(rgb: Tensor, medians: Tensor, scenes: list[world.Scene]) -> npt.NDArray[np.float64]:
    """Column and row [T,2] of what stands out from its row and has the subject's colour, in rgb [T,3,64,96], whose
    rows have these medians [T,3,64,1].

    Found where a square of the subject's size holds most of it, then refined to the centre of mass in that square.
    """
    colour = torch.tensor(np.array([_subject_rgb(scene) for scene in scenes]))[:, :, None, None]
    stands_out = (rgb - medians).abs().amax(1)
    weight = (stands_out - 0.05).clamp(0, 0.3) * torch.exp(-(rgb - colour).square().sum(1) / 0.1)  # [T,64,96]
    weight[:, 44:] = 0  # the subject never leaves the sky
    mass = box(weight[:, None], _SIDE)[:, 0]
    best = mass.flatten(1).argmax(1)
    rows, columns = best // _WIDTH, best % _WIDTH
    y, x = torch.arange(_HEIGHT), torch.arange(_WIDTH)
    for _ in range(3):
        near = ((y - rows[:, None]).abs() <= _SIDE // 2)[:, :, None] & ((x - columns[:, None]).abs() <= _SIDE // 2)[
            :, None
        ]
        inside = weight * near
        total = inside.sum((1, 2)) + 1e-9
        rows, columns = (inside.sum(2) * y).sum(1) / total, (inside.sum(1) * x).sum(1) / total
    return torch.stack([columns, rows], 1).numpy()


def _scroll(rgb: Tensor) -> npt.NDArray[np.float64]:
    """Speed of the near hills to the left in pixels a frame [T-8]: the shift over 8 frames that fits best."""
    if len(rgb) <= _LAG:
        return np.zeros(0)
    strip = rgb[:, :, _HILLS:]
    later, now = strip[_LAG:], strip[:-_LAG]
    lags = range(-4, 17)
    errors = []
    for lag in lags:
        a, b = (now[..., max(lag, 0) : _WIDTH + min(lag, 0)], later[..., max(-lag, 0) : _WIDTH - max(lag, 0)])
        errors.append((a - b).square().mean((1, 2, 3)))
    error = torch.stack(errors, 1)
    best = error[:, 1:-1].argmin(1, keepdim=True) + 1
    left, middle, right = (error.gather(1, best + i)[:, 0] for i in (-1, 0, 1))
    offset = 0.5 * (left - right) / (left - 2 * middle + right).clamp_min(1e-12)
    return ((best[:, 0] + lags[0] + offset.clamp(-0.5, 0.5)) / _LAG).numpy()
