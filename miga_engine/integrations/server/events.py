"""What happens in a job, told to whoever listens: nobody who listens slowly, or not at all, holds up the one who tells.

A listener has a bounded queue of its own, from which the oldest is dropped where it is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

MOST_REMEMBERED = 2000
"""Events that one who comes later is told first."""
MOST_WAITING = 500
"""Events that wait for one listener."""
MOST_CHUNKS = 4
"""Chunks of frames that wait for one listener."""


def as_json(message: Mapping[str, Any]) -> str:
    """The message as JSON of any reader: what is not finite is null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in message.items()}
    return json.dumps(finite, default=str)


class Listener:
    """One who listens, in a thread with an event loop, to a hub that is told from other threads."""

    def __init__(self, told: list[dict[str, Any]], *, wants_frames: bool) -> None:
        self.wants_frames = wants_frames
        self.num_lost = 0
        self._events: deque[dict[str, Any]] = deque(told[-MOST_WAITING:], MOST_WAITING)
        self._chunks: deque[tuple[int, Tensor]] = deque(maxlen=MOST_CHUNKS)
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._news.set()

    def tell(self, event: dict[str, Any] | None, chunk: tuple[int, Tensor] | None = None) -> None:
        """From any thread: take an event or a chunk, or neither, which only wakes."""
        if event is not None:
            self.num_lost += len(self._events) == MOST_WAITING
            self._events.append(event)
        if chunk is not None:
            self._chunks.append(chunk)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._news.set)

    async def news(self, seconds: float) -> tuple[list[dict[str, Any]], list[tuple[int, Tensor]]]:
        """Events and chunks since the last call, as soon as there are any; none after that many seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        self._news.clear()
        return _emptied(self._events), _emptied(self._chunks)


def _emptied(queue: deque[Any]) -> list[Any]:
    taken = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(queue.popleft())
    return taken


class Hub:
    """The events of one job, and who listens to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: deque[dict[str, Any]] = deque(maxlen=MOST_REMEMBERED)
        self._progress: list[dict[str, Any]] = []  # the last
        self._listeners: set[Listener] = set()

    def tell(self, kind: str, **data: Any) -> None:
        """From any thread; never waits for a listener."""
        event = {"event": kind, **data}
        with self._lock:
            if kind == "progress":
                self._progress = [event]
            else:
                self._told.append(event)
            listeners = list(self._listeners)
        for listener in listeners:
            listener.tell(event)

    def show(self, first_frame: int, frames: Tensor) -> None:
        """Frames uint8 `[n,H,W,3]`, for those who want them."""
        with self._lock:
            listeners = [listener for listener in self._listeners if listener.wants_frames]
        for listener in listeners:
            listener.tell(None, (first_frame, frames))

    def listen(self, *, wants_frames: bool = False) -> Listener:
        """A listener who is first told what has happened so far; to be left by `leave`."""
        with self._lock:
            listener = Listener([*self._told, *self._progress], wants_frames=wants_frames)
            self._listeners.add(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        with self._lock:
            self._listeners.discard(listener)

    def wake(self) -> None:
        """Let all who listen look whether the job has ended."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.tell(None)

    def forget(self) -> None:
        """Give back the memory of what has been told."""
        with self._lock:
            self._told.clear()
