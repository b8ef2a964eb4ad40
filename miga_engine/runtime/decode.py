"""Clean latents → uint8 video frames, in order: in the caller's thread, or beside the network in a thread of its own.

Beside the network, a thread takes groups of latents and gives their frames back while the caller computes the next
ones; on CUDA it works on a stream of its own. The caller waits for it only when `MOST_PENDING` groups are under way,
which bounds both queues, and for the first frames of a video, which are not held back for a pass.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

import torch
from torch import Tensor

Push = Callable[[Tensor], Tensor]
"""A streaming decoder: the next latents ``[1,C,1,h,w]`` → their frames ``[1,3,t,H,W]`` in [−1, 1]."""

MOST_PENDING = 2
"""Groups handed to the thread whose frames the caller has not taken."""


def decode_frames(groups: Iterable[Tensor | None], push: Push, *, overlap: bool) -> Iterator[Tensor]:
    """Frames uint8 ``[t,H,W,3]`` of each group of latents ``[n,C,h,w]``, in order and on the latents' device.

    ``groups`` yields None where a unit of its work finished no latent; the frames that are ready then leave. It must
    not write into a tensor it has given. With ``overlap`` decoding runs in a second thread: the frames are the same
    bit for bit, an error of ``push`` is raised here with its own type, and the thread ends with this generator.
    An error of ``groups`` is raised after the frames of all earlier groups.
    """
    if not overlap:
        for latents in groups:
            if latents is not None:
                yield _decode(latents, push)
        return
    failure: Exception | None = None
    remaining = iter(groups)
    most_pending = 0
    with _DecodeThread(push) as thread:
        while failure is None:
            try:
                latents = next(remaining)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            if latents is not None:
                thread.put(latents)
            while thread.num_pending > most_pending or thread.has_frames():
                yield thread.get()
                most_pending = MOST_PENDING
        while thread.num_pending:
            yield thread.get()
    if failure is not None:
        raise failure


def to_uint8(frames: Tensor) -> Tensor:
    """Frames ``[3,T,H,W]`` in [−1, 1] → uint8 ``[T,H,W,3]``, contiguous."""
    return frames.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def _decode(latents: Tensor, push: Push, is_stopped: Callable[[], bool] = lambda: False) -> Tensor:
    """One latent frame at a time; frames of the latents before ``is_stopped`` was true."""
    parts = []
    with torch.no_grad():
        for latent in latents:
            if is_stopped():
                break
            parts.append(to_uint8(push(latent[None, :, None])[0]))
    return torch.cat(parts) if len(parts) != 1 else parts[0]


@functools.cache
def _decode_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs: memory that the allocator holds for a stream serves no other."""
    return torch.cuda.Stream(device)


class _DecodeThread:
    """Decodes the groups it is given, in order. Leaving the context ends it after the latent frame at hand."""

    def __init__(self, push: Push) -> None:
        self.num_pending = 0
        self._inputs: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event | None] | None] = queue.SimpleQueue()
        self._outputs: queue.SimpleQueue[Tensor | BaseException] = queue.SimpleQueue()
        self._is_stopped = threading.Event()
        # A daemon, so that a stream that was dropped half-way never keeps the interpreter from ending.
        self._thread = threading.Thread(target=self._run, args=(push,), name="miga-decode", daemon=True)

    def __enter__(self) -> _DecodeThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_stopped.set()
        self._inputs.put(None)
        self._thread.join()

    def put(self, latents: Tensor) -> None:
        """Hand over latents ``[n,C,h,w]``; on CUDA they need only be queued on the current stream."""
        ready = None
        if latents.is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(latents.device))
        self.num_pending += 1
        self._inputs.put((latents, ready))

    def has_frames(self) -> bool:
        return not self._outputs.empty()

    def get(self) -> Tensor:
        """Frames of the oldest group, finished on the device too; the thread's error where it failed."""
        result = self._outputs.get()
        self.num_pending -= 1
        if isinstance(result, BaseException):
            raise result
        if result.is_cuda:  # allocated on the decoder's stream, used on the caller's
            result.record_stream(torch.cuda.current_stream(result.device))
        return result

    def _run(self, push: Push) -> None:
        # OpenMP counts threads by thread; asking makes torch set this one's count to the process's.
        torch.get_num_threads()
        while (job := self._inputs.get()) is not None:
            try:
                self._outputs.put(self._decode(push, *job))
            except BaseException as error:
                self._outputs.put(error)
                return
            finally:
                del job

    def _decode(self, push: Push, latents: Tensor, ready: torch.cuda.Event | None) -> Tensor:
        if ready is None:
            return _decode(latents, push, self._is_stopped.is_set)
        stream = _decode_stream(latents.device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            frames = _decode(latents, push, self._is_stopped.is_set)
            done = torch.cuda.Event(blocking=True)
            done.record(stream)
        # Handed on only when finished: a caller that waited in its stream would hold up the network, and the number
        # of pending groups would not bound the work. The latents live until here, so their memory is not reused early.
        done.synchronize()
        return frames
