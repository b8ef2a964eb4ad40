"""The YAML file of --config: options by our names or by those of the releases, checked before anything is done."""

from __future__ import annotations

import dataclasses
import reprlib
from pathlib import Path
from typing import Any

from miga_engine.config import MigaConfig, SamplingConfig
from miga_engine.errors import ConfigError

RELEASED_NAMES = {
    "saw_width": "zigzag_width",
    "slide_size": "stride",
    "mem_frames": "guidance_frames",
    "index_bias": "guidance_offset",
    "resample": "self_reflection",
    "threshold": "score_drop",
    "adjust_num": "candidates",
    "sampling_steps": "num_inference_steps",
    "sample_steps": "num_inference_steps",
    "sample_solver": "solver",
    "sample_shift": "shift",
    "sample_guide_scale": "guidance_scale",
    "guide_scale": "guidance_scale",
    "base_seed": "seed",
    "sample_neg_prompt": "negative_prompt",
    "ckpt_dir": "model",
    "save_file": "output",
    "frame_num": "num_frames",
    "new_video_length": "num_frames",
    "video_length": "num_frames",
    "unconditional_guidance_scale": "guidance_scale",
    "ddim_eta": "eta",
}
"""Option names of the Wan2.1, FIFO-Diffusion and MIGA releases, understood in a --config file."""

_SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingConfig))
MIGA_FIELDS = {f.name: f for f in dataclasses.fields(MigaConfig)}
REQUEST_OPTIONS = ("num_frames", "seed", "height", "width", "negative_prompt", "fps", *_SAMPLING_FIELDS)

MAX_CONFIG_BYTES = 2**20
_TEXT_OPTIONS = ("model", "preset", "device", "dtype", "vae_dtype", "attention", "method", "output", "events",
                 "contact_sheet", "session", "solver", "negative_prompt")  # fmt: skip
_OTHER_OPTIONS = ("checkpoint_every", "stop_on_drift")
_FLAGS = ("overwrite", "overlap_decode", "compile", "capture", "quiet", "use_scale_array")


def read_config(path: str) -> dict[str, Any]:
    """Options of a YAML file, by our names; names of the releases are translated, unknown ones refused."""
    content = _read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a list of 'option: value' lines, got {type(content).__name__}")
    known = {"prompt", "prompt_at", *_OTHER_OPTIONS, *_TEXT_OPTIONS, *_FLAGS, *REQUEST_OPTIONS, *MIGA_FIELDS}
    settings = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = RELEASED_NAMES.get(name, name)
        if name not in known:
            raise ConfigError(
                f"--config {path} has an unknown option {reprlib.repr(key)}; the options are {', '.join(sorted(known))}"
            )
        if name in settings:
            raise ConfigError(f"--config {path} gives {name} twice (as {key!r} again): keep one")
        settings[name] = value
    for name, value in settings.items():
        kind = "text" if name in _TEXT_OPTIONS else "true or false" if name in _FLAGS else None
        if kind and value is not None and not isinstance(value, str if kind == "text" else bool):
            raise ConfigError(f"--config {path} gives {name} as {reprlib.repr(value)}: give {kind}")
    if settings.get("method") not in (None, "miga", "fifo"):
        raise ConfigError(f"--config {path} gives method as {settings['method'][:80]!r}: give miga or fifo")
    changes = settings.get("prompt_at")
    if changes is not None and not (isinstance(changes, list) and all(map(_is_prompt_change, changes))):
        raise ConfigError(f"--config {path} must give prompt_at as a list of [frame, prompt]")
    unset = {name for name in (*_TEXT_OPTIONS, *_FLAGS, "prompt_at") if settings.get(name) is None}
    return {name: value for name, value in settings.items() if name not in unset}


def _is_prompt_change(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], int | str)


def _read_yaml(path: str) -> Any:
    """A YAML document without aliases, which a short file can unfold to any size, and without deep nesting."""
    import yaml

    try:
        with Path(path).open("rb") as stream:
            text = stream.read(MAX_CONFIG_BYTES + 1).decode()
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader) if len(text) <= MAX_CONFIG_BYTES else ():
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 4 or isinstance(event, yaml.AliasEvent):
                what = "an alias" if isinstance(event, yaml.AliasEvent) else "lists in lists in lists"
                line = event.start_mark.line + 1 if event.start_mark else "?"
                raise ConfigError(f"--config {path} has {what} at line {line}: write the values out")
        if len(text) > MAX_CONFIG_BYTES:
            raise ConfigError(f"--config {path} is larger than {MAX_CONFIG_BYTES >> 20} MiB: give a file of options")
        return yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"--config {path} is not valid YAML{where}: mend it or leave it out") from error
