"""What `miga batch` is asked for beside the model and the video, as a record of options."""

from __future__ import annotations

import re
from dataclasses import dataclass

from miga_engine.errors import ConfigError
from miga_engine.fields import Checked, option

MOST_SEGMENTS = 1000

_MOST = 10**6
_SEEDS = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?")


@dataclass(frozen=True, kw_only=True)
class BatchOptions(Checked):
    """Where the videos go, and who makes them."""

    output: str = option(
        "miga-batch", "folder that every worker sees, or URL of a store (s3://bucket/folder), for videos and "
        "manifest.jsonl", group="batch", flags=("-o",), metavar="DIR|URL",
    )  # fmt: skip
    container: str = option("mp4", "of the videos; mkv is lossless", choices=("mp4", "mkv"), group="batch")
    seeds: str | None = option(
        None, "a video for each of these seeds, of every job that gives none: 0-3,7", shown="that of --seed",
        group="batch", metavar="SEEDS",
    )  # fmt: skip
    segments: int = option(
        1, "parts of each video, which are made at the same time and joined by cuts: each begins anew, with another "
        "seed, for the frames of a queue are made one after the other", least=1, most=MOST_SEGMENTS, group="batch",
    )  # fmt: skip
    workers: int | None = option(
        None, "videos that are made at once, each by a process of its own", shown="one a GPU, or 1; on a cluster of "
        "CPUs one each", least=1, most=_MOST, group="batch",
    )  # fmt: skip
    ray: str | None = option(
        None, "have the workers on a Ray cluster of which this machine is a part: auto, HOST:PORT; or local, one "
        "for this run", group="batch", metavar="ADDRESS",
    )  # fmt: skip
    retries: int = option(2, "how often a video that failed, or whose worker died, is gone on with", most=_MOST,
                          group="batch")  # fmt: skip
    save_every: int = option(
        100, "video frames between two writings of a video's session file: what a lost worker can cost", least=1,
        most=_MOST, unit="video frames", group="batch",
    )  # fmt: skip
    verify: int | None = option(
        None, "make so many of the videos of JOBS, a manifest, once more, and compare their frames with it", least=1,
        most=_MOST, group="batch",
    )  # fmt: skip
    dry_run: bool = option(False, "show the jobs and what each needs of memory", group="batch", flags=("-n",))
    overwrite: bool = option(False, "make videos again that are there", group="batch", flags=("-y",))
    quiet: bool = option(False, "no progress bar", group="batch", flags=("-q",))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seed_numbers()

    def seed_numbers(self) -> list[int]:
        """The seeds, in order; none where none are given. Raises ConfigError."""
        numbers: list[int] = []
        for word in [] if self.seeds is None else self.seeds.split(","):
            found = _SEEDS.fullmatch(word.strip())
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
            if not first <= last < 2**64 or last - first >= _MOST:
                raise ConfigError(f"seeds must be numbers and ranges from 0 to 2^64 − 1, as 0-3,7, got {self.seeds!r}")
            numbers += range(first, last + 1)
        if len(set(numbers)) != len(numbers):
            raise ConfigError(f"seeds names a number twice, got {self.seeds!r}: name each once")
        return numbers
