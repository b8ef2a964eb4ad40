"""Engine: load a model, then generate or stream endless video from a prompt."""

from __future__ import annotations

import dataclasses
import functools
import os
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from miga_engine import ops
from miga_engine._version import __version__
from miga_engine.config import ATTENTION_BACKENDS, PRESETS, MigaConfig, Preset, Request
from miga_engine.device import indexed, is_out_of_memory, own_modes, total_bytes
from miga_engine.errors import CheckpointError, ConfigError, DeviceError, SessionError
from miga_engine.models.bundle import ModelBundle, WindowNetwork
from miga_engine.models.layers import allows_tf32, set_tf32
from miga_engine.models.loading import file_bytes, load_bundle
from miga_engine.noise import CounterNoise
from miga_engine.prompts import MAX_FRAME, PromptTimeline, check_prompt, check_text
from miga_engine.runtime.denoise import Batch
from miga_engine.runtime.frame_store import FrameStore
from miga_engine.runtime.ranks import Ranks
from miga_engine.runtime.run_state import check_run_state, check_stream_state
from miga_engine.runtime.session import Session, State, fingerprint, load_session, taking_apart
from miga_engine.runtime.stages import RunLayout, VideoRun
from miga_engine.runtime.stream import Chunk, Event, Events, Stream
from miga_engine.schedule import Schedule, make_schedule
from miga_engine.tiny import WEIGHTS_DIR
from miga_engine.video.rate import frame_rate, rate_text

if TYPE_CHECKING:
    from miga_engine.memory import MemoryEstimate


@dataclass(frozen=True)
class Video:
    """A finished video: ``frames`` uint8 ``[T, H, W, 3]`` on the CPU."""

    frames: torch.Tensor
    fps: int | str
    metadata: Mapping[str, Any]

    @own_modes()
    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write an mp4, mkv (lossless), PNG sequence or raw file, by suffix; OutputError where that cannot be."""
        from miga_engine.video.outputs import open_sink

        height, width = self.frames.shape[1:3]
        with open_sink(path, self.fps, width, height, metadata=dict(self.metadata), overwrite=overwrite) as sink:
            sink.write(self.frames)


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each chunk; returning False from the callback ends the run."""

    num_frames_out: int
    num_frames: int | None
    chunk: Chunk


MOST_WINDOWS = 8
"""Windows that go together at most where the GPU's memory decides: more gain next to nothing at the sizes of Wan2.1."""


class Engine:
    """A loaded model and its defaults. Generating leaves no state behind: two runs never influence each other."""

    def __init__(self, bundle: ModelBundle, preset: Preset, *, name: str, device: torch.device) -> None:
        self.bundle = bundle
        self.preset = preset
        self.name = name
        self.device = indexed(device)
        self.preset_name = next((known for known, entry in PRESETS.items() if entry is preset), "")
        self.capture = True
        self.ranks: Ranks | None = None
        self._estimates: dict[str, int] = {}  # bytes of runs by what decides over them

    @classmethod
    @own_modes()
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "tiny",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        preset: str | None = None,
        attention: str = "auto",
        vae_dtype: str | torch.dtype = "float32",
        compile: bool = False,
        capture: bool = True,
        ranks: Ranks | None = None,
    ) -> Engine:
        """Load ``"tiny"`` (the embedded model), a model folder, or a file inside one.

        Args:
            model: name or path; official Wan2.1 folder and ``-Diffusers`` folder layouts are read.
            device: default "cuda" where there is one, else "cpu".
            dtype: of the transformer; default bfloat16 on CUDA, float32 on CPU.
            preset: name of the defaults; None for those of the model's family, or of the embedded model.
            attention: backend of the transformer's self-attention, one of `config.ATTENTION_BACKENDS`; "auto" times
                what is installed at the real shape, once on each GPU. Any other is obeyed or refused.
            vae_dtype: in which frames are decoded: "float32", "tf32" (on GPUs: float32, with convolutions that round to
                TF32 as torch's own do), "bfloat16" or "float16". On "tiny" frames in bfloat16 have a PSNR of 54 dB
                against those of float32 and differ by at most 4 of 255 levels; float16 64 dB, 1 level.
            compile: run the transformer through torch.compile, which compiles at the first passes.
            capture: replay forwards of one shape as CUDA graphs; without effect on CPUs.
            ranks: the processes that share the windows of each pass (`runtime.ranks.Ranks`). All must ask for the same
                video; rank 0 gives its frames, the others none.

        Raises CheckpointError, ConfigError or DeviceError, each with one sentence.
        """
        target = _resolve_device(device)
        compute = _resolve_dtype(dtype, target)
        is_tiny = str(model) == "tiny"
        folder = WEIGHTS_DIR if is_tiny else Path(model)
        if not os.path.exists(folder):
            raise CheckpointError(f"there is no model at {str(model)!r}: give 'tiny', a model folder or a file")
        if preset is not None and preset not in PRESETS:
            raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {reprlib.repr(preset)}")
        is_tf32 = vae_dtype == "tf32"
        if is_tf32 and target.type == "cpu":
            raise ConfigError("vae_dtype 'tf32' is for GPUs, and the device is a CPU: use float32")
        decoding = torch.float32 if is_tf32 else _resolve_dtype(vae_dtype, target, "vae_dtype")
        bundle = load_bundle(folder, target, compute, decoding)
        set_tf32(bundle.vae, is_tf32)
        ops.require_attention(attention, target, compute, bundle.transformer.config.head_dim)
        bundle.transformer.attention = attention
        if compile:
            bundle.transformer.compile()
        defaults = PRESETS[preset or ("tiny" if is_tiny else bundle.facts.default_preset)]
        engine = cls(bundle, defaults, name="tiny" if is_tiny else str(model), device=target)
        engine.capture, engine.ranks = capture, ranks
        return engine

    @classmethod
    @own_modes()
    def estimate(
        cls,
        model: str | os.PathLike[str] = "tiny",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        preset: str | None = None,
        vae_dtype: str | torch.dtype = "float32",
        prompt: str | Mapping[int, str] = "any",
        num_frames: int | None = 240,
        miga: MigaConfig | None = None,
        window_batch: int | None = None,
        **options: Any,
    ) -> MemoryEstimate:
        """What a run of a model would need of memory, from its shapes: no weights are read.

        Arguments are those of :meth:`from_pretrained` and :meth:`resolve`, and are checked as there, except that a GPU
        need not be here. Each text of the prompt counts as if it were as long as can be. window_batch takes precedence
        over that of `miga`. Call it before loading: what the process already holds counts as its libraries.
        """
        from miga_engine import memory

        target = torch.device("cuda") if str(device).startswith("cuda") else _resolve_device(device)
        shapes = cls.from_pretrained(model, "meta", _resolve_dtype(dtype, target), preset=preset, vae_dtype=vae_dtype)
        config = miga or shapes.preset.miga
        if window_batch is not None:
            config = dataclasses.replace(config, window_batch=window_batch)
        request = shapes.resolve(prompt, num_frames=num_frames, miga=config, **options)

        def start(bundle: ModelBundle) -> VideoRun:
            return cls(bundle, shapes.preset, name=shapes.name, device=shapes.device).start(request)

        return memory.estimate(
            shapes.bundle,
            start,
            device=target.type,
            height=request.height,
            width=request.width,
            stored=file_bytes(WEIGHTS_DIR if shapes.name == "tiny" else Path(model)),
        )

    @own_modes()
    def describe(self) -> dict[str, str]:
        """What the model is, in a few lines, for ``miga info``."""
        bundle = self.bundle
        window = bundle.window_frames
        parts = {"transformer": bundle.transformer, "VAE": bundle.vae, "text encoder": bundle.text_encoder}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        sampling = self.preset.sampling
        return {
            "model": self.name,
            **{name: f"{count / 1e6:.1f} M parameters" for name, count in counts.items()},
            "window": f"{window} latent frames = {bundle.num_video_frames(window)} video frames",
            "picture": f"{self.preset.width}×{self.preset.height} at {self.preset.fps} fps",
            "sampling": f"{sampling.solver}, {sampling.num_inference_steps} steps, shift {sampling.shift:g}, "
            f"guidance {sampling.guidance_scale:g}",
        }

    @own_modes()
    def resolve(
        self,
        prompt: str | Mapping[int, str],
        *,
        num_frames: int | None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        fps: float | str | Fraction | None = None,
        miga: MigaConfig | None = None,
        solver: str | None = None,
        shift: float | None = None,
        eta: float | None = None,
        use_scale_array: bool | None = None,
    ) -> Request:
        """Fill in the preset's defaults and refuse what cannot run, before any work is done.

        fps is taken as FFmpeg takes a rate, and kept exactly: 24, 29.97, "24000/1001".
        """
        sampling = self.preset.sampling
        request = Request(
            prompt=check_prompt(prompt),
            negative_prompt=_default(negative_prompt, self.bundle.default_negative_prompt),
            num_frames=num_frames,
            seed=seed,
            height=_default(height, self.preset.height),
            width=_default(width, self.preset.width),
            fps=rate_text(frame_rate(_default(fps, self.preset.fps))),
            solver=_default(solver, sampling.solver),
            num_inference_steps=_default(num_inference_steps, sampling.num_inference_steps),
            shift=_number("shift", _default(shift, sampling.shift)),
            guidance_scale=_number("guidance_scale", _default(guidance_scale, sampling.guidance_scale)),
            eta=_number("eta", _default(eta, sampling.eta)),
            use_scale_array=bool(_default(use_scale_array, sampling.use_scale_array)),
            miga=miga or self.preset.miga,
        )
        if num_frames is not None:
            _check_count("num_frames", num_frames, "video frames")
        _check_count("num_inference_steps", request.num_inference_steps, "steps", most=1000)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ConfigError(f"seed must be a whole number from 0 to 2^64 − 1, got {reprlib.repr(seed)}")
        multiple = self.bundle.size_multiple
        for name, size in (("height", request.height), ("width", request.width)):
            _check_count(name, size, "pixels", most=16384)
            if size % multiple:
                below = size // multiple * multiple
                nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
                raise ConfigError(f"{name} must be a multiple of {multiple} pixels, got {size}; use {nearest}")
        check_text("negative_prompt", request.negative_prompt)
        request.miga.check(request.num_inference_steps, self.bundle.window_frames)
        predicted = _schedule(request).coefficients.prediction_type
        if (predicted == "flow") != (self.bundle.prediction_type == "velocity"):
            raise ConfigError(
                f"solver {request.solver!r} does not fit a model that predicts {self.bundle.prediction_type}"
            )
        return request

    def stream(
        self,
        prompt: str | Mapping[int, str],
        num_frames: int | None = None,
        *,
        chunk_frames: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        overlap_decode: bool | None = None,
        stop_on_drift: float | None = None,
        **options: Any,
    ) -> Stream:
        """Chunks of video frames while the video is being made; ``num_frames`` None never ends.

        ``chunk_frames`` re-cuts the stream into chunks of that many frames (the last may be shorter); the frames
        themselves do not depend on it. ``is_cancelled`` is asked between passes; True ends the stream after what was
        already made. ``overlap_decode`` decodes in a second thread while the network computes the next frames: the
        chunks are the same bit for bit, and all but the first come one pass later; None means on CUDA, and not on CPUs.
        ``stop_on_drift`` ends the stream with DriftError once colours have moved further from the beginning than this
        share of their range (`runtime.drift`). Other options are those of :meth:`resolve`; they are checked before the
        first chunk is asked for.
        """
        request = self.resolve(prompt, num_frames=num_frames, **options)
        return self.run(
            request,
            chunk_frames=chunk_frames,
            on_event=on_event,
            is_cancelled=is_cancelled,
            overlap_decode=overlap_decode,
            stop_on_drift=stop_on_drift,
        )

    @own_modes()
    def generate(
        self,
        prompt: str | Mapping[int, str],
        num_frames: int = 240,
        *,
        callback: Callable[[Progress], bool | None] | None = None,
        on_event: Callable[[Event], None] | None = None,
        overlap_decode: bool | None = None,
        **options: Any,
    ) -> Video:
        """Generate exactly ``num_frames`` video frames and return them together.

        ``callback`` is called after each chunk; when it returns False the video so far is returned. The other options
        are those of :meth:`stream` and :meth:`resolve`.
        """
        request = self.resolve(prompt, num_frames=num_frames, **options)
        frames = []
        with self.run(request, on_event=on_event, overlap_decode=overlap_decode) as stream:
            for chunk in stream:
                frames.append(chunk.frames.cpu())
                if callback is not None and callback(Progress(stream.num_frames_out, num_frames, chunk)) is False:
                    break
        return Video(torch.cat(frames), request.fps, request.metadata(self.name) | stream.metadata())

    @own_modes()
    def resume(
        self,
        path: str | os.PathLike[str],
        num_frames: int | None = None,
        *,
        chunk_frames: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        overlap_decode: bool | None = None,
        stop_on_drift: float | None = None,
    ) -> Stream:
        """Go on from a session file with the frames that come next, as if the run had never stopped.

        ``num_frames`` is the length of the whole video, None for that of the saved run. A longer one gives what a
        longer run from the start would have given: where the end of the saved run had already shaped it, its last
        frames are made again, and the stream's ``num_frames_out`` says from which frame on. Other options are those of
        :meth:`stream`. SessionError names what has changed where this engine is not the one of the session.
        """
        session = load_session(path)
        warnings = [] if session.warning is None else [session.warning]
        warnings += self._differences(path, session.model)
        with taking_apart(path):
            request, state = self._resumed(path, session, num_frames)
            self._check_state(request, state)
        stream = self.run(
            request,
            chunk_frames=chunk_frames,
            on_event=on_event,
            is_cancelled=is_cancelled,
            overlap_decode=overlap_decode,
            stop_on_drift=stop_on_drift,
            attention=_attention_choices(path, session),
        )
        stream.load(path, state, has_extension=state is session.state and session.extension is not None)
        for warning in warnings:
            stream.warn(warning)
        return stream

    @own_modes()
    def run(
        self,
        request: Request,
        *,
        chunk_frames: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        overlap_decode: bool | None = None,
        stop_on_drift: float | None = None,
        attention: dict[str, str] | None = None,
    ) -> Stream:
        """Stream a resolved request; see :meth:`stream`.

        attention: see `ops.attention_choices`; those of a run that is to be repeated, to which this one adds its own.
        """
        attention = {} if attention is None else attention
        events = Events(on_event)
        if chunk_frames is not None:
            _check_count("chunk_frames", chunk_frames, "video frames")
        if stop_on_drift is not None:
            _number("stop_on_drift", stop_on_drift)
        return Stream(
            self.start(request, events, attention),
            self.bundle.vae.stream_decoder(),
            request,
            lambda: {**self.identity(), "attention_choices": dict(attention)},
            chunk_frames=chunk_frames,
            events=events,
            is_cancelled=is_cancelled or (lambda: False),
            overlap_decode=self.device.type == "cuda" if overlap_decode is None else overlap_decode,
            stop_on_drift=stop_on_drift,
            num_video_frames=self.bundle.num_video_frames,
            attention=attention,
        )

    @own_modes()
    def identity(self) -> dict[str, Any]:
        """What computes the frames, as session files record it: all of it decides over the last bits."""
        cpu = f"{torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"
        return {
            "name": self.name if self.name == "tiny" else os.path.abspath(self.name),
            "preset": self.preset_name,
            "dtype": str(self.bundle.dtype).removeprefix("torch."),
            "vae_dtype": "tf32" if allows_tf32(self.bundle.vae) else str(self.bundle.vae.dtype).removeprefix("torch."),
            "attention": self.bundle.transformer.attention,
            "compile": self.bundle.transformer._compiled_call_impl is not None,
            "transformer": fingerprint(self.bundle.transformer),
            "VAE": fingerprint(self.bundle.vae),
            "device": self.device.type,
            **({"CPU": cpu} if self.device.type == "cpu" else {}),
            "torch": torch.__version__,
            "miga_engine": __version__,
        }

    def _differences(self, path: str | os.PathLike[str], saved: Mapping[str, Any]) -> list[str]:
        """What makes last bits differ from the saved run's; SessionError where more than that would."""
        here = self.identity()
        for name in ("dtype", "vae_dtype", "attention", "compile", "transformer", "VAE"):
            if saved.get(name) != here[name]:
                what = (
                    f"other weights of the {name}"
                    if name in ("transformer", "VAE")
                    else f"{name} {reprlib.repr(saved.get(name))}"
                )
                raise SessionError(
                    f"the session {path} was made with {what} ({self.name!r} has {here[name]!r} here): load the model "
                    "as it was, or start a new run"
                )
        return [
            f"the session {path} was made with {name} {saved[name][:100]}, and here it is {here[name]}: frames may "
            "differ in their last bits"
            for name in ("device", "CPU", "torch", "miga_engine")
            if name in saved and name in here and saved[name] != here[name]
        ]

    def _resumed(self, path: str | os.PathLike[str], session: Session, num_frames: int | None) -> tuple[Request, State]:
        """The request and the state to go on from, for a video of num_frames."""
        saved = Request.from_record(session.request)
        fields = {field.name: getattr(saved, field.name) for field in dataclasses.fields(saved)}
        asked = self.resolve(**fields)  # of the file, before what is asked for now
        request = asked if num_frames is None else self.resolve(**{**fields, "num_frames": num_frames})
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

    def _check_state(self, request: Request, state: State) -> None:
        """SessionError unless a saved state is one of a run of this request."""
        bundle, shape = self.bundle, self._frame_shape(request)
        run = {name.removeprefix("run/"): tensor for name, tensor in state.tensors.items() if name.startswith("run/")}
        layout, uses_noise = self._layout(request), _schedule(request).uses_noise
        check_run_state(layout, shape, self._timeline(request).row, uses_noise, run, state.numbers["run"])
        check_stream_state(
            state.numbers,
            state.tensors,
            frame_shape=shape,
            picture_shape=(request.height, request.width),
            num_prompts=len(request.prompt),
            num_video_frames=bundle.num_video_frames,
        )

    @own_modes()
    def start(
        self,
        request: Request,
        emit: Callable[..., None] = lambda kind, **fields: None,
        attention: dict[str, str] | None = None,
    ) -> VideoRun:
        """The run of a resolved request, for those who take its latents themselves; DeviceError if memory is short.

        attention: see `ops.attention_choices`; the run's choices are added to it.
        """
        try:
            return self._start(request, emit, {} if attention is None else attention)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceError(
                f"out of memory on {self.device} before the first pass of a video of {request.width}×{request.height}: "
                "choose a smaller picture or bfloat16; `miga estimate` tells what it needs"
            ) from error

    def _start(self, request: Request, emit: Callable[..., None], attention: dict[str, str]) -> VideoRun:
        config = dataclasses.replace(request.miga, window_batch=self._window_batch(request))
        bundle = self.bundle
        schedule = _schedule(request)
        timeline = self._timeline(request)
        frame_shape = self._frame_shape(request)
        layout = self._layout(request)
        _refuse_the_impossible(layout, frame_shape, self.device)
        texts = timeline.encode(request.negative_prompt, bundle.encode_prompts)
        num_slots = 1 + layout.num_anchors + timeline.most_rows(layout.capacity)  # the negative prompt's, and these
        windows = bundle.window_network(texts, schedule.timesteps, min(num_slots, len(texts)))
        network = _BatchNetwork(windows, len(texts), attention)
        return VideoRun(
            network,
            schedule,
            config,
            window_frames=bundle.window_frames,
            frame_shape=frame_shape,
            noise=CounterNoise(request.seed, frame_shape, self.device),
            num_frames=layout.num_frames,
            guidance_scale=request.guidance_scale,
            device=self.device,
            prompt_row=timeline.row,
            emit=emit,
            capture=self.capture,
            ranks=self.ranks,
        )

    def _layout(self, request: Request) -> RunLayout:
        bundle = self.bundle
        num_latents = None if request.num_frames is None else bundle.num_latent_frames(request.num_frames)
        return RunLayout(request.miga, request.num_inference_steps, bundle.window_frames, num_latents)

    def _frame_shape(self, request: Request) -> tuple[int, int, int]:
        """(C, h, w) of a latent frame."""
        factor = self.bundle.spatial_factor
        return self.bundle.latent_channels, request.height // factor, request.width // factor

    def _timeline(self, request: Request) -> PromptTimeline:
        return PromptTimeline(request.prompt, request.miga.prompt_blend_frames, self.bundle.first_video_frame)

    def _window_batch(self, request: Request) -> int:
        """Windows that go together: as asked, or what the GPU's memory holds beside everything else; 1 on CPUs."""
        if request.miga.window_batch is not None or self.device.type != "cuda":
            return request.miga.window_batch or 1
        from miga_engine import memory

        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        estimated = functools.partial(self.running_bytes, request)
        batch = memory.choose_window_batch(estimated, free, most=MOST_WINDOWS)
        return batch if self.ranks is None else self.ranks.agree(batch)

    @own_modes()
    def running_bytes(self, request: Request, window_batch: int) -> int:
        """What a run needs on a GPU at most once its prompts are encoded, weights included: an estimate from shapes.

        It is made once for each size of picture, prompt and batch.
        """
        from miga_engine import memory

        config = dataclasses.replace(request.miga, window_batch=window_batch)
        sizes = dataclasses.replace(request, miga=config, seed=0, num_frames=None)
        if (key := repr(sizes)) not in self._estimates:

            def start(bundle: ModelBundle) -> VideoRun:
                return Engine(bundle, self.preset, name=self.name, device=bundle.device).start(sizes)

            need = memory.running_bytes(self.bundle, start, height=request.height, width=request.width)
            self._estimates[key] = need
        return self._estimates[key]


class _BatchNetwork:
    """A model's network as the runtime calls it."""

    def __init__(self, run: WindowNetwork, num_prompts: int, attention: dict[str, str]) -> None:
        self.num_prompts = num_prompts
        self._run = run
        self._attention = attention

    def place_prompts(self, rows: np.ndarray) -> np.ndarray:
        return self._run.place(rows)

    def forward_batch(self, batch: Batch) -> torch.Tensor:
        with ops.attention_choices(self._attention):
            return self._run(batch.latents, batch.steps, batch.prompt_rows, batch.keep)


def _attention_choices(path: str | os.PathLike[str], session: Session) -> dict[str, str]:
    """What "auto" took on the GPU of the saved run."""
    choices = session.model.get("attention_choices", {})
    known = [name for name in ATTENTION_BACKENDS if name != "auto"]
    if not isinstance(choices, dict) or not all(choice in known for choice in choices.values()):
        raise SessionError(f"{path} names attention that there is not: resume from another copy")
    return dict(choices)


def _refuse_the_impossible(layout: RunLayout, frame_shape: tuple[int, int, int], device: torch.device) -> None:
    """DeviceError, before any of it is allocated, where the queue alone is more than there is memory."""
    if device.type == "meta":
        return
    from miga_engine.memory import amount

    needed, total = layout.num_slots * FrameStore.bytes_per_slot(frame_shape), total_bytes(device)
    if needed > total:
        raise DeviceError(
            f"the queue of this run alone would need {amount(needed)} of memory and {device} has {amount(total)}: make "
            "the picture smaller, or take fewer steps or candidates (see: miga estimate)"
        )


def _schedule(request: Request) -> Schedule:
    return make_schedule(
        request.solver,
        request.num_inference_steps,
        request.shift,
        eta=request.eta,
        use_scale_array=request.use_scale_array,
    )


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise ConfigError(f"{name} must be a finite number of at least 0, got {reprlib.repr(value)}")
    return float(value)


def _check_count(name: str, value: Any, unit: str, most: int = MAX_FRAME) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1 ({unit}), got {reprlib.repr(value)}")
    if value > most:
        raise ConfigError(f"{name} must be at most {most} ({unit}), got {reprlib.repr(value)}")


def _resolve_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
        target = indexed(target)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"device {str(device)!r} is not available here: use 'cpu' or leave the option out") from error
    return target


def _resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, option: str = "dtype") -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = str(dtype).removeprefix("torch.")
    if name not in choices:
        names = ["float32", "tf32", *list(choices)[1:]] if option == "vae_dtype" else choices
        raise ConfigError(f"{option} must be one of {', '.join(names)}, got {reprlib.repr(name)}")
    return choices[name]
