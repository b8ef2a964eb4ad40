"""Clean latents → uint8 video frames, in order: in the caller's thread, or beside the network in a thread of its own.

Beside the network, a thread takes groups of latents and gives their frames back while the caller computes the next
ones; on CUDA it works on a stream of its own. The caller waits for it only when `MOST_PENDING` groups are under way,
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

Push = Callable[[Tensor], Tensor]
"""A streaming decoder: the next latents ``[1,C,1,h,w]`` → their frames ``[1,3,t,H,W]`` in [−1, 1]. A push that fails
must leave the decoder as it was."""

MOST_PENDING = 2
"""Groups handed to the thread whose frames the caller has not taken."""


class Decoding:
    """Groups of latents in, their frames out, in order and on the latents' device.

    With ``overlap`` a second thread decodes: the frames are the same bit for bit. What was put and not yet decoded is
    never lost: where ``push`` fails, the frames of all latents before come out first, then the error with its own type,
    and ``undecoded`` is the rest.
    """

    def __init__(self, push: Push, *, overlap: bool) -> None:
        self.num_pending = 0
        self._push = push
        self._most_pending = 0
        self._failure: BaseException | None = None
        self._undecoded: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._outputs: queue.SimpleQueue[tuple[list[Tensor], BaseException | None]] = queue.SimpleQueue()
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
        self._is_stopped.set()
        if self._thread is not None:
            self._jobs.put(False)
            self._thread.join()
            self._thread = None
            atexit.unregister(self.close)

    def exchange(self, latents: Tensor | None) -> Iterator[Tensor]:
        """Hand over the next latents ``[n,C,h,w]`` or none; the frames uint8 ``[t,H,W,3]`` that leave meanwhile.

        On CUDA the latents need only be queued on the current stream. They must not be written into afterwards.
        """
        if latents is not None:
            ready = None
            if latents.is_cuda:
                ready = torch.cuda.Event()
                ready.record(torch.cuda.current_stream(latents.device))
            self.num_pending += 1
            self._undecoded.append((latents, ready))
            self._jobs.put(True)
        while self.num_pending > self._most_pending or not self._outputs.empty():
            yield from self._take()
            self._most_pending = MOST_PENDING if self._thread is not None else 0

    def drain(self) -> Iterator[Tensor]:
        """The frames of all groups that were handed over, waited for."""
        while self.num_pending:
            yield from self._take()

    @property
    def undecoded(self) -> list[Tensor]:
        """Latents that were handed over and not decoded, once `drain` has ended or failed."""
        return [latents for latents, _ in self._undecoded]

    def _take(self) -> list[Tensor]:
        """Frames of the oldest group, finished on the device too; the error where there is nothing but it."""
        if self._failure is not None:
            raise self._failure
        if self._thread is None:
            self._decode_next()
        frames, self._failure = self._outputs.get()
        if self._failure is None:
            self.num_pending -= 1
        if not frames and self._failure is not None:
            raise self._failure
        for part in frames:
            if part.is_cuda:  # allocated on the decoder's stream, used on the caller's
                part.record_stream(torch.cuda.current_stream(part.device))
        return frames

    def _run(self) -> None:
        # OpenMP counts threads by thread; asking makes torch set this one's count to the process's.
        torch.get_num_threads()
        while self._jobs.get() and self._decode_next():
            pass

    def _decode_next(self) -> bool:
        """Decode the oldest group, as far as it goes; False where that was not to its end."""
        latents, ready = self._undecoded[0]
        parts: list[Tensor] = []
        failure: BaseException | None = None
        num_latents, num_decoded = len(latents), 0
        try:
            # Handed on only when finished: a caller that waited in its stream would hold up the network, and the number
            # of pending groups would not bound the work. The latents live until then: their memory is not reused early.
            with decoding_stream(latents.device, after=ready):
                try:
                    self._decode(latents, parts)
                finally:
                    num_decoded = len(parts)
                    if num_decoded > 1:
                        parts = [torch.cat(parts)]  # where memory is short for it, they stay apart
        except BaseException as error:
            failure = error
        if num_decoded == num_latents:
            self._undecoded.popleft()
            if failure is not None and parts:  # nothing but the joining failed, and no frame is missing
                failure = None
        else:
            self._undecoded[0] = (latents[num_decoded:], ready)
        del latents
        self._outputs.put((parts, failure))
        return failure is None

    def _decode(self, latents: Tensor, parts: list[Tensor]) -> None:
        """One latent frame at a time, until stopped."""
        with own_modes():
            for latent in latents:
                if self._is_stopped.is_set():
                    break
                parts.append(to_uint8(self._push(latent[None, :, None])[0]))


def to_uint8(frames: Tensor) -> Tensor:
    """Frames ``[3,T,H,W]`` in [−1, 1] → uint8 ``[T,H,W,3]``, contiguous."""
    return frames.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


@contextlib.contextmanager
def decoding_stream(device: torch.device, *, after: torch.cuda.Event | None = None) -> Iterator[None]:
    """On CUDA, the decoder's stream: begun behind `after`, finished on the device when this ends.

    All of a decoder's memory is to be allocated in it. What another stream allocated would go back to that stream's
    pool as soon as the decoder drops it, with the decoder's work on it still under way.
    """
    if device.type != "cuda":
        yield
        return
    stream = _decode_stream(indexed(device))
    with torch.cuda.stream(stream):
        if after is not None:
            stream.wait_event(after)
        try:
            yield
        finally:
            done = torch.cuda.Event(blocking=True)
            done.record(stream)
            done.synchronize()


@functools.cache
def _decode_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs: memory that the allocator holds for a stream serves no other."""
    return torch.cuda.Stream(device)
