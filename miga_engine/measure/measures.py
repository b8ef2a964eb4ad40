"""Measures of a video, pure functions of its frames uint8 [T,H,W,3], and `measure`, which takes them all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from miga_engine.colour import LUMA
from miga_engine.errors import ConfigError
from miga_engine.measure import long_videos
from miga_engine.measure.catalogue import MEASURES
from miga_engine.measure.features import consistency_curve, load_features
from miga_engine.measure.flow import SHORT_SIDE, flow_method, motion_and_warping
from miga_engine.measure.truth import truth_curves

VideoArray = npt.NDArray[np.uint8]
Curve = npt.NDArray[np.float64]

_LUMA = np.array(LUMA, np.float32)
_FROZEN_LEVELS = 0.1
_STILL = 0.1  # pixels a frame at a short side of 256
_GROUP, _REFERENCE_GROUPS = 4, 2  # latent frames in a judged group, and groups before it that it is compared with
_PERMUTATIONS = 2000

MAX_HELD_BYTES = 2**31
"""Of frames, where all have to be held at once."""


PART_FRAMES = 16
"""Frames that are measured together; a multiple of the batches of `features`, and those of `flow`."""


def measure(
    frames: VideoArray | Iterable[VideoArray],
    fps: float | None = None,
    *,
    prompt: str | Mapping[int, str] | None = None,
    block: int | None = None,
    block_offset: int | None = None,
    period: int = 1,
    flow: str = "auto",
    features: str | os.PathLike[str] = "auto",
    subject_features: str | os.PathLike[str] | None = None,
    background_features: str | os.PathLike[str] | None = None,
    vae: Any = None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Measures a video uint8 [T,H,W,3], T ≥ 2.

    Args:
        frames: the video, or parts of it in order, of which one or two are held at a time, all only where there is a
            prompt or a VAE. Parts of PART_FRAMES frames give the same numbers as the whole, to the bit.
        fps: frames a second, for the report's time axis.
        prompt: of the embedded world, or a timeline {first frame: prompt}; adds the measures against its truth.
        block, block_offset, period: video frames a committed block, the first border (default: `block`), and video
            frames a latent frame; adds the seams, see `seam_visibility`.
        flow: who estimates motion, see `flow_method`.
        features, subject_features, background_features: names or weights files for `load_features`, on `device`.
        vae: a loaded VAE; adds the latent consistency score.

    Returns a JSON-able dict: frames, height, width, fps; computed_by {measure: who}; measures {name of `MEASURES`:
    float}; curves {name: list over frames}; flags, sentences that must be read beside the numbers.
    Raises ConfigError for frames or options that cannot be used.
    """
    method = flow_method(flow)
    computed_by = {"motion": {"dis": "OpenCV's DIS", "lucas-kanade": "Lucas-Kanade, built in"}[method]}
    networks = {}
    for name, choice in (
        ("consistency", features),
        ("subject_consistency", subject_features),
        ("background_consistency", background_features),
    ):
        if choice is not None:
            networks[name] = load_features(choice, device)
            computed_by[name] = networks[name].name
    found: dict[str, list[npt.NDArray[np.float64]]] = {}

    def note(**values: npt.NDArray[np.float64]) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    def note_pairs(part: VideoArray) -> None:
        if len(part) > 1:
            motion, warping = motion_and_warping(part, method)
            note(difference=frame_differences(part), motion=motion, warping_error=warping)

    held: list[VideoArray] = []
    num_frames, num_bytes, previous = 0, 0, np.zeros((0, 0, 0, 3), np.uint8)
    first_frame: VideoArray | None = None
    for part in _parts(frames):
        if first_frame is None:
            first_frame = part[0].copy()
        else:
            note_pairs(np.concatenate([previous, part[:1]]))
        note(
            luminance=luminance(part), saturation=saturation(part), sharpness=sharpness(part), noise=noise(part),
            histograms=colour_histograms(part), hues=long_videos.hue_histograms(part),
            distance=long_videos.distances_to(first_frame, part),
            **{name: network(part) for name, network in networks.items()},
        )  # fmt: skip
        num_frames, num_bytes, previous = num_frames + len(part), num_bytes + part.nbytes, part
        if prompt is not None or vae is not None:
            if num_bytes > MAX_HELD_BYTES:
                raise ConfigError(
                    f"the first {num_frames} frames take more than {MAX_HELD_BYTES >> 30} GiB, and all are held to "
                    "measure against a prompt or with a model: give fewer frames, or leave these out"
                )
            held.append(part)
    if num_frames < 2:
        raise ConfigError(f"the video has {num_frames} frames: give 2 frames or more")
    note_pairs(previous)
    height, width = previous.shape[1:3]
    curves: dict[str, Curve] = {name: np.concatenate(values) for name, values in found.items()}
    histograms, hues = curves.pop("histograms"), curves.pop("hues")
    differences, motion, warping = curves["difference"], curves["motion"], curves["warping_error"]
    n = max(1, num_frames // 8)
    curves["colour_overlap"] = np.minimum(histograms, histograms[:n].mean(0)).sum(1)
    similarity_drop = long_videos.similarity_drop(curves["consistency"])
    for name in networks:
        curves[name] = consistency_curve(curves[name])
    figures: dict[str, Any] = {
        **{name: curves[name].mean() for name in MEASURES if name in curves and name.endswith("consistency")},
        "motion": motion.mean(),
        "motion_ratio": _ratio(motion),
        "frozen_share": frozen_share(differences),
        "flicker": 1 - differences.mean() / 255,
        "warping_error": np.nanmean(warping) if np.isfinite(warping).any() else np.nan,
        "largest_jump": differences.max() / max(float(np.median(differences)), _FROZEN_LEVELS),
        "colour_overlap": np.minimum(histograms[:n].mean(0), histograms[-n:].mean(0)).sum(),
        "hue_drift": long_videos.hue_drift(hues),
        "similarity_drop": similarity_drop,
        "sink_collapse": long_videos.sink_collapse(curves["distance"]),
        "returns": long_videos.returns(curves["distance"]),
        "cuts": long_videos.count_cuts(differences),
    }
    for name in ("consistency", "sharpness", "luminance", "saturation"):
        figures[f"{name}_drift"] = long_videos.start_end_contrast(curves[name])
    for name in ("luminance", "saturation", "sharpness", "noise"):
        figures[name], figures[f"{name}_ratio"] = curves[name].mean(), _ratio(curves[name])
    if block is not None:
        figures["seam_ratio"], figures["seam_p"] = seam_visibility(differences, block, block_offset, period)
    if vae is not None:
        scores = latent_consistency(np.concatenate(held), vae)
        figures["latent_consistency"], figures["latent_consistency_min"] = scores.mean(), scores.min()
    if prompt is not None:
        truth = truth_curves(np.concatenate(held), prompt)
        figures |= {f"truth_{name}": value for name, value in {**truth.means(), **truth.hazards()}.items()}
        curves["truth_colour_profile_distance"] = truth.colour_profile_distance
        curves["truth_accuracy"] = np.mean(list(truth.accuracy.values()), 0)
    return {
        "frames": num_frames,
        "height": height,
        "width": width,
        "fps": None if fps is None else float(fps),
        "computed_by": computed_by,
        "measures": {name: _json_number(figures[name]) for name in MEASURES if name in figures},
        "curves": {name: [_json_number(x) for x in curve] for name, curve in curves.items()},
        "flags": _flags(figures),
    }


def in_parts(frames: Iterator[VideoArray]) -> Iterator[VideoArray]:
    """Frames [H,W,3], as many at a time [n,H,W,3] as are measured together: a video may be longer than memory."""
    while part := list(islice(frames, PART_FRAMES)):
        yield np.stack(part)


def _parts(frames: VideoArray | Iterable[VideoArray]) -> Iterator[VideoArray]:
    """Parts that can be measured together; ConfigError for what are none."""
    parts = frames if isinstance(frames, Iterable) and not isinstance(frames, np.ndarray) else [frames]
    if isinstance(frames, np.ndarray) and frames.ndim == 4:
        parts = [frames[i : i + PART_FRAMES] for i in range(0, len(frames), PART_FRAMES)]
    size = None
    for part in parts:
        if not isinstance(part, np.ndarray) or part.dtype != np.uint8 or part.ndim != 4 or part.shape[3] != 3:
            got = f"{part.dtype} {list(part.shape)}" if hasattr(part, "shape") else type(part).__name__
            raise ConfigError(f"frames are {got}: give a numpy array uint8 [T,H,W,3]")
        size = size or part.shape[1:3]
        if min(size) < 16 or part.shape[1:3] != size:
            raise ConfigError(f"frames are {list(part.shape[:3])}: give frames of one size, 16×16 pixels or more")
        if len(part):
            yield part


def frame_differences(frames: VideoArray) -> Curve:
    """Mean absolute difference of successive frames in levels of 255: [T-1]."""
    return np.array([np.abs(b.astype(np.int16) - a).mean() for a, b in pairwise(frames)], np.float64)


def temporal_flicker(frames: VideoArray) -> float:
    """VBench's temporal flickering: (255 − mean absolute difference of successive frames)/255; 1 = no change at all.

    Source: VBench (arXiv 2311.17982), which takes it of still scenes only: motion lowers it too.
    """
    return float(1 - frame_differences(frames).mean() / 255)


def frozen_share(differences: Curve) -> float:
    """Share of pairs that differ by less than 0.1 levels."""
    return float((differences < _FROZEN_LEVELS).mean())


def luminance(frames: VideoArray) -> Curve:
    """Mean luma (BT.709) of each frame in [0,1]: [T]."""
    return np.array([float(frame.mean((0, 1)) @ _LUMA) / 255 for frame in frames])


def saturation(frames: VideoArray) -> Curve:
    """Mean over pixels of the largest minus the smallest channel in [0,1]: [T]."""

    def of(frame: VideoArray) -> float:
        r, g, b = (frame[..., i] for i in range(3))  # four times as fast as max and min over the last axis
        return float((np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)).mean()) / 255

    return np.array([of(frame) for frame in frames])


def sharpness(frames: VideoArray) -> Curve:
    """Variance of the Laplacian (four neighbours) of the luma, in squared levels: [T]."""

    def of(y: npt.NDArray[np.float32]) -> float:
        edges = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
        return float(edges.var())

    return np.array([of(frame @ _LUMA) for frame in frames])


def noise(frames: VideoArray) -> Curve:
    """Standard deviation of white noise in levels, by Immerkær's mask (CVIU 1996), which straight edges pass: [T]."""

    def of(y: npt.NDArray[np.float32]) -> float:
        rows = y[:-2] - 2 * y[1:-1] + y[2:]
        return float(np.abs(rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]).mean()) * (np.pi / 2) ** 0.5 / 6

    return np.array([of(frame @ _LUMA) for frame in frames])


def colour_histograms(frames: VideoArray) -> npt.NDArray[np.float64]:
    """Shares of the pixels of each frame in 8×8×8 cells of RGB: [T,512]."""

    def of(frame: VideoArray) -> npt.NDArray[np.float64]:
        r, g, b = (frame[..., i].astype(np.int64) >> 5 for i in range(3))
        return np.bincount((r * 64 + g * 8 + b).ravel(), minlength=512) / r.size

    return np.stack([of(frame) for frame in frames])


def seam_visibility(differences: Curve, block: int, offset: int | None = None, period: int = 1) -> tuple[float, float]:
    """Ratio and p-value of the borders of committed blocks in differences of successive frames [T-1].

    Borders lie before frames offset, offset + block, …; offset defaults to block. Each difference is divided by the
    mean of its neighbours'; the ratio is the geometric mean of that at borders over that elsewhere. The p-value is the
    share of random choices of as many pairs whose ratio is as large (one-sided, seeded). A video VAE makes a step
    between latent frames itself; with their length as `period` (4 of Wan's) borders are compared with the other
    steps between latent frames only.
    Raises ConfigError where the video has no border, or nothing else.
    """
    first = block if offset is None else offset
    if block < 2 or first < 0 or period < 1 or block % period:
        raise ConfigError(
            f"block is {block}, its offset {first} and the period {period}: give 2 or more, 0 or more, and a divisor "
            "of the block"
        )
    compared = np.arange((first - 1) % period, len(differences), period)
    is_border = (compared + 1 - first) % block == 0
    is_border &= compared + 1 >= first
    num = int(is_border.sum())
    if not 0 < num < len(compared):
        raise ConfigError(
            f"{len(differences) + 1} frames have {num} borders of blocks of {block} among {len(compared)} pairs: give "
            "another block, or a longer video"
        )
    d = differences + 0.01
    padded = np.pad(d, 1, mode="reflect")
    contrast = (np.log(d) - np.log((padded[:-2] + padded[2:]) / 2))[compared]

    def statistic(chosen: npt.NDArray[Any]) -> Any:
        inside = (contrast * chosen).sum(-1)
        return inside / num - (contrast.sum() - inside) / (len(contrast) - num)

    seen = statistic(is_border)
    rng = np.random.default_rng(0)
    random = rng.permuted(np.broadcast_to(is_border, (_PERMUTATIONS, len(contrast))), axis=1)
    p = (1 + int((statistic(random) >= seen - 1e-12).sum())) / (1 + _PERMUTATIONS)
    return float(np.exp(seen)), p


@torch.no_grad()
def latent_consistency(frames: VideoArray, vae: Any) -> Curve:
    """Consistency score (`ops.consistency_score`) of each group of 4 latent frames with the 8 before it.

    The video uint8 [T,H,W,3] is encoded in clips of at most 81 frames by a VAE of `miga_engine.models`, cropped at its
    right and lower edge to the size that takes. Raises ConfigError for videos of fewer than 12 latent frames.
    """
    from miga_engine import ops

    factor, ratio = vae.config.spatial_factor, getattr(vae.config, "frame_ratio", 1)
    height, width = (side // factor * factor for side in frames.shape[1:3])
    weight = next(vae.parameters())
    latents = []
    for start in range(0, len(frames), 81):
        clip = frames[start : start + 81, :height, :width]
        clip = clip[: 1 + (len(clip) - 1) // ratio * ratio]
        video = torch.from_numpy(np.ascontiguousarray(clip)).to(weight.device).permute(3, 0, 1, 2)[None]
        latents.append(vae.encode(video.to(weight.dtype).div(127.5).sub(1))[0].transpose(0, 1).float())
    x = torch.cat(latents)  # [F,C,h,w]
    before = _GROUP * _REFERENCE_GROUPS
    if len(x) < before + _GROUP:
        raise ConfigError(
            f"{len(frames)} frames are {len(x)} latent frames, and the consistency score needs {before + _GROUP}: "
            "give a longer video or leave --model out"
        )
    starts = range(before, len(x) - _GROUP + 1, _GROUP)
    scores = [ops.consistency_score(x[s - before : s], x[None, s : s + _GROUP]) for s in starts]
    return torch.cat(scores).double().cpu().numpy()


def measure_tiny(frames: VideoArray, prompt: str | Mapping[int, str]) -> dict[str, float]:
    """A video uint8 [T,H,W,3] of the embedded world in numbers: its truth, and motion and flicker beside it.

    Keys: those of `truth.TruthCurves.means`, motion (pixels a frame at a short side of 256, Lucas-Kanade) and flicker
    (VBench's). Raises ConfigError where the prompt names nothing of the embedded world.
    """
    motion, _ = motion_and_warping(frames, "lucas-kanade")
    return {
        **truth_curves(frames, prompt).means(),
        "motion": float(motion.mean()),
        "flicker": temporal_flicker(frames),
    }


def _ratio(curve: Curve) -> float:
    n = max(1, len(curve) // 8)
    first, last = float(curve[:n].mean()), float(curve[-n:].mean())
    return last / first if first > 0 else (1.0 if last == 0 else np.inf)


def _flags(figures: Mapping[str, float]) -> list[str]:
    flags = []
    if figures["motion"] < _STILL:
        flags.append(
            f"STILL: it moves by {figures['motion']:.2f} px a frame at a short side of {SHORT_SIDE}; a still picture "
            "is perfectly consistent, so its consistency says nothing"
        )
    elif figures["motion_ratio"] < 0.5:
        flags.append(f"SLOWS DOWN: motion at the end is {figures['motion_ratio']:.2f} of that at the start")
    if figures["frozen_share"] > 0.05:
        flags.append(f"FROZEN: {100 * figures['frozen_share']:.0f} % of its frames repeat the one before")
    if figures.get("seam_p", 1.0) < 0.01 and figures["seam_ratio"] > 1.05:
        flags.append(f"SEAMS: frames differ {figures['seam_ratio']:.2f} times as much at block borders as elsewhere")
    return flags


def _json_number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
