"""A run as a stream of frames: ticks, decoding, chunks, checkpoints, telemetry."""

from __future__ import annotations

import json
import os
import threading
import traceback
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from miga_engine.config import Request
from miga_engine.device import is_out_of_memory, own_modes
from miga_engine.errors import DeviceError, DriftError, SessionError
from miga_engine.runtime.decode import Decoding, decoding_stream
from miga_engine.runtime.drift import DriftMeter
from miga_engine.runtime.session import Session, State, guarded, load_session, save_session
from miga_engine.runtime.stages import DONE, VideoRun


@dataclass(frozen=True)
class Chunk:
    """Frames that left the decoder together: ``frames`` uint8 ``[n, H, W, 3]`` on the engine's device.

    ``index`` counts chunks from 0, ``first_frame`` is the video frame number of ``frames[0]``.
    """

    index: int
    first_frame: int
    frames: Tensor


@dataclass(frozen=True)
class Event:
    """Something that happened in a run: ``kind`` is stage, score, search_started, search_finished, window_batch,
    capture, chunk, drift or saved."""

    kind: str
    data: Mapping[str, Any]

    def to_json(self) -> str:
        return json.dumps({"event": self.kind, **self.data})


class StreamDecoder(Protocol):
    """A VAE that decodes a video piece by piece. A push that fails leaves it as it was."""

    def push(self, latents: Tensor, /) -> Tensor: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: dict[str, Tensor], /) -> None: ...


class Output(Protocol):
    """Where the caller writes the frames, as far as a session file must know it."""

    def checkpoint(self) -> tuple[dict[str, Any], Tensor]:
        """(JSON-able position up to which frames are on the disk, the frames behind it uint8 [n,H,W,3])."""


class Stream(Iterator[Chunk]):
    """The chunks of one run, made as they are asked for.

    Iterate over it, or call ``next``. ``close``, or leaving it as a context manager, ends its threads and releases its
    memory; so do dropping it and the end of the program. Where the network or the decoder fails, the frames made before
    come first, then the error; after that `save` still writes all that was made, unless the error came in the middle of
    an update.
    """

    def __init__(
        self,
        run: VideoRun,
        decoder: StreamDecoder,
        request: Request,
        model: Callable[[], dict[str, Any]],
        *,
        chunk_frames: int | None,
        on_event: Callable[[Event], None] | None,
        is_cancelled: Callable[[], bool],
        overlap_decode: bool,
        stop_on_drift: float | None,
        attention: Mapping[str, str] | None = None,
    ) -> None:
        self.request = request
        self.num_frames_out = 0
        self.output: tuple[dict[str, Any], Tensor] | None = None
        """Of a resumed run: what `Output.checkpoint` gave when it was saved."""
        self.is_resumed = False
        self._run: VideoRun | None = run
        self._decoder = decoder
        self._decoding = Decoding(decoder.push, overlap=overlap_decode)
        self._model = model  # what computes it, asked when it is saved
        self._chunk_frames = chunk_frames
        self._on_event = on_event
        self._is_cancelled = is_cancelled
        self._cancel = threading.Event()
        self._num_chunks = 0
        self._ready: deque[Tensor] = deque()  # decoded and not given out, group by group
        self._backlog: list[Tensor] = []  # clean latents of a resumed run, not handed to the decoder yet
        self._is_over = False
        self._failure: Exception | None = None
        self._autosave: _Autosave | None = None
        self._extension: Path | None = None  # the file that holds it
        self._meters: dict[int, DriftMeter] = {}
        self._stop_on_drift = stop_on_drift
        self._attention = {} if attention is None else attention  # the engine adds to it

    # Frames ----------------------------------------------------------------------------------------------------

    @own_modes()
    def __next__(self) -> Chunk:
        if self._run is None:
            raise StopIteration
        if self._autosave is not None and self._autosave.is_due(self.num_frames_out):
            self._save(self._autosave)
        while (frames := self._cut()) is None:
            if self._is_over:
                self._end()
            self._advance(self._run)
        chunk = Chunk(self._num_chunks, self.num_frames_out, frames)
        self._num_chunks += 1
        self.num_frames_out += len(frames)
        self._report(chunk)
        return chunk

    def cancel(self) -> None:
        """End the stream after the pass at hand and the frames already made. May be called from any thread."""
        self._cancel.set()

    @property
    def is_finished(self) -> bool:
        """Whether every frame asked for has been given out."""
        return self.num_frames_out == self.request.num_frames

    @property
    def window_batch(self) -> int:
        """Windows that go through the network together now; 0 of a closed stream."""
        return 0 if self._run is None else self._run.denoiser.window_batch

    def metadata(self) -> dict[str, Any]:
        """What the run has chosen by itself and a repetition must know: on GPUs, who computes attention."""
        return {"attention_choices": dict(self._attention)} if self._attention else {}

    def close(self) -> None:
        """End the threads and release the memory; the stream has no frames after this, and cannot be saved."""
        self._decoding.close()
        self._run = None
        self._ready.clear()
        self._decoder = _NoDecoder()
        self._decoding = Decoding(self._decoder.push, overlap=False)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_decoding"):
            self._decoding.close()

    def _advance(self, run: VideoRun) -> None:
        """One tick, or at the end the frames still being decoded; an error is kept until the frames before are out."""
        try:
            while self._backlog:
                for frames in self._decoding.exchange(self._backlog.pop(0)):
                    self._ready.append(frames)
            if run.stage == DONE or self._asks_to_stop(run):
                for frames in self._decoding.drain():
                    self._ready.append(frames)
                self._is_over = True
                return
            if run.parts_next and self._autosave is not None and self._autosave.keeps_extension:
                self._save(self._autosave)
                self._extension = self._autosave.path
            with torch.no_grad():
                clean = run.tick()
            for frames in self._decoding.exchange(clean.latents if clean is not None and self._is_writer else None):
                self._ready.append(frames)
        except Exception as error:
            self._failure, self._is_over = error, True
            if is_out_of_memory(error):
                traceback.clear_frames(error.__traceback__)  # the decoder's tensors: memory for what goes on from here
                self._failure = DeviceError(
                    "out of memory while decoding: free memory, or decode in bfloat16 (vae_dtype), and go on from here"
                ).with_traceback(error.__traceback__)
            self._drain()

    @property
    def _is_writer(self) -> bool:
        """Whether this process is the one, of those that share the run, that gives frames and saves."""
        ranks = None if self._run is None else self._run.denoiser.ranks
        return ranks is None or ranks.rank == 0

    def _asks_to_stop(self, run: VideoRun) -> bool:
        asked = self._cancel.is_set() or self._is_cancelled()
        ranks = run.denoiser.ranks
        return asked if ranks is None else ranks.agree(asked)

    def _drain(self) -> None:
        """Wait for the frames still being decoded; what cannot be decoded stays latent."""
        try:
            for frames in self._decoding.drain():
                self._ready.append(frames)
        except Exception as error:
            self._failure, self._is_over = self._failure or error, True

    def _cut(self) -> Tensor | None:
        """The next chunk of the frames at hand, or None where more must be made first."""
        num_ready, num_frames = sum(map(len, self._ready)), self.request.num_frames
        if num_frames is not None:
            num_ready = min(num_ready, num_frames - self.num_frames_out)
        size = self._chunk_frames
        if size is None:
            size = min(len(self._ready[0]), num_ready) if num_ready else 0
        elif self._is_over:
            size = min(size, num_ready)
        if not 0 < size <= num_ready:
            return None
        frames = self._ready.popleft()
        while len(frames) < size:
            frames = torch.cat([frames, self._ready.popleft()])
        if len(frames) > size:
            self._ready.appendleft(frames[size:])
        return frames[:size]

    def _end(self) -> None:
        failure, self._failure = self._failure, None
        self._decoding.close()
        if failure is not None:
            self._autosave = None  # what is left is for the caller to save
            raise failure
        if self._autosave is not None:
            self._save(self._autosave)
        raise StopIteration

    # Telemetry -------------------------------------------------------------------------------------------------

    def _report(self, chunk: Chunk) -> None:
        """Events of a chunk. Colours are compared with those of the first chunk that shows the same prompt."""
        if self._on_event is None and self._stop_on_drift is None:
            return
        where = {"index": chunk.index, "first_frame": chunk.first_frame, "num_frames": len(chunk.frames)}
        starts = [0, *(start + self.request.miga.prompt_blend_frames for start in sorted(self.request.prompt) if start)]
        entry = bisect_right(starts, chunk.first_frame) - 1
        drift = self._meters.setdefault(entry, DriftMeter()).measure(chunk.frames)
        if self._on_event is not None:
            self._on_event(Event("chunk", where))
            self._on_event(Event("drift", {**where, **drift}))
        if self._stop_on_drift is not None and drift["drift"] > self._stop_on_drift and self._failure is None:
            self._failure = DriftError(
                f"the colours of frames {chunk.first_frame} to {chunk.first_frame + len(chunk.frames) - 1} have moved "
                f"by {drift['drift']:.3f} from the beginning, more than stop_on_drift {self._stop_on_drift:g}: try "
                "another seed, more guidance frames, or a lower guidance scale"
            )
            self._is_over = True

    # Sessions --------------------------------------------------------------------------------------------------

    @own_modes()
    def save_every(
        self,
        num_frames: int | None,
        path: str | os.PathLike[str],
        output: Output | None = None,
        *,
        keep_extension: bool = False,
    ) -> None:
        """Write a session file now and after every `num_frames` video frames (None: only at the end).

        ``output`` is where the caller has written every chunk by the time it asks for the next. ``keep_extension``:
        keep in it the last moment from which the run could be made longer, so that a finished run can.
        """
        self._autosave = _Autosave(Path(path), num_frames, output, keep_extension, self.num_frames_out)
        self._save(self._autosave)

    @own_modes()
    def save(self, path: str | os.PathLike[str], output: Output | None = None) -> None:
        """Write all that this stream depends on to a session file; `Engine.resume` goes on from it, bit for bit.

        Raises SessionError where there is nothing consistent to save, OutputError where it cannot be written; the file
        that was there is kept then.
        """
        if self._run is None:
            raise SessionError("the stream is closed and cannot be saved: save it before close()")
        if not self._run.denoiser.is_intact:
            raise SessionError(
                "the run stopped in the middle of an update and cannot be saved: the last session file stands"
            )
        if not self._is_writer:
            return
        self._drain()
        extension = None
        if self._run.has_parted and self._extension is not None:
            earlier = load_session(self._extension)
            extension = earlier.extension if earlier.state.has_parted else earlier.state
        session = Session(self.request.to_record(), self._model(), self._state(self._run, output), extension)
        save_session(path, session)
        if self._on_event is not None:
            self._on_event(Event("saved", {"path": os.fspath(path), "num_frames": self.num_frames_out}))

    @own_modes()
    def load(self, path: str | os.PathLike[str], state: State, *, has_extension: bool = False) -> None:
        """Go on from a state of the session file at `path`, which also holds an extension or not."""
        guarded(path, lambda: self._load(state))
        self._extension = Path(path) if has_extension else None

    def _save(self, autosave: _Autosave) -> None:
        self.save(autosave.path, autosave.output)
        autosave.saved_at = self.num_frames_out

    def _state(self, run: VideoRun, output: Output | None) -> State:
        tensors, numbers = run.state()
        parts = {f"run/{name}": tensor for name, tensor in tensors.items()}
        parts |= {f"decoder/{name}": tensor.cpu() for name, tensor in self._decoder.state().items()}
        undecoded = [*self._decoding.undecoded, *self._backlog]
        if undecoded:
            parts["undecoded"] = torch.cat(undecoded).cpu()
        if self._ready:
            parts["frames"] = torch.cat(list(self._ready)).cpu()
        position = None
        if output is not None:
            position, parts["output_frames"] = output.checkpoint()
        return State(
            {
                "run": numbers,
                "num_frames_out": self.num_frames_out,
                "num_chunks": self._num_chunks,
                "drift": {str(entry): meter.reference for entry, meter in self._meters.items()},
                "output": position,
                "keeps_extension": self._autosave is not None and self._autosave.keeps_extension,
            },
            parts,
        )

    def _load(self, state: State) -> None:
        assert self._run is not None
        numbers, tensors = state.numbers, state.tensors
        device = self._run.store.device

        def part(start: str) -> dict[str, Tensor]:
            return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

        self._run.load_state(part("run/"), numbers["run"])
        with decoding_stream(device):
            self._decoder.load_state(part("decoder/"))
        if "undecoded" in tensors:
            self._backlog = [tensors["undecoded"].to(device)]
        if "frames" in tensors:
            self._ready.append(tensors["frames"].to(device))
        self.num_frames_out, self._num_chunks = int(numbers["num_frames_out"]), int(numbers["num_chunks"])
        self._meters = {int(entry): DriftMeter(reference) for entry, reference in numbers["drift"].items()}
        self.is_resumed = True
        if numbers["output"] is not None:
            self.output = dict(numbers["output"]), tensors["output_frames"]


@dataclass
class _Autosave:
    path: Path
    num_frames: int | None
    output: Output | None
    keeps_extension: bool
    saved_at: int

    def is_due(self, num_frames_out: int) -> bool:
        return self.num_frames is not None and num_frames_out - self.saved_at >= self.num_frames


class _NoDecoder:
    """Of a closed stream."""

    def push(self, latents: Tensor) -> Tensor:
        raise AssertionError

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        return None
