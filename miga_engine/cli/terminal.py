"""Standard error, which the command speaks on: it may be closed, full, or a terminal that is gone."""

from __future__ import annotations

import contextlib
import sys

from miga_engine.errors import printable


def say(message: object) -> None:
    """A line on standard error, if anybody can read it."""
    Screen().write(printable(message) + "\n")


class Screen:
    """Standard error as a file whose failures end nothing."""

    def write(self, text: str) -> None:
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(text)

    def flush(self) -> None:
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()
