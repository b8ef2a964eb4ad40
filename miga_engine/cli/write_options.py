"""What `miga generate` writes, as a record of options beside those of `config`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from miga_engine.config import LoadOptions, MigaConfig, StreamOptions
from miga_engine.fields import Checked, option
from miga_engine.request import Request

CHECKPOINT_EVERY = 500
"""Video frames between two session files."""


@dataclass(frozen=True)
class WriteOptions(Checked):
    """What `miga generate` writes, and says."""

    output: str = option("miga.mp4", ".mp4, .mkv (lossless), folder/%06d.png, .rgb", flags=("-o",), metavar="FILE")
    overwrite: bool = option(False, "replace files that exist", flags=("-y",))
    contact_sheet: str | None = option(None, "frames evenly spaced over the video in one picture", metavar="PNG")
    preview: str | None = option(
        None, "until the first frame, what it is predicted to be: a PNG that is rewritten, or - for a terminal that "
        "shows 24-bit colours", metavar="PNG",
    )  # fmt: skip
    events: str | None = option(
        None, "scores, searches, chunks and changes as JSON lines", metavar="JSONL"
    )  # fmt: skip
    checkpoint_every: int | None = option(
        None, "video frames between two writings of the session file, 0 = only when stopped; given, the file is kept "
        "at the end, and the video can be made longer", shown=f"{CHECKPOINT_EVERY}", unit="video frames, 0 for never",
    )  # fmt: skip
    session: str | None = option(
        None, "where the session file lies; given, it is kept at the end", shown="beside the video, "
        "NAME.session.safetensors", metavar="FILE",
    )  # fmt: skip
    auto_resume: bool | None = option(
        None, "go on with the video where the session file of this very run lies there, as after a restart by a "
        "scheduler, and begin it where there is none", shown="under torchrun with --max-restarts",
    )  # fmt: skip
    quiet: bool = option(False, "no progress bar", flags=("-q",))

    @property
    def goes_on(self) -> bool:
        """Whether a session file that lies there is gone on with."""
        if self.auto_resume is not None:
            return self.auto_resume
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "")
        return restarts.isdigit() and int(restarts) > 0


RECORDS = (LoadOptions, Request, MigaConfig, StreamOptions, WriteOptions)
"""Whose options `miga generate` takes."""
