"""Option records ⇄ Python signatures, flags, YAML and JSON, host forms, documentation: what follows from `config`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import re
import reprlib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from miga_engine.config import LoadOptions, MigaConfig, StreamOptions
from miga_engine.errors import ConfigError
from miga_engine.fields import is_wanted, kind_of, wanted
from miga_engine.presets import PRESETS
from miga_engine.request import Request

Record = type[Any]
"""One of the dataclasses of `config`, or of a host's own that are written alike."""

P = ParamSpec("P")
Given = TypeVar("Given")
Owner = TypeVar("Owner")
Result = TypeVar("Result")

TITLES: Mapping[Record, str] = {
    LoadOptions: "model",
    Request: "video",
    MigaConfig: "method",
    StreamOptions: "output",
}
"""The records of every host, and the heading of their options where a field names none."""

_HEADINGS = ("model", "video", "sampling", "method", "output")


class Option(NamedTuple):
    """An option as a host shows it; `default` None where it follows from something else, which `shown` names."""

    name: str
    group: str
    kind: str
    """true or false, whole number, number, or text."""
    default: Any
    shown: str
    help: str
    unit: str
    least: float | None
    most: float | None
    choices: tuple[str, ...]


def fields(record: Record) -> dict[str, dataclasses.Field[Any]]:
    """The options of a record that hosts other than Python can give, by name."""
    return {option.name: option for option in dataclasses.fields(record) if option.metadata["is_hosted"]}


def form(records: Iterable[Record] | None = None) -> list[Option]:
    """What a host asks its user for beside the prompt, in order; by default of all of `TITLES`."""
    kinds = {bool: "true or false", int: "whole number", float: "number", str: "text", tuple: "text", object: "text"}
    shown = []
    for record in TITLES if records is None else records:
        for option in fields(record).values():
            metadata, kind = option.metadata, kind_of(option)
            is_number = kind in (int, float)
            shown.append(
                Option(
                    option.name, metadata["group"] or TITLES.get(record, "output"), kinds[kind], option.default,
                    _default(option), metadata["help"], metadata["unit"], metadata["least"] if is_number else None,
                    metadata["most"] if is_number else None, _choices(option),
                )
            )  # fmt: skip
    return shown


def _choices(option: dataclasses.Field[Any]) -> tuple[str, ...]:
    return tuple(PRESETS) if option.name == "preset" else option.metadata["choices"]


def _default(option: dataclasses.Field[Any]) -> str:
    if option.metadata["shown"]:
        return str(option.metadata["shown"])
    if option.default is None or option.default is dataclasses.MISSING:
        return "that of the preset" if "FromPreset" in str(option.type) else ""
    return {True: "on", False: "off"}[option.default] if isinstance(option.default, bool) else str(option.default)


# Python ----------------------------------------------------------------------------------------------------------


def takes(record: Callable[P, Given]) -> Callable[
    [Callable[[Owner, Given], Result]], Callable[Concatenate[Owner, P], Result]
]:  # fmt: skip
    """A method of one record becomes one of the record's options, which editors complete and `help` names."""

    def decorate(method: Callable[[Owner, Given], Result]) -> Callable[Concatenate[Owner, P], Result]:
        @functools.wraps(method)
        def call(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Result:
            try:
                given = record(*args, **kwargs)
            except TypeError as error:
                raise TypeError(str(error).replace(f"{record.__qualname__}.__init__", method.__qualname__)) from None
            return method(self, given)

        described = sorted(dataclasses.fields(record), key=_place)  # type: ignore[arg-type]
        of_record = inspect.signature(record).parameters
        parameters = sorted((of_record[option.name] for option in described), key=lambda p: p.kind)
        owner = next(iter(inspect.signature(method).parameters.values())).replace(annotation=inspect.Parameter.empty)
        plain = [p.replace(annotation=re.sub(r"FromPreset\[(.*)\]$", r"\1 | None", p.annotation)) for p in parameters]
        returned = inspect.signature(method).return_annotation
        call.__signature__ = inspect.Signature([owner, *plain], return_annotation=returned)  # type: ignore[attr-defined]
        lines = (f"{option.name}: {_sentence(option)}" for option in described)
        wrapped = (textwrap.fill(line, 116, initial_indent=" " * 4, subsequent_indent=" " * 8) for line in lines)
        call.__doc__ = f"{inspect.getdoc(method)}\n\nOptions:\n" + "\n".join(wrapped)
        return call

    return decorate


def _place(option: dataclasses.Field[Any]) -> tuple[bool, int]:
    """In the order in which signatures and descriptions name options: the video, how it is made, how it is given."""
    group = option.metadata["group"]
    return bool(option.kw_only), _HEADINGS.index(group) if group in _HEADINGS else 0


def _sentence(option: dataclasses.Field[Any]) -> str:
    default = _default(option)
    return option.metadata["help"] + (f" (default: {default})" if default else "")


def part(given: Any, record: Callable[..., Given]) -> Given:
    """The options of a record out of one that has more."""
    return record(**{option.name: getattr(given, option.name) for option in dataclasses.fields(record)})  # type: ignore[arg-type]


def with_default(record: Record, name: str, default: Any) -> Any:
    """A field of another record, to be declared with another default."""
    return dataclasses.field(default=default, metadata={**record.__dataclass_fields__[name].metadata, "shown": ""})


# Flags -----------------------------------------------------------------------------------------------------------


def add_flags(
    parser: argparse.ArgumentParser,
    record: Record,
    names: Iterable[str] | None = None,
    help: Mapping[str, str] = {},
) -> None:
    """The options of a record as flags under their headings; `names` for some of them, `help` where it differs.

    The parser is to suppress defaults, so that what was not given is left to the record.
    """
    groups = {group.title: group for group in parser._action_groups}
    for option in sorted(fields(record).values(), key=lambda option: _place(option)[1]):
        name = option.name
        if names is not None and name not in names:
            continue
        title = option.metadata["group"] or TITLES.get(record, "output")
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        flags = (*option.metadata["flags"], "--" + name.replace("_", "-"))
        is_plain = _is_switch(option) or (record is MigaConfig and not option.metadata["shown"])  # the preset's default
        said = option.metadata["help"] if is_plain else _sentence(option)
        group.add_argument(*flags, **_flag(option, help.get(name, said)))


def _is_switch(option: dataclasses.Field[Any]) -> bool:
    """Off unless it is there, as `-y`."""
    return option.default is False and bool(option.metadata["flags"])


def _flag(option: dataclasses.Field[Any], help: str) -> dict[str, Any]:
    keywords: dict[str, Any] = {"help": help.replace("%", "%%")}
    kind, choices = kind_of(option), _choices(option)
    if kind is bool:
        return keywords | {"action": "store_true" if _is_switch(option) else argparse.BooleanOptionalAction}
    if choices:
        return keywords | {"choices": choices}
    if kind is int or kind is float:
        keywords["type"] = kind
    if option.metadata["is_repeated"]:
        keywords["action"] = "append"
    return keywords | {"metavar": option.metadata["metavar"] or "N"}


# YAML and JSON ---------------------------------------------------------------------------------------------------


def picked(settings: Mapping[str, Any], record: Record) -> dict[str, Any]:
    """Those of the settings that are options of the record."""
    return {name: settings[name] for name in fields(record) if name in settings}


def plain(records: Iterable[Record], *kinds: type) -> list[str]:
    """Names of the options that are texts, choices or switches, or of these kinds."""
    options = {name: option for record in records for name, option in fields(record).items()}
    return [name for name, option in options.items() if kind_of(option) in (kinds or (bool, str))]


def check_kinds(
    settings: Mapping[str, Any], records: Iterable[Record], refusal: Callable[[str, Any, str], str]
) -> None:
    """Texts, choices and switches of a file must be such; numbers are checked by the record that they go into.

    ConfigError with refusal(name, value, what it must be).
    """
    for record in records:
        for name in plain([record]):
            value, option = settings.get(name), record.__dataclass_fields__[name]
            if value is not None and not is_wanted(option, value):
                raise ConfigError(refusal(name, reprlib.repr(value), wanted(option)))


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `json.loads` makes it with this `object_pairs_hook`; ValueError where a name repeats."""
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"{reprlib.repr(max(names, key=names.count))} is there twice")
    return dict(pairs)


def as_recorded(model: Mapping[str, Any]) -> dict[str, Any]:
    """The options of loading that a session's record of its model holds; a text that is empty stands for None."""
    names = [option.name for option in dataclasses.fields(LoadOptions) if option.metadata["is_recorded"]]
    defaults = LoadOptions()
    found = {name: model.get(name, getattr(defaults, name)) for name in names}  # a file may be a stranger's
    return {name: None if value == "" else value for name, value in found.items()}


# Documentation ---------------------------------------------------------------------------------------------------


def markdown() -> str:
    """docs/options.md: `make options` writes it."""
    lines = [
        "# Options",
        "",
        "Made from `miga_engine/config.py` by `make options`. The names are those of `Engine.from_pretrained`,",
        "`Engine.generate` and `Engine.stream`, of a YAML file, and of the C interface; with hyphens they are flags of",
        "`miga generate`. Those of the method are fields of `MigaConfig`; each preset has its own values for them.",
    ]
    for title, options in _by_group():
        lines += ["", f"## Of the {title}", "", "| option | value | default | what it says |", "|---|---|---|---|"]
        lines += [f"| `{option.name}` | {_value(option)} | {option.shown} | {option.help} |" for option in options]
    return "\n".join(lines) + "\n"


def c_comment() -> str:
    """The list of options in miga_engine/embed/miga_embed.h."""
    headings = {
        Request: "Of the video: prompt, ",
        MigaConfig: "Of the method, in an object of the name miga: ",
        LoadOptions: "Of the model: ",
        StreamOptions: "Of the stream: ",
    }
    texts = [
        heading + ", ".join(fields(record)).replace("model, ", "", 1) + "." for record, heading in headings.items()
    ]
    return "\n".join(textwrap.fill(text, 119, initial_indent=" *   ", subsequent_indent=" *     ") for text in texts)


def _by_group() -> Iterator[tuple[str, list[Option]]]:
    options = form()
    for title in _HEADINGS:
        yield title, [option for option in options if option.group == title]


def _value(option: Option) -> str:
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    bounds = "" if option.least is None else f" from {option.least:,}"
    bounds += "" if option.most is None else f" to {option.most:,}"
    return f"{option.kind}{bounds}{f' ({option.unit})' if option.unit else ''}"


if __name__ == "__main__":
    print(markdown(), end="")
