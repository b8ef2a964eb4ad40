"""Steps that an interrupt must not cut in two."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # what `signal` wraps, forty times as fast where all are looked at
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class uninterrupted:  # noqa: N801 - reads as what the block is
    """Within the block Python's signal handlers wait; what came is handed to them, in order, when it has ended.

    An exception that a handler raises, KeyboardInterrupt above all, then finds the block done as a whole. Only the main
    thread runs handlers: elsewhere this does nothing. Blocks are to be short.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in range(1, signal.NSIG):
                handler = _signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler  # before it is replaced: giving it back twice does no harm
                    signal.signal(number, self._note)
        except ValueError:  # no interpreter in which Python handles signals
            self._handlers.clear()
        except BaseException:  # a handler that has not been replaced yet
            self._restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        handlers = dict(self._handlers)
        raised = self._restore()
        for number, frame in self._came:
            try:
                handlers[number](number, frame)
            except BaseException as interrupt:
                raised = raised or interrupt
        if raised is not None:
            raise raised

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append((number, frame))

    def _restore(self) -> BaseException | None:
        """Give all handlers back; what one of them raises meanwhile."""
        raised: BaseException | None = None
        while self._handlers:
            try:
                number = next(iter(self._handlers))
                signal.signal(number, self._handlers[number])
                del self._handlers[number]
            except BaseException as interrupt:
                raised = raised or interrupt
        return raised
