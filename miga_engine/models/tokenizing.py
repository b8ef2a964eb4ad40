"""What all tokenizers share: cleaning as the models' texts were cleaned, cutting that is said, and errors."""

from __future__ import annotations

import functools
import html
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from miga_engine.errors import CheckpointError
from miga_engine.weights.untrusted import first_line

if TYPE_CHECKING:
    import tokenizers

_log = logging.getLogger("miga_engine")


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities (also doubly escaped ones), collapse white space."""
    text = html.unescape(html.unescape(_unicode_repair()(text)))
    return re.sub(r"\s+", " ", text).strip()


@functools.cache
def _unicode_repair() -> Callable[[str], str]:
    """`ftfy.fix_text`, or the text as it is where ftfy is missing, said once."""
    try:
        from ftfy import fix_text
    except ImportError:
        _log.warning(
            "the package ftfy is not installed: prompts are used as typed, with broken or full-width characters that "
            "the model's training text did not have; install ftfy to have them repaired"
        )
        return str
    return cast("Callable[[str], str]", fix_text)


@contextmanager
def reported(sentence: str) -> Iterator[None]:
    """What the tokenizers library raises, which is bare Exception and Rust's panics, as one CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{sentence} ({first_line(error)}): download it again") from error


def encode(backend: tokenizers.Tokenizer, text: str, most: int) -> list[int]:
    """Token ids without special tokens, at most so many; a cut is said in the log. Raises CheckpointError."""
    with reported("the tokenizer fails on the prompt"):
        encoding = backend.encode(text, add_special_tokens=False)
    ids: list[int] = encoding.ids
    if len(ids) > most:
        end = encoding.offsets[most][0]
        before, behind = text[:end].split()[-4:], text[end:].split()[:4]
        _log.warning(
            "a prompt has %d tokens and the text encoder reads %d: it is cut behind %r, and %r and what follows "
            "is lost",
            len(ids), most, " ".join(before), " ".join(behind),
        )  # fmt: skip
    return ids[:most]
