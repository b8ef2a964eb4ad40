"""What a command was given: what the --config file says, overridden by the flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miga_engine.cli.config_file import RELEASED_NAMES, read_config, read_value, translated
from miga_engine.cli.write_options import RECORDS
from miga_engine.config import NUM_FRAMES, PARTS, LoadOptions, MigaConfig
from miga_engine.errors import ConfigError
from miga_engine.options import Record, picked
from miga_engine.request import Request

if TYPE_CHECKING:
    from miga_engine.engine import Engine
    from miga_engine.runtime.ranks import Ranks


PLACES = (*PARTS, "lora", "download", "revision", "cache_dir")
"""Options of loading that say where weights are, beside the model's own, and that a session leaves open."""


def read_settings(options: argparse.Namespace, records: Sequence[Record] = RECORDS) -> dict[str, Any]:
    """What the --config file says, overridden by the flags; options of these records."""
    given = vars(options)
    settings = read_config(given.pop("config"), records) if "config" in given else {}
    start = "released "
    released = {name.removeprefix(start): value for name, value in given.items() if name.startswith(start)}
    released = {name: read_value(name, value) for name, value in released.items()}
    given = {name: value for name, value in given.items() if not name.startswith(start)}
    if released:
        for name, value in translated(released, "the command line").items():
            ours = RELEASED_NAMES.get(name, name)
            if ours in given:
                raise ConfigError(f"{ours} is given twice, once as --{name}: keep one")
            given[ours] = value
    return {**settings, **given}


def load_engine(settings: dict[str, Any], ranks: Ranks | None = None) -> Engine:
    """The engine of a run's settings."""
    from miga_engine.engine import Engine

    return Engine.from_pretrained(**picked(settings, LoadOptions), ranks=ranks)


def video_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Options of `Engine.resolve` beside the prompt."""
    asked = picked(settings, Request)
    if settings.get("long_iter_nums") is not None and "num_frames" not in asked:
        asked["num_frames"] = _frames_of_groups(settings)
    return {"num_frames": NUM_FRAMES, **asked, "miga": picked(settings, MigaConfig)}


def _frames_of_groups(settings: dict[str, Any]) -> int:
    """Video frames of so many zigzag groups, the MIGA release's unit of length."""
    from miga_engine.engine import Engine
    from miga_engine.resolve import method_config

    groups = settings["long_iter_nums"]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ConfigError(f"long_iter_nums must be a whole number of at least 1, got {groups!r}")
    shapes = Engine.from_pretrained(settings.get("model", "tiny"), "meta", preset=settings.get("preset"))
    asked = Request("any", **picked(settings, Request), miga=picked(settings, MigaConfig))
    config = method_config(asked, shapes.preset.miga, shapes.bundle.window_frames)
    return shapes.bundle.num_video_frames(groups * config.zigzag_width)


def prompt_timeline(settings: dict[str, Any]) -> dict[int, str]:
    """The prompt and its changes; ConfigError where there is none."""
    prompt = settings.get("prompt", settings.get("sample_prompt"))
    timeline = dict(prompt) if isinstance(prompt, dict) else {} if prompt is None else {0: prompt}
    for frame, text in settings.get("prompt_at", ()):
        try:
            number = int(frame)
        except ValueError:
            raise ConfigError(f"--prompt-at needs a video frame number before the prompt, got {frame!r}") from None
        if number in timeline:
            raise ConfigError(f"frame {number} has two prompts: {timeline[number]!r} and {text!r}; keep one")
        timeline[number] = text
    if not timeline:
        raise ConfigError('there is no prompt: describe the video in quotes, for instance miga generate "a red kite"')
    return timeline
