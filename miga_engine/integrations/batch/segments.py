"""Videos that are made in segments: their parts are jobs like others, and joined once all of them are there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from miga_engine.integrations.batch.jobs import Job
from miga_engine.integrations.batch.making import video_of
from miga_engine.integrations.batch.store import Store
from miga_engine.video.joining import join
from miga_engine.video.reading import read_metadata

Made = dict[str, Any]


class Segments:
    """The jobs that are left, by their parts. `made` is what there is of these, by name.

    on_made is called with each job whose video is there whole, what came of it, and the parts that it is of; none where
    it was made as one.
    """

    def __init__(
        self, jobs: Sequence[Job], made: dict[str, Made], store: Store, container: str,
        on_made: Callable[[Job, Made, list[Job]], None],
    ) -> None:  # fmt: skip
        self._store, self._container, self._on_made = store, container, on_made
        self._made = dict(made)
        self._whole = {part.name: job for job in jobs for part in job.parts()}
        self.left = [part for job in jobs for part in job.parts() if part.name not in made]
        """What is to be made."""
        for job in jobs:
            self._join_if_whole(job)

    def add(self, part: Job, made: Made) -> None:
        """A part is there."""
        self._made[part.name] = made
        self._join_if_whole(self._whole[part.name])

    def _join_if_whole(self, job: Job) -> None:
        parts = job.parts()
        made = [self._made[part.name] for part in parts if part.name in self._made]
        if len(made) < len(parts):
            return
        if job.segments == 1:
            self._on_made(job, made[0], [])
        else:
            self._on_made(job, self._joined(job, made), parts)

    def _joined(self, job: Job, made: list[Made]) -> Made:
        video, names = video_of(job, self._container), [part["video"] for part in made]
        with self._store.workplace(names) as folder:
            paths = [folder / name for name in names]
            said = [read_metadata(path) for path in paths]
            starts = [sum(part["num_frames"] for part in made[:i]) for i in range(len(made))]
            metadata = {**said[0], "prompt": job.prompt, "num_frames": job.num_frames, "segments": [
                {"first_frame": start, "seed": one["seed"]} for start, one in zip(starts, said, strict=True)
            ]}  # fmt: skip
            join(paths, Path(folder) / video, made[0]["fps"], metadata)
            self._store.keep(folder, video)
        hashes = [part["frames"] for part in made]
        drifts = [part["drift"] for part in made if part["drift"] is not None]
        return {
            **made[-1],
            "video": video,
            "frames": hashlib.blake2b(bytes.fromhex("".join(hashes)), digest_size=16).hexdigest(),
            "segments": hashes,
            "num_frames": job.num_frames,
            "seconds": round(sum(part["seconds"] for part in made), 3),
            "drift": max(drifts, default=None),
            "attempts": sum(part["attempts"] for part in made),
        }
