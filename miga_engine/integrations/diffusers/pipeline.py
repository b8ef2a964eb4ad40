"""A pipeline of diffusers around the engine: its modules are the engine's networks, its calls are the engine's.

This file is also the `pipeline.py` of a custom pipeline: diffusers copies it alone and imports it under another name.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from miga_engine import ConfigError, Engine, Event, Stream
from miga_engine.config import MigaConfig, replace_options
from miga_engine.options import fields

_log = logging.getLogger("miga_engine")

BOUNDARY_RATIO = 0.875
"""Of Wan2.2 T2V-A14B, the one model of two networks."""


@dataclass
class MigaPipelineOutput(BaseOutput):
    """`frames`: of each video its frames, in the form that `output_type` names."""

    frames: Any


class MigaPipeline(DiffusionPipeline):
    """Endless, consistent video from the modules of a `WanPipeline`, whose weights it shares.

    The scheduler is not used: steps, solver and shift are options of a call, as are all others of `Engine.stream`.
    """

    _optional_components = ["text_encoder", "tokenizer", "scheduler", "transformer_2"]  # noqa: RUF012 - diffusers' form
    config: Any
    device: Any
    progress_bar: Any
    register_modules: Any
    register_to_config: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    model_cpu_offload_seq = "text_encoder->transformer->transformer_2->vae"

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        transformer: Any,
        scheduler: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler,
            transformer_2=transformer_2,
        )  # fmt: skip
        self.register_to_config(boundary_ratio=boundary_ratio, expand_timesteps=expand_timesteps)
        if transformer_2 is not None and boundary_ratio not in (None, BOUNDARY_RATIO):
            raise ConfigError(
                f"boundary_ratio is {boundary_ratio}: the model of two networks that there is, Wan2.2 T2V-A14B, has "
                f"{BOUNDARY_RATIO}"
            )
        self._engine_options: dict[str, Any] = {}
        self._engine: tuple[Any, Engine] | None = None
        self._offload_device: torch.device | None = None
        self._interrupt = False

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> MigaPipeline:
        """The same modules, shared, as they are: in their dtypes, on their devices. Components may be replaced."""
        for name in ("dtype", "torch_dtype"):
            if components.pop(name, None) not in (None, pipeline.transformer.dtype):
                raise ConfigError(f"{name} would change the modules that both pipelines share: leave it out")
        theirs = {**pipeline.config, **pipeline.components}
        names = set(inspect.signature(cls.__init__).parameters) - {"self"}
        return cls(**{name: theirs[name] for name in names if theirs.get(name) is not None} | components)

    def configure(self, **options: Any) -> MigaPipeline:
        """Options of `Engine.from_components` for the engine: `preset`, `attention`, `window_frames`, …; itself."""
        self._engine_options |= options
        self._engine = None
        return self

    @property
    def engine(self) -> Engine:
        """The engine, which shares all weights; made anew where modules were replaced, moved or cast."""
        parts = {name: getattr(self, name) for name in ("transformer", "transformer_2", "vae", "text_encoder")}
        device = self._offload_device or self._engine_options.get("device") or self.device
        state = (*(_state_of(part) for part in parts.values()), str(device))
        if self._engine is None or self._engine[0] != state or not self._engine[1].is_loaded:
            name = str(self.config.get("_name_or_path") or type(self).__name__)
            options = {"name": name, **self._engine_options, "device": device}
            self._engine = state, Engine.from_components(**parts, tokenizer=self.tokenizer, **options)
        return self._engine[1]

    @property
    def interrupt(self) -> bool:
        """Whether the call at hand is to end with the frames that there are: set `_interrupt` in a callback."""
        return self._interrupt

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """The modules stay where they are; a call computes with copies on the GPU, which it gives back at its end."""
        target = torch.device(device or "cuda")
        self._offload_device = torch.device(target.type, gpu_id) if gpu_id is not None else target

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Refused: layers that come one by one have no weights that could be shared. ConfigError."""
        raise ConfigError("sequential offload leaves no weights in memory to share: use enable_model_cpu_offload")

    def stream(
        self,
        prompt: str | Mapping[int, str] | None = None,
        *,
        generator: torch.Generator | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **options: Any,
    ) -> Stream:
        """Chunks of frames while the video is being made, without an end where `num_frames` is None; the options are
        those of `Engine.stream`, those of the method among them."""
        engine = self.engine
        if prompt_embeds is not None and prompt is None:
            prompt = engine.hold_embedding(prompt_embeds)
        elif prompt is None or prompt_embeds is not None:
            raise ConfigError("give one of prompt and prompt_embeds")
        if negative_prompt_embeds is not None:
            options["negative_prompt"] = engine.hold_embedding(negative_prompt_embeds)
        elif prompt_embeds is not None and self.text_encoder is None:
            if options.get("guidance_scale", engine.preset.sampling_for(engine.preset.miga).guidance_scale) != 1:
                raise ConfigError("there is no text encoder: give negative_prompt_embeds, too, or guidance_scale=1")
            options["negative_prompt"] = prompt  # which nothing is made of
        if generator is not None:
            options["seed"] = _seed_of(generator)
        method = {name: options.pop(name) for name in fields(MigaConfig) if name in options}
        if method:
            given = options.get("miga") or {}
            options["miga"] = replace_options(given, method) if isinstance(given, MigaConfig) else {**given, **method}
        return engine.stream(prompt, **options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Mapping[int, str] | list[str] | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        **options: Any,
    ) -> Any:
        """Videos of exactly `num_frames` frames, one after the other, `num_videos_per_prompt` of each prompt.

        Args:
            prompt: a text, a timeline {first frame: text}, or a list of either.
            generator: of the seed; one that is fresh from `manual_seed(n)` gives the video of seed n, and the same one
                used again another video. A list has one for each video.
            prompt_embeds, negative_prompt_embeds: [B,T,D] or [T,D], in place of texts.
            output_type: "np" float32 [B,F,H,W,3] in 0..1, "pt" float32 [B,F,3,H,W], "pil", or "uint8", tensors
                [F,H,W,3] as they are, a quarter of the memory.
            callback_on_step_end: is called after each pass with (pipeline, passes done, None, what the engine tells).
            options: any others of `Engine.stream`, such as seed, shift, solver, image, video, save_every, and those of
                the method, such as zigzag_width.

        Raises ConfigError where something is out of place.
        """
        if output_type not in _OUTPUTS:
            raise ConfigError(f"output_type must be one of {', '.join(_OUTPUTS)}, got {output_type!r}")
        if callback_on_step_end_tensor_inputs:
            raise ConfigError("callback_on_step_end gets no tensors: leave callback_on_step_end_tensor_inputs out")
        given = {
            "negative_prompt": negative_prompt, "height": height, "width": width,
            "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
            "guidance_scale_low": guidance_scale_2,
        }  # fmt: skip
        options |= {name: value for name, value in given.items() if value is not None}
        asked = [
            subject for subject in _subjects(prompt, prompt_embeds, negative_prompt_embeds)
            for _ in range(num_videos_per_prompt)
        ]  # fmt: skip
        generators = generator if isinstance(generator, list) else [generator] * len(asked)
        if len(generators) != len(asked):
            raise ConfigError(f"there are {len(generators)} generators for {len(asked)} videos: give one for each")
        self._interrupt = False
        self._tell_of_the_scheduler(options)
        videos = []
        try:
            for subject, source in zip(asked, generators, strict=True):
                videos.append(self._video(subject, source, num_frames, callback_on_step_end, options))
        finally:
            if self._offload_device is not None and self._engine is not None:
                self._engine[1].unload()
        frames = _OUTPUTS[output_type](videos)
        return MigaPipelineOutput(frames=frames) if return_dict else (frames,)

    def _video(
        self,
        subject: Mapping[str, Any],
        generator: torch.Generator | None,
        num_frames: int,
        callback: Callable[..., Any] | None,
        options: Mapping[str, Any],
    ) -> Tensor:
        """One video, uint8 [F,H,W,3] on the CPU; of one that is interrupted, the frames that there are."""
        given = dict(options)
        heard = given.pop("on_event", None)

        def on_event(event: Event) -> None:
            if heard is not None:
                heard(event)
            if callback is not None and event.kind == "progress":
                callback(self, event.data["passes"], None, dict(event.data))

        is_cancelled = given.pop("is_cancelled", None)
        chunks = []
        with (
            self.stream(
                **subject, generator=generator, num_frames=num_frames, on_event=on_event,
                is_cancelled=lambda: self._interrupt or (is_cancelled is not None and is_cancelled()), **given,
            ) as stream,
            self.progress_bar(total=num_frames) as bar,
        ):  # fmt: skip
            for chunk in stream:
                chunks.append(chunk.frames.cpu())
                bar.update(len(chunk.frames))
        if not chunks:
            raise ConfigError("the video was interrupted before its first frame: there is nothing to return")
        return torch.cat(chunks)

    def _tell_of_the_scheduler(self, options: Mapping[str, Any]) -> None:
        shift = None if self.scheduler is None else self.scheduler.config.get("flow_shift")
        ours = self.engine.preset.sampling_for(self.engine.preset.miga).shift
        if shift is not None and shift != ours and "shift" not in options:
            _log.warning(
                "the scheduler's flow_shift of %g is not used, and the shift is %g: give shift=%g", shift, ours, shift
            )


def _state_of(part: Any) -> Any:
    """What changes where a module's tensors are others than before; what is written into them does not."""
    if not isinstance(part, nn.Module):
        return id(part)
    tensors = (*part.parameters(), *part.buffers())
    return id(part), hash(tuple((tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in tensors))


def _seed_of(generator: torch.Generator) -> int:
    """The seed of a generator that is fresh, else a number that it draws; it is not fresh any more then."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    is_fresh = torch.equal(fresh.get_state(), generator.get_state())
    drawn = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
    return generator.initial_seed() if is_fresh else drawn


def _subjects(prompt: Any, embeds: Tensor | None, negative: Tensor | None) -> list[dict[str, Any]]:
    """What each video shows."""
    if prompt is not None:
        texts = prompt if isinstance(prompt, list) else [prompt]
        if embeds is not None:
            raise ConfigError("prompt and prompt_embeds are both given: keep one of the two")
        return [{"prompt": text, "negative_prompt_embeds": _nth(negative, 0)} for text in texts]
    if embeds is None:
        raise ConfigError("give a prompt, or prompt_embeds")
    count = len(embeds) if embeds.ndim == 3 else 1
    return [{"prompt_embeds": _nth(embeds, i), "negative_prompt_embeds": _nth(negative, i)} for i in range(count)]


def _nth(embeds: Tensor | None, i: int) -> Tensor | None:
    return embeds if embeds is None or embeds.ndim == 2 else embeds[min(i, len(embeds) - 1)]


def _as_images(videos: list[Tensor]) -> list[list[Any]]:
    from PIL import Image

    return [[Image.fromarray(frame.numpy()) for frame in video] for video in videos]


_OUTPUTS: dict[str, Callable[[list[Tensor]], Any]] = {
    "np": lambda videos: torch.stack(videos).float().div_(255).numpy(),
    "pt": lambda videos: torch.stack(videos).float().div_(255).permute(0, 1, 4, 2, 3),
    "pil": _as_images,
    "uint8": lambda videos: videos,
}
