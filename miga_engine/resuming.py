"""What a session asks of the engine that goes on with it, and what it is gone on with."""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from miga_engine._version import __version__
from miga_engine.config import ATTENTION_BACKENDS
from miga_engine.errors import ConfigError, SessionError
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.family import Sources
from miga_engine.models.layers import allows_tf32
from miga_engine.options import as_recorded
from miga_engine.request import Request
from miga_engine.resolve import layout_of, schedule_of, timeline_of
from miga_engine.runtime.run_state import check_run_state, check_stream_state
from miga_engine.runtime.session import Session, State, fingerprint
from miga_engine.runtime.session_info import weighted
from miga_engine.runtime.steering import entries
from miga_engine.weights.hub import is_hub_name
from miga_engine.weights.untrusted import short


def identity(bundle: ModelBundle, sources: Sources, name: str, preset: str, device: torch.device) -> dict[str, Any]:
    """What computes the frames: see `Engine.identity`."""
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"
    apart, merged = sources.apart(), [list(lora) for lora in bundle.merged]
    return {
        "name": name if name == "tiny" or is_hub_name(name) else os.path.abspath(name),
        "preset": preset,
        "decoder": sources.decoder,
        "dtype": str(bundle.dtype).removeprefix("torch."),
        "vae_dtype": "tf32" if allows_tf32(bundle.vae) else str(bundle.vae.dtype).removeprefix("torch."),
        "attention": bundle.transformer.attention,
        "compile": bundle.transformer._compiled_call_impl is not None,
        "transformer": fingerprint(bundle.transformer),
        "VAE": fingerprint(bundle.vae),
        **({"text encoder": bundle.texts_form} if bundle.texts_form else {}),
        "device": device.type,
        **({"CPU": cpu} if device.type == "cpu" else {}),
        "torch": torch.__version__,
        "miga_engine": __version__,
        **({"files": apart} if apart else {}),
        **({"hub": dict(sources.hub)} if sources.hub else {}),
        **({"lora": merged} if merged else {}),
    }


def differences(
    path: str | os.PathLike[str], saved: Mapping[str, Any], here: Mapping[str, Any], name: str
) -> list[str]:
    """What makes last bits differ from the saved run's; SessionError where more than that would.

    saved, here: `Engine.identity` of the session and of the engine, whose model has this name.
    """
    merged = [[(strength, weights) for _, strength, weights in model.get("lora", [])] for model in (saved, here)]
    if merged[0] != merged[1]:
        was, now = (_lora_texts(model.get("lora", [])) for model in (saved, here))
        raise SessionError(
            f"the session {path} was made with {was}, and here there is {now}: load the model with the same LoRA, of "
            "the same strength, or start a new run"
        )
    networks = ("transformer", "VAE", *(["text encoder"] if "text encoder" in here else []))
    for field in (*(option for option in as_recorded(here) if option != "preset"), *networks):
        if saved.get(field) != here[field]:
            what = f"other weights of the {field}" if field in networks else f"{field} {reprlib.repr(saved.get(field))}"
            raise SessionError(
                f"the session {path} was made with {what} ({name!r} has {here[field]!r} here): load the model "
                "as it was, or start a new run"
            )
    return [
        f"the session {path} was made with {field} {saved[field][:100]}, and here it is {here[field]}: frames may "
        "differ in their last bits"
        for field in ("device", "CPU", "torch", "miga_engine")
        if field in saved and field in here and saved[field] != here[field]
    ]


def _lora_texts(merged: Sequence[tuple[str, float, str]]) -> str:
    named = [
        f"{weighted(short(os.path.basename(path)), strength)} ({weights[:16]})" for path, strength, weights in merged
    ]
    return f"the LoRA {' and '.join(named)}" if named else "no LoRA"


def request_and_state(
    path: str | os.PathLike[str], session: Session, num_frames: int | None, resolve: Callable[[Request], Request]
) -> tuple[Request, State]:
    """What to go on with and from where, for a video of `num_frames`, None for that of the session."""
    asked = resolve(Request.from_record(session.request))  # of the file, before what is asked for now
    request = asked if num_frames is None else resolve(dataclasses.replace(asked, num_frames=num_frames))
    state = session.state
    if state.has_parted and request.num_frames != asked.num_frames:
        if session.extension is None:
            raise SessionError(
                f"the session {path} can be finished, but not be made longer or shorter: its run had come near "
                "its end, and it was not saved to be extended"
            )
        state = session.extension
    out = int(state.numbers["num_frames_out"])
    if request.num_frames is not None and request.num_frames < out:
        raise SessionError(f"the session {path} has {out} frames already: give --num-frames of at least {out}")
    return request, state


def is_of(request: Request, session: Session) -> bool:
    """Whether a session is of this very video, a resolved request."""
    return bool(json.loads(json.dumps(request.to_record())) == session.request)


def replayed(
    path: str | os.PathLike[str],
    session: Session,
    image: Any,
    video: Any,
    resolve: Callable[[Request], Request],
) -> Request:
    """The request of a session, to be made from its first frame on with the picture or clip that is given again."""
    asked = Request.from_record(session.request)
    given: dict[str, Any] = {"image": image, "video": video}
    if (condition := asked.condition) is None:
        if any(value is not None for value in given.values()):
            raise ConfigError(f"the video of {path} began with nothing that was given: leave image and video out")
        return resolve(asked)
    if given[condition.kind] is None or sum(value is not None for value in given.values()) > 1:
        name = f" ({short(condition.source)})" if condition.source else ""
        raise ConfigError(f"the video of {path} began with a given {condition.kind}{name}: give that again")
    given["video_frames"] = condition.num_frames if condition.kind == "video" else None
    request = resolve(dataclasses.replace(asked, condition=None, **given))
    if request.condition is None or request.condition.digest != condition.digest:
        raise SessionError(f"the video of {path} began with another {condition.kind} than the one given: give that one")
    return request


def check_state(request: Request, state: State, bundle: ModelBundle) -> None:
    """SessionError unless a saved state is one of a run of this request."""
    shape = bundle.frame_shape(request.height, request.width)
    run = {name.removeprefix("run/"): tensor for name, tensor in state.tensors.items() if name.startswith("run/")}
    numbers, num_changes = state.numbers["run"], len(request.changes)
    timeline = timeline_of(request, bundle).changed(entries(request.changes[: max(numbers["num_changes"], 0)]))
    layout, uses_noise = layout_of(request, bundle), schedule_of(request).uses_noise
    check_run_state(layout, shape, timeline.prompt_row, uses_noise, run, numbers, num_changes)
    check_stream_state(
        state.numbers,
        state.tensors,
        frame_shape=shape,
        picture_shape=(request.height, request.width),
        num_prompts=len(timeline.starts),
        num_video_frames=bundle.num_video_frames,
    )


def attention_choices(path: str | os.PathLike[str], session: Session) -> dict[str, str]:
    """What "auto" took on the GPU of the saved run."""
    choices = session.model.get("attention_choices", {})
    known = [name for name in ATTENTION_BACKENDS if name != "auto"]
    if not isinstance(choices, dict) or not all(choice in known for choice in choices.values()):
        raise SessionError(f"{path} names attention that there is not: resume from another copy")
    return dict(choices)
