"""What an option is: a field of a frozen record that carries its description and refuses what is no value of it."""

from __future__ import annotations

import dataclasses
import re
import reprlib
import sys
from dataclasses import field
from typing import Any, TypeAlias, TypeVar, Union

from miga_engine.errors import ConfigError

T = TypeVar("T")

FromPreset: TypeAlias = Union[T, Any]  # noqa: UP007 - an alias with a variable
"""None asks for the preset's value; a resolved record has it."""

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
) -> Any:
    """A field that carries its description and the values it may take.

    Args:
        default: None where it follows from something else, which `shown` names; MISSING where it must be given.
        least, most: bounds of a number; `least` None for none.
        kind: bool, int, float or str; by default the first of them in the field's annotation; object where a value is
            checked by whoever uses it, and hosts give a text.
        group: heading under which help texts show it, where not that of its record.
        flags, metavar: further names and the placeholder on the command line.
        phrase: what a value must be, where that does not follow from the rest.
        is_hosted: hosts other than Python can give it.
        is_recorded: session files hold it.
    """
    return field(default=default, metadata={name: value for name, value in locals().items() if name != "default"})


def kind_of(option: dataclasses.Field[Any]) -> type:
    """bool, int, float, str, or object: see `option`."""
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


class Checked:
    """Of a record: what is no value of an option is refused, by ConfigError, before anything is done with it."""

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, option.name)
            if kind_of(option) is object or (value is None and option.default is None):
                continue
            if not is_wanted(option, value):
                raise ConfigError(f"{option.name} must be {wanted(option)}, got {reprlib.repr(value)}")
            if (most := option.metadata["most"]) is not None and value > most:
                unit = f" ({option.metadata['unit']})" if option.metadata["unit"] else ""
                raise ConfigError(f"{option.name} must be at most {most}{unit}, got {reprlib.repr(value)}")
            if kind_of(option) is float:
                object.__setattr__(self, option.name, float(value))
