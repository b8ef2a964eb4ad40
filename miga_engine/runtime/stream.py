"""A run as a stream of frames: ticks, decoding, chunks, checkpoints, telemetry."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import traceback
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from miga_engine.config import Request
from miga_engine.device import is_out_of_memory, own_modes
from miga_engine.errors import DeviceError, DriftError, MigaError, NumericsError, SessionError, printable
from miga_engine.runtime.decode import Decoding, decoding_stream
from miga_engine.runtime.drift import DriftMeter
from miga_engine.runtime.interrupts import uninterrupted
from miga_engine.runtime.session import Session, State, load_session, save_session, taking_apart
from miga_engine.runtime.stages import DONE, VideoRun
from miga_engine.threads import StarvationWatch

_log = logging.getLogger("miga_engine")


@dataclass(frozen=True)
class Chunk:
    """Frames that left the decoder together: `frames` uint8 `[n,H,W,3]` on the engine's device.

    `index` counts chunks from 0, `first_frame` is the video frame number of `frames[0]`.
    """

    index: int
    first_frame: int
    frames: Tensor


@dataclass(frozen=True)
class Event:
    """Something that happened in a run: `kind` is stage, score, search_started, search_finished, window_batch,
    capture, chunk, drift, saved or warning. `number` counts a run's events from 1, on from a session file's."""

    kind: str
    data: Mapping[str, Any]
    number: int = 0

    def to_json(self) -> str:
        return json.dumps({"event": self.kind, "number": self.number, **self.data})


class _Cut(NamedTuple):
    """A chunk, the groups of frames that it is cut from, and what it leaves of them."""

    chunk: Chunk
    groups: list[Tensor]
    rest: Tensor


class Events:
    """Tells what happens in a run to whoever listens. The run may be saved, and gone on with, at each of them."""

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        self.on_event = on_event
        self.count = 0

    def __call__(self, kind: str, **data: Any) -> None:
        if self.on_event is not None:
            self.count += 1
            self.on_event(Event(kind, data, self.count))


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

    Iterate over it, or call `next`. `close`, or leaving it as a context manager, ends its threads and releases its
    memory; so do dropping it and the end of the program. Where the network or the decoder fails, the frames made before
    come first, then the error; after that `save` still writes all that was made. An interrupt (KeyboardInterrupt, or
    what else a signal handler raises) and an error of `on_event` change nothing: `next` goes on, and `save` saves.

    One thread at a time may ask for the next chunk. `save` and `close` wait for it, `cancel` does not.
    """

    def __init__(
        self,
        run: VideoRun,
        decoder: StreamDecoder,
        request: Request,
        model: Callable[[], dict[str, Any]],
        *,
        chunk_frames: int | None,
        events: Events,
        is_cancelled: Callable[[], bool],
        overlap_decode: bool,
        stop_on_drift: float | None,
        num_video_frames: Callable[[int], int],
        attention: Mapping[str, str] | None = None,
    ) -> None:
        self.request = request
        self.num_frames_out = 0
        self.output: tuple[dict[str, Any], Tensor] | None = None
        """Of a resumed run: what `Output.checkpoint` gave when it was saved."""
        self.resumed_at_event: int | None = None
        """Of a resumed run: number of the last event before it was saved."""
        self._run: VideoRun | None = run
        self._decoder = decoder
        self._decoding = Decoding(
            decoder.push, overlap=overlap_decode, state=decoder.state, load_state=decoder.load_state
        )
        self._ready = self._decoding.ready  # decoded and not given out, group by group
        self._model = model  # what computes it, asked when it is saved
        self._chunk_frames = chunk_frames
        self._events = events
        self._is_cancelled = is_cancelled
        self._cancel = threading.Event()
        self._turn = threading.Lock()  # of whoever works at the run
        self._owner: int | None = None  # the thread that has it
        self._is_making = False
        self._is_closing = False
        self._num_chunks = 0
        self._backlog: deque[Tensor] = deque()  # clean latents, not handed to the decoder yet
        self._num_latents = 0  # taken from the run
        self._is_over = False
        self._failure: Exception | None = None
        self._autosave: _Autosave | None = None
        self._extension: Path | None = None  # the file that holds it
        self._starvation = StarvationWatch() if run.store.device.type == "cpu" else None
        self._meters: dict[int, DriftMeter] = {}
        self._stop_on_drift = stop_on_drift
        self._num_video_frames = num_video_frames  # that a number of latent frames decodes to
        self._attention = {} if attention is None else attention  # the engine adds to it

    # Frames ----------------------------------------------------------------------------------------------------

    def __next__(self) -> Chunk:
        if self._run is None or self._is_closing:
            raise StopIteration
        if self._is_making:
            raise MigaError(
                "the next chunk of this stream is being made already, in another thread or by what is calling back: "
                "ask for one at a time"
            )
        cut: _Cut | None = None
        try:
            with self._work() as run:
                if run is None:
                    raise StopIteration
                self._is_making = True
                try:
                    with own_modes():
                        cut = self._next(run)
                    with uninterrupted():
                        self._give(cut)
                finally:
                    self._is_making = False
            return cut.chunk
        except BaseException:  # an interrupt that came so late that it finds the chunk given, and nobody who has it
            if cut is not None and self._num_chunks > cut.chunk.index:
                self._take_back(cut)
            raise

    @contextlib.contextmanager
    def _work(self) -> Iterator[VideoRun | None]:
        """The run, for this thread alone; None of a closed stream."""
        if self._owner == threading.get_ident():
            yield self._run
            return
        try:
            with self._turn:
                try:
                    self._owner = threading.get_ident()
                    yield self._run
                finally:
                    self._owner = None
        finally:
            if self._is_closing:  # asked for meanwhile by what was called back
                self.close()

    def _next(self, run: VideoRun) -> _Cut:
        """Make the next chunk, and report it; it is not given yet."""
        if self._autosave is not None and self._autosave.is_due(self.num_frames_out):
            self._save(self._autosave)
        while (num_frames := self._num_to_cut()) == 0:
            if self._is_over:
                self._end()
            self._advance(run)
        groups: list[Tensor] = []
        while sum(map(len, groups)) < num_frames:
            groups.append(self._ready[len(groups)])
        frames = groups[0] if len(groups) == 1 else torch.cat(groups)
        chunk = Chunk(self._num_chunks, self.num_frames_out, frames[:num_frames])
        if self._starvation is not None and (message := self._starvation.look()) is not None:
            self.warn(message)
        self._report(chunk)
        return _Cut(chunk, groups, frames[num_frames:])

    def _give(self, cut: _Cut) -> None:
        for _ in cut.groups:
            self._ready.popleft()
        if len(cut.rest):
            self._ready.appendleft(cut.rest)
        self._num_chunks += 1
        self.num_frames_out += len(cut.chunk.frames)

    def _take_back(self, cut: _Cut) -> None:
        if len(cut.rest):
            self._ready.popleft()
        self._ready.extendleft(reversed(cut.groups))
        self._num_chunks -= 1
        self.num_frames_out -= len(cut.chunk.frames)

    def warn(self, message: str) -> None:
        """Say in the log, and as an event, what is amiss and does not keep the stream from going on."""
        message = printable(message)
        _log.warning("%s", message)
        self._events("warning", message=message)

    def cancel(self) -> None:
        """End the stream after the pass at hand and the frames already made. May be called from any thread."""
        self._cancel.set()

    @property
    def is_resumed(self) -> bool:
        """Whether it goes on from a session file."""
        return self.resumed_at_event is not None

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
        """End the threads and release the memory; the stream has no frames after this, and cannot be saved.

        Where another thread is at the next chunk, that ends first; called back from there, this is done at its end.
        """
        self._is_closing = True
        self._cancel.set()
        if self._owner == threading.get_ident():
            return
        with self._turn:
            self._decoding.close()
            self._run = None
            self._backlog.clear()
            self._decoder = _NoDecoder()
            self._decoding = Decoding(self._decoder.push, overlap=False)
            self._ready = self._decoding.ready

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
            self._decode(run)  # what an interrupt left
            if run.stage == DONE or self._asks_to_stop(run):
                self._decoding.settle(0)
                self._is_over = True
                return
            if run.parts_next and self._autosave is not None and self._autosave.keeps_extension:
                self._save(self._autosave)
                self._extension = self._autosave.path
            with torch.no_grad():
                run.tick()
            self._decode(run)
        except Exception as error:
            self._fail(error)
            self._drain()

    def _decode(self, run: VideoRun) -> None:
        """Hand over what became clean, and take what came out of the decoder."""
        self._take_clean(run)
        while self._backlog:
            with uninterrupted():
                self._decoding.put(self._backlog.popleft())
            self._decoding.settle()
        self._decoding.settle()

    def _take_clean(self, run: VideoRun) -> None:
        clean = run.newest
        if clean is not None and clean.first_frame >= self._num_latents and self._is_writer:
            with uninterrupted():
                self._num_latents = clean.first_frame + len(clean.latents)
                self._backlog.append(clean.latents)

    def _fail(self, error: Exception) -> None:
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # the tensors there: memory for what goes on from here
            error = DeviceError(
                "out of memory while decoding or between two passes: free memory and go on from here, or begin anew in "
                "bfloat16 (vae_dtype)"
            ).with_traceback(error.__traceback__)
        with uninterrupted():
            self._failure, self._is_over = self._failure or error, True

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
            self._decoding.settle(0)
        except Exception as error:
            self._fail(error)

    def _num_to_cut(self) -> int:
        """Length of the next chunk of the frames at hand, 0 where more must be made first."""
        num_ready, num_frames = sum(map(len, self._ready)), self.request.num_frames
        if num_frames is not None:
            num_ready = min(num_ready, num_frames - self.num_frames_out)
        size = self._chunk_frames
        if size is None:
            size = min(len(self._ready[0]), num_ready) if num_ready else 0
        elif self._is_over:
            size = min(size, num_ready)
        return size if 0 < size <= num_ready else 0

    def _end(self) -> None:
        self._decoding.close()
        if (failure := self._failure) is not None:
            self._failure = self._autosave = None  # what is left is for the caller to save
            raise failure
        if self._autosave is not None:
            self._save(self._autosave)
        raise StopIteration

    # Telemetry -------------------------------------------------------------------------------------------------

    def _report(self, chunk: Chunk) -> None:
        """Events of a chunk. Colours are compared with those of the first chunk that shows the same prompt."""
        is_heard = self._events.on_event is not None
        if not is_heard and self._stop_on_drift is None:
            return
        where = {"index": chunk.index, "first_frame": chunk.first_frame, "num_frames": len(chunk.frames)}
        starts = [0, *(start + self.request.miga.prompt_blend_frames for start in sorted(self.request.prompt) if start)]
        entry = bisect_right(starts, chunk.first_frame) - 1
        drift = self._meters.setdefault(entry, DriftMeter()).measure(chunk.frames)
        if is_heard:
            self._events("chunk", **where)
            self._events("drift", **where, **drift)
        if self._stop_on_drift is not None and drift["drift"] > self._stop_on_drift and self._failure is None:
            self._fail(DriftError(
                f"the colours of frames {chunk.first_frame} to {chunk.first_frame + len(chunk.frames) - 1} have moved "
                f"by {drift['drift']:.3f} from the beginning, more than stop_on_drift {self._stop_on_drift:g}: try "
                "another seed, more guidance frames, or a lower guidance scale"
            ))  # fmt: skip

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

        `output` is where the caller has written every chunk by the time it asks for the next. `keep_extension`:
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
        with self._work() as run:
            if run is None:
                raise SessionError("the stream is closed and cannot be saved: save it before close()")
            self._write(run, path, output)

    def _write(self, run: VideoRun, path: str | os.PathLike[str], output: Output | None) -> None:
        if run.store.is_intact:
            with contextlib.suppress(NumericsError):  # of a pass that an interrupt kept from being looked at
                run.denoiser.check_finite()
        if not run.store.is_intact:
            raise SessionError(
                "the run stopped in the middle of an update and cannot be saved: the last session file stands"
            )
        if not self._is_writer:
            return
        self._take_clean(run)
        self._drain()
        extension = None
        if run.has_parted and self._extension is not None:
            earlier = load_session(self._extension)
            extension = earlier.extension if earlier.state.has_parted else earlier.state
        session = Session(self.request.to_record(), self._model(), self._state(run, output), extension)
        save_session(path, session)
        self._events("saved", path=os.fspath(path), num_frames=self.num_frames_out)

    @own_modes()
    def load(self, path: str | os.PathLike[str], state: State, *, has_extension: bool = False) -> None:
        """Go on from a state of the session file at `path`, which also holds an extension or not.

        Its run is one that was found to fit (`run_state`); SessionError where the rest does not.
        """
        with taking_apart(path):
            self._load(state)
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
                "num_events": self._events.count + (self._events.on_event is not None),  # with that of this saving
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
        self._num_latents = self._run.emitted
        num_decoded = numbers["run"]["emitted"] - len(tensors.get("undecoded", ()))
        self._load_decoder(part("decoder/"), device, is_first=num_decoded == 0)
        if "undecoded" in tensors:
            self._backlog.append(tensors["undecoded"].to(device))
        if "frames" in tensors:
            self._ready.append(tensors["frames"].to(device))
        self.num_frames_out, self._num_chunks = numbers["num_frames_out"], numbers["num_chunks"]
        self._events.count = self.resumed_at_event = numbers["num_events"]
        self._meters = {int(entry): DriftMeter(reference) for entry, reference in numbers["drift"].items()}
        if numbers["output"] is not None:
            self.output = dict(numbers["output"]), tensors["output_frames"]

    def _load_decoder(self, state: dict[str, Tensor], device: torch.device, *, is_first: bool) -> None:
        """The decoder's memory, tried on a latent frame: to see that it fits, and gives the frames that come next."""
        run, num_expected = self._run, self._num_video_frames(1 if is_first else 2) - (0 if is_first else 1)
        assert run is not None
        with torch.no_grad(), decoding_stream(device):
            self._decoder.load_state(state)
            latent = torch.zeros(1, *run.store.frame_shape, device=device)
            num_frames = self._decoder.push(latent.unsqueeze(2)).shape[2]
            self._decoder.load_state(state)
        if num_frames != num_expected:
            raise SessionError("the saved decoder has seen other frames than the saved run: resume from another copy")


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
