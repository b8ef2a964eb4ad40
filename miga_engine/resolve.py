"""What is asked for, made whole: the preset's and the model's defaults filled in, what cannot run refused."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miga_engine.config import MigaConfig, Request, SamplingConfig, fifo_config, replace_options
from miga_engine.errors import ConfigError
from miga_engine.presets import Preset
from miga_engine.prompts import check_prompt, check_text
from miga_engine.schedule import Schedule, make_schedule
from miga_engine.video.rate import frame_rate, rate_text

if TYPE_CHECKING:
    from miga_engine.models.bundle import ModelBundle


def resolved(given: Request, preset: Preset, bundle: ModelBundle) -> Request:
    """The request with every option filled in, known to be one that the model can run; ConfigError otherwise."""
    miga = method_config(given, preset.miga, bundle.window_frames)
    sampling = preset.sampling_for(miga)
    filled: dict[str, Any] = {
        option.name: getattr(sampling, option.name)
        for option in dataclasses.fields(SamplingConfig)
        if getattr(given, option.name) is None
    }
    request = dataclasses.replace(
        given,
        **filled,
        prompt=check_prompt(given.prompt),
        height=preset.height if given.height is None else given.height,
        width=preset.width if given.width is None else given.width,
        fps=rate_text(frame_rate(preset.fps if given.fps is None else given.fps)),
        negative_prompt=bundle.default_negative_prompt if given.negative_prompt is None else given.negative_prompt,
        method=None,
        miga=miga,
    )
    if given.condition is not None and given.condition.kind not in bundle.facts.conditions:
        taken = " or ".join(bundle.facts.conditions)
        raise ConfigError(
            f"condition is of kind {given.condition.kind!r}, and this model follows {taken}: leave it out"
        )
    multiple = bundle.size_multiple
    for name, size in (("height", request.height), ("width", request.width)):
        if size % multiple:
            below = size // multiple * multiple
            nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise ConfigError(f"{name} must be a multiple of {multiple} pixels, got {size}; use {nearest}")
    check_text("negative_prompt", request.negative_prompt)
    request.miga.check(request.num_inference_steps, bundle.window_frames)
    predicted = schedule_of(request).coefficients.prediction_type
    if (predicted == "flow") != (bundle.prediction_type == "velocity"):
        raise ConfigError(f"solver {request.solver!r} does not fit a model that predicts {bundle.prediction_type}")
    return request


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
    )
