"""Encoding beside the network, in a bounded thread."""

import atexit
import queue
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from miga_engine.video.sink import FrameArray, Sink, as_frames

if TYPE_CHECKING:
    import torch


class EncoderThread(Sink):
    """Writes to another sink in a thread, so that encoding does not hold up whoever makes the frames.

    At most `max_chunks` writes wait; the next one then blocks. Frames are read after `write` has returned, so they must
    stay as they are; on CUDA they are copied to pinned memory, queued behind the current stream's work. An error of the
    sink is raised by the next `write` or by `close`, with its own type and message. `num_frames` counts what the sink
    has taken. `close` and `abort` first write all that waits. The interpreter's end aborts what is still open.
    """

    def __init__(self, sink: Sink, max_chunks: int = 4) -> None:
        super().__init__(sink.width, sink.height)
        self._sink = sink
        self.num_frames = sink.num_frames
        self._error: BaseException | None = None
        self._left: list[FrameArray] = []  # chunks that came after an error
        self._chunks: queue.Queue[tuple[FrameArray, Any] | None] = queue.Queue(max_chunks)
        self._thread = threading.Thread(target=self._run, name="miga-encode", daemon=True)
        self._thread.start()
        atexit.register(self.abort)

    def write(self, frames: FrameArray) -> None:
        if self.is_closed:
            raise ValueError("the sink is closed")
        if self._error is not None:
            self._left.append(frames.copy() if isinstance(frames, np.ndarray) else frames.cpu())
            raise self._error
        self._chunks.put(_to_host(frames))

    def checkpoint(self) -> tuple[dict[str, Any], "torch.Tensor"]:
        """As of the other sink, with all that was written to this one."""
        import torch

        if not self.is_closed:
            self._chunks.join()
        position, frames = self._sink.checkpoint()
        return position, torch.cat([frames, *(torch.from_numpy(as_frames(left)) for left in self._left)])

    def _write(self, frames: FrameArray) -> None:
        self._sink.write(frames)
        self.num_frames = self._sink.num_frames

    def _close(self) -> None:
        self._finish()
        if self._error is not None:
            self._sink.abort()
            raise self._error
        self._sink.close()

    def _abort(self) -> None:
        self._finish()
        self._sink.abort()

    def _finish(self) -> None:
        self._chunks.put(None)
        self._thread.join()
        atexit.unregister(self.abort)

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            frames, copied = chunk
            if copied is not None:
                copied.synchronize()
            if self._error is None:
                try:
                    self._write(frames)
                except BaseException as error:
                    self._error = error
            else:  # the queue is only emptied, so that no write waits for ever
                self._left.append(frames)
            del chunk, frames
            self._chunks.task_done()


def _to_host(frames: FrameArray) -> tuple[FrameArray, Any]:
    """(frames on the CPU, the CUDA event after which they are there, or None)."""
    if isinstance(frames, np.ndarray) or not frames.is_cuda:
        return frames, None
    import torch

    with torch.cuda.device(frames.device):
        host = frames.detach().to("cpu", non_blocking=True)  # pinned; its block is reused when the copy is done
        copied = torch.cuda.Event(blocking=True)
        copied.record()
    return host, copied
