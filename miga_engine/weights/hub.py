"""Models under their names on Hugging Face's hub: found in the local cache, downloaded only where that is asked for.

The library huggingface_hub lays out the cache and reads HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from miga_engine.errors import CheckpointError
from miga_engine.weights.files import format_of
from miga_engine.weights.untrusted import first_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_hub_name(name: str) -> bool:
    """Whether a text that is no path here has the form owner/name."""
    return bool(_NAME.fullmatch(name)) and not os.path.exists(name)


def snapshot(
    name: str,
    patterns: Sequence[str],
    *,
    check: Callable[[Path], None],
    revision: str | None = None,
    cache_dir: str | None = None,
    download: bool,
) -> Path:
    """The folder of a model in the hub's cache; with `download` its files of the patterns are fetched first.

    `check` is given the folder when only what describes the model has come, and raises where the rest is of no use.
    Raises CheckpointError, which says the command.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{name!r} is no path here, and models of Hugging Face's hub need the package huggingface_hub: "
            'pip install "miga_engine[download]"'
        ) from error
    try:
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": not download}
        if download:
            check(Path(str(snapshot_download(name, allow_patterns=["*.json"], **where))))
        folder = str(snapshot_download(name, allow_patterns=list(patterns), **where))
    except CheckpointError:
        raise
    except errors.LocalEntryNotFoundError as error:
        if download:
            raise CheckpointError(
                f"{name}{_at(revision)} cannot be downloaded ({first_line(error.__cause__ or error)}): see that the "
                "hub can be reached and HF_HUB_OFFLINE is not set"
            ) from error
        is_partial = isinstance(error, getattr(errors, "IncompleteSnapshotError", ()))  # not in releases before 2
        raise _not_cached(name, revision, cache_dir, is_partial=is_partial) from error
    except (errors.HfHubHTTPError, ValueError) as error:
        raise CheckpointError(
            f"{name} cannot be had from Hugging Face's hub ({first_line(error)}): see to its name, its revision, and "
            "HF_TOKEN where it is gated"
        ) from error
    except Exception as error:  # of the disk, or of the HTTP library, which is another one from release to release
        raise CheckpointError(
            f"{name} did not come whole from Hugging Face's hub ({first_line(error)}): see to the connection and to "
            "the space on the disk; --download goes on where it broke off"
        ) from error
    if not download and not any(file.is_file() for file in Path(folder).rglob("*") if format_of(file) is not None):
        raise _not_cached(name, revision, cache_dir, is_partial=True)  # another program fetched something of it
    return Path(folder)


def _not_cached(name: str, revision: str | None, cache_dir: str | None, *, is_partial: bool) -> CheckpointError:
    what = ("only a part of this one" if is_partial else "none of this name") + _at(revision)
    given = (("--revision", revision), ("--cache-dir", cache_dir))
    options = "".join(f" {flag} {shlex.quote(value)}" for flag, value in given if value)
    return CheckpointError(
        f"there is no model at {name!r}, and {what} in the cache of Hugging Face's hub: add --download, or run: "
        f"hf download {name}{options}"
    )


def _at(revision: str | None) -> str:
    return f" at revision {revision}" if revision else ""
