"""What the C interface calls (csrc/embed): a run that fills a caller's buffers; options are JSON."""

from __future__ import annotations

import json
import os
import reprlib
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch

from miga_engine.config import LoadOptions, StreamOptions
from miga_engine.engine import Engine
from miga_engine.errors import ConfigError, MigaError
from miga_engine.options import as_recorded, check_kinds, fields, named_once
from miga_engine.prompts import FRAME_NUMBER
from miga_engine.request import Request
from miga_engine.runtime.session import load_session
from miga_engine.runtime.session_info import model_of_session, parts_of_session
from miga_engine.runtime.stream import Stream

ABI = 2
"""MIGA_ABI of the header that this module answers to."""

_OF_MODEL = set(fields(LoadOptions)) - {"model"}
_OF_STREAM = set(fields(StreamOptions))
_OF_VIDEO = {"prompt", "miga", *fields(Request), *_OF_STREAM}


class Run:
    """A video that is being made. Calls may come from any thread; each waits for the one before.

    `is_cancelled` is one byte; whoever sets it to 1, from any thread and without Python's lock, ends the video before
    the next pass.
    """

    def __init__(self, start: Callable[[Callable[[], bool]], Stream]) -> None:
        self.is_cancelled = flag = bytearray(1)
        self._stream = start(lambda: flag[0] != 0)
        self._first_frame = self._stream.num_frames_out
        self._failure = ""
        self._lock = threading.Lock()

    def info(self) -> tuple[int, int, int, int, int]:
        """Width and height in pixels, frames per second (rounded), frames of the video (−1 = endless), the first."""
        request = self._stream.request
        num_frames = -1 if request.num_frames is None else request.num_frames
        return request.width, request.height, max(1, round(Fraction(request.fps))), num_frames, self._first_frame

    def next_frame(self, frame: Any, row_bytes: int = 0) -> bool:
        """Write the next frame, uint8 RGB, into a writable buffer of bytes; False where the video has ended.

        `row_bytes` from the start of a row to that of the next, 0 = 3 · width. ConfigError for a buffer that does not
        hold a frame, which is then not lost; after any other error the video has ended, and MigaError repeats it.
        """
        request = self._stream.request
        least = 3 * request.width
        row_bytes = row_bytes or least
        if row_bytes < least:
            raise ConfigError(f"row_bytes must be 0 or at least {least} (3 × {request.width} pixels), got {row_bytes}")
        needed = row_bytes * (request.height - 1) + least
        if len(frame) < needed:
            raise ConfigError(f"the buffer must hold {needed} bytes for a frame, got {len(frame)}")
        with self._lock:
            if self._failure:
                raise MigaError(f"the video ended with an error: {self._failure}")
            torch.get_num_threads()  # OpenMP counts by thread; asking makes torch set this one's count to the process's
            try:
                chunk = next(self._stream, None)
                if chunk is None:
                    return False
                rows = torch.frombuffer(frame, dtype=torch.uint8)
                rows.as_strided((request.height, request.width, 3), (row_bytes, 3, 1)).copy_(chunk.frames[0])
            except BaseException as error:
                self._failure = sentence(error)
                raise
            return True

    def set_prompt(self, prompt: bytes, options: bytes) -> None:
        """See `Stream.set_prompt`, whose other arguments are a JSON object; it does not wait for the next frame."""
        self._stream.set_prompt(_text(prompt), **_options(options, {"at", "blend", "above", "restart"}))

    def set_guidance_scale(self, guidance_scale: float, options: bytes) -> None:
        """See `Stream.set_guidance_scale`; it does not wait for the next frame."""
        self._stream.set_guidance_scale(guidance_scale, **_options(options, {"at"}))

    def save(self, path: bytes) -> None:
        """Write a session file that goes on after the last frame given."""
        with self._lock:
            self._stream.save(os.fsdecode(path))

    def close(self) -> None:
        """End the video and wait until its pass and its threads have ended."""
        self.is_cancelled[0] = 1
        with self._lock:
            self._stream.close()


_named_models: set[str] = set()
"""Models that the host has named, which a session file may name too."""


def open_run(model: bytes, options: bytes) -> Run:
    """A run of a model, "tiny" or a path, with a JSON object of options (miga_embed.h lists them)."""
    given = _parse(options, _OF_MODEL | _OF_VIDEO)
    if "prompt" not in given:
        raise ConfigError('the options have no "prompt": describe the video, as in {"prompt": "a red kite"}')
    engine = Engine.from_pretrained(os.fsdecode(model), **_take(given, _OF_MODEL))
    _named_models.add(os.path.abspath(os.fsdecode(model)))
    if not isinstance(given.get("miga", {}), dict):
        raise ConfigError(f"miga must be an object of options of the method, got {reprlib.repr(given['miga'])}")
    prompt = _timeline(given.pop("prompt"))
    return Run(lambda is_cancelled: engine.stream(prompt, chunk_frames=1, is_cancelled=is_cancelled, **given))


def resume_run(path: bytes, options: bytes) -> Run:
    """The run of a session file; options of the model, and num_frames to extend it, as a JSON object.

    What the options leave out is as the file records it.
    """
    file, (engine, given) = os.fsdecode(path), _of_session(path, options, {"num_frames"})
    return Run(lambda is_cancelled: engine.resume(file, chunk_frames=1, is_cancelled=is_cancelled, **given))


def replay_run(path: bytes, options: bytes) -> Run:
    """The video of a session file once more, as it was seen; options of the model, and image or video as a JSON
    object."""
    file, (engine, given) = os.fsdecode(path), _of_session(path, options, {"image", "video"})
    return Run(lambda is_cancelled: engine.replay(file, chunk_frames=1, is_cancelled=is_cancelled, **given))


def _of_session(path: bytes, options: bytes, more: set[str]) -> tuple[Engine, dict[str, Any]]:
    """The model of a session file, and those of the options that are not the model's."""
    file = os.fsdecode(path)
    given = _parse(options, _OF_MODEL | _OF_STREAM | {"model"} | more)
    session = load_session(file)
    saved = session.model
    as_saved = {"device": saved["device"], **as_recorded(saved)}
    model = given.pop("model", None)
    if model is None:
        model = saved["name"] if saved["name"] in _named_models else model_of_session(file, session)
    _named_models.add(os.path.abspath(model))
    loading = parts_of_session(file, session, {**as_saved, **_take(given, _OF_MODEL)})
    return Engine.from_pretrained(model, **loading), given


def sentence(error: BaseException) -> str:
    """An error in one line: the words of ours, and those of any other with its type before them."""
    words = " ".join(str(error).split())
    return words if isinstance(error, MigaError) and words else f"{type(error).__name__}: {words}"


def _parse(options: bytes, known: set[str]) -> dict[str, Any]:
    """The options that were given a value, of those known; their types where the engine leaves them to Python."""
    given = _options(options, known)
    refusal = "{} must be {}, got {}".format
    check_kinds(given, (LoadOptions, Request), lambda name, value, kind: refusal(name, kind, value))
    return given


def _options(options: bytes, known: set[str]) -> dict[str, Any]:
    try:
        given = json.loads(options, object_pairs_hook=named_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'options are no JSON ({error}): give an object such as {{"prompt": "a red kite"}}') from None
    if not isinstance(given, dict):
        raise ConfigError(
            f'options must be a JSON object such as {{"prompt": "a red kite"}}, got {reprlib.repr(given)}'
        )
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(f"unknown option {reprlib.repr(unknown[0])}; the options are {', '.join(sorted(known))}")
    return {name: value for name, value in given.items() if value is not None}


def _text(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt is no UTF-8 ({error.reason} at byte {error.start}): encode it so") from None


def _take(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: given.pop(name) for name in sorted(names & set(given))}


def _timeline(prompt: Any) -> Any:
    """A timeline's keys as numbers: JSON has texts only. What is none is refused by the engine."""
    if not isinstance(prompt, dict):
        return prompt
    return {int(frame) if FRAME_NUMBER.fullmatch(frame) else frame: text for frame, text in prompt.items()}
