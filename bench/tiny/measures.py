"""What is measured of the embedded model: `python -m bench.tiny.measures`.

PSNR of its VAE over unseen scenes, the share of generated clips whose attributes the classifier reads as asked for, and
how the subject holds together: its jitter, and the share of frames in which it is not one piece (`pieces`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.command import Parser, run_command
from bench.study.paired import resampled_ratio
from bench.tiny.pieces import is_counted, pieces, subject_areas
from miga_engine.files import write_whole
from miga_engine.measure.truth import truth_curves
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.loading import load_bundle
from miga_engine.tiny import WEIGHTS_DIR, world
from miga_engine.tiny.classifier import ATTRIBUTES, AttributeClassifier, load_classifier, read_attributes, to_tensor
from miga_engine.video.contact_sheet import write_contact_sheet


def psnr(
    original: Tensor, other: Tensor, mask: npt.NDArray[np.float32] | None = None
) -> tuple[float, float, npt.NDArray[np.float64]]:
    """PSNR in dB of a video `[T,3,H,W]` in [-1,1]: whole, inside the subject's box, and per frame.

    The box of a frame bounds the pixels its subject covers by more than a tenth; without a mask it is the frame. Frames
    that do not show the subject have none; where no frame shows it, the box's figure is not a number.
    """
    error = ((other.clamp(-1, 1) - original) / 2).double().square().mean(1).numpy()  # [T,H,W]
    inside = []
    for t in range(len(error)):
        covered = np.ones(error.shape[1:], bool) if mask is None else mask[t] > 0.1
        rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
        if len(rows):
            inside.append(error[t, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean())
    per_frame = -10 * np.log10(error.mean((1, 2)))
    return float(-10 * np.log10(error.mean())), float(-10 * np.log10(np.mean(inside or np.nan))), per_frame


@torch.no_grad()
def sample_clips(
    bundle: ModelBundle,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_steps: int = 24,
    shift: float = 3.0,
    guidance_scale: float = 3.0,
    batch: int = 8,
    height: int = 64,
    width: int = 96,
) -> Tensor:
    """Short clips `[P,T,3,H,W]` in [-1,1], one a prompt, all frames at one noise level, by Euler steps."""
    generator = torch.Generator().manual_seed(seed)
    factor = bundle.spatial_factor
    shape = (bundle.latent_channels, bundle.window_frames, height // factor, width // factor)
    u = torch.linspace(1, 0, num_steps + 1)
    sigmas = (shift * u / (1 + (shift - 1) * u)).tolist()
    clips = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        n = len(part)
        context = bundle.encode_prompts([*part, *[bundle.default_negative_prompt] * n])
        x = torch.randn(n, *shape, generator=generator)
        for sigma, after in pairwise(sigmas):
            times = torch.full((2 * n,), 1000.0 * sigma)
            wished, other = bundle.transformer(torch.cat([x, x]), times, context).float().chunk(2)
            x = x + (after - sigma) * (other + guidance_scale * (wished - other))
        clips.append(bundle.vae.decode(x).transpose(1, 2))
    return torch.cat(clips)


def played(video: Tensor) -> npt.NDArray[np.uint8]:
    """uint8 `[T,H,W,3]` of a clip `[T,3,H,W]` in [-1,1], as a sink would write it."""
    return np.asarray((video.permute(0, 2, 3, 1) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))


def subject_figures(clips: Sequence[npt.NDArray[np.uint8]], scenes: Sequence[world.Scene]) -> dict[str, Any]:
    """Jitter of the subject in pixels a frame², mean and median over clips, and the share of frames in which it is not
    one piece, with a 95 % interval over clips, of those that can be counted (`pieces.is_counted`)."""
    jitter = [truth_curves(c, world.caption(s)).means()["subject_jitter"] for c, s in zip(clips, scenes, strict=True)]
    counted = [(c, s) for c, s in zip(clips, scenes, strict=True) if is_counted(s)]
    broken = np.array([float((pieces(subject_areas(c, s)) != 1).float().mean()) for c, s in counted])
    share, *interval = resampled_ratio(broken, np.ones_like(broken), num_resamples=4000)
    return {
        "jitter": round(float(np.mean(jitter)), 3),
        "jitter_median": round(float(np.median(jitter)), 3),
        "not_one_piece": round(share, 4),
        "counted": len(counted),
        "not_one_piece_95": [round(v, 4) for v in interval],
    }


def vae_figures(bundle: ModelBundle, num_scenes: int = 16, num_frames: int = 97, seed: int = 90_210) -> dict[str, Any]:
    """PSNR of encode and decode over unseen scenes: whole, in the subject's box, along the clip."""
    rng = np.random.default_rng(seed)
    whole, box, quarters, opening = [], [], [], []
    scenes, true, shown = [], [], []
    for _ in range(num_scenes):
        scene = world.sample_scene(rng)
        video, mask = world.render(scene, int(rng.integers(5000, 9000)), num_frames)
        x = to_tensor(video)
        with torch.no_grad():
            rec = bundle.vae.decode(bundle.vae.encode(x.transpose(0, 1)[None]))[0].transpose(0, 1)
        a, b, along = psnr(x, rec, mask)
        scenes.append(scene)
        true.append(video)
        shown.append(played(rec))
        whole.append(a)
        box.append(b)
        opening.append(along[:9])
        quarters.append([float(part.mean()) for part in np.array_split(along, 4)])
    return {
        "scenes": num_scenes,
        "frames": num_frames,
        "psnr_db": round(float(np.mean(whole)), 2),
        "psnr_db_lowest_scene": round(float(np.min(whole)), 2),
        "psnr_db_subject_box": round(float(np.mean(box)), 2),
        "psnr_db_quarters": np.mean(quarters, 0).round(2).tolist(),
        "psnr_db_first_frames": np.mean(opening, 0).round(2).tolist(),
        **subject_figures(shown, scenes),
        "true_clips": subject_figures(true, scenes),
    }


def clip_figures(
    bundle: ModelBundle, classifier: AttributeClassifier, num_clips: int = 80, seed: int = 0
) -> tuple[dict[str, Any], list[world.Scene], Tensor]:
    """Share of generated clips whose attributes the classifier reads as asked for; also the scenes and the clips."""
    rng = np.random.default_rng(seed)
    # every value of every attribute equally often
    n = np.arange(num_clips)
    columns = [rng.permutation(n % len(classes)) for classes in ATTRIBUTES.values()]
    names = list(ATTRIBUTES.values())
    scenes = [world.Scene(*(names[a][columns[a][i]] for a in range(4))) for i in range(num_clips)]
    clips = sample_clips(bundle, [world.caption(s) for s in scenes], seed=seed)
    right = np.array(
        [[read[a] == getattr(s, a) for a in ATTRIBUTES] for s, c in zip(scenes, clips, strict=True)
         if (read := read_attributes(classifier, c))]
    )  # fmt: skip
    shares = {a: round(float(v), 3) for a, v in zip(ATTRIBUTES, right.mean(0), strict=True)}
    held = subject_figures([played(c) for c in clips], scenes)
    return {"clips": num_clips, **shares, "all_four": round(float(right.all(1).mean()), 3), **held}, scenes, clips


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="python -m bench.tiny.measures", description=__doc__)
    parser.add_argument("--folder", type=Path, default=WEIGHTS_DIR)
    parser.add_argument("--clips", type=int, default=80)
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--docs", type=Path, help="folder for vae_reconstructions.png and short_clips.png")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def run(args: argparse.Namespace) -> None:
    """Print the figures of the shipped weights as JSON and, if asked, write the contact sheets."""
    torch.set_num_threads(args.threads)
    bundle = load_bundle(args.folder, device=torch.device("cpu"), dtype=torch.float32)
    classifier = load_classifier(args.folder / "classifier.safetensors")
    clips_figures, scenes, clips = clip_figures(bundle, classifier, args.clips)
    figures = {"vae": vae_figures(bundle, args.scenes), "generated_clips": clips_figures}
    print(json.dumps(figures, indent=2))
    if args.json:
        write_whole(args.json, json.dumps(figures, indent=2))

    if args.docs:
        rng = np.random.default_rng(7)
        rows = []
        for kind in world.SUBJECTS:
            scene = dataclasses.replace(world.sample_scene(rng), subject=kind)
            x = to_tensor(world.render(scene, 7000, 97)[0])
            with torch.no_grad():
                rec = bundle.vae.decode(bundle.vae.encode(x.transpose(0, 1)[None]))[0].transpose(0, 1)
            rows += [played(v)[::16] for v in (x, rec)]
        write_contact_sheet(args.docs / "vae_reconstructions.png", rows)
        chosen = range(0, min(12, len(clips)))
        write_contact_sheet(args.docs / "short_clips.png", [played(clips[i])[::8] for i in chosen])
        for i in chosen:
            print(world.caption(scenes[i]), read_attributes(classifier, clips[i]))


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
