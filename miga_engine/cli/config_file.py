"""The YAML file of --config: options by our names or by those of the releases, checked before anything is done."""

from __future__ import annotations

import logging
import re
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miga_engine.cli.write_options import RECORDS
from miga_engine.errors import ConfigError
from miga_engine.options import Record, check_kinds, fields, plain

_log = logging.getLogger("miga_engine")

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
    "ckpt_path": "model",
    "save_file": "output",
    "frame_num": "num_frames",
    "new_video_length": "num_frames",
    "temporal_memory_len": "guidance_frames",
    "involve_resample": "self_reflection",
    "resample_threshold": "score_drop",
    "unconditional_guidance_scale": "guidance_scale",
    "ddim_eta": "eta",
    "denoising_step_list": "denoising_steps",
}
"""Option names of Wan2.1, FIFO-Diffusion, MIGA and few-step releases, understood in a --config file and as flags."""

_CHANGED = ("task", "size", "video_length", "num_partitions", "long_iter_nums")  # their values become other options
IGNORED_NAMES = (
    "offload_model", "t5_cpu", "t5_fsdp", "dit_fsdp", "ulysses_size", "ring_size", "convert_model_dtype",
    "use_prompt_extend", "prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang",
    "save_inter_results", "save_dir", "exp_name", "save_frames", "lookahead_denoising", "output_fps", "output_dir",
    "num_processes", "rank", "queue_length",
)  # fmt: skip
"""Options of the releases that say how they run, and not what the video shows."""
_REFUSED = {
    **dict.fromkeys(("first_frame", "last_frame", "src_video", "src_mask", "src_ref_images"),
                    "a video begins with --image or --video, and follows no other picture"),
    "prompt_file": "give one prompt",
    "miga_config": "give its options, or the file as --config",
}  # fmt: skip
FLAGS_ALONE = ("t5_cpu", "t5_fsdp", "dit_fsdp", "use_prompt_extend", "convert_model_dtype", "save_frames",
               "lookahead_denoising")  # fmt: skip
"""Flags of the releases that take no value."""
FLAG_NAMES = (*RELEASED_NAMES, *_CHANGED, *IGNORED_NAMES, *_REFUSED)
"""What is accepted as a flag of `miga generate`, beside our names."""
_LEFT_OUT = {*_CHANGED, *IGNORED_NAMES, *_REFUSED} - {"long_iter_nums"}
_SOLVERS = {"dpm++": "dpmpp_2m"}
_FIFO_WINDOW = 16

MAX_CONFIG_BYTES = 2**20


def read_config(path: str, records: Sequence[Record] = RECORDS) -> dict[str, Any]:
    """Options of a YAML file, by our names; names of the releases are translated, unknown ones refused."""
    content = _read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a list of 'option: value' lines, got {type(content).__name__}")
    content = _flattened(path, content)
    known = {"prompt", "prompt_at", "long_iter_nums"}.union(*map(fields, records))
    settings: dict[str, Any] = {}
    for key, value in translated(content, f"--config {path}").items():
        name = str(key).replace("-", "_")
        name = RELEASED_NAMES.get(name, name)
        if name not in known:
            raise ConfigError(
                f"--config {path} has an unknown option {reprlib.repr(key)}; the options are {', '.join(sorted(known))}"
            )
        if name in settings:
            raise ConfigError(f"--config {path} gives {name} twice (as {key!r} again): keep one")
        settings[name] = value
    check_kinds(settings, records, lambda name, value, kind: f"--config {path} gives {name} as {value}: give {kind}")
    changes = settings.get("prompt_at")
    if changes is not None and not (isinstance(changes, list) and all(map(_is_prompt_change, changes))):
        raise ConfigError(f"--config {path} must give prompt_at as a list of [frame, prompt]")
    unset = {"prompt_at", *plain(records)}
    return {name: value for name, value in settings.items() if value is not None or name not in unset}


def _flattened(path: str, content: dict[Any, Any]) -> dict[Any, Any]:
    """The options of a file, those of the MIGA release under its heading `miga` among them."""
    inner = content.get("miga")
    if inner is None:
        return content
    if not isinstance(inner, dict):
        raise ConfigError(f"--config {path} gives miga as {reprlib.repr(inner)}: give a list of its options")
    if twice := [name for name in inner if name in content]:
        raise ConfigError(f"--config {path} gives {twice[0]} twice, above miga and in it: keep one")
    return {**{name: value for name, value in content.items() if name != "miga"}, **inner}


def translated(options: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    """Options without those of the releases whose values mean something else here; what is left keeps its name.

    A seed of -1 is drawn, and said in the log, as are options that decide nothing here. `long_iter_nums` stays: its
    length in video frames follows from the model. Raises ConfigError for what cannot be done.
    """
    given = {str(name).replace("-", "_"): value for name, value in options.items()}
    kept = {name: value for name, value in options.items() if str(name).replace("-", "_") not in _LEFT_OUT}
    for name in _REFUSED:
        if given.get(name) is not None:
            raise ConfigError(f"{where} gives {name}, which is not to be had: {_REFUSED[name]}")
    for name in ("ulysses_size", "ring_size"):
        if given.get(name) not in (None, 1):
            raise ConfigError(f"{where} gives {name} as {reprlib.repr(given[name])}: start miga with torchrun instead")
    if given.get("use_prompt_extend") not in (None, False):
        raise ConfigError(f"{where} gives use_prompt_extend, which is not to be had: write the long prompt out")
    known = ("t2v-1.3B", "t2v-14B", "t2v-A14B", "ti2v-5B")
    if (task := given.get("task")) is not None and task not in known and not str(task).startswith(known[0]):
        raise ConfigError(f"{where} gives task as {reprlib.repr(task)}: {', '.join(known)} are to be had")
    if (size := given.get("size")) is not None:
        sides = re.fullmatch(r"(\d{1,5})[*x](\d{1,5})", str(size))
        if sides is None or "width" in given or "height" in given:
            raise ConfigError(f"{where} gives size as {reprlib.repr(size)}: give width*height, such as 832*480, alone")
        kept |= {"width": int(sides[1]), "height": int(sides[2])}
    if given.get("num_partitions") is not None:
        window, partitions = given.get("video_length", _FIFO_WINDOW), given["num_partitions"]
        for name, value in (("video_length", window), ("num_partitions", partitions)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{where} gives {name} as {reprlib.repr(value)}: give a whole number of at least 1")
        kept = {name: value for name, value in kept.items() if name != "num_inference_steps"}
        kept["num_inference_steps"] = window * partitions
    for name in ("seed", "base_seed"):
        if given.get(name) == -1:
            kept = {key: value for key, value in kept.items() if str(key).replace("-", "_") != name}
            kept["seed"] = secrets.randbelow(2**31)
            _log.warning("the seed -1 asks for any: it is %d", kept["seed"])
    for name in ("solver", "sample_solver"):
        if name in kept:
            kept[name] = _SOLVERS.get(str(kept[name]), kept[name])
    if idle := [name for name in given if name in (*IGNORED_NAMES, "video_length")]:
        _log.warning("%s: these options of a release decide nothing here and are left out", ", ".join(idle))
    return kept


def _is_prompt_change(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], int | str)


def read_value(name: str, text: str) -> Any:
    """A flag's value as a --config file would have it: a number, true or false, or the text itself."""
    if RELEASED_NAMES.get(name, name) in ("prompt", *plain(RECORDS, str)):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _refuse_twice(path: str, node: Any) -> None:
    """ConfigError where a mapping names a key twice, of which YAML's reader would keep the last."""
    pairs = node.value if getattr(node, "id", "") in ("mapping", "sequence") else []
    seen = set()
    for pair in pairs:
        if node.id == "sequence":
            _refuse_twice(path, pair)
            continue
        key = pair[0].value if isinstance(pair[0].value, str) else ""
        if key in seen and key:
            line = pair[0].start_mark.line + 1
            raise ConfigError(f"--config {path} gives {reprlib.repr(key)} twice, again at line {line}: keep one")
        seen.add(key)
        _refuse_twice(path, pair[1])


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
        _refuse_twice(path, yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"--config {path} is not valid YAML{where}: mend it or leave it out") from error
