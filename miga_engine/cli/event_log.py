"""The file of a run's events, a JSON object a line, which a resumed run goes on with."""

from __future__ import annotations

import json
import os
from pathlib import Path

from miga_engine.files import WholeFile, create, open_own
from miga_engine.runtime.stream import Event
from miga_engine.video.paths import reported


class EventLog:
    """Each event is wholly in the file or not at all. What comes before the file is opened waits for that.

    path None: nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: WholeFile | None = None
        self._waiting: list[Event] = []

    def open(self, *, after: int | None, overwrite: bool = False) -> None:
        """Begin the file; with `after`, go on with one that is there behind the event of this number.

        OutputError where that cannot be.
        """
        if self._path is None:
            return
        with reported(self._path):
            if after is not None and os.path.lexists(self._path):
                self._file = open_own(self._path, "r+")
                _forget_later(self._file, after)
                self._file.seek(0, os.SEEK_END)
            else:
                if overwrite:
                    self._path.unlink(missing_ok=True)
                self._file = create(self._path)
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self.write(event)

    def write(self, event: Event) -> None:
        """Append an event; OutputError where it cannot be written, and then nothing of it is there."""
        if self._path is None:
            return
        if self._file is None:
            self._waiting.append(event)
            return
        length = self._file.tell()
        try:
            with reported(self._path):
                self._file.write(f"{event.to_json()}\n".encode())
        except BaseException:
            self._file.truncate(length)
            self._file.seek(length)
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _forget_later(file: WholeFile, after: int) -> None:
    """Take from the end of the file what a run that was killed wrote behind the session that is gone on from."""
    end, num_bytes = None, 0
    while line := file.readline():
        try:
            event = json.loads(line)
            is_later = isinstance(event, dict) and "event" in event and event["number"] > after
        except (ValueError, KeyError, TypeError, RecursionError):
            is_later = not line.endswith(b"\n")  # the last one, cut short
        end = None if not is_later else num_bytes if end is None else end
        num_bytes += len(line)
    if end is not None:
        file.truncate(end)
