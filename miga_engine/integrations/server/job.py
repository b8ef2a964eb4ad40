"""A job: its record in job.json, its files, and the stream that makes it while it is made."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miga_engine.files import open_own, written_whole
from miga_engine.integrations.server.asked import RequestError
from miga_engine.integrations.server.events import Hub
from miga_engine.runtime.session import SUFFIX
from miga_engine.runtime.stream import Stream

ID = re.compile(r"video_[0-9a-f]{24}")
RUNNING = ("queued", "in_progress")
ENDED = ("completed", "failed", "cancelled")
SOURCE = f"replayed.session{SUFFIX}"
"""Of a replay: the session file of the job that it repeats."""

MOST_CHANGES = 1000
"""Of one video, all of which its record holds."""

_VERSION = 1


@dataclass
class Record:
    """What job.json holds: what was asked for, and how it stands. Times are seconds since 1970."""

    id: str
    prompt: dict[str, str]
    options: dict[str, Any]
    width: int
    height: int
    fps: str
    num_frames: int | None
    seed: int
    created_at: float
    order: int
    image: str | None = None
    replay_of: str | None = None
    status: str = "queued"
    started_at: float | None = None
    completed_at: float | None = None
    error: dict[str, str] | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What its stream was asked for while it ran, in order; `frame` where it is known from where on it shows."""
    is_deleted: bool = False
    version: int = _VERSION

    @classmethod
    def read(cls, path: Path) -> Record:
        """What `Job.save` wrote; OSError, ValueError or TypeError where it is not there or something else."""
        with open_own(path) as file:
            record = cls(**json.loads(file.readall()))
        if record.version != _VERSION or not ID.fullmatch(record.id) or record.id != path.parent.name:
            raise ValueError("a job of another version or another folder")
        return record


class Job:
    """A job: its record, its files, and, while it is made, the stream that makes it."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record
        self.video, self.session = folder / "video.mp4", folder / f"video.session{SUFFIX}"
        self.hub = Hub()
        self.is_cancelled = threading.Event()
        self.stream: Stream | None = None
        """While it is made."""
        self._steering = threading.Lock()
        self._num_changed = 0
        self.num_frames_out = 0
        self.seconds_to_first_frame: float | None = None
        self.stale_inode: int | None = None
        """Of a video that was begun before, and that is about to be replaced by a copy that goes on."""

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def status(self) -> str:
        return self.record.status

    @property
    def is_ended(self) -> bool:
        return self.record.status in ENDED

    def wait_for_copy(self) -> None:
        """What there is of the video will go on in another file."""
        with contextlib.suppress(FileNotFoundError):
            self.stale_inode = os.stat(self.video).st_ino

    def steer(self, change: dict[str, Any]) -> None:
        """Ask for a change of the running video, a keyword of `Stream.set_prompt` or `Stream.set_guidance_scale` each.

        It is on the disk when this returns, to be asked for again where a kill comes before the session has it.
        RequestError unless the video is being made, ConfigError for what cannot be asked for.
        """
        with self._steering:
            if (stream := self.stream) is None:
                raise RequestError(f"the video is {self.status}: only one that is being made can be changed", 409)
            if self.record.replay_of is not None:
                raise RequestError("the video is a replay, which is as it was: change another one", 409)
            if len(self.record.changes) >= MOST_CHANGES:
                raise RequestError(f"the video has been changed {MOST_CHANGES} times: go on in another one", 429)
            ask(stream, change)
            self.record.changes.append(change)
            self.save()

    def begin(self, stream: Stream) -> None:
        """Let a stream be steered, and ask it again for what its session does not have."""
        with self._steering:
            self._num_changed = 0
            for change in stream.request.changes:
                self._take_up(change.prompt, change.guidance_scale, change.frame)
            for asked in self.record.changes[self._num_changed :]:
                ask(stream, asked)
            self.stream = stream

    def is_changed(self, prompt: str | None, guidance_scale: float | None, frame: int) -> None:
        """The stream has taken up a change, which shows from this frame on."""
        with self._steering:
            self._take_up(prompt, guidance_scale, frame)

    def _take_up(self, prompt: str | None, guidance_scale: float | None, frame: int) -> None:
        """Note it of the first that says the same; those asked for before that came too late, and are forgotten."""
        changes = self.record.changes
        for i in range(self._num_changed, len(changes)):
            if (changes[i].get("prompt"), changes[i].get("guidance_scale")) == (prompt, guidance_scale):
                changes[i]["frame"] = frame
                del changes[self._num_changed : i]
                self._num_changed += 1
                return

    def save(self) -> None:
        """Write job.json, to the disk."""
        with written_whole(self.folder / "job.json") as file:
            file.write(json.dumps(dataclasses.asdict(self.record), indent=1).encode())
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the folder; what is being read stays readable for those who read it."""
        gone = self.folder.with_name(f".{self.id}.gone")
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def view(self, model: str) -> dict[str, Any]:
        """The job as OpenAI's interface shows it, and what ours adds."""
        record, total = self.record, self.record.num_frames
        prompt: Any = record.prompt["0"] if set(record.prompt) == {"0"} else record.prompt
        share = 0 if total is None else int(100 * self.num_frames_out / total)
        seconds = None if total is None else f"{total / _rate(record.fps):g}"
        started, ended = record.started_at, record.completed_at
        return {
            "id": record.id,
            "object": "video",
            "model": model,
            "status": record.status,
            "progress": 100 if record.status == "completed" else min(share, 99),
            "prompt": prompt,
            "size": f"{record.width}x{record.height}",
            "seconds": seconds,
            "created_at": int(record.created_at),
            "started_at": None if started is None else int(started),
            "completed_at": None if ended is None else int(ended),
            "expires_at": None,
            "error": record.error,
            "remixed_from_video_id": record.replay_of,
            "media_type": "video/mp4",
            "file_name": f"{record.id}.mp4",
            "inference_time_s": None if started is None or ended is None else round(ended - started, 3),
            "width": record.width,
            "height": record.height,
            "fps": record.fps,
            "num_frames": total,
            "num_frames_out": self.num_frames_out,
            "seed": record.seed,
            "options": record.options,
            "changes": record.changes,
            "seconds_to_first_frame": self.seconds_to_first_frame,
        }


def ask(stream: Stream, change: Mapping[str, Any]) -> None:
    """ConfigError for what cannot be asked for."""
    asked = {name: value for name, value in change.items() if name != "frame"}
    if "guidance_scale" in asked:
        stream.set_guidance_scale(**asked)
    else:
        stream.set_prompt(**asked)


def _rate(fps: str) -> float:
    above, _, below = fps.partition("/")
    return float(above) / float(below or 1)
