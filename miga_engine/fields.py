"""What an option is: a field of a frozen record that carries its description and refuses what is no value of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import field
from numbers import Real
from typing import Any, TypeAlias, TypeVar, Union

from miga_engine.errors import ConfigError

T = TypeVar("T")

FromPreset: TypeAlias = Union[T, Any]  # noqa: UP007 - an alias with a variable
"""None asks for the preset's value; a resolved record has it."""

MAX_LEVELS = 1000
"""Of a list of noise levels."""

_KINDS = {"bool": bool, "int": int, "float": float, "str": str}


def option(
    default: Any,
    help: str,
    *,
    least: float | None = 0,
    most: float | None = None,
    unit: str = "",
    choices: tuple[str, ...] = (),
    kind: type | None = None,
    group: str = "",
    flags: tuple[str, ...] = (),
    metavar: str = "",
    shown: str = "",
    phrase: str = "",
    is_hosted: bool = True,
    is_recorded: bool = True,
    is_repeated: bool = False,
) -> Any:
    """A field that carries its description and the values it may take.

    Args:
        default: None where it follows from something else, which `shown` names; MISSING where it must be given.
        least, most: bounds of a number; `least` None for none.
        kind: bool, int, float or str; by default the first of them in the field's annotation; tuple for levels that
            descend from `most`, see `descending`; object where a value is checked by whoever uses it, and hosts give a
            text.
        group: heading under which help texts show it, where not that of its record.
        flags, metavar: further names and the placeholder on the command line.
        phrase: what a value must be, where that does not follow from the rest.
        is_hosted: hosts other than Python can give it.
        is_recorded: session files hold it.
        is_repeated: its flag may be given several times, for a list.
    """
    return field(default=default, metadata={name: value for name, value in locals().items() if name != "default"})


def kind_of(option: dataclasses.Field[Any]) -> type:
    """bool, int, float, str, tuple, or object: see `option`."""
    found = re.search(r"\b(bool|int|float|str)\b", str(option.type))
    return option.metadata["kind"] or _KINDS[found[1] if found else "str"]


def wanted(option: dataclasses.Field[Any]) -> str:
    """What a value must be, in words."""
    metadata, kind = option.metadata, kind_of(option)
    if metadata["phrase"]:
        return str(metadata["phrase"])
    if choices := metadata["choices"]:
        return " or ".join(map(repr, choices)) if len(choices) < 3 else f"one of {', '.join(choices)}"
    if kind is int:
        unit = f" ({metadata['unit']})" if metadata["unit"] else ""
        return f"a whole number of at least {metadata['least']}{unit}"
    if kind is float:
        return "a number" if metadata["least"] is None else f"a finite number of at least {metadata['least']}"
    return "true or false" if kind is bool else "a text"


def is_wanted(option: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a value, not None, is of the option's kind, among its choices and not below its bound."""
    metadata, kind = option.metadata, kind_of(option)
    if kind is bool or kind is str:
        return isinstance(value, kind) and (not metadata["choices"] or value in metadata["choices"])
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    is_finite = kind is int or abs(value) <= sys.float_info.max
    return is_finite and (metadata["least"] is None or value >= metadata["least"])


def descending(name: str, value: Any, most: float) -> tuple[float, ...]:
    """Levels, as a sequence of numbers or as a text of them with commas or blanks between, without a last 0.

    ConfigError unless they descend, from at most `most` to above 0.
    """
    levels: tuple[float, ...] = ()
    parts = re.findall(r"[^,\s]+", value) if isinstance(value, str) else value
    if isinstance(parts, Sequence) and not isinstance(parts, bytes) and len(parts) <= MAX_LEVELS + 1:
        is_number = all(isinstance(part, Real | str) and not isinstance(part, bool) for part in parts)
        with contextlib.suppress(ValueError, OverflowError):
            levels = tuple(map(float, parts if is_number else ()))
    levels = levels[:-1] if levels[-1:] == (0,) else levels
    bounds = zip(levels, (*levels[1:], 0), strict=True)
    if not (0 < len(levels) <= MAX_LEVELS and levels[0] <= most and all(level > after for level, after in bounds)):
        raise ConfigError(
            f"{name} must be up to {MAX_LEVELS} numbers that descend, from at most {most:g} to above 0 or to a last 0, "
            f"got {reprlib.repr(value)}"
        )
    return levels


def weighted_files(name: str, value: Any) -> tuple[tuple[str, float], ...] | None:
    """Files and strengths, out of one or several paths, texts `FILE:STRENGTH`, or pairs. Raises ConfigError."""
    if value is None or value == ():
        return None
    is_pair = isinstance(value, Sequence) and len(value) == 2 and isinstance(value[1], Real)
    given = [value] if is_pair or isinstance(value, str | os.PathLike) else value
    if not isinstance(given, Sequence):
        raise ConfigError(f"{name} must be FILE, FILE:STRENGTH or a list of them, got {reprlib.repr(value)}")
    return tuple(_weighted_file(name, entry) for entry in given)


def _weighted_file(name: str, entry: Any) -> tuple[str, float]:
    path, strength = entry, 1.0
    if isinstance(entry, str):
        before, _, behind = entry.rpartition(":")
        try:
            path, strength = (before, float(behind)) if before else (entry, 1.0)
        except ValueError:  # a colon of the path's own
            path = "" if not behind else entry
    elif isinstance(entry, Sequence) and len(entry) == 2:
        path, strength = entry
    is_number = isinstance(strength, Real) and not isinstance(strength, bool) and abs(strength) <= sys.float_info.max
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or not is_number:
        raise ConfigError(f"{name} must be FILE or FILE:STRENGTH with a finite strength, got {reprlib.repr(entry)}")
    return os.fspath(path), float(strength)


class Checked:
    """Of a record: what is no value of an option is refused, by ConfigError, before anything is done with it."""

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, option.name)
            if kind_of(option) is object or (value is None and option.default is None):
                continue
            if kind_of(option) is tuple:
                object.__setattr__(self, option.name, descending(option.name, value, option.metadata["most"]))
                continue
            if not is_wanted(option, value):
                raise ConfigError(f"{option.name} must be {wanted(option)}, got {reprlib.repr(value)}")
            if (most := option.metadata["most"]) is not None and value > most:
                unit = f" ({option.metadata['unit']})" if option.metadata["unit"] else ""
                raise ConfigError(f"{option.name} must be at most {most}{unit}, got {reprlib.repr(value)}")
            if kind_of(option) is float:
                object.__setattr__(self, option.name, float(value))
