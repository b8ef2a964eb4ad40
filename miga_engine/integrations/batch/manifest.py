"""manifest.jsonl: a line a video that is there, which is its job, and under `made` what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from miga_engine.errors import OutputError
from miga_engine.integrations.batch.jobs import MADE, Job
from miga_engine.integrations.batch.store import Folder, Store

NAME = "manifest.jsonl"


class Manifest:
    """The manifest of a store, of which one process at a time adds lines."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.made: dict[str, dict[str, Any]] = {}
        """What came of jobs, by name, with the `job`'s digest."""
        self._lines: dict[str, str] = {}
        for number, line in enumerate(lines := store.read(NAME).split("\n"), 1):
            if line and number < len(lines):  # what a kill has left behind the last line is none
                self._take(line, number)
        self._is_whole = lines[-1] == ""

    def _take(self, line: str, number: int) -> None:
        try:
            record = json.loads(line)
            name, made = record["name"], record[MADE]
            self.made[name] = {
                **made,
                "job": str(made["job"]),
                "video": str(made["video"]),
                "frames": str(made["frames"]),
            }
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise OutputError(
                f"line {number} of {NAME} in {self._store.name} is none of a batch ({error}): name another folder"
            ) from None
        self._lines[name] = line

    @staticmethod
    def made_in(path: str) -> dict[str, dict[str, Any]]:
        """What came of the jobs of a manifest's file, by name. OutputError where there is nothing."""
        made = Manifest(Folder(os.path.dirname(path) or ".")).made if os.path.basename(path) == NAME else {}
        if not made:
            raise OutputError(f"{path} is no manifest with videos: give the {NAME} that a batch has written")
        return made

    def is_made(self, job: Job, files: set[str]) -> bool:
        """Whether its video is there. OutputError where another one has its name."""
        made = self.made.get(job.name)
        if made is None:
            return False
        if made["job"] != job.digest:
            raise OutputError(
                f"{made['video']} in {self._store.name} was made of other options than {job.place} asks for: give "
                "--overwrite, or another name, or another folder"
            )
        return made["video"] in files

    def add(self, job: Job, made: Mapping[str, Any]) -> None:
        """The line is safe when this returns."""
        self.made[job.name] = {**made, "job": job.digest}
        self._lines[job.name] = json.dumps({**job.to_record(), MADE: self.made[job.name]}, ensure_ascii=False)
        if self._is_whole:
            self._store.append(NAME, self._lines[job.name])
        else:
            self._write()

    def forget(self, names: Iterable[str]) -> None:
        """Videos that are to be made again have no line."""
        gone = [name for name in names if self._lines.pop(name, None) is not None]
        for name in gone:
            del self.made[name]
        if gone:
            self._write()

    def put_in_order(self, jobs: Iterable[Job]) -> None:
        """The lines of these jobs in their order, behind those of others: the same manifest, whoever was first."""
        names = [job.name for job in jobs if job.name in self._lines]
        ordered = {name: line for name, line in self._lines.items() if name not in set(names)}
        ordered |= {name: self._lines[name] for name in names}
        if list(ordered) != list(self._lines) or not self._is_whole:
            self._lines = ordered
            self._write()

    def _write(self) -> None:
        self._store.write(NAME, "".join(f"{line}\n" for line in self._lines.values()))
        self._is_whole = True
