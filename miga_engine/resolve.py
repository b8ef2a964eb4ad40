"""What is asked for, made whole: the preset's and the model's defaults filled in, what cannot run refused."""

from __future__ import annotations

import dataclasses
import itertools
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from miga_engine.conditions import condition_of
from miga_engine.config import MigaConfig, SamplingConfig, fifo_config, replace_options
from miga_engine.device import amount, total_bytes
from miga_engine.errors import ConfigError, DeviceError
from miga_engine.presets import Preset
from miga_engine.prompts import MAX_CHANGES, PromptTimeline, check_prompt, check_text
from miga_engine.request import Change, Request
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.guidance import Guidance
from miga_engine.runtime.layout import RunLayout
from miga_engine.schedule import Schedule, make_schedule
from miga_engine.video.rate import frame_rate, rate_text

if TYPE_CHECKING:
    from miga_engine.models.bundle import ModelBundle


def resolved(given: Request, preset: Preset, bundle: ModelBundle) -> Request:
    """The request with every option filled in, known to be one that the model can run; ConfigError otherwise."""
    miga = method_config(given, preset.miga, bundle.window_frames)
    request = dataclasses.replace(
        given,
        **_sampling(given, preset.sampling_for(miga)),
        prompt=check_prompt(given.prompt),
        height=preset.height if given.height is None else given.height,
        width=preset.width if given.width is None else given.width,
        fps=rate_text(frame_rate(preset.fps if given.fps is None else given.fps)),
        negative_prompt=bundle.default_negative_prompt if given.negative_prompt is None else given.negative_prompt,
        method=None,
        miga=miga,
        guidance_scale_low=_low_scale(given, preset, bundle),
    )
    multiple = bundle.size_multiple
    for name, size in (("height", request.height), ("width", request.width)):
        if size % multiple:
            below = size // multiple * multiple
            nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise ConfigError(f"{name} must be a multiple of {multiple} pixels, got {size}; use {nearest}")
    check_text("negative_prompt", request.negative_prompt)
    _check_changes(request.changes)
    request.miga.check(request.num_inference_steps, bundle.window_frames)
    if request.miga.commit == "trailing" and bundle.transformer.boundary_timestep is not None:
        raise ConfigError("commit 'trailing' needs a model of one network, and this has two: give 'leading'")
    boundary = boundary_step(request, bundle)
    if boundary is not None and request.miga.self_reflection and request.miga.judge_step > boundary:
        raise ConfigError(
            f"judge_step {request.miga.judge_step} lies behind step {boundary}, from which on the model's second "
            "network denoises, and a search has one: lower judge_step, or switch self_reflection off"
        )
    predicted = schedule_of(request).coefficients.prediction_type
    if (predicted == "flow") != (bundle.prediction_type == "velocity"):
        raise ConfigError(f"solver {request.solver!r} does not fit a model that predicts {bundle.prediction_type}")
    return _with_condition(request, bundle)


def _check_changes(changes: tuple[Change, ...]) -> None:
    """ConfigError unless a stream may have been told this: it may come out of a stranger's file."""
    if len(changes) > MAX_CHANGES:
        raise ConfigError(f"the stream was changed {len(changes)} times: it may be {MAX_CHANGES} times")
    if any(later.tick < change.tick for change, later in itertools.pairwise(changes)):
        raise ConfigError("what the stream was told is not in the order of its ticks")
    for change in changes:
        if change.prompt is not None:
            check_text("a prompt that the stream was told", change.prompt)


def _with_condition(request: Request, bundle: ModelBundle) -> Request:
    """The request with what it begins with in the place of the names that say so."""
    most = layout_of(request, bundle).most_given
    condition = condition_of(request, bundle, most)
    if condition is not None:
        if condition.kind not in bundle.facts.conditions or bundle.num_latent_frames(condition.num_frames) > most:
            raise ConfigError(
                f"this model begins no video with {condition.num_frames} frames of kind {condition.kind!r}"
            )
        if request.num_frames is not None and request.num_frames <= condition.num_frames:
            raise ConfigError(
                f"num_frames is {request.num_frames}, and the video begins with what is given, {condition.num_frames}: "
                "ask for more"
            )
    return dataclasses.replace(request, condition=condition, image=None, video=None, video_frames=None)


def layout_of(request: Request, bundle: ModelBundle) -> RunLayout:
    """Where the frames of a resolved request lie."""
    num_latents = None if request.num_frames is None else bundle.num_latent_frames(request.num_frames)
    given = request.condition
    num_given = 0 if given is None else bundle.num_latent_frames(given.num_frames)
    boundary = boundary_step(request, bundle)
    return RunLayout(request.miga, request.num_inference_steps, bundle.window_frames, num_latents, num_given, boundary)


def timeline_of(request: Request, bundle: ModelBundle) -> PromptTimeline:
    """The prompts of a resolved request, without what its stream was told while it ran."""
    return PromptTimeline(request.timeline, request.miga.prompt_blend_frames, bundle.first_video_frame)


def refuse_the_impossible(layout: RunLayout, frame_shape: tuple[int, int, int], device: torch.device) -> None:
    """DeviceError, before any of it is allocated, where the queue alone is more than there is memory."""
    if device.type == "meta":
        return
    needed, total = layout.num_slots * FrameStore.bytes_per_slot(frame_shape), total_bytes(device)
    if needed > total:
        raise DeviceError(
            f"the queue of this run alone would need {amount(needed)} of memory and {device} has {amount(total)}: make "
            "the picture smaller, or take fewer steps or candidates (see: miga estimate)"
        )


def boundary_step(request: Request, bundle: ModelBundle) -> int | None:
    """The first step of a resolved request that the second of a model's two networks is for; None where it has one."""
    boundary = bundle.transformer.boundary_timestep
    return None if boundary is None else schedule_of(request).num_steps_from(boundary)


def _low_scale(given: Request, preset: Preset, bundle: ModelBundle) -> float | None:
    """Of the second network of two: as given, or the preset's as long as that of the first is the preset's too."""
    if given.guidance_scale_low is not None and bundle.transformer.boundary_timestep is None:
        raise ConfigError(
            f"guidance_scale_low is {given.guidance_scale_low:g}, and this model has one network: leave it out"
        )
    if bundle.transformer.boundary_timestep is None or given.guidance_scale_low is not None:
        return given.guidance_scale_low
    return preset.guidance_scale_low if given.guidance_scale is None else None


def _sampling(given: Request, of_preset: SamplingConfig) -> dict[str, Any]:
    """The options of sampling that are not given, and how many steps a list of levels makes.

    A list of the preset's gives way to one that is given, and to another number of steps.
    """
    filled = {
        option.name: getattr(of_preset, option.name)
        for option in dataclasses.fields(SamplingConfig)
        if getattr(given, option.name) is None
    }
    asked, names = given.num_inference_steps, ("sigmas", "denoising_steps")
    lists = {name: getattr(given, name) for name in names if name not in filled}
    if len(lists) == 2:
        raise ConfigError("sigmas and denoising_steps are both given: keep one of the two")
    for name, levels in lists.items():
        if asked not in (None, len(levels)):
            raise ConfigError(
                f"num_inference_steps is {asked} and {name} has {len(levels)} levels: leave num_inference_steps out"
            )
    if not lists:
        of_preset_lists = {name: filled[name] for name in names if filled[name] is not None}
        lists = {name: levels for name, levels in of_preset_lists.items() if asked in (None, len(levels))}
    filled |= {name: lists.get(name) for name in names}
    filled["num_inference_steps"] = next(map(len, lists.values()), asked or of_preset.num_inference_steps)
    return filled


def method_config(given: Request, of_preset: MigaConfig, window_frames: int) -> MigaConfig:
    """The options of the method: those given over the preset's, or over FIFO-Diffusion's for such a window."""
    base, changes = (given.miga, {}) if isinstance(given.miga, MigaConfig) else (of_preset, given.miga or {})
    if given.method == "fifo":
        base = fifo_config(base, window_frames)
    if not isinstance(changes, Mapping):
        raise ConfigError(f"miga must be a MigaConfig or a mapping of its options, got {reprlib.repr(changes)}")
    return replace_options(base, changes)


def schedule_of(request: Request) -> Schedule:
    """The noise levels and the solver of a resolved request."""
    return make_schedule(
        request.solver,
        request.num_inference_steps,
        request.shift,
        eta=request.eta,
        use_scale_array=request.use_scale_array,
        sigmas=request.sigmas,
        denoising_steps=request.denoising_steps,
        reference_sigma=request.miga.reference_sigma,
    )


def network_calls(request: Request, window_frames: int, boundary: int | None = None) -> str:
    """What a resolved request asks of a network with this native window, or of two with this boundary, in a line."""
    layout = RunLayout(request.miga, request.num_inference_steps, window_frames, None, boundary_step=boundary)
    windows, frames = layout.reading
    guidance = Guidance(
        schedule_of(request), torch.device("cpu"), request.guidance, request.guidance_scale, request.guidance_scale_end,
        request.guidance_scale_low, boundary,
    )  # fmt: skip
    return (
        f"{request.num_inference_steps} steps: for each latent frame {windows:.2f} windows of up to {window_frames} "
        f"latent frames, {frames:.1f} frames read, {'2 branches' if guidance.is_on else '1 branch'}"
        f"{'; searches come on top' if request.miga.self_reflection else ''}"
    )
