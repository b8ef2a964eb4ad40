"""Engine: load a model, then generate or stream endless video from a prompt."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from miga_engine import networks
from miga_engine.calls import (
    ComponentsCall,
    EstimateCall,
    GenerateCall,
    LoadCall,
    Progress,
    ReplayCall,
    ResumeCall,
    RunCall,
    StreamCall,
    StreamControls,
    Video,
)
from miga_engine.config import LoadOptions
from miga_engine.device import indexed, is_out_of_memory, own_modes, resolve_device
from miga_engine.errors import ConfigError, DeviceError
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.family import Sources
from miga_engine.models.loading import file_bytes
from miga_engine.options import part, takes
from miga_engine.presets import PRESETS, Preset
from miga_engine.request import Request
from miga_engine.resolve import resolved
from miga_engine.resuming import attention_choices, check_state, differences, identity, replayed, request_and_state
from miga_engine.runtime.ranks import Ranks
from miga_engine.runtime.session import Session, load_session, taking_apart
from miga_engine.runtime.sharing import SharedStream, Sharing
from miga_engine.runtime.stages import VideoRun
from miga_engine.runtime.steering import Steering
from miga_engine.runtime.stream import Events, Stream
from miga_engine.starting import started

if TYPE_CHECKING:
    from miga_engine.memory import MemoryEstimate


MOST_WINDOWS = 8
"""Windows that go together at most where the GPU's memory decides: more gain next to nothing at the sizes of Wan2.1."""


class Engine:
    """A loaded model and its defaults. Generating leaves no state behind: two runs never influence each other."""

    def __init__(
        self, bundle: ModelBundle, preset: Preset, *, name: str, device: torch.device, sources: Sources | None = None
    ) -> None:
        self._networks = networks.Networks(bundle)
        self.preset = preset
        self.name = name
        self.sources = Sources(bundle.path) if sources is None else sources
        self.device = indexed(device)
        self.preset_name = next((known for known, entry in PRESETS.items() if entry is preset), "")
        self.capture = True
        self.ranks: Ranks | None = None
        self._sharing: Sharing | None = None
        self._estimates: dict[str, int] = {}  # bytes of runs by what decides over them

    @classmethod
    @own_modes()
    @takes(LoadCall)
    def from_pretrained(cls, given: LoadCall) -> Engine:
        """Load `"tiny"` (the embedded model), a model folder, or a file inside one.

        On "tiny" frames decoded in bfloat16 have a PSNR of 54 dB against those of float32 and differ by at most 4 of
        255 levels; float16 64 dB, 1 level. Raises CheckpointError, ConfigError or DeviceError, each with one sentence.
        """
        return cls._loaded(given, resolve_device(given.device))

    @classmethod
    @own_modes()
    @takes(ComponentsCall)
    def from_components(cls, given: ComponentsCall) -> Engine:
        """An engine of parts that are in memory: no weights are copied where device and dtype are those wanted, and no
        file of weights is read, then or later.

        What others change in these tensors changes here, too. Raises CheckpointError, ConfigError or DeviceError.
        """
        return cls._of(given, *networks.of_components(given))

    @classmethod
    def _loaded(cls, given: LoadCall, target: torch.device) -> Engine:
        engine = cls._of(given, *networks.read(given, target))
        engine.ranks = given.ranks
        return engine

    @classmethod
    def _of(cls, given: LoadCall | ComponentsCall, model: networks.Networks, sources: Sources, name: str) -> Engine:
        defaults = networks.defaults_of(given.preset, name, model.bundle)
        engine = cls(model.bundle, defaults, name=name, device=model.device, sources=sources)
        engine._networks, engine.capture = model, given.capture
        return engine

    @property
    def bundle(self) -> ModelBundle:
        """The networks and their facts; read again where they were unloaded."""
        return self._networks.bundle

    @bundle.setter
    def bundle(self, bundle: ModelBundle) -> None:
        self._networks = networks.Networks(bundle)

    @property
    def is_loaded(self) -> bool:
        """Whether the networks are in memory; see `unload`."""
        return self._networks.is_there

    def network_bytes(self) -> int:
        """Bytes of the weights that are held now, the text encoder's with them while it is there."""
        return self._networks.num_bytes()

    def unload(self) -> None:
        """Give back the networks' memory at once; the next call that needs them reads their files again.

        A stream that goes on keeps what it computes with until it ends, and so does an engine that `shared` made. What
        was given to `from_components` is let go of, and such an engine makes no more videos.
        """
        self._networks.unload()

    def to(self, device: str | torch.device) -> Engine:
        """Have the networks on another device, in the same dtypes; the engine itself. Memory where they were is given
        back at once.

        A stream that goes on stays where it is, and keeps its networks there until it ends. Raises DeviceError, or
        ConfigError.
        """
        self._networks.transfer(resolve_device(device))
        self.device = self._networks.device
        self._estimates.clear()
        return self

    @own_modes()
    def hold_embedding(self, embedding: torch.Tensor, prompt: str | None = None) -> str:
        """Have a prompt mean a text embedding [T,D] (or [1,T,D]) of the model's text encoder, which is not asked then.

        Rows of zeros at its end are padding. Without a prompt it gets a name, made of its content; the name is what
        `stream`, `set_prompt` and session files then say. Raises ConfigError where it is none of this model's.
        """
        return networks.hold(self.bundle, embedding, prompt)

    @classmethod
    @own_modes()
    @takes(EstimateCall)
    def estimate(cls, given: EstimateCall) -> MemoryEstimate:
        """What a run of a model would need of memory, from its shapes: no weights are read.

        Options are those of `from_pretrained` and `resolve`, and are checked as there, except that a GPU
        need not be here. Each text of the prompt counts as if it were as long as can be. window_batch takes precedence
        over that of `miga`. Call it before loading: what the process already holds counts as its libraries.
        """
        from miga_engine import memory

        target = torch.device("cuda") if str(given.device).startswith("cuda") else resolve_device(given.device)
        dtype = str(networks.compute_dtype(given, target)).removeprefix("torch.")
        asked = dataclasses.asdict(part(given, LoadOptions))
        here = {"device": "meta", "dtype": dtype, "attention": "auto", "compile": False}
        here |= {"experts": "resident"} if target.type == "cpu" else {}  # where nothing is copied
        shapes = cls._loaded(LoadCall(**asked | here), torch.device("meta"))
        request = shapes._resolve(given)
        if given.window_batch is not None:
            config = dataclasses.replace(request.miga, window_batch=given.window_batch)
            request = dataclasses.replace(request, miga=config)

        shapes.bundle = memory.longest_texts(shapes.bundle)
        with memory.counting(target.type) as ledger:
            run = shapes.start(request)
        return memory.estimate(run, shapes.bundle, ledger, stored=file_bytes(shapes.sources))

    def shared(self, most_windows: int = MOST_WINDOWS) -> Engine:
        """The same engine for several videos at a time, whose windows go through the network together.

        Each stream is asked for its chunks in a thread of its own, begins, stands still and ends as it likes, and holds
        up no other; up to `most_windows` windows of them go together. Frames are those of a stream alone up to the
        rounding of another `window_batch`: which windows meet is a matter of time. No graphs are captured.
        """
        if self.ranks is not None:
            raise ConfigError(
                "several processes share the windows of one video: load the engine without ranks to share it"
            )
        engine = copy.copy(self)
        engine.capture, engine._sharing = False, Sharing(self.bundle, most_windows)
        engine.bundle = self.bundle
        return engine

    @own_modes()
    def describe(self) -> dict[str, str]:
        """What the model is, in a few lines, for `miga info`."""
        bundle = self.bundle
        window = bundle.window_frames
        parts = {"transformer": bundle.transformer, "VAE": bundle.vae, "text encoder": bundle.text_encoder}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        sampling = self.preset.sampling_for(self.preset.miga)
        return {
            "model": self.name,
            **{name: f"{count / 1e6:.1f} M parameters" for name, count in counts.items()},
            "window": f"{window} latent frames = {bundle.num_video_frames(window)} video frames",
            "picture": f"{self.preset.width}×{self.preset.height} at {self.preset.fps} fps",
            "sampling": f"{sampling.solver}, {sampling.num_inference_steps} steps, shift {sampling.shift:g}, "
            f"guidance {sampling.guidance_scale:g}",
        }

    @own_modes()
    @takes(Request)
    def resolve(self, given: Request) -> Request:
        """Fill in the preset's defaults and refuse what cannot run, before any work is done.

        fps is taken as FFmpeg takes a rate, and kept exactly: 24, 29.97, "24000/1001".
        """
        return resolved(given, self.preset, self.bundle)

    @takes(StreamCall)
    def stream(self, given: StreamCall) -> Stream:
        """Chunks of video frames while the video is being made.

        Options are checked before the first chunk is asked for. The frames do not depend on how they leave.
        """
        return self._run(self._resolve(given), part(given, StreamControls))

    @own_modes()
    @takes(GenerateCall)
    def generate(self, given: GenerateCall) -> Video:
        """Generate exactly `num_frames` video frames and return them together.

        `callback` is called after each chunk; when it returns False the video so far is returned.
        """
        request, frames = self._resolve(given), []
        with self._run(request, part(given, StreamControls)) as stream:
            for chunk in stream:
                frames.append(chunk.frames.cpu())
                progress = Progress(stream.num_frames_out, request.num_frames, chunk)
                if given.callback is not None and given.callback(progress) is False:
                    break
        return Video(torch.cat(frames), request.fps, request.metadata(**self.made_of()) | stream.metadata())

    @own_modes()
    @takes(ResumeCall)
    def resume(self, given: ResumeCall) -> Stream:
        """Go on from a session file with the frames that come next, as if the run had never stopped.

        `num_frames` is the length of the whole video, None for that of the saved run. A longer one gives what a
        longer run from the start would have given: where the end of the saved run had already shaped it, its last
        frames are made again, and the stream's `num_frames_out` says from which frame on. SessionError names what has
        changed where this engine is not the one of the session.
        """
        path = given.path
        session, warnings = self._session(path)
        with taking_apart(path):
            request, state = request_and_state(path, session, given.num_frames, self._resolve)
            check_state(request, state, self.bundle)
        stream = self._run(request, part(given, StreamControls), attention_choices(path, session))
        stream.load(path, state, has_extension=state is session.state and session.extension is not None)
        for warning in warnings:
            stream.warn(warning)
        return stream

    @own_modes()
    @takes(ReplayCall)
    def replay(self, given: ReplayCall) -> Stream:
        """The video of a session once more, from its first frame, as it was seen: with every change that its stream was
        told, at the same moments, bit for bit.

        It ends with the last frame that the saved stream had given, and can be saved and gone on with there. What the
        video began with is not in the file and has to be given again. SessionError as with `resume`.
        """
        path = given.path
        session, warnings = self._session(path)
        with taking_apart(path):
            request = replayed(path, session, given.image, given.video, self._resolve)
        until = session.state.numbers["num_frames_out"]
        stream = self._run(request, part(given, StreamControls), attention_choices(path, session), until)
        for warning in warnings:
            stream.warn(warning)
        return stream

    def _session(self, path: str | os.PathLike[str]) -> tuple[Session, list[str]]:
        """A session file of this engine's model, and what is to be said of it."""
        session = load_session(path)
        warnings = [] if session.warning is None else [session.warning]
        return session, warnings + differences(path, session.model, self.identity(), self.name)

    @takes(RunCall)
    def run(self, given: RunCall) -> Stream:
        """Stream a resolved request; see `stream`."""
        return self._run(given.request, part(given, StreamControls), given.attention)

    def _resolve(self, given: Request) -> Request:
        return resolved(part(given, Request), self.preset, self.bundle)

    @own_modes()
    def _run(
        self,
        request: Request,
        options: StreamControls,
        attention: dict[str, str] | None = None,
        until: int | None = None,
    ) -> Stream:
        attention = {} if attention is None else attention
        events = Events(options.on_event)
        is_on_gpu = self.device.type == "cuda"
        steering = self._steered(request, events, attention)
        make = Stream if self._sharing is None else SharedStream
        return make(
            steering.run,
            self.bundle.vae.stream_decoder(),
            request.without_frames(),
            lambda: {**self.identity(), "attention_choices": dict(attention)},
            chunk_frames=options.chunk_frames,
            events=events,
            is_cancelled=options.is_cancelled or (lambda: False),
            overlap_decode=is_on_gpu if options.overlap_decode is None else options.overlap_decode,
            stop_on_drift=options.stop_on_drift,
            warn_on_drift=options.warn_on_drift,
            num_video_frames=self.bundle.num_video_frames,
            attention=attention,
            steering=steering,
            until=until,
            preview_decoder=self.bundle.vae.stream_decoder,
        )

    def made_of(self) -> dict[str, Any]:
        """The model as a video's metadata name it: what is said of it, and what is merged or stands in for a part."""
        merged = [[os.path.basename(file), strength, weights] for file, strength, weights in self.bundle.merged]
        decoder = {} if self.sources.decoder == "vae" else {"decoder": self.sources.decoder}
        return {"model": self.name, **decoder, **({"lora": merged} if merged else {})}

    @own_modes()
    def identity(self) -> dict[str, Any]:
        """What computes the frames, as session files record it: all of it decides over the last bits."""
        return identity(self.bundle, self.sources, self.name, self.preset_name, self.device)

    @own_modes()
    def start(
        self,
        request: Request,
        emit: Callable[..., None] = lambda kind, **fields: None,
        attention: dict[str, str] | None = None,
    ) -> VideoRun:
        """The run of a resolved request, for those who take its latents themselves; DeviceError if memory is short.

        attention: see `ops.attention_choices`; the run's choices are added to it. What the request's stream was told
        while it ran is left to `stream`.
        """
        return self._steered(request, emit, {} if attention is None else attention).run

    def _steered(self, request: Request, emit: Callable[..., None], attention: dict[str, str]) -> Steering:
        try:
            config = dataclasses.replace(request.miga, window_batch=self._window_batch(request))
            return started(
                dataclasses.replace(request, miga=config), self.bundle, self.device, emit, attention,
                capture=self.capture, ranks=self.ranks, sharing=self._sharing,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceError(
                f"out of memory on {self.device} before the first pass of a video of {request.width}×{request.height}: "
                "choose a smaller picture or bfloat16; `miga estimate` tells what it needs"
            ) from error

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
            shapes = memory.on_meta(self.bundle)
            with memory.counting("cuda") as ledger:
                run = Engine(shapes, self.preset, name=self.name, device=shapes.device).start(sizes)
            self._estimates[key] = memory.running_bytes(run, shapes, ledger)
        return self._estimates[key]
