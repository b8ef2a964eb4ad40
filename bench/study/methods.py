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
    "commit_offset": 0, "tail_signal": 0.0, "history_guidance": "off", "past_context": False,
    "self_reflection": False,
}  # fmt: skip
"""The method's queue without any of its parts: windows commit their cleaner end, the queue grows behind a clip."""
MIGA = {
    "zigzag_width": 4, "stage2_steps": 5, "refine_steps": 0, "guidance_frames": 2, "guidance_anchor": False,
    "commit_offset": 0, "tail_signal": 0.0, "history_guidance": "off", "past_context": False,
}  # fmt: skip
"""MIGA as published, in the embedded model's sizes."""

SAMPLING = {"num_inference_steps": 0, "guidance": "cfg", "guidance_scale": 0.0, "guidance_scale_end": 0.0}
"""What a method may change beside the options of `MigaConfig`; its values here give the types alone."""

METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "fifo": ("fifo", {"num_inference_steps": 52}),
    "fifo-equal": ("fifo", {"num_inference_steps": 26}),
    "zigzag+stage2+guidance": ("miga", {"self_reflection": False}),
    "zigzag+stage2+guidance+anchor": ("miga", {"guidance_anchor": True, "self_reflection": False}),
    "lookahead+stage2": ("bare", {"stage2_steps": 5, "commit_offset": 7}),
    "lookahead+stage2+anchor": (
        "bare",
        {"stage2_steps": 5, "commit_offset": 6, "guidance_frames": 1, "guidance_anchor": True},
    ),
    "lookahead+stage2+past": ("bare", {"stage2_steps": 5, "commit_offset": 7, "past_context": True}),
    "lookahead+stage2+history": (
        "bare",
        {"stage2_steps": 5, "commit_offset": 7, "history_guidance": "all", "guidance_scale": 3.0},
    ),
    "lookahead+stage2+past+history": (
        "bare",
        {"stage2_steps": 5, "commit_offset": 7, "past_context": True, "history_guidance": "all"},
    ),
    "lookahead+stage2+anchor+past+history": (
        "bare",
        {
            "stage2_steps": 5,
            "commit_offset": 6,
            "guidance_frames": 1,
            "guidance_anchor": True,
            "past_context": True,
            "history_guidance": "all",
        },
    ),
    "lookahead+stage2+tail": ("bare", {"stage2_steps": 5, "commit_offset": 7, "tail_signal": 0.1}),
    "lookahead+stage2+anchor+tail": (
        "bare",
        {"stage2_steps": 5, "commit_offset": 6, "guidance_frames": 1, "guidance_anchor": True, "tail_signal": 0.1},
    ),
    "fifo-equal+tail": ("fifo", {"num_inference_steps": 26, "tail_signal": 0.1}),
    "fifo-equal+history": ("fifo", {"num_inference_steps": 26, "history_guidance": "all", "guidance_scale": 3.0}),
    "default": ("default", {}),
    "miga": ("miga", {}),
    "miga+anchor": ("miga", {"guidance_anchor": True}),
    "paper": ("miga", {"judge": "latent", "channels": "mean", "score_drop": 0.01}),
    "miga+refine": ("miga", {"refine_steps": 5}),
    "bare": ("bare", {}),
    "zigzag": ("bare", {"zigzag_width": 4}),
    "zigzag+stage2": ("bare", {"zigzag_width": 4, "stage2_steps": 5}),
    "lookahead": ("bare", {"commit_offset": 7}),
    "stage2": ("bare", {"stage2_steps": 5}),
    "guidance": ("bare", {"guidance_frames": 2}),
    "guidance+anchor": ("bare", {"guidance_frames": 2, "guidance_anchor": True}),
    "reflection": ("bare", {"self_reflection": True}),
    "refine": ("bare", {"refine_steps": 5}),
}
"""Rows of the table: what they start from (FIFO-Diffusion, the bare queue, MIGA, the preset), and what they change."""

PARTS = (
    ("kept end", "lookahead", "bare"),
    ("kept end", "zigzag+stage2+guidance,commit_offset=5", "zigzag+stage2+guidance"),
    ("Stage 1", "zigzag", "bare"),
    ("Stage 1", "lookahead+stage2,zigzag_width=2", "lookahead+stage2"),
    ("Stage 2", "stage2", "bare"),
    ("Stage 2", "zigzag+stage2", "zigzag"),
    ("Stage 2", "lookahead+stage2", "lookahead"),
    ("guidance", "guidance", "bare"),
    ("guidance", "zigzag+stage2+guidance", "zigzag+stage2"),
    ("anchor", "guidance+anchor", "guidance"),
    ("anchor", "zigzag+stage2+guidance+anchor", "zigzag+stage2+guidance"),
    ("anchored window", "lookahead+stage2+anchor", "lookahead+stage2"),
    ("tail", "fifo-equal+tail", "fifo-equal"),
    ("tail", "zigzag+stage2+guidance,tail_signal=0.1", "zigzag+stage2+guidance"),
    ("tail", "lookahead+stage2+tail", "lookahead+stage2"),
    ("tail", "lookahead+stage2+anchor+tail", "lookahead+stage2+anchor"),
    ("anchored window", "lookahead+stage2+anchor+tail", "lookahead+stage2+tail"),
    ("history", "fifo-equal+history", "fifo-equal"),
    ("history", "lookahead+stage2+history", "lookahead+stage2"),
    ("history", "lookahead+stage2+past+history", "lookahead+stage2+past"),
    ("past", "lookahead+stage2+past", "lookahead+stage2"),
    ("anchored window", "lookahead+stage2+anchor+past+history", "lookahead+stage2+past+history"),
    ("reflection", "reflection", "bare"),
    ("reflection", "miga", "zigzag+stage2+guidance"),
    ("like with like", "miga,search_baseline=continued", "miga"),
    ("refine", "refine", "bare"),
    ("refine", "miga+refine", "miga"),
)
"""Each part of the method alone and on top of others: its name, a method with it, the same method without it."""

WORLD = "world"
"""Not a method: the prompt's scene as the world renders it, which says what the measures can reach."""
SWEEP = (
    "lookahead+stage2+tail,tail_signal=0.05", "lookahead+stage2+tail,tail_signal=0.2",
    "lookahead+stage2+tail,stage2_steps=2", "lookahead+stage2+tail,stage2_steps=9",
    "lookahead+stage2+tail,stride=4,commit_offset=9", "lookahead+stage2+tail,stride=9,commit_offset=4",
    "lookahead+stage2+tail,commit_offset=0", "lookahead+stage2+tail,commit_offset=3",
    "lookahead+stage2+tail,guidance=cfg-zero", "lookahead+stage2+tail,guidance=apg",
    "lookahead+stage2+tail,guidance_scale_end=1.5",
)  # fmt: skip
GROUPS = {
    "main": (*tuple(METHODS)[:13], WORLD),
    "alone": tuple(METHODS)[13:],
    "sweep": SWEEP,
}


def noise_seed(prompt_index: int, seed: int) -> int:
    """The engine's seed: each prompt has noise of its own, which the methods share."""
    return seed * NUM_PROMPTS + prompt_index


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
    sampling = {name: options.pop(name) for name in SAMPLING.keys() & options.keys()}
    default = engine.preset.miga
    config = {
        "fifo": fifo_config(default, engine.bundle.window_frames),
        "bare": replace_options(default, BARE),
        "miga": replace_options(default, MIGA),
        "default": default,
    }[base]
    return {**sampling, "miga": replace_options(config, options)}


def _parse_change(method: str, change: str) -> tuple[str, Any]:
    """`stride=3` → ("stride", 3), by the type of the option's default."""
    name, equals, text = change.partition("=")
    defaults = {field.name: field.default for field in dataclasses.fields(MigaConfig)} | SAMPLING
    if not equals or name not in defaults:
        raise ConfigError(f"method {method!r} has {change!r}: give OPTION=VALUE with an option of MigaConfig, or "
                          f"{', '.join(SAMPLING)}")  # fmt: skip
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
