"""Clean latents → uint8 video frames, in order: in the caller's thread, or beside the network in a thread of its own.

Beside the network, a thread takes groups of latents and gives their frames back while the caller computes the next
ones; on CUDA its work goes to a side stream. The caller waits for it only when `MOST_PENDING` groups are under way,
which bounds both queues, and for the first frames of a video, which are not held back for a pass.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from torch import Tensor

from miga_engine.device import indexed, own_modes
from miga_engine.runtime.interrupts import uninterrupted

Push = Callable[[Tensor], Tensor]
"""A streaming decoder: the next latents `[1,C,1,h,w]` → their frames `[1,3,t,H,W]` in [−1, 1]. A push that fails
must leave the decoder as it was."""

MOST_PENDING = 2
"""Groups handed to the thread whose frames the caller has not taken."""


class Decoding:
    """Groups of latents in, their frames out, in order and on the latents' device.

    With `overlap` a second thread decodes: the frames are the same bit for bit. What was put and not yet decoded is
    never lost: where `push` fails, the frames of all latents before come out first, then the error with its own type,
    and `undecoded` is the rest. An interrupt (KeyboardInterrupt, or what else a signal handler raises) is no failure:
    the next call goes on.

    `state` and `load_state` are those of the decoder behind `push`: a latent frame whose picture is not kept
    leaves it as it was before.
    """

    def __init__(
        self,
        push: Push,
        *,
        overlap: bool,
        state: Callable[[], dict[str, Tensor]] = dict,
        load_state: Callable[[dict[str, Tensor]], None] = lambda state: None,
    ) -> None:
        self.num_pending = 0
        """Groups that were put and not decoded."""
        self.ready: deque[Tensor] = deque()
        """Frames uint8 `[t,H,W,3]` that came out and were not taken, group by group."""
        self._push, self._state, self._load_state = push, state, load_state
        self._most_pending = 0
        self._failure: BaseException | None = None
        self._undecoded: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._parts: list[Tensor] = []  # frames of the oldest group, latent by latent
        self._decoded: deque[Tensor] = deque()
        self._has_news = threading.Condition()
        self._jobs: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._is_stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if overlap:
            # A daemon, so that a stream that was dropped half-way never keeps the interpreter from ending; but ended
            # before that: a thread that comes back from an operator of torch to no interpreter aborts the process.
            self._thread = threading.Thread(target=self._run, name="miga-decode", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def __enter__(self) -> Decoding:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, after the latent frame at hand."""
        with self._has_news:
            self._is_stopped.set()
            self._has_news.notify_all()
        if self._thread is not None:
            self._jobs.put(False)
            self._thread.join()
            self._thread = None
            atexit.unregister(self.close)

    def put(self, latents: Tensor) -> None:
        """Hand over the next latents `[n,C,h,w]`.

        On CUDA they need only be queued on the current CUDA stream. They must not be written into afterwards.
        """
        queued = None
        if latents.is_cuda:
            queued = torch.cuda.Event()
            queued.record(torch.cuda.current_stream(latents.device))
        with uninterrupted(), self._has_news:
            self.num_pending += 1
            self._undecoded.append((latents, queued))
            self._jobs.put(True)

    def settle(self, most_pending: int | None = None) -> None:
        """Wait until no more groups are under way than may be; what came out is in `ready`, also where this raises."""
        if most_pending is None:
            most_pending = self._most_pending
        try:
            if self._thread is None:
                while self._is_to_wait(most_pending):
                    self._decode_next()
            else:
                with self._has_news:
                    while self._is_to_wait(most_pending):
                        self._has_news.wait()
        finally:
            with uninterrupted():
                while self._decoded:
                    frames = self._decoded[0]
                    if frames.is_cuda:  # allocated on the side stream, used on the caller's
                        frames.record_stream(torch.cuda.current_stream(frames.device))
                    self.ready.append(self._decoded.popleft())
                    self._most_pending = MOST_PENDING if self._thread is not None else 0
        if self._failure is not None:
            raise self._failure

    def _is_to_wait(self, most_pending: int) -> bool:
        return self.num_pending > most_pending and self._failure is None and not self._is_stopped.is_set()

    @property
    def undecoded(self) -> list[Tensor]:
        """Latents that were handed over and not decoded, once `settle` has ended or failed."""
        groups = [latents for latents, _ in self._undecoded]
        return [groups[0][len(self._parts) :], *groups[1:]] if self._parts else groups

    def _run(self) -> None:
        # OpenMP counts threads by thread; asking makes torch set this one's count to the process's.
        torch.get_num_threads()
        while self._jobs.get() and not self._is_stopped.is_set() and self._failure is None:
            self._decode_next()

    def _decode_next(self) -> None:
        """Decode what is left of the oldest group, as far as it goes; a failure is kept."""
        latents, queued = self._undecoded[0]
        failure: BaseException | None = None
        parts = self._parts
        try:
            # Handed on only when finished: a caller that waited on its queue would hold up the network, and the number
            # of pending groups would not bound the work. The latents live until then: their memory is not reused early.
            with on_side_stream(latents.device, after=queued):
                try:
                    self._decode(latents[len(self._parts) :])
                finally:
                    parts = self._parts
                    if len(parts) > 1:
                        parts = [torch.cat(parts)]  # where memory is short for it, they stay apart
        except BaseException as error:
            if self._thread is None and not isinstance(error, Exception):
                raise  # an interrupt of the caller's
            failure = error
        is_whole = len(self._parts) == len(latents)
        with uninterrupted(), self._has_news:
            self._decoded.extend(parts)
            if is_whole:
                self._undecoded.popleft()
                self.num_pending -= 1
            else:
                self._undecoded[0] = (latents[len(self._parts) :], queued)
                self._failure = failure
            self._parts = []
            self._has_news.notify_all()

    def _decode(self, latents: Tensor) -> None:
        """One latent frame at a time, until stopped."""
        with own_modes():
            for latent in latents:
                if self._is_stopped.is_set():
                    break
                before, num_parts = self._state(), len(self._parts)
                try:
                    frames = to_uint8(self._push(latent[None, :, None])[0])
                    with uninterrupted():
                        self._parts.append(frames)
                except BaseException:
                    if len(self._parts) == num_parts:
                        self._load_state(before)
                    raise


def to_uint8(frames: Tensor) -> Tensor:
    """Frames `[3,T,H,W]` in [−1, 1] → uint8 `[T,H,W,3]`, contiguous."""
    return frames.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


@contextlib.contextmanager
def on_side_stream(device: torch.device, *, after: torch.cuda.Event | None = None) -> Iterator[None]:
    """On CUDA, the decoder's own CUDA stream: begun behind `after`, finished on the device when this ends.

    All of a decoder's memory is to be allocated in it. What another CUDA stream allocated would go back to that one's
    pool as soon as the decoder drops it, with the decoder's work on it still under way.
    """
    if device.type != "cuda":
        yield
        return
    side_stream = _side_stream(indexed(device))
    with torch.cuda.stream(side_stream):
        if after is not None:
            side_stream.wait_event(after)
        try:
            yield
        finally:
            done = torch.cuda.Event(blocking=True)
            done.record(side_stream)
            done.synchronize()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs: memory that the allocator holds for a CUDA stream serves no other."""
    return torch.cuda.Stream(device)
