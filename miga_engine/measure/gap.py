"""The gap profile: how much better or worse a network denoises in a queue's windows than in ordinary ones.

Real clips are encoded and noised, frame by frame to the levels of a window, and the network's error on the frames that
the window commits is compared with its error on the same frames in windows at one level, which it was trained on. No
video is made, so a checkpoint is profiled in the time of a few hundred forwards (docs/method.md §2). All neighbours are
true here: what helps by copying from them may copy errors in a run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from miga_engine.config import MigaConfig, fifo_config
from miga_engine.device import own_modes
from miga_engine.engine import Engine
from miga_engine.errors import ConfigError
from miga_engine.measure.report import write_curves
from miga_engine.prompts import PromptTimeline
from miga_engine.request import Request
from miga_engine.resolve import schedule_of
from miga_engine.runtime.layout import RunLayout
from miga_engine.runtime.network import Batch, PromptedTransformer
from miga_engine.schedule import Schedule, add_noise

BANDS = (1.0, 0.95, 0.88, 0.76, 0.6, 0.25)
"""Sigmas between which figures are given: most of a video is decided in the first band, detail in the last."""
_WINDOWS = 4  # that go through the network together


@dataclass(frozen=True)
class Clip:
    """A real video, uint8 `[T,H,W,3]`, and its caption."""

    frames: npt.NDArray[np.uint8]
    caption: str = ""


@dataclass(frozen=True)
class Profile:
    """Of a pattern: error over that of ordinary windows at the same level, less 1, in %, averaged over the levels of a
    band that the queue has; NaN where it has none. And its standard error."""

    percent: tuple[float, ...]
    error: tuple[float, ...]
    windows: float
    """That go through the network for each latent frame of video."""


@dataclass(frozen=True)
class _Window:
    """One forward: places in the clip `[F]`, steps `[F]`, and the positions whose error counts."""

    places: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    commit: range


def patterns(base: MigaConfig, window_frames: int) -> dict[str, MigaConfig]:
    """What is compared: FIFO-Diffusion, and the queue of `base` with and without guidance, by what a window keeps."""
    plain = dataclasses.replace(base, guidance_anchor=False, commit="leading", commit_offset=0, past_context=False)
    most = base.most_commit_offset(window_frames)
    found = {
        "FIFO, look-ahead": fifo_config(base, window_frames),
        "no guidance, leading": dataclasses.replace(plain, guidance_frames=0),
    }
    for guided, anchor in (("guided", False), ("anchored", True)):
        if base.guidance_frames:
            for name, offset in (("leading", 0), ("middle", most // 2), ("trailing", most)):
                found[f"{guided}, {name}"] = dataclasses.replace(plain, guidance_anchor=anchor, commit_offset=offset)
    return found


@own_modes()
@torch.no_grad()
def gap_profile(
    engine: Engine,
    clips: Iterable[Clip],
    compared: Mapping[str, MigaConfig],
    request: Request,
    *,
    passes: int = 2,
    on_clip: Callable[[], object] = lambda: None,
) -> tuple[list[tuple[float, float]], dict[str, Profile]]:
    """Sigmas (highest, lowest) of each band, and the profile of every pattern of `compared`.

    request: resolved; its schedule and seed are used, of its prompt nothing. passes: of the queue, each with another
    phase, that a pattern's windows are taken from for each clip. Without classifier-free guidance: of the conditional
    branch. A profile's band has only levels of the queue; Stage 2 is ordinary windows. ConfigError for a clip that is
    shorter than what a window spans.
    """
    schedule = schedule_of(request)
    bands = _bands(schedule)
    window = engine.bundle.window_frames
    layouts = {name: RunLayout(config, schedule.num_steps, window, None) for name, config in compared.items()}
    errors: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in ("", *compared)}
    for number, clip in enumerate(clips):
        latents = _latents(engine, clip)
        rng = np.random.default_rng([request.seed, number])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        network = _network(engine, schedule, clip.caption)
        plans = {"": _ordinary(schedule, window, len(latents), rng)}
        phases = range(number * passes, number * passes + passes)
        for name, layout in layouts.items():
            plans[name] = _of_queue(layout, phases, len(latents), rng, name)
        for name, windows in plans.items():
            errors[name].append(_errors(network, schedule, latents, noise, windows))
        on_clip()
    if len(errors[""]) < 2:
        raise ConfigError(f"there are {len(errors[''])} clips: give at least 2, for the profile has standard errors")
    ordinary = np.stack(errors[""])  # [clips,T]
    found = {
        name: _profile(np.stack(errors[name]), ordinary, bands, _num_windows(layout))
        for name, layout in layouts.items()
    }
    return [(float(schedule.sigmas[a]), float(schedule.sigmas[b - 1])) for a, b in bands], found


def to_record(bands: Sequence[tuple[float, float]], profiles: Mapping[str, Profile]) -> dict[str, object]:
    """JSON-able: what `table` shows, None where a band has no level of the queue."""
    cells = {name: dataclasses.asdict(profile) for name, profile in profiles.items()}
    for profile in cells.values():
        for name in ("percent", "error"):
            profile[name] = [None if np.isnan(value) else value for value in profile[name]]
    return {"sigmas": [list(band) for band in bands], "patterns": cells}


def table(bands: Sequence[tuple[float, float]], profiles: Mapping[str, Profile]) -> str:
    """Profiles as lines of text: per cent and its standard error in every band."""
    rows = [["kept", *(f"σ {high:.2f}–{low:.2f}" for high, low in bands), "windows/frame"]]
    for name, profile in profiles.items():
        cells = [
            "–" if np.isnan(p) else f"{p:+.1f} ± {e:.1f}" for p, e in zip(profile.percent, profile.error, strict=True)
        ]
        rows.append([name, *cells, f"{profile.windows:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "   ".join([f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(["error over that of ordinary windows, %", "", *lines])


def write_picture(
    path: str | os.PathLike[str], bands: Sequence[tuple[float, float]], profiles: Mapping[str, Profile]
) -> None:
    """Writes a PNG of a curve for each pattern over the bands; OutputError where the file cannot be written."""
    labels = [f"{high:.2f} - {low:.2f}" for high, low in bands]
    curves = {name: profile.percent for name, profile in profiles.items()}
    write_curves(path, "error over that of ordinary windows, %, by sigma", labels, curves)


def _bands(schedule: Schedule) -> list[tuple[int, int]]:
    """Steps from, to, of the bands that have any."""
    sigmas = schedule.sigmas[: schedule.num_steps]
    edges = [0, *(int((sigmas >= least).sum()) for least in BANDS[1:])]
    return [(first, stop) for first, stop in pairwise(edges) if stop > first]


def _profile(
    own: npt.NDArray[np.float64], ordinary: npt.NDArray[np.float64], bands: Sequence[tuple[int, int]], windows: float
) -> Profile:
    """From errors `[clips,T]`. Ratios are of means over clips, their standard errors by leaving out one clip after
    another (jackknife); a level that not every clip has is left out."""

    def by_band(over: npt.NDArray[np.float64], under: npt.NDArray[np.float64]) -> list[float]:
        ratio = over / under
        known = [ratio[first:stop][~np.isnan(ratio[first:stop])] for first, stop in bands]
        return [float(levels.mean()) if len(levels) else float("nan") for levels in known]

    count = len(own)
    whole = np.array(by_band(own.sum(0), ordinary.sum(0)))
    left = np.array([by_band(own.sum(0) - o, ordinary.sum(0) - u) for o, u in zip(own, ordinary, strict=True)])
    error = np.sqrt((count - 1) / count * ((left - left.mean(0)) ** 2).sum(0))
    return Profile(tuple((100 * (whole - 1)).tolist()), tuple((100 * error).tolist()), windows)


def _num_windows(layout: RunLayout) -> float:
    """Windows of a pass over the full queue for each frame that leaves it, and of the passes behind it."""
    config = layout.config
    length = config.zigzag_width * layout.handoff_step
    per_pass = [len(layout.queue_plan(0, length, number)) for number in range(layout.stride)]
    return sum(per_pass) / len(per_pass) / config.zigzag_width + layout.num_levels / layout.stride


def _latents(engine: Engine, clip: Clip) -> Tensor:
    """Normalised latents `[F,C,h,w]` float32 of a clip, cut to what the model takes around its middle."""
    bundle = engine.bundle
    count = 1 + (len(clip.frames) - 1) // bundle.frame_ratio * bundle.frame_ratio
    multiple = bundle.size_multiple
    height, width = (size // multiple * multiple for size in clip.frames.shape[1:3])
    if not (height and width):
        raise ConfigError(f"a clip is {clip.frames.shape[2]}×{clip.frames.shape[1]} pixels: the model needs {multiple}")
    top, left = ((size - kept) // 2 for size, kept in zip(clip.frames.shape[1:3], (height, width), strict=True))
    frames = torch.from_numpy(np.ascontiguousarray(clip.frames[:count, top : top + height, left : left + width]))
    video = frames.permute(3, 0, 1, 2)[None].to(bundle.device, bundle.vae.dtype).div(127.5).sub(1)
    return bundle.vae.encode(video)[0].transpose(0, 1).float()


def _network(engine: Engine, schedule: Schedule, caption: str) -> PromptedTransformer:
    bundle = engine.bundle
    timeline = PromptTimeline({0: caption}, 0, bundle.first_video_frame)
    texts = timeline.encode(bundle.default_negative_prompt, bundle.encode_prompts)
    return PromptedTransformer(bundle, texts, schedule.timesteps, {})


def _placed(frames: npt.NDArray[np.int64], length: int, rng: np.random.Generator, name: str) -> npt.NDArray[np.int64]:
    """Places in a clip of `length` latent frames for the numbered frames of a window, anywhere that they fit."""
    low, span = int(frames.min()), int(frames.max() - frames.min()) + 1
    if span > length:
        raise ConfigError(
            f"a clip has {length} latent frames and a window of {name!r} spans {span}: give longer clips, or bring "
            "guidance frames nearer"
        )
    return frames - low + int(rng.integers(length - span + 1))


def _ordinary(schedule: Schedule, window: int, length: int, rng: np.random.Generator) -> list[_Window]:
    """A window at every level."""
    return [
        _Window(_placed(np.arange(window), length, rng, "ordinary"), np.full(window, step), range(window))
        for step in range(schedule.num_steps)
    ]


def _of_queue(layout: RunLayout, phases: range, length: int, rng: np.random.Generator, name: str) -> list[_Window]:
    """The windows of passes over the full queue."""
    config, found = layout.config, []
    tail = config.zigzag_width * layout.handoff_step
    for number in phases:
        for frames, num_guidance, first, stop in layout.queue_windows(0, tail, number):
            steps = np.where(frames < 0, layout.num_steps, layout.handoff_step - 1 - frames // config.zigzag_width)
            is_anchored = bool(num_guidance) and config.guidance_anchor
            own = frames[1:] if is_anchored else frames
            places = _placed(own, length, rng, name)
            if is_anchored:
                places, steps[0] = np.concatenate([[0], places]), layout.num_steps
            found.append(_Window(places, steps, range(first, stop)))
    return found


def _errors(
    network: PromptedTransformer,
    schedule: Schedule,
    latents: Tensor,
    noise: Tensor,
    windows: Sequence[_Window],
) -> npt.NDArray[np.float64]:
    """Mean square error of the network's output by step `[T]` over the frames that the windows commit."""
    total, count = np.zeros(schedule.num_steps), np.zeros(schedule.num_steps)
    by_length: dict[int, list[_Window]] = {}
    for window in windows:
        by_length.setdefault(len(window.places), []).append(window)
    device = latents.device
    parts = [group[i : i + _WINDOWS] for group in by_length.values() for i in range(0, len(group), _WINDOWS)]
    for part in parts:
        places = torch.from_numpy(np.stack([window.places for window in part])).to(device)
        steps = torch.from_numpy(np.stack([window.steps for window in part])).to(device)
        shape = (*places.shape, *latents.shape[1:])
        clean, noises = latents[places.flatten()], noise[places.flatten()]
        mixed = add_noise(schedule, clean, noises, steps.flatten())
        known = steps.clamp(max=schedule.num_steps - 1)
        rows = network.place_prompts(np.ones(len(part), np.int64))
        keep = torch.arange(places.shape[1], device=device).expand(len(part), -1)
        output = network(
            Batch(
                mixed.view(shape).transpose(1, 2),
                schedule.timesteps.to(device)[known].float(),
                known,
                torch.from_numpy(rows).to(device),
                keep,
            )
        ).transpose(1, 2)
        target = _target(schedule, clean, noises, steps.flatten()).view(shape)
        error = (output.float() - target).square().mean((2, 3, 4)).double().cpu().numpy()
        for window, row in zip(part, error, strict=True):
            positions = np.arange(window.commit.start, window.commit.stop)
            np.add.at(total, window.steps[positions], row[positions])
            np.add.at(count, window.steps[positions], 1)
    with np.errstate(invalid="ignore"):
        return total / count


def _target(schedule: Schedule, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """What the network is to give: see `Schedule` for how clean latents and noise are mixed."""
    prediction = schedule.coefficients.prediction_type
    if prediction == "flow":
        return noise - clean
    if prediction == "epsilon":
        return noise
    view = (-1, 1, 1, 1)
    alpha, sigma = (values.to(clean.device)[steps].view(view) for values in (schedule.alphas, schedule.sigmas))
    return alpha * noise - sigma * clean
