"""What the ablation compares: prompts of the embedded world, and methods by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from miga_engine.config import MigaConfig, fifo_config, replace_options
from miga_engine.errors import ConfigError
from miga_engine.tiny import world

if TYPE_CHECKING:
    from miga_engine.engine import Engine

# Neighbours share at most one attribute, so that the first few are as varied as all: each subject, terrain and time of
# day comes six times, each colour four or five times.
SCENES = tuple(
    world.Scene(
        world.SUBJECTS[i % 4],
        world.COLOURS[(i + i // 5) % 5],
        world.TERRAINS[(i + i // 4) % 4],
        world.TIMES[(3 * i + i // 4 + i // 16) % 4],
    )
    for i in range(24)
)


def leaving_open(scene: world.Scene, attribute: str) -> str:
    """The scene in words, but for its time, terrain or colour."""
    caption = world.caption(scene)
    where, when = caption.index(" over "), caption.index(" at ")
    if attribute == "colour":
        return caption.replace(f" {scene.colour} ", " ", 1)
    return caption[:when] if attribute == "time" else caption[:where] + caption[when:]


# By index: first those that say everything, then those of which each leaves something open.
NUM_PROMPTS = len(SCENES)
OPEN_ATTRIBUTES = ("time", "terrain", "colour")  # in turn
OPEN_PROMPTS = tuple(leaving_open(scene, OPEN_ATTRIBUTES[i % 3]) for i, scene in enumerate(SCENES))
PROMPTS = tuple(map(world.caption, SCENES)) + OPEN_PROMPTS

BARE = {
    "zigzag_width": 1, "stage2_steps": 0, "refine_steps": 0, "guidance_frames": 0, "guidance_anchor": False,
    "self_reflection": False,
}  # fmt: skip
"""The method's queue without any of its parts: windows commit their cleaner end, the queue grows behind a clip."""

METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "fifo": ("fifo", {"num_inference_steps": 52}),
    "fifo-equal": ("fifo", {"num_inference_steps": 26}),
    "zigzag": ("bare", {"zigzag_width": 4}),
    "zigzag+stage2": ("bare", {"zigzag_width": 4, "stage2_steps": 5}),
    "zigzag+stage2+guidance": ("default", {"guidance_anchor": False, "self_reflection": False}),
    "zigzag+stage2+guidance+anchor": ("default", {"self_reflection": False}),
    "miga": ("default", {"guidance_anchor": False}),
    "default": ("default", {}),
    "paper": ("default", {"guidance_anchor": False, "judge": "latent", "channels": "mean", "score_drop": 0.01}),
    "miga+refine": ("default", {"guidance_anchor": False, "refine_steps": 5}),
    "bare": ("bare", {}),
    "stage2": ("bare", {"stage2_steps": 5}),
    "guidance": ("bare", {"guidance_frames": 2}),
    "guidance+anchor": ("bare", {"guidance_frames": 2, "guidance_anchor": True}),
    "reflection": ("bare", {"self_reflection": True}),
    "refine": ("bare", {"refine_steps": 5}),
}
"""Rows of the table: what they start from (FIFO-Diffusion, the bare queue, the preset), and what they change."""

PARTS = (
    ("Stage 1", "zigzag", "bare"),
    ("Stage 2", "stage2", "bare"),
    ("Stage 2", "zigzag+stage2", "zigzag"),
    ("guidance", "guidance", "bare"),
    ("guidance", "zigzag+stage2+guidance", "zigzag+stage2"),
    ("anchor", "guidance+anchor", "guidance"),
    ("anchor", "zigzag+stage2+guidance+anchor", "zigzag+stage2+guidance"),
    ("anchor", "default", "miga"),
    ("reflection", "reflection", "bare"),
    ("reflection", "miga", "zigzag+stage2+guidance"),
    ("reflection", "default", "zigzag+stage2+guidance+anchor"),
    ("refine", "refine", "bare"),
    ("refine", "miga+refine", "miga"),
)
"""Each part of the method alone and on top of others: its name, a method with it, the same method without it."""

WORLD = "world"
"""Not a method: the prompt's scene as the world renders it, which says what the measures can reach."""
SWEEP = (
    "default,zigzag_width=2", "default,zigzag_width=6", "default,zigzag_width=8",
    "default,guidance_frames=0", "default,guidance_frames=1", "default,guidance_frames=4",
    "default,stage2_steps=0", "default,stage2_steps=2", "default,stage2_steps=9",
    "default,stride=3", "default,stride=9",
    "default,score_drop=0.1", "default,score_drop=0.4",
    "default,judge=latent,channels=all", "default,judge=latent,channels=all,judge_step=10,score_drop=0.03",
    "default,judge=x0,channels=mean",
)  # fmt: skip
GROUPS = {
    "main": (*tuple(METHODS)[:10], WORLD),
    "alone": tuple(METHODS)[10:],
    "sweep": SWEEP,
}


def prompt_indices(left_open: str | None) -> list[int]:
    """Indices of the prompts that leave this attribute open (any: whichever), or nothing."""
    if left_open is None:
        return list(range(NUM_PROMPTS))
    return [NUM_PROMPTS + i for i in range(NUM_PROMPTS) if left_open in ("any", OPEN_ATTRIBUTES[i % 3])]


def method_options(engine: Engine, method: str) -> dict[str, Any]:
    """Options of `Engine.stream` for a name of `METHODS`, or for one with changes, as in `default,zigzag_width=2`."""
    if method == WORLD:
        return {}
    name, *changes = method.split(",")
    if name not in METHODS:
        raise ConfigError(f"method is {name!r}: choose {', '.join(METHODS)} or {WORLD}")
    base, options = METHODS[name]
    options = {**options, **dict(_parse_change(method, change) for change in changes)}
    num_steps = options.pop("num_inference_steps", None)
    default = engine.preset.miga
    config = {
        "fifo": fifo_config(default, engine.bundle.window_frames),
        "bare": replace_options(default, BARE),
        "default": default,
    }[base]
    return {"num_inference_steps": num_steps, "miga": replace_options(config, options)}


def _parse_change(method: str, change: str) -> tuple[str, Any]:
    """`stride=3` → ("stride", 3), by the type of the option's default."""
    name, equals, text = change.partition("=")
    defaults = {field.name: field.default for field in dataclasses.fields(MigaConfig)} | {"num_inference_steps": 0}
    if not equals or name not in defaults:
        raise ConfigError(f"method {method!r} has {change!r}: give OPTION=VALUE with an option of MigaConfig")
    default = defaults[name]
    try:
        if isinstance(default, bool):
            return name, {"true": True, "false": False}[text.lower()]
        if isinstance(default, str):
            return name, text
        return name, float(text) if isinstance(default, float) else int(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{name} is {text!r} in the method {method!r}: give a value of its type") from None


def expand_methods(names: Iterable[str]) -> list[str]:
    """Groups replaced by their methods, each method once."""
    return list(dict.fromkeys(method for name in names for method in GROUPS.get(name, (name,))))
