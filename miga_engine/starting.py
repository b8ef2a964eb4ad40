"""From a resolved request to the run that makes its video: everything that it asks for is put together here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from miga_engine.conditions import encoded
from miga_engine.models.bundle import ModelBundle
from miga_engine.noise import CounterNoise
from miga_engine.prompts import PromptEmbeddings
from miga_engine.request import Request
from miga_engine.resolve import layout_of, refuse_the_impossible, schedule_of, timeline_of
from miga_engine.runtime.network import PromptedTransformer
from miga_engine.runtime.ranks import Ranks
from miga_engine.runtime.sharing import SharedTransformer, Sharing
from miga_engine.runtime.stages import VideoRun
from miga_engine.runtime.steering import LivePrompts, Steering
from miga_engine.video.rate import frame_rate


def started(
    request: Request,
    bundle: ModelBundle,
    device: torch.device,
    emit: Callable[..., None],
    attention: dict[str, str],
    *,
    capture: bool,
    ranks: Ranks | None,
    sharing: Sharing | None,
) -> Steering:
    """The run of a resolved request, whose window_batch is a number, before its first pass.

    attention: see `ops.attention_choices`. capture: whether forwards may be replayed as CUDA graphs. ranks, sharing:
    who computes windows with it. Raises MigaError.
    """
    schedule = schedule_of(request)
    timeline = timeline_of(request, bundle)
    frame_shape = bundle.frame_shape(request.height, request.width)
    layout = layout_of(request, bundle)
    refuse_the_impossible(layout, frame_shape, device)
    texts = timeline.encode(request.negative_prompt, bundle.encode_prompts)
    condition, rate = request.condition, float(frame_rate(request.fps))

    def num_slots(texts: PromptEmbeddings) -> int:
        num_prompts = texts.timeline.most_prompt_rows(layout.num_remembered)
        return min(1 + layout.num_anchors + num_prompts, len(texts))  # 1: of the negative prompt

    kind: Any = PromptedTransformer if sharing is None else functools.partial(SharedTransformer, sharing)

    network = kind(bundle, texts, schedule.network_timesteps, attention, num_slots(texts), rate)
    prompts = LivePrompts(network, texts, bundle.encode_prompts, num_slots)
    run = VideoRun(
        network,
        schedule,
        request.miga,
        window_frames=bundle.window_frames,
        frame_shape=frame_shape,
        noise=CounterNoise(request.seed, frame_shape, device),
        num_frames=layout.num_frames,
        boundary_step=layout.boundary_step,
        num_given=layout.num_given,
        given=None if condition is None or condition.frames is None else encoded(condition, bundle),
        guidance_scale=request.guidance_scale,
        guidance=request.guidance,
        guidance_scale_end=request.guidance_scale_end,
        guidance_scale_low=request.guidance_scale_low,
        device=device,
        prompt_row=prompts.row,
        emit=emit,
        capture=capture,
        ranks=ranks,
    )
    return Steering(run, prompts, request.changes)
