"""Models that were made for queues, in small: runs of them have all that the runtime does for such."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import golden_model
import random_wan
import torch
from golden_model import MIGA, OPTIONS, Family
from safetensors.torch import save_file

from miga_engine.models.wan.places import OFFICIAL_PAIR

PICTURE = torch.randint(0, 256, (40, 70, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
CLIP = torch.randint(0, 256, (11, 20, 30, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def _short(folder: Path) -> Path:
    (folder / "miga.json").write_text(json.dumps({"window_frames": 5, "default_negative_prompt": "blurry"}))
    return folder


def ti2v(folder: Path) -> Path:
    """Wan2.2 TI2V-5B."""
    return _short(random_wan.official(folder, "ti2v"))


def skyreels(folder: Path) -> Path:
    """SkyReels-V2-DF 1.3B, which is told the rate."""
    return _short(random_wan.official(folder, "skyreels"))


def experts(folder: Path) -> Path:
    """Wan2.2 T2V-A14B: two networks in two folders."""
    random_wan.official(folder)
    (folder / random_wan.TRANSFORMER).unlink()
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    for seed, name in enumerate(OFFICIAL_PAIR, 1):
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes(config)
        save_file(random_wan.transformer(seed), folder / name / random_wan.TRANSFORMER)
    return _short(folder)


MODELS = {
    **golden_model.FAMILIES,
    "ti2v": Family(
        ti2v,
        {
            **OPTIONS,
            "width": 64,
            "image": PICTURE,
            "miga": dataclasses.replace(MIGA, zigzag_width=1, guidance_anchor=True, reference_sigma=0.0),
        },
        30,
    ),
    "skyreels": Family(
        skyreels,
        {
            **OPTIONS,
            "video": CLIP,
            "miga": dataclasses.replace(
                MIGA, stage2_steps=2, passes_per_advance=2, judge_step=2, reference_groups=1, guidance_anchor=True,
                commit_offset=-1, past_context=True, reference_sigma=0.02, score_drop=0.0,
            ),
        },
        30,
    ),
    "experts": Family(experts, {**OPTIONS, "shift": 5.0, "miga": MIGA}, 30),
}  # fmt: skip
"""The families, and Wan's models that begin with what is given, have groups several steps apart, or two networks."""
