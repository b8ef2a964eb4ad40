"""Which model of Wan's family this is, and what it was trained for.

Networks of one architecture differ in what no tensor says: how long their clips were, and how they are meant to be
sampled. A model is told by its tensors where it has some of its own, else by its config.json, else by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from miga_engine.models.wan.dit import WanDiTConfig
from miga_engine.models.wan.tokenizer import WAN_DEFAULT_NEGATIVE_PROMPT

CLASS_NAMES = frozenset({"WanModel", "WanTransformer3DModel", "SkyReelsV2Transformer3DModel"})
"""What the config.json of a transformer says that it is, official (SkyReels too) or of Diffusers."""


class Signs(NamedTuple):
    """By what a model is told."""

    config: WanDiTConfig
    stored: Mapping[str, Any]  # the config.json beside the weights
    name: str  # of the model's folder or file
    num_networks: int


@dataclass(frozen=True)
class Variant:
    """A model of the family: the facts that nothing in its files says."""

    name: str
    is_told_by: Callable[[Signs], bool]
    window_frames: int
    default_preset: str
    boundary_timestep: float | None = None
    """From which timestep on the first of two networks is meant."""
    default_negative_prompt: str = WAN_DEFAULT_NEGATIVE_PROMPT
    protocol_frames: int = 161
    """Video frames of MIGA's evaluation."""


def _is_skyreels(signs: Signs) -> bool:
    told = signs.stored.get("_class_name") == "SkyReelsV2Transformer3DModel" or "inject_sample_info" in signs.stored
    return signs.config.inject_sample_info or told or "skyreels" in signs.name.lower()


VARIANTS: tuple[Variant, ...] = (
    Variant("Wan2.2 TI2V-5B", lambda signs: signs.config.in_dim == 48, 31, "wan2.2-ti2v-5b"),
    Variant("Wan2.2 T2V-A14B", lambda signs: signs.num_networks == 2, 21, "wan2.2-t2v-a14b", boundary_timestep=875.0),
    Variant("SkyReels-V2 720P", lambda signs: _is_skyreels(signs) and "720p" in signs.name.lower(), 31,
            "skyreels-v2-df"),
    Variant("SkyReels-V2", _is_skyreels, 25, "skyreels-v2-df"),
    Variant("Wan2.1 T2V", lambda signs: True, 21, "wan2.1"),
)  # fmt: skip
"""The first that is told counts. Clips of 81 video frames are 21 latent frames, of 97 are 25, of 121 are 31."""


def variant_of(config: WanDiTConfig, stored: Mapping[str, Any], path: Path, num_networks: int) -> Variant:
    """The model that a transformer is, whose weights lie at this path."""
    signs = Signs(config, stored, _name(path), num_networks)
    return next(variant for variant in VARIANTS if variant.is_told_by(signs))


def _name(path: Path) -> str:
    """Of a file or a folder and the model's folder around it; in a hub's cache that is the repository's."""
    folder = path.absolute().parent if path.is_file() else path.absolute()
    if re.fullmatch(r"transformer(_2)?|(high|low)_noise_model", folder.name):
        folder = folder.parent
    if folder.parent.name == "snapshots":
        folder = folder.parents[1]
    return f"{folder.name}/{path.name}"
