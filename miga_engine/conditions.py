"""What a video begins with: a picture, or the end of a clip, read and brought to the video's size and rate."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import reprlib
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from miga_engine.errors import ConfigError
from miga_engine.models.bundle import ModelBundle
from miga_engine.request import Condition, Request
from miga_engine.video.rate import frame_rate

_SHAPES = {"image": "[H,W,3]", "video": "[T,H,W,3]"}


def condition_of(given: Request, bundle: ModelBundle, most_latents: int) -> Condition | None:
    """What the request's `image` or `video` is, for a request whose height, width and fps are known.

    `most_latents` is how many latent frames a video may begin with. Raises ConfigError, MigaError where a file cannot
    be read.
    """
    named = {kind: getattr(given, kind) for kind in ("image", "video") if getattr(given, kind) is not None}
    if given.video_frames is not None and "video" not in named:
        raise ConfigError(f"video_frames is {given.video_frames} without a video: name the clip, or leave it out")
    if not named:
        return given.condition
    if len(named) == 2:
        raise ConfigError("image and video are both given: keep one of the two")
    ((kind, source),) = named.items()
    most = 1 if kind == "image" else bundle.num_video_frames(most_latents)
    if given.video_frames is not None:
        _check_count(given.video_frames, most, bundle)
    is_file = isinstance(source, str | os.PathLike)
    found = _read(kind, source, frame_rate(given.fps), most) if is_file else _array(kind, source)
    count = given.video_frames or min(most, len(found))
    if len(found) < count:
        raise ConfigError(f"video_frames is {count} and the clip has {len(found)} at {given.fps} fps: ask for fewer")
    count = bundle.num_video_frames(bundle.num_whole_latents(count))
    frames = _fitted(torch.from_numpy(np.stack(found[-count:])), given.height, given.width)
    name = os.path.basename(os.fspath(source)) if is_file else ""
    digest = hashlib.blake2b(frames.numpy().tobytes(), digest_size=8).hexdigest()
    return Condition(kind, count, name, digest, frames)


def _check_count(count: int, most: int, bundle: ModelBundle) -> None:
    """ConfigError unless so many video frames are whole latent frames, and no more than there may be."""
    latents = bundle.num_whole_latents(count)
    below, above = bundle.num_video_frames(latents), bundle.num_video_frames(latents + 1)
    if below != count and above <= most:
        raise ConfigError(f"video_frames is {count}, which is no whole number of latent frames: use {below} or {above}")
    if count > most:
        raise ConfigError(f"video_frames is {count}, and a video begins with at most {most} frames here: ask for fewer")


def _read(kind: str, path: str | os.PathLike[str], fps: Fraction, most: int) -> list[np.ndarray[Any, Any]]:
    """The picture of a file, or the last frames of a clip at the video's rate, `[H,W,3]` uint8."""
    from miga_engine.video.reading import check_bytes, opened_video

    kept: deque[np.ndarray[Any, Any]] = deque(maxlen=most)
    with opened_video(path) as video:
        for number, frame in enumerate(
            _at_rate(video.frames, video.fps, fps, most) if kind == "video" else video.frames
        ):
            if kind == "image" and number:
                raise ConfigError(f"{os.fspath(path)} holds more than one picture: give it as the video")
            kept.append(frame)
            check_bytes(path, frame.nbytes * len(kept))
    if not kept:
        raise ConfigError(f"{os.fspath(path)} holds no frames: give another file")
    return list(kept)


def _at_rate(
    frames: Iterator[np.ndarray[Any, Any]], rate: Fraction | None, fps: Fraction, most: int
) -> Iterator[np.ndarray[Any, Any]]:
    """Of frames at a rate those that are shown at the times of another: left out, or repeated, `most` times at most."""
    number = 0
    for i, frame in enumerate(frames, 1):
        end = math.ceil(i * fps / rate) if rate else i
        yield from itertools.repeat(frame, min(end - number, most))
        number = end


def _array(kind: str, given: Any) -> list[np.ndarray[Any, Any]]:
    """Pictures out of an array, a tensor or a PIL image, `[H,W,3]` uint8; ConfigError where it is none."""
    value = given.convert("RGB") if kind == "image" and hasattr(given, "convert") else given
    try:
        array = np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        array = np.empty(0)
    array = array[None] if kind == "image" else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        got = f"{array.dtype} {list(array.shape[kind == 'image' :])}" if array.size else reprlib.repr(given)
        raise ConfigError(f"{kind} must be a file, or uint8 {_SHAPES[kind]}, got {got}")
    return list(array)


def _fitted(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Frames uint8 `[n,H,W,3]` in the size of the video: as large as fills it, and what is over cut off evenly."""
    old_height, old_width = frames.shape[1:3]
    if (old_height, old_width) == (height, width):
        return frames
    scale = max(Fraction(height, old_height), Fraction(width, old_width))
    size = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    made = frames.new_empty(len(frames), height, width, 3)
    for frame, target in zip(frames, made, strict=True):
        picture = F.interpolate(
            frame.permute(2, 0, 1)[None].float(), size, mode="bicubic", antialias=True, align_corners=False
        )
        cut = picture[0, :, top : top + height, left : left + width].round().clamp(0, 255)
        target.copy_(cut.permute(1, 2, 0))
    return made


def encoded(condition: Condition, bundle: ModelBundle) -> torch.Tensor:
    """Latent frames `[n,C,h,w]` float32 of a condition, on the bundle's device; of shapes alone on `meta`.

    Raises ConfigError where the model's decoder has no encoder beside it.
    """
    assert condition.frames is not None
    count, (height, width) = bundle.num_latent_frames(condition.num_frames), condition.frames.shape[1:3]
    if bundle.device.type == "meta":
        factor = bundle.spatial_factor
        shape = (count, bundle.latent_channels, height // factor, width // factor)
        return torch.empty(shape, device="meta")
    pictures = condition.frames.to(bundle.device).permute(3, 0, 1, 2)[None].to(bundle.vae.dtype) / 127.5 - 1
    with torch.no_grad():
        return bundle.vae.encode(pictures)[0].transpose(0, 1).float().contiguous()
