"""Jobs of a file: JSON lines, CSV, a text of prompts, a manifest; each has a name that follows from what it asks."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miga_engine.config import MigaConfig, StreamOptions
from miga_engine.errors import ConfigError
from miga_engine.fields import kind_of
from miga_engine.integrations.batch.settings import MOST_SEGMENTS
from miga_engine.options import check_kinds, fields, named_once, picked
from miga_engine.prompts import FRAME_NUMBER
from miga_engine.request import Request

MOST_BYTES = 2**28
"""Of a file of jobs."""
MADE = "made"
"""In a manifest: what came of a job."""
FILES = ("image", "video")
"""Options that name a file; one that is not absolute lies beside the file of jobs."""

OF_BEGINNING = (*FILES, "video_frames")
"""Options of the first segment alone."""

_RECORDS = (Request, MigaConfig, StreamOptions)
_OPTIONS = {name: option for record in _RECORDS for name, option in fields(record).items()}
_OWN = ("name", "prompt", "prompt_at", "segments")
_NAME = re.compile(r"\w[\w.-]{0,99}")
_MOST_SLUG = 40


@dataclass(frozen=True)
class Job:
    """A video: JSON-able `options` of `Engine.stream` beside the prompt, in which `miga` holds those of the method."""

    name: str
    prompt: dict[int, str]
    options: dict[str, Any]
    place: str
    """Where it is from, for messages."""
    segments: int = 1
    """Parts that are made apart, and joined by cuts."""

    def to_record(self) -> dict[str, Any]:
        """As a line of a file of jobs; `digest` tells another video by this name."""
        timeline = {str(frame): text for frame, text in self.prompt.items()}
        prompt: Any = timeline["0"] if set(timeline) == {"0"} else timeline
        flat = {name: value for name, value in self.options.items() if name != "miga"}
        cut = {} if self.segments == 1 else {"segments": self.segments}
        return {"name": self.name, "prompt": prompt, **flat, **self.options["miga"], **cut}

    @property
    def digest(self) -> str:
        """A short name of all that is asked for."""
        return _digest(self.prompt, self.options, self.segments)

    @property
    def num_frames(self) -> int:
        return int(self.options["num_frames"])

    def of_stream(self) -> dict[str, Any]:
        """Those of its options that say how frames leave."""
        return picked(self.options, StreamOptions)

    def of_video(self) -> dict[str, Any]:
        """Those that say what they show: of `Engine.resolve`."""
        return {name: value for name, value in self.options.items() if name not in fields(StreamOptions)}

    def parts(self) -> list[Job]:
        """The jobs of its segments, in order; of one alone the job itself.

        The first has the job's seed and what the video begins with, each other a seed made of it and its number.
        """
        if self.segments == 1:
            return [self]
        bounds = [self.num_frames * i // self.segments for i in range(self.segments + 1)]
        return [self._part(i, start, end) for i, (start, end) in enumerate(itertools.pairwise(bounds))]

    def _part(self, number: int, start: int, end: int) -> Job:
        text = self.prompt[max(frame for frame in self.prompt if frame <= start)]
        later = {frame - start: text for frame, text in self.prompt.items() if start < frame < end}
        kept = {name: value for name, value in self.options.items() if not number or name not in OF_BEGINNING}
        seed = self.options["seed"]
        if number:
            seed = int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest(), "big")
        name = f"{self.name}.{number + 1}of{self.segments}"
        return Job(name, {0: text, **later}, {**kept, "num_frames": end - start, "seed": seed}, self.place)


def read_jobs(path: str | Path, common: Mapping[str, Any], seeds: list[int], segments: int = 1) -> list[Job]:
    """The jobs of a file, each known to be of options that there are; ConfigError names the line.

    common, segments: of every job that gives none of its own. seeds: a job without a seed becomes one of each of these.
    """
    jobs: dict[str, Job] = {}
    for place, given in _lines(Path(path)):
        flat = _options(given, place, Path(path).parent)
        prompt, name, cut = _prompt(flat, place), flat.pop("name", None), flat.pop("segments", segments)
        if isinstance(cut, bool) or not isinstance(cut, int) or not 1 <= cut <= MOST_SEGMENTS:
            raise ConfigError(f"{place} gives segments as {reprlib.repr(cut)}: give a number from 1 to {MOST_SEGMENTS}")
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ConfigError(f"{place} has the name {reprlib.repr(name)}: give up to 100 letters, digits, . _ and -")
        flat = {**common, **flat}
        for seed in seeds if seeds and flat.get("seed") is None else [flat.get("seed", 0)]:
            options = {**picked(flat, Request), **picked(flat, StreamOptions), "seed": seed}
            options["miga"] = picked(flat, MigaConfig)
            is_one_of_many = name is not None and bool(seeds) and "seed" not in flat
            if cut > (num_frames := options.get("num_frames", 1)):
                raise ConfigError(f"{place} has {num_frames} frames to cut into {cut} segments: give as many frames")
            job_name = _name(prompt, options, cut) if name is None else f"{name}-s{seed}" if is_one_of_many else name
            job = Job(job_name, prompt, options, place, cut)
            if (other := jobs.setdefault(job_name.lower(), job)) is not job:
                what = "ask for the same video" if name is None else f"have the same name {job_name}"
                raise ConfigError(f"{other.place} and {place} {what}: leave one out, or give another seed or name")
    if not jobs:
        raise ConfigError(
            f"{path} holds no job: give a prompt a line, or JSON objects, or a table with a prompt column"
        )
    return list(jobs.values())


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, what is given there) of every job."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{path} is larger than {MOST_BYTES >> 20} MiB: give it in parts")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}): save it as such"
        ) from None
    kind = path.suffix.lower()
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _table, ".txt": _prompts}
    if kind not in readers:
        raise ConfigError(f"{path} is no file of jobs: give .jsonl, .csv, or .txt with a prompt a line")
    yield from readers[kind](path, text)


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"line {number} of {path}"
        try:
            given = json.loads(line, object_pairs_hook=named_once)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f'{place} is no JSON ({error}): give an object such as {{"prompt": "a red kite"}}'
            ) from None
        if not isinstance(given, dict):
            raise ConfigError(f'{place} is {reprlib.repr(given)}: give an object such as {{"prompt": "a red kite"}}')
        yield place, given


def _table(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = csv.DictReader(text.splitlines(keepends=True), strict=True)
        names = rows.fieldnames or ()
        if len(set(names)) != len(names):
            raise ConfigError(f"{path} has two columns of one name: keep one")
        for cells in rows:
            place = f"line {rows.line_num} of {path}"
            if None in cells or None in cells.values():
                raise ConfigError(f"{place} has not as many cells as the first line has names: quote commas of a text")
            yield place, {name: _cell(name, cell) for name, cell in cells.items() if cell.strip()}
    except csv.Error as error:
        raise ConfigError(f"{path} is no table in CSV ({error}): quote texts that hold quotes") from None


def _cell(name: str, cell: str) -> Any:
    """What a cell says, as JSON would; a text where the option is one, or where it is none of another kind."""
    option = _OPTIONS.get(name.strip().replace("-", "_"))
    is_text = option is not None and kind_of(option) in (str, tuple)
    if is_text or (option is None and not (name == "prompt" and cell.startswith("{"))):
        return cell
    try:
        return json.loads(cell.lower() if cell.lower() in ("true", "false") else cell, object_pairs_hook=named_once)
    except (ValueError, RecursionError):
        return cell


def _prompts(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number} of {path}", {"prompt": line.strip()}


def _options(given: Mapping[str, Any], place: str, folder: Path) -> dict[str, Any]:
    """The options of a job by our names, without those that are null."""
    flat: dict[str, Any] = {}
    inner = given.get("miga")
    if inner is not None and not isinstance(inner, dict):
        raise ConfigError(f"{place} gives miga as {reprlib.repr(inner)}: give an object of its options")
    outer = {name: value for name, value in given.items() if name not in ("miga", MADE)}
    for name, value in (*outer.items(), *(inner or {}).items()):
        ours = name.strip().replace("-", "_")
        if ours not in (*_OPTIONS, *_OWN):
            raise ConfigError(
                f"{place} has an unknown option {reprlib.repr(name)}; the options are "
                f"{', '.join(sorted((*_OPTIONS, *_OWN)))}"
            )
        if ours in flat:
            raise ConfigError(f"{place} gives {ours} twice: keep one")
        if value is not None:
            flat[ours] = value
    check_kinds(flat, _RECORDS, lambda name, value, kind: f"{place} gives {name} as {value}: give {kind}")
    for name in FILES:
        if name in flat:
            if not isinstance(flat[name], str):
                raise ConfigError(f"{place} gives {name} as {reprlib.repr(flat[name])}: give a file")
            flat[name] = str((folder / flat[name]).absolute())
    return flat


def _prompt(flat: dict[str, Any], place: str) -> dict[int, str]:
    """The timeline of `prompt` and `prompt_at`, which are taken out."""
    prompt, changes = flat.pop("prompt", None), flat.pop("prompt_at", [])
    timeline: dict[Any, Any] = {}
    pairs: list[Any] = changes if isinstance(changes, list) else [None]
    is_timeline = isinstance(prompt, dict) and all(FRAME_NUMBER.fullmatch(str(frame)) for frame in prompt)
    if isinstance(prompt, str):
        timeline = {0: prompt}
    elif is_timeline:
        timeline = {int(frame): text for frame, text in prompt.items()}
    if not timeline or not all(isinstance(text, str) for text in timeline.values()):
        raise ConfigError(
            f'{place} has the prompt {reprlib.repr(prompt)}: give a text, or a timeline {{"0": text, "160": text}}'
        )
    for pair in pairs:
        is_change = isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and isinstance(pair[1], str)
        if not is_change or pair[0] in timeline:
            raise ConfigError(
                f"{place} has the prompt_at {reprlib.repr(changes)}: give pairs [frame, prompt], a frame once"
            )
        timeline[pair[0]] = pair[1]
    return dict(sorted(timeline.items()))


def _digest(prompt: Mapping[int, str], options: Mapping[str, Any], segments: int) -> str:
    cut = [segments] if segments > 1 else []
    asked = json.dumps([sorted(prompt.items()), options, *cut], sort_keys=True)
    return hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()


def _name(prompt: Mapping[int, str], options: Mapping[str, Any], segments: int) -> str:
    """A file's name that says what the video is, the same wherever the job stands in its file."""
    slug = re.sub(r"[^a-z0-9]+", "-", next(iter(prompt.values())).lower()).strip("-")[:_MOST_SLUG].strip("-")
    return f"{slug or 'video'}-s{options['seed']}-{_digest(prompt, options, segments)[:6]}"
