"""What a command was given: the option records, and what a --config file and the flags say of them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miga_engine.cli.config_file import RELEASED_NAMES, read_config, read_value, translated
from miga_engine.config import Checked, LoadOptions, MigaConfig, Request, StreamOptions, option
from miga_engine.errors import ConfigError
from miga_engine.options import picked

if TYPE_CHECKING:
    from miga_engine.engine import Engine
    from miga_engine.runtime.ranks import Ranks

NUM_FRAMES = 240
CHECKPOINT_EVERY = 500
"""Video frames between two session files."""


@dataclass(frozen=True)
class WriteOptions(Checked):
    """What `miga generate` writes, and says."""

    output: str = option("miga.mp4", ".mp4, .mkv (lossless), folder/%06d.png, .rgb", flags=("-o",), metavar="FILE")
    overwrite: bool = option(False, "replace files that exist", flags=("-y",))
    contact_sheet: str | None = option(None, "frames evenly spaced over the video in one picture", metavar="PNG")
    events: str | None = option(None, "scores, searches and chunks as JSON lines", metavar="JSONL")
    checkpoint_every: int | None = option(
        None, "video frames between two writings of the session file, 0 = only when stopped; given, the file is kept "
        "at the end, and the video can be made longer", shown=f"{CHECKPOINT_EVERY}", unit="video frames, 0 for never",
    )  # fmt: skip
    session: str | None = option(
        None, "where the session file lies; given, it is kept at the end", shown="beside the video, "
        "NAME.session.safetensors", metavar="FILE",
    )  # fmt: skip
    quiet: bool = option(False, "no progress bar", flags=("-q",))


RECORDS = (LoadOptions, Request, MigaConfig, StreamOptions, WriteOptions)
"""Whose options `miga generate` takes."""


def read_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the --config file says, overridden by the flags."""
    given = vars(options)
    settings = read_config(given.pop("config"), RECORDS) if "config" in given else {}
    start = "released "
    released = {name.removeprefix(start): value for name, value in given.items() if name.startswith(start)}
    released = {name: read_value(name, value, RECORDS) for name, value in released.items()}
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

    groups = settings["long_iter_nums"]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ConfigError(f"long_iter_nums must be a whole number of at least 1, got {groups!r}")
    shapes = Engine.from_pretrained(settings.get("model", "tiny"), "meta", preset=settings.get("preset"))
    request = shapes.resolve("any", **picked(settings, Request), miga=picked(settings, MigaConfig))
    return shapes.bundle.num_video_frames(groups * request.miga.zigzag_width)


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
