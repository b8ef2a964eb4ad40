"""A request for a video, as strangers word it, into what the engine is asked for: nothing else gets through.

The options are those of the records of `config`, by their own names, less whatever names a file or an address; beside
them the names of OpenAI's interface, vLLM-Omni's and SGLang's are understood.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from miga_engine.config import NUM_FRAMES, LoadOptions, MigaConfig, StreamOptions
from miga_engine.device import total_bytes
from miga_engine.engine import Engine
from miga_engine.errors import MigaError
from miga_engine.fields import kind_of
from miga_engine.integrations.server.settings import ServeOptions
from miga_engine.memory import amount
from miga_engine.options import check_kinds, fields, named_once
from miga_engine.prompts import FRAME_NUMBER
from miga_engine.request import Request
from miga_engine.video.rate import frame_rate

FILES = ("image", "video", "video_frames")
"""Options of a video that name a file, which no request does."""

OF_VIDEO = tuple(name for name in fields(Request) if name not in FILES)
OF_METHOD = tuple(fields(MigaConfig))
OF_STREAM = tuple(fields(StreamOptions))

RENAMED = {"guidance_scale_2": "guidance_scale_low", "flow_shift": "shift"}
"""Names of others for options of ours."""
NESTED = ("video_params", "extra_body", "extra_params", "miga")
"""Objects whose options count as if they stood beside them."""
IGNORED = ("user",)

_NAMES_FILES = {*FILES, *fields(LoadOptions), "image_reference", "reference_url", "output_path", "video_reference",
                "path", "output", "session"} - {"model"}  # fmt: skip
_SIZE = re.compile("([1-9][0-9]{0,4})[xX×]([1-9][0-9]{0,4})")
_MOST_DEPTH = 32
_TEXTS = {"prompt", "model", "seconds", "size", "fps", "sigmas", "denoising_steps", *IGNORED}
_OWN = ("prompt", "model", "seconds", "size", *IGNORED)

REFUSAL = "{} is {}: give {}".format


class RequestError(MigaError):
    """A request that is refused, and with which status of HTTP."""

    def __init__(self, message: object, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Asked:
    """A video that can be made: what `Engine.stream` is given, and what it says of its size.

    `options` is JSON-able; in it `miga` holds the options of the method.
    """

    prompt: dict[int, str]
    options: dict[str, Any]
    width: int
    height: int
    fps: str
    num_frames: int | None
    seed: int

    def to_record(self) -> dict[str, Any]:
        """JSON-able, with the names of its fields."""
        return {**vars(self), "prompt": {str(frame): text for frame, text in self.prompt.items()}}


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds; RequestError for anything else, for NaN, for names that are there twice."""
    try:
        given = _parsed(body.decode())
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is no UTF-8 ({error}): send JSON") from None
    if not isinstance(given, dict):
        raise RequestError(f'the body is {reprlib.repr(given)}: send a JSON object such as {{"prompt": "a red kite"}}')
    return given


def read_form(texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The same out of the texts of a form: numbers, switches and objects are read as JSON, all else is the text."""

    def value(name: str, text: str) -> Any:
        if name == "prompt" and text.startswith("{"):
            return _parsed(text)
        with contextlib.suppress(RequestError):  # what is none, the option refuses by its name
            return text if name in of_text else _parsed(text)
        return text

    options = {**fields(Request), **fields(MigaConfig), **fields(StreamOptions)}
    of_text = {name for name, option in options.items() if kind_of(option) is str} | _TEXTS
    return {name: value(name, text) for name, text in _object(list(texts)).items()}


def _parsed(text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f'{reprlib.repr(text)} is no JSON ({error}): send, for instance, {{"prompt": "a red kite"}}'
        ) from None
    _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return named_once(pairs)
    except ValueError as error:
        raise RequestError(f"{error}: send it once") from None


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > _MOST_DEPTH:
        raise RequestError(f"the body nests deeper than {_MOST_DEPTH} levels: no option does")
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            _check_depth(entry, depth + 1)


def asked_of(given: Mapping[str, Any], engine: Engine, limits: ServeOptions, image: str | None = None) -> Asked:
    """What the body of a request asks for, known to be something that the engine can make within the limits.

    `image` is a file of ours, of what was sent along. Raises RequestError or ConfigError.
    """
    flat = _flattened(given)
    known = {*OF_VIDEO, *OF_METHOD, *OF_STREAM, *RENAMED, *_OWN}
    for name in flat:
        if name in _NAMES_FILES:
            raise RequestError(
                f"{name} is not taken from a request: a server opens no file and no address that a client names; "
                "a picture to begin with is sent along as input_reference, the model is the server's"
            )
        if name not in known:
            raise RequestError(f"unknown field {reprlib.repr(name)}; the fields are {', '.join(sorted(known))}", 422)
    prompt = prompt_of(flat.pop("prompt", None))
    check_model(flat.pop("model", None), engine)
    for name in IGNORED:
        flat.pop(name, None)
    for theirs, ours in RENAMED.items():
        if theirs in flat:
            _put(flat, ours, flat.pop(theirs), theirs)
    if (size := flat.pop("size", None)) is not None:
        found = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if found is None:
            raise RequestError(REFUSAL("size", reprlib.repr(size), 'a text "WIDTHxHEIGHT" such as "832x480"'))
        _put(flat, "width", int(found[1]), "size")
        _put(flat, "height", int(found[2]), "size")
    seconds = flat.pop("seconds", None)
    is_endless = "num_frames" in flat and flat["num_frames"] is None
    flat = {name: value for name, value in flat.items() if value is not None}
    check_kinds(flat, (Request, MigaConfig, StreamOptions), REFUSAL)
    options = {name: flat[name] for name in (*OF_VIDEO, *OF_STREAM) if name in flat}
    options["miga"] = {name: flat[name] for name in OF_METHOD if name in flat}
    if seconds is not None:
        if "num_frames" in options or is_endless:
            raise RequestError("seconds and num_frames are both given: keep one of the two")
        options["num_frames"] = _frames_of(seconds, options.get("fps", engine.preset.fps))
    elif not is_endless:
        options.setdefault("num_frames", NUM_FRAMES)
    StreamOptions(**{name: options[name] for name in OF_STREAM if name in options})
    _check_limits(options, engine, limits)
    asked = {name: value for name, value in options.items() if name not in OF_STREAM}
    request = engine.resolve(prompt, **asked | ({} if image is None else {"image": image}))
    _check_memory(request, engine)
    fps = str(request.fps)
    return Asked(prompt, options, request.width, request.height, fps, request.num_frames, request.seed)


def prompt_of(prompt: Any) -> dict[int, str]:
    """A prompt as a timeline; what is none is refused by the engine, as far as it is not of JSON's own."""
    if prompt is None:
        raise RequestError('the request has no "prompt": describe the video, as in {"prompt": "a red kite"}')
    if isinstance(prompt, str):
        return {0: prompt}
    if not isinstance(prompt, dict):
        raise RequestError(REFUSAL("prompt", reprlib.repr(prompt), 'a text, or a timeline {"0": text, "160": text}'))
    for frame in prompt:
        if not FRAME_NUMBER.fullmatch(frame):
            raise RequestError(f"the prompt timeline has the key {reprlib.repr(frame)}: give numbers of video frames")
    return {int(frame): text for frame, text in prompt.items()}


def check_model(model: Any, engine: Engine) -> None:
    """RequestError unless a request leaves the model open or names the one that there is."""
    if model is not None and model != model_name(engine):
        raise RequestError(f"model is {reprlib.repr(model)}, and this server has {model_name(engine)}: name that", 404)


def model_name(engine: Engine) -> str:
    """The model as clients know it, which does not tell them where it lies."""
    return re.split(r"[\\/]", engine.name.rstrip("\\/"))[-1]


def _flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(given)
    for name in NESTED:
        inner = flat.pop(name, None)
        if inner is None:
            continue
        if not isinstance(inner, dict):
            raise RequestError(REFUSAL(name, reprlib.repr(inner), "an object of options"))
        for option, value in inner.items():
            _put(flat, option, value, name)
    return flat


def _check_memory(request: Request, engine: Engine) -> None:
    """RequestError where the video alone needs more memory than there is, which would end the server."""
    of_any: dict[str, Any] = {"prompt": "any", "negative_prompt": "", "seed": 0, "num_frames": None, "condition": None}
    needed, total = _running_bytes(engine, dataclasses.replace(request, **of_any)), total_bytes(engine.device)
    if needed > total:
        raise RequestError(
            f"the video would need {amount(needed)} of memory and this server has {amount(total)}: make the picture "
            "smaller, or take fewer steps or candidates"
        )


@functools.lru_cache(maxsize=256)
def _running_bytes(engine: Engine, request: Request) -> int:
    return engine.running_bytes(request, request.miga.window_batch or 1)


def _put(flat: dict[str, Any], name: str, value: Any, source: str) -> None:
    if name in flat and flat[name] != value:
        raise RequestError(f"{name} is given twice, once by {source}: keep one of the two")
    flat[name] = value


def _frames_of(seconds: Any, fps: Any) -> int:
    """Video frames of a length in seconds, a number or, as OpenAI has it, a text of one."""
    try:
        length = float(seconds) if isinstance(seconds, str | int | float) and not isinstance(seconds, bool) else -1.0
    except (ValueError, OverflowError):
        length = -1.0
    if not (math.isfinite(length) and length > 0):
        raise RequestError(REFUSAL("seconds", reprlib.repr(seconds), "a number above 0"))
    return max(1, round(length * float(frame_rate(fps))))


def _check_limits(options: Mapping[str, Any], engine: Engine, limits: ServeOptions) -> None:
    """RequestError where a video would be larger than the server makes; ConfigError where its size is none."""
    asked = Request("any", **{name: options[name] for name in ("num_frames", "width", "height") if name in options})
    width, height = asked.width or engine.preset.width, asked.height or engine.preset.height
    if width * height > limits.max_pixels:
        raise RequestError(
            f"size is {width}×{height}, and this server makes pictures of at most {limits.max_pixels} pixels: "
            "ask for a smaller one"
        )
    if limits.max_frames is None:
        return
    if asked.num_frames is None:
        raise RequestError(f"this server makes no endless videos: give num_frames up to {limits.max_frames}")
    if asked.num_frames > limits.max_frames:
        raise RequestError(
            f"num_frames is {asked.num_frames}, and this server makes at most {limits.max_frames}: ask for fewer"
        )
