"""The tokenizer that lies inside files of text encoders: a model of SentencePiece, made one of the library tokenizers.

Ids are those of the package sentencepiece, which is not needed. Its normalisation is done here, since the library's own
takes marks for part of the letter before them; its pieces and their scores are the library's Unigram. Every failure is
a CheckpointError.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from miga_engine.errors import CheckpointError
from miga_engine.models.tokenizing import reported
from miga_engine.weights.untrusted import first_line, short

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MODELS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_SPACE = "▁"

# Each above twice what google/umt5-xxl has; a byte of a name may become a node of a table of some 300 bytes.
_MAX_PIECES = 2**19
_MAX_NAME_BYTES = 256
_MAX_NAMES_BYTES = 2**22
_MAX_CHARSMAP_BYTES = 2**21
_MAX_MAPPED_BYTES = 64  # of what the map of characters replaces and of what it puts there; Unicode's longest has 33
_MAX_STEPS = 100


@dataclasses.dataclass
class _Model:
    """What such a model is made of, whatever file it comes from."""

    names: list[str] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    kinds: list[int] = dataclasses.field(default_factory=list)
    charsmap: bytes = b""
    adds_prefix: bool = True
    removes_spaces: bool = True
    type: str = "unigram"


def tokenizer_of_spiece(content: bytes, where: str) -> tokenizers.Tokenizer:
    """From the bytes of a `spiece.model`; `where` is said in errors. Raises CheckpointError."""
    try:
        return _built(_parsed(content), where)
    except CheckpointError:
        raise
    except (ValueError, OverflowError) as error:
        raise _damaged(where, error) from error


def spiece_of_gguf(metadata: Mapping[str, Any], where: str) -> bytes:
    """The `spiece.model` that gives the same tokenizer, which itself cannot be written to a file. CheckpointError."""
    try:
        model = _told(metadata, where)
        _check(model, where)
        return _written(model)
    except CheckpointError:
        raise
    except (ValueError, OverflowError) as error:
        raise _damaged(where, error) from error


def _told(metadata: Mapping[str, Any], where: str) -> _Model:
    """A model out of key-value pairs, by the names that llama.cpp gives them. Raises ValueError."""
    start = "tokenizer.ggml."
    said = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
    if "tokens" not in said:
        raise CheckpointError(f"{where} holds no tokenizer: give the tokenizer.json of google/umt5-xxl too")
    kind = said.get("model", "t5")
    model = _Model(
        _listed(said, "tokens", str),
        [float(score) for score in _listed(said, "scores", (int, float))],
        _listed(said, "token_type", int).copy(),
        bytes(number & 255 for number in _listed(said, "precompiled_charsmap", int)),  # signed in some files
        bool(said.get("add_space_prefix", True)),
        bool(said.get("remove_extra_whitespaces", True)),
        "unigram" if kind == "t5" else short(str(kind)),
    )
    if not len(model.names) == len(model.scores) == len(model.kinds):
        raise ValueError(f"{len(model.names)} tokens, {len(model.scores)} scores and {len(model.kinds)} types")
    unknown = said.get("unknown_token_id")
    if _UNKNOWN not in model.kinds and type(unknown) is int and 0 <= unknown < len(model.kinds):
        model.kinds[unknown] = _UNKNOWN
    return model


def _listed(said: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> list[Any]:
    values = said.get(name, [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"its {name} are of another type")
    return values


def _damaged(where: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{where} holds a tokenizer that cannot be read ({first_line(error)}): download it again")


def _built(model: _Model, where: str) -> tokenizers.Tokenizer:
    """The library's object. Control pieces have ids, and no text gives them."""
    import tokenizers
    from tokenizers import models, normalizers

    _check(model, where)
    names, scores = list(model.names), list(model.scores)
    normal = [score for score, kind in zip(scores, model.kinds, strict=True) if kind == _NORMAL]
    lowest, highest = min(normal, default=0.0), max(normal, default=0.0)
    # No text has a blank after normalisation, and none shall have a <, with which the names of all other pieces begin.
    hides = any(name == "<" and kind == _NORMAL for name, kind in zip(names, model.kinds, strict=True))
    for i, kind in enumerate(model.kinds):
        if kind == _USER_DEFINED:
            scores[i] = len(names[i].encode()) * highest - 0.1  # as sentencepiece prefers them
        elif kind != _NORMAL:
            scores[i] = lowest
        if kind == _UNUSED:
            names[i] = f"<unused {i}>"
        elif kind in (_NORMAL, _USER_DEFINED) and hides:
            names[i] = names[i].replace("<", " ")
    with reported(f"{where} holds a tokenizer that cannot be read"):
        unigram = models.Unigram(
            list(zip(names, scores, strict=True)), model.kinds.index(_UNKNOWN), byte_fallback=_BYTE in model.kinds
        )
        backend = tokenizers.Tokenizer(unigram)
        backend.normalizer = normalizers.Normalizer.custom(_Normalizer(model, hides))
    return backend


def _check(model: _Model, where: str) -> None:
    """ValueError for what sentencepiece would refuse, and what would ask for more memory than any honest model."""
    if model.type != "unigram":
        raise CheckpointError(
            f"{where} holds a tokenizer of type {model.type}, and Wan's text encoder has one of type unigram: "
            "give the weights of umt5-xxl"
        )
    if not 0 < len(model.names) <= _MAX_PIECES:
        raise ValueError(f"{len(model.names)} pieces")
    if not all(map(math.isfinite, model.scores)):
        raise ValueError("a score that is no number")
    if model.kinds.count(_UNKNOWN) != 1:
        raise ValueError(f"{model.kinds.count(_UNKNOWN)} pieces for what is unknown")
    if others := [kind for kind in model.kinds if not _NORMAL <= kind <= _BYTE]:
        raise ValueError(f"a piece of type {others[0]}")
    sizes = [len(name.encode()) for name in model.names]  # a UnicodeEncodeError, for bytes that are no text, is one too
    if not 0 < min(sizes) <= max(sizes) <= _MAX_NAME_BYTES or sum(sizes) > _MAX_NAMES_BYTES:
        raise ValueError(f"pieces of {min(sizes)} to {max(sizes)} bytes, and of {sum(sizes)} together")
    if len(set(model.names)) < len(model.names):
        raise ValueError("a piece stands twice in it")
    if len(model.charsmap) > _MAX_CHARSMAP_BYTES:
        raise ValueError(f"a map of characters of {len(model.charsmap)} bytes")
    _charsmap(model.charsmap)


class _Normalizer:
    """Texts as sentencepiece normalises them, for `Normalizer.custom`."""

    def __init__(self, model: _Model, hides: bool) -> None:
        self._trie, self._replacements = _charsmap(model.charsmap)
        self._adds_prefix, self._removes_spaces, self._hides = model.adds_prefix, model.removes_spaces, hides
        kept = [name for name, kind in zip(model.names, model.kinds, strict=True) if kind == _USER_DEFINED]
        kept.sort(key=len, reverse=True)
        self._kept = re.compile("|".join(map(re.escape, kept))) if kept else None

    def normalize(self, normalized: tokenizers.NormalizedString) -> None:
        """In steps that keep each character's place, and where they do not lead there, at once."""
        from tokenizers import Regex

        text = str(normalized.normalized)
        if not text:
            return
        parts = list(self._replaced(text))
        mapped = "".join(new for _, new in parts)
        target = self._spaced(mapped)
        changes = sorted({part for part in parts if part[0] != part[1]}, key=lambda part: (-len(part[0]), part))
        if _leads(text, changes, mapped):
            for old, new in changes:
                normalized.replace(old, new)
        if self._removes_spaces:
            normalized.replace(Regex(rf"\A +|[ {_SPACE}]+\z"), "")
            normalized.replace(Regex(" {2,}"), " ")
        if self._adds_prefix and target:
            normalized.prepend(_SPACE)
        normalized.replace(" ", _SPACE)
        if self._hides:
            normalized.replace("<", " ")
        if str(normalized.normalized) != target:
            normalized.clear()
            normalized.append(target)

    def _replaced(self, text: str) -> Iterator[tuple[str, str]]:
        """Parts of a text, one after the other, and what stands for each: user-defined pieces stay as they are."""
        end = 0
        for match in self._kept.finditer(text) if self._kept else ():
            yield from self._mapped(text[end : match.start()])
            yield match[0], match[0]
            end = match.end()
        yield from self._mapped(text[end:])

    def _mapped(self, text: str) -> Iterator[tuple[str, str]]:
        """The same by the map of characters, by the longest of its keys that the rest of the text begins with."""
        content, i = text.encode(), 0
        while i < len(content):
            length, new = self._longest(content, i)
            if new is None:
                length = next(n for n in range(1, 5) if i + n == len(content) or content[i + n] & 0xC0 != 0x80)
            old = content[i : i + length].decode()
            yield old, old if new is None else new
            i += length

    def _longest(self, content: bytes, start: int) -> tuple[int, str | None]:
        """A walk through the double array of the library Darts-clone, each unit of which has the next one's place."""
        found: tuple[int, str | None] = (0, None)
        if not self._trie:
            return found
        place = _offset(self._trie[0])
        for i in range(start, min(len(content), start + _MAX_MAPPED_BYTES)):
            place ^= content[i]
            if place >= len(self._trie) or self._trie[place] & 0x800000FF != content[i]:
                break
            unit = self._trie[place]
            place ^= _offset(unit)
            is_key = unit >> 8 & 1 and (i + 1 == len(content) or content[i + 1] & 0xC0 != 0x80)
            if is_key and place < len(self._trie):
                new = _replacement(self._replacements, self._trie[place] & 0x7FFFFFFF)
                found = (i + 1 - start, new) if new is not None else found
        return found

    def _spaced(self, text: str) -> str:
        """With _SPACE for each blank, and before the first word; leading, trailing and repeated blanks removed."""
        if self._removes_spaces:
            text = re.sub(" {2,}", " ", text.lstrip(" ").rstrip(f" {_SPACE}"))
        if self._adds_prefix and (text or not self._removes_spaces):
            text = _SPACE + text
        text = text.replace(" ", _SPACE)
        return text.replace("<", " ") if self._hides else text


def _leads(text: str, changes: list[tuple[str, str]], end: str) -> bool:
    """Whether to replace each of them everywhere gives `end`, by way of nothing much longer than that."""
    most = len(text) + len(end)
    for old, new in changes[:_MAX_STEPS]:
        if len(text) + text.count(old) * (len(new) - len(old)) > most:
            return False
        text = text.replace(old, new)
    return text == end


def _charsmap(content: bytes) -> tuple[tuple[int, ...], bytes]:
    """The double array, and behind it the texts that its values are places in, each up to a zero."""
    if not content:
        return (), b""
    size = int.from_bytes(content[:4], "little")
    if len(content) < 8 or size % 4 or not 4 <= size <= len(content) - 4:
        raise ValueError(f"a map of characters of {size} in {len(content)} bytes")
    return struct.unpack_from(f"<{size // 4}I", content, 4), content[4 + size :]


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 512) >> 6)


def _replacement(texts: bytes, start: int) -> str | None:
    end = texts.find(b"\0", start, start + _MAX_MAPPED_BYTES)
    try:
        return texts[start:end].decode() if end >= 0 else None
    except UnicodeDecodeError:
        return None


def _parsed(content: bytes) -> _Model:
    """A ModelProto. Raises ValueError."""
    model = _Model()
    for field, value in _fields(content):
        if field == 1 and isinstance(value, bytes):  # a piece
            name, score, kind = b"", 0.0, _NORMAL
            for part, said in _fields(value):
                if part == 1 and isinstance(said, bytes):
                    name = said
                elif part == 2 and isinstance(said, bytes) and len(said) == 4:
                    (score,) = struct.unpack("<f", said)
                elif part == 3 and isinstance(said, int):
                    kind = said
            model.names.append(name.decode())
            model.scores.append(score)
            model.kinds.append(kind)
        elif field == 2 and isinstance(value, bytes):
            for part, said in _fields(value):
                if part == 3:
                    model.type = _MODELS.get(said, "?") if isinstance(said, int) else "?"
                elif part == 24 and said:
                    raise ValueError("blanks end its words instead of beginning them")
        elif field == 3 and isinstance(value, bytes):
            for part, said in _fields(value):
                if part == 2 and isinstance(said, bytes):
                    model.charsmap = said
                elif part == 3:
                    model.adds_prefix = bool(said)
                elif part == 4:
                    model.removes_spaces = bool(said)
                elif part == 5 and not said:
                    raise ValueError("blanks are kept in its pieces")
    return model


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields, integers or bytes. Raises ValueError."""
    i, size = 0, len(content)
    while i < size:
        tag, i = _varint(content, i)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            value, i = _varint(content, i)
            yield field, value
            continue
        if wire == 2:
            length, i = _varint(content, i)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
        if length > size - i:
            raise ValueError(f"a field of {length} bytes in {size - i}")
        yield field, content[i : i + length]
        i += length


def _varint(content: bytes, i: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and where it ends."""
    value = shift = 0
    for byte in content[i : i + 10]:
        value |= (byte & 127) << shift
        i, shift = i + 1, shift + 7
        if byte < 128:
            return value, i
    raise ValueError("a number without an end")


def _written(model: _Model) -> bytes:
    """A ModelProto."""
    parts = []
    for name, score, kind in zip(model.names, model.scores, model.kinds, strict=True):
        parts.append(_field(1, _field(1, name.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind])))
    numbers = {3: 1, 4: len(model.names), 35: _BYTE in model.kinds, 40: model.kinds.index(_UNKNOWN)}
    parts.append(_field(2, b"".join(_number(number << 3) + _number(value) for number, value in numbers.items())))
    spaces = bytes([3 << 3, model.adds_prefix, 4 << 3, model.removes_spaces])
    parts.append(_field(3, _field(2, model.charsmap) + spaces))
    return b"".join(parts)


def _field(number: int, content: bytes) -> bytes:
    return _number(number << 3 | 2) + _number(len(content)) + content


def _number(value: int) -> bytes:
    """As `_varint` reads it."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
