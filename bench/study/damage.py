"""Which measure sees which damage: clean clips of the embedded world, damaged on purpose, and the table of it.

`python -m bench.study.damage docs/measures.md` writes the table with the definitions of all measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from bench.command import Parser, run_command
from miga_engine.colour import LUMA
from miga_engine.files import write_whole
from miga_engine.measure.catalogue import MEASURES
from miga_engine.measure.measures import VideoArray, measure
from miga_engine.tiny import WEIGHTS_DIR, world

NUM_FRAMES, BLOCK = 80, 12
_HALF = 43  # where no block ends
_SCENE = ("balloon", "red", "green", "noon")
_LAYOUTS = ((3, 200), (7, 900), (12, 60), (21, 3000))  # seed and first frame; the first one is damaged


def clean_clips() -> list[VideoArray]:
    """Clips uint8 [80,64,96,3] of one scene in several layouts: how measures differ where nothing is wrong."""
    return [world.render(world.Scene(*_SCENE, seed=seed), first, NUM_FRAMES)[0] for seed, first in _LAYOUTS]


def _levels(video: npt.NDArray[Any]) -> VideoArray:
    return np.asarray(video.round().clip(0, 255), np.uint8)


def _growth(frames: VideoArray) -> npt.NDArray[Any]:
    """0 for the first half, then up to 1 at the last frame: [T,1,1,1]."""
    return np.linspace(-1, 1, len(frames)).clip(0)[:, None, None, None]


def _blur(frames: VideoArray) -> VideoArray:
    """the second half grows blurred, to a standard deviation of 2 pixels."""
    out = []
    for frame, share in zip(frames, _growth(frames).ravel(), strict=True):
        offsets = torch.arange(-6.0, 7.0)
        kernel = torch.exp(-(offsets**2) / (2 * max(2.0 * share, 1e-3) ** 2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        x = F.pad(torch.from_numpy(frame).float().permute(2, 0, 1)[None], (6, 6, 6, 6), mode="replicate")
        x = F.conv2d(F.conv2d(x, kernel, groups=3), kernel.transpose(2, 3), groups=3)
        out.append(x[0].permute(1, 2, 0).numpy())
    return _levels(np.stack(out))


def _noise(frames: VideoArray) -> VideoArray:
    """white noise grows over the second half, to a standard deviation of 20 levels."""
    grain = np.random.default_rng(0).standard_normal(frames.shape)
    return _levels(frames + 20 * _growth(frames) * grain)


def _drift(frames: VideoArray) -> VideoArray:
    """the colours drift over the second half: red up to 1.3 times, blue down to 0.7 times."""
    return _levels(frames * (1 + _growth(frames) * np.array([0.3, 0.0, -0.3])))


def _fade(frames: VideoArray) -> VideoArray:
    """the colours fade over the second half, to a third of their saturation."""
    luma = (frames @ np.array(LUMA))[..., None]
    return _levels(frames + 2 / 3 * _growth(frames) * (luma - frames))


def _flicker(frames: VideoArray) -> VideoArray:
    """every other frame is 6 % darker."""
    return _levels(frames * np.where(np.arange(len(frames)) % 2, 0.94, 1.0)[:, None, None, None])


def _freeze(frames: VideoArray) -> VideoArray:
    """the second half repeats one frame."""
    return frames[np.minimum(np.arange(len(frames)), _HALF)]


def _still(frames: VideoArray) -> VideoArray:
    """the first frame, throughout."""
    return np.repeat(frames[:1], len(frames), 0)


def _cut(frames: VideoArray) -> VideoArray:
    """the second half is another scene: a blue kite over snowy hills at dusk."""
    other, _ = world.render(world.Scene("kite", "blue", "snowy", "dusk", seed=5), 0, len(frames))
    return np.concatenate([frames[:_HALF], other[_HALF:]])


def _shuffle(frames: VideoArray) -> VideoArray:
    """the frames in random order."""
    return frames[np.random.default_rng(0).permutation(len(frames))]


def _seams(frames: VideoArray) -> VideoArray:
    """every block of 12 frames skips 4 frames of the scene."""
    scene = world.Scene(*_SCENE, seed=_LAYOUTS[0][0])
    index = np.arange(len(frames))
    pictures, _ = world.render_frames([scene] * len(frames), _LAYOUTS[0][1] + index + 4 * (index // BLOCK))
    return _levels(pictures * 255)


def _sink(frames: VideoArray) -> VideoArray:
    """it jumps back to its first frame every 20 frames, as where a sink collapses."""
    return frames[np.arange(len(frames)) % 20]


DAMAGES: dict[str, Callable[[VideoArray], VideoArray]] = {
    "blur": _blur,
    "noise": _noise,
    "drift": _drift,
    "fade": _fade,
    "flicker": _flicker,
    "freeze": _freeze,
    "still": _still,
    "cut": _cut,
    "shuffle": _shuffle,
    "seams": _seams,
    "sink": _sink,
}


def figures(frames: VideoArray, vae: Any) -> dict[str, float]:
    """All measures that need neither weights from elsewhere nor optional packages."""
    prompt = world.caption(world.Scene(*_SCENE))
    options: dict[str, Any] = {"flow": "lucas-kanade", "features": "descriptor", "vae": vae}
    return measure(frames, prompt=prompt, block=BLOCK, **options)["measures"]


def load_vae() -> Any:
    """The embedded model's."""
    from miga_engine import models

    return models.load_vae(WEIGHTS_DIR)


def mark(measure: str, clean: Sequence[float], damaged: float, strictness: float = 1.0) -> str:
    """▲ or ▼ where a value lies above or below all clean ones by `strictness` times their spread or more, else ·.

    The spread counts as a unit of the last digit shown at least. A p-value is low below 0.01.
    """
    entry = MEASURES[measure]
    if measure == "seam_p":
        return "▼" if damaged < 0.01 else "·"
    slack = strictness * max(max(clean) - min(clean), 10.0**-entry.digits / entry.factor)
    return "▲" if damaged >= max(clean) + slack else "▼" if damaged <= min(clean) - slack else "·"


def marks(clean: Sequence[dict[str, float]], damaged: dict[str, dict[str, float]]) -> dict[str, dict[str, str]]:
    """measure → damage → mark, of figures of clean clips and of one damaged in several ways."""
    return {
        name: {damage: mark(name, [c[name] for c in clean], values[name]) for damage, values in damaged.items()}
        for name in clean[0]
    }


def document(clean: Sequence[dict[str, float]], damaged: dict[str, dict[str, float]]) -> str:
    """docs/measures.md."""
    seen = marks(clean, damaged)
    lines = [_INTRODUCTION, *(f"- **{name}**: {function.__doc__}" for name, function in DAMAGES.items())]
    lines += ["", f"| measure | clean | {' | '.join(damaged)} |", "| --- | --- |" + " --- |" * len(damaged)]
    for name, row in seen.items():
        entry = MEASURES[name]
        unit = f", {entry.unit}" if entry.unit else ""
        values = sorted(c[name] for c in clean)
        low, high = entry.text(values[0]), entry.text(values[-1])
        cells = [low if low == high else f"{low} … {high}"]
        cells += [f"{row[d]} {entry.text(damaged[d][name])}" if row[d] != "·" else "·" for d in damaged]
        lines.append(f"| {entry.label}{unit} | {' | '.join(cells)} |")
    lines += ["", "## Definitions", ""]
    group = ""
    for name, entry in MEASURES.items():
        if entry.group != group:
            group = entry.group
            lines += [f"### {group}", "", "| name | shown as | better | what it is |", "| --- | --- | --- | --- |"]
        unit = f", {entry.unit}" if entry.unit else ""
        lines.append(f"| `{name}` | {entry.label}{unit} | {entry.better or '–'} | {entry.meaning} |")
        following = list(MEASURES)[list(MEASURES).index(name) + 1 :]
        if following and MEASURES[following[0]].group != group:
            lines.append("")
    return "\n".join(lines) + "\n"


_INTRODUCTION = """\
# What the measures of `miga eval` see

Made by `python -m bench.study.damage docs/measures.md`; `tests/measure/test_measures.py` holds it to what is measured.

No single number says that a video is good. A still picture is perfectly consistent, noise is sharp, and a cut to a
better scene raises accuracy: read consistency beside motion, and sharpness beside noise.

## Which measure sees which damage

Clips of the embedded world, 80 frames of 96×64, damaged on purpose. *Clean* is the range over four layouts of the same
scene; ▲ and ▼ mark values outside that range by its own length or more, with the value; · did not move. Motion by
the built-in Lucas-Kanade flow, features by the descriptor without weights, seams at blocks of 12 frames, latents by the
embedded model's VAE.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="python -m bench.study.damage", description=__doc__)
    parser.add_argument("output", type=Path, help="markdown file to write")
    return parser


def run(options: argparse.Namespace) -> None:
    """Write docs/measures.md."""
    vae, clips = load_vae(), clean_clips()
    damaged = {name: figures(damage(clips[0]), vae) for name, damage in DAMAGES.items()}
    write_whole(options.output, document([figures(clip, vae) for clip in clips], damaged))


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
