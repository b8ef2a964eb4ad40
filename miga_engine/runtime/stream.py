"""A run as the user sees it: an iterator over chunks of frames, with events, and saved wherever it stands."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miga_engine.device import own_modes
from miga_engine.errors import MigaError, SessionError
from miga_engine.models.protocols import StreamDecoder
from miga_engine.request import Request
from miga_engine.runtime.decode import to_uint8
from miga_engine.runtime.drift import DriftWatch
from miga_engine.runtime.events import Chunk, Events
from miga_engine.runtime.events import Event as Event
from miga_engine.runtime.interrupts import uninterrupted
from miga_engine.runtime.progress import ProgressMeter
from miga_engine.runtime.pump import Pump
from miga_engine.runtime.saving import Autosave, Output, Saving
from miga_engine.runtime.session import State, taking_apart
from miga_engine.runtime.stages import VideoRun
from miga_engine.runtime.steering import TAKES_ABOVE, Ask, Steering, asked_prompt, asked_scale
from miga_engine.threads import StarvationWatch


class _Cut(NamedTuple):
    """A chunk, the frames that are ready, the groups of them that it is cut from, and what it leaves of these."""

    chunk: Chunk
    ready: deque[Tensor]
    groups: list[Tensor]
    rest: Tensor


class Stream(Iterator[Chunk]):
    """The chunks of one run, made as they are asked for.

    Iterate over it, or call `next`. `close`, or leaving it as a context manager, ends its threads and releases its
    memory; so do dropping it and the end of the program. Where the network or the decoder fails, the frames made before
    come first, then the error; after that `save` still writes all that was made. An interrupt (KeyboardInterrupt, or
    what else a signal handler raises) and an error of `on_event` change nothing: `next` goes on, and `save` saves.

    One thread at a time may ask for the next chunk; `save` and `close` wait for it. From elsewhere `is_cancelled` ends
    a run, after the pass at hand and the frames already made, and `set_prompt` and `set_guidance_scale` change it.
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
        warn_on_drift: float | None,
        num_video_frames: Callable[[int], int],
        attention: Mapping[str, str] | None = None,
        steering: Steering,
        until: int | None = None,
        preview_decoder: Callable[[], StreamDecoder] | None = None,
    ) -> None:
        self._request = request
        self.num_frames_out = 0
        self.output: tuple[dict[str, Any], Tensor] | None = None
        """Of a resumed run: what `Output.checkpoint` gave when it was saved."""
        self.resumed_at_event: int | None = None
        """Of a resumed run: number of the last event before it was saved."""
        self._is_closing = is_closing = threading.Event()
        self._pump: Pump | None = Pump(
            run,
            decoder,
            overlap=overlap_decode,
            is_cancelled=lambda: is_closing.is_set() or is_cancelled(),
            num_video_frames=num_video_frames,
            steering=steering,
        )
        self._until, self._preview_decoder = until, preview_decoder
        self._progress = ProgressMeter(events)
        self._num_told = self._num_saved = 0  # changes of which was told, and which are in the session file
        self._saving = Saving(model)
        self._chunk_frames, self._events = chunk_frames, events
        self._turn = threading.Lock()  # of whoever works at the run
        self._owner: int | None = None  # the thread that has it
        self._is_making = False
        self._num_chunks = 0
        self._starvation = StarvationWatch() if run.store.device.type == "cpu" else None
        self._drift = DriftWatch(steering.prompts.texts.timeline.settled, stop_on_drift, warn_on_drift)
        self._attention = {} if attention is None else attention  # the engine adds to it

    def __next__(self) -> Chunk:
        if self._pump is None or self._is_closing.is_set():
            raise StopIteration
        if self._is_making:
            raise MigaError(
                "the next chunk of this stream is being made already, in another thread or by what is calling back: "
                "ask for one at a time"
            )
        cut: _Cut | None = None
        try:
            with self._work() as pump:
                if pump is None:
                    raise StopIteration
                self._is_making = True
                try:
                    with own_modes():
                        cut = self._next(pump)
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
    def _work(self) -> Iterator[Pump | None]:
        """The run, for this thread alone; None of a closed stream."""
        if self._owner == threading.get_ident():
            yield self._pump
            return
        try:
            with self._turn:
                try:
                    self._owner = threading.get_ident()
                    yield self._pump
                finally:
                    self._owner = None
        finally:
            if self._is_closing.is_set():  # asked for meanwhile by what was called back
                self.close()

    def _next(self, pump: Pump) -> _Cut:
        """Make the next chunk, and report it; it is not given yet."""
        if self._saving.autosave is not None and self._saving.autosave.is_due(self.num_frames_out):
            self._save(self._saving.autosave)
        self._progress(pump.run, pump.steering, self.num_frames_out)
        while (num_frames := self._num_to_cut(pump)) == 0:
            if pump.is_over or self.num_frames_out == self._until:
                self._end(pump)
            pump.advance(self._keep_extension)
            if self._saving.autosave is not None and self._num_saved < pump.run.num_changes:  # before anybody sees it
                self._save(self._saving.autosave)
            self._report_changes(pump)
            self._progress(pump.run, pump.steering, self.num_frames_out)
        groups: list[Tensor] = []
        while sum(map(len, groups)) < num_frames:
            groups.append(pump.ready[len(groups)])
        frames = groups[0] if len(groups) == 1 else torch.cat(groups)
        chunk = Chunk(self._num_chunks, self.num_frames_out, frames[:num_frames])
        self._report(chunk, pump)
        return _Cut(chunk, pump.ready, groups, frames[num_frames:])

    def _give(self, cut: _Cut) -> None:
        for _ in cut.groups:
            cut.ready.popleft()
        if len(cut.rest):
            cut.ready.appendleft(cut.rest)
        self._num_chunks += 1
        self.num_frames_out += len(cut.chunk.frames)

    def _take_back(self, cut: _Cut) -> None:
        if len(cut.rest):
            cut.ready.popleft()
        cut.ready.extendleft(reversed(cut.groups))
        self._num_chunks -= 1
        self.num_frames_out -= len(cut.chunk.frames)

    def warn(self, message: str) -> None:
        """Say in the log, and as an event, what is amiss and does not keep the stream from going on."""
        self._events.warn(message)

    @property
    def request(self) -> Request:
        """What was asked for, and what the run was told since and has taken up, or will at its tick."""
        pump = self._pump  # which another thread may take away
        if pump is not None and len(pump.steering.changes) > len(self._request.changes):
            self._request = dataclasses.replace(self._request, changes=tuple(pump.steering.changes))
        return self._request

    @property
    def is_resumed(self) -> bool:
        """Whether it goes on from a session file."""
        return self.resumed_at_event is not None

    @property
    def is_finished(self) -> bool:
        """Whether every frame asked for has been given out."""
        return self.num_frames_out == self.num_frames

    @property
    def num_frames(self) -> int | None:
        """Video frames that it gives in all: of a replay, those that were seen; None = endless."""
        return self.request.num_frames if self._until is None else self._until

    @property
    def window_batch(self) -> int:
        """Windows that go through the network together now; 0 of a closed stream."""
        pump = self._pump  # which another thread may take away
        return 0 if pump is None else pump.run.denoiser.window_batch

    def metadata(self) -> dict[str, Any]:
        """What the run has chosen by itself and a repetition must know: on GPUs, who computes attention."""
        return {"attention_choices": dict(self._attention)} if self._attention else {}

    def close(self) -> None:
        """End the threads and release the memory; the stream has no frames after this, and cannot be saved.

        Where another thread is at the next chunk, that ends first; called back from there, this is done at its end.
        """
        self._is_closing.set()
        if self._owner == threading.get_ident():
            return
        with self._turn:
            if self._pump is not None:
                self._request = self.request  # the last look at what it was told
                self._pump.close()
            self._pump = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if (pump := getattr(self, "_pump", None)) is not None:
            pump.close()

    def _num_to_cut(self, pump: Pump) -> int:
        """Length of the next chunk of the frames at hand, 0 where more must be made first."""
        num_ready, num_frames = sum(map(len, pump.ready)), self.num_frames
        if num_frames is not None:
            num_ready = min(num_ready, num_frames - self.num_frames_out)
        size = self._chunk_frames
        if size is None:
            size = min(len(pump.ready[0]), num_ready) if num_ready else 0
        elif pump.is_over or self.num_frames_out + num_ready == self._until:
            size = min(size, num_ready)
        return size if 0 < size <= num_ready else 0

    def _end(self, pump: Pump) -> None:
        pump.close()
        if (failure := pump.failure) is not None:
            pump.failure = self._saving.autosave = None  # what is left is for the caller to save
            raise failure
        if self._saving.autosave is not None:
            self._save(self._saving.autosave)
        raise StopIteration

    def _report(self, chunk: Chunk, pump: Pump) -> None:
        """Events of a chunk, and a warning, or the end, of a run whose colours have drifted."""
        if self._starvation is not None and (message := self._starvation.look()) is not None:
            self.warn(message)
        if self._events.on_event is not None:
            self._events("chunk", index=chunk.index, first_frame=chunk.first_frame, num_frames=len(chunk.frames))
        failure = self._drift.watch(chunk, self._events)
        if failure is not None and pump.failure is None:
            pump.fail(failure)

    def set_prompt(
        self, prompt: str, at: int | str = "now", *, blend: int = 0, above: float = TAKES_ABOVE, restart: bool = False
    ) -> None:
        """Change what the running video shows; from any thread, without waiting.

        at: the video frame from which on, or "now". Frames that are made already keep their prompt, so that it may
            begin later: the event `prompt` tells where. From there it holds up to the next one of the timeline.
        blend: video frames over which the text runs from the old prompt to the new one.
        above: noise level sigma from which on frames that are being made take it at once: the lower, the sooner it is
            seen, and the less is left to change in the first of them. 1: only frames that are noise yet, and the video
            is the one of a timeline with this prompt at that frame.
        restart: with "now", grow the queue anew behind its cleanest frame: the change is seen sooner still, after a
            pause without frames, and it is harder. Where that cannot be, the change goes without.

        It is taken up before the next pass, encoded there, and recorded in session files with its moment, so that
        `Engine.replay` and `Engine.resume` make the same frames. ConfigError for what cannot be asked for, MigaError
        once the stream is closed.
        """
        self._ask(asked_prompt(prompt, at, blend, above, restart))

    def set_guidance_scale(self, guidance_scale: float, at: int | str = "now") -> None:
        """Change the scale of guidance from video frame `at` on; "now": of all frames that are not clean. The rest is
        as with `set_prompt`. ConfigError where the run has no guidance to change, its scale being 1."""
        self._ask(asked_scale(guidance_scale, at))

    def _ask(self, ask: Ask) -> None:
        pump = self._pump  # which another thread may take away
        if pump is None or self._is_closing.is_set():
            raise MigaError("the stream is closed and cannot be changed any more: start a new one, or resume a session")
        pump.steering.check(ask, len(pump.asks))
        pump.asks.append(ask)

    def _report_changes(self, pump: Pump) -> None:
        """Tell of what the run has taken up since, and of what came too late."""
        if self._num_told < pump.run.num_changes:
            self._drift.starts = pump.steering.prompts.texts.timeline.settled
        for change in pump.steering.done[self._num_told :]:
            self._num_told += 1
            self._events("guidance_scale" if change.prompt is None else "prompt", **change.told())
        while pump.too_late:
            what = "guidance_scale" if pump.too_late.popleft().prompt is None else "prompt"
            self.warn(f"a change of the {what} came too late for the frames that are left, and is dropped")

    @own_modes()
    def preview(self) -> Tensor | None:
        """The next frame that is to come, as it is predicted now: uint8 `[H,W,3]` on the engine's device; None before
        the first pass. For `on_event`, which is called between passes; from another thread it waits for the chunk."""
        with self._work() as pump:
            latent = None if pump is None else pump.run.predicted()
            if latent is None or self._preview_decoder is None:
                return None
            with torch.no_grad():
                return to_uint8(self._preview_decoder().push(latent[None, :, None])[0])[0]

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
        self._saving.autosave = Autosave(Path(path), num_frames, output, keep_extension, self.num_frames_out)
        self._save(self._saving.autosave)

    @own_modes()
    def save(self, path: str | os.PathLike[str], output: Output | None = None) -> None:
        """Write all that this stream depends on to a session file; `Engine.resume` goes on from it, bit for bit.

        Raises SessionError where there is nothing consistent to save, OutputError where it cannot be written; the file
        that was there is kept then.
        """
        with self._work() as pump:
            if pump is None:
                raise SessionError("the stream is closed and cannot be saved: save it before close()")
            if self._saving.write(path, pump, self.request, self._given(), output):
                self._events("saved", path=os.fspath(path), num_frames=self.num_frames_out)

    @own_modes()
    def load(self, path: str | os.PathLike[str], state: State, *, has_extension: bool = False) -> None:
        """Go on from a state of the session file at `path`, which also holds an extension or not.

        Its run is one that was found to fit (`run_state`); SessionError where the rest does not.
        """
        numbers, tensors = state.numbers, state.tensors
        with taking_apart(path):
            assert self._pump is not None
            self._pump.load_state(tensors, numbers["run"])
            self._num_told = self._num_saved = self._pump.run.num_changes
            self._drift.starts = self._pump.steering.prompts.texts.timeline.settled
            self.num_frames_out, self._num_chunks = numbers["num_frames_out"], numbers["num_chunks"]
            self._events.count = self.resumed_at_event = numbers["num_events"]
            self._drift.load_references(numbers["drift"])
            self._drift.warned = set(numbers["drift_warned"])
            if numbers["output"] is not None:
                self.output = dict(numbers["output"]), tensors["output_frames"]
        self._saving.extension = Path(path) if has_extension else None

    def _given(self) -> dict[str, Any]:
        """What a session file says of the frames given out so far."""
        return {
            "num_frames_out": self.num_frames_out,
            "num_chunks": self._num_chunks,
            "num_events": self._events.count + (self._events.on_event is not None),  # with that of this saving
            "drift": self._drift.references(),
            "drift_warned": sorted(self._drift.warned),
        }

    def _save(self, autosave: Autosave) -> None:
        self.save(autosave.path, autosave.output)
        autosave.saved_at = self.num_frames_out
        self._num_saved = 0 if self._pump is None else self._pump.run.num_changes

    def _keep_extension(self) -> None:
        """Save the last moment from which the run could be made longer, where that is wanted."""
        if (autosave := self._saving.autosave) is not None and autosave.keeps_extension:
            self._save(autosave)
            self._saving.extension = autosave.path
