"""What nodes ask for, made of the option table, and what they were given, made options again. Knows no host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from miga_engine.config import MigaConfig
from miga_engine.fields import kind_of
from miga_engine.options import Option, Record, fields, form

UNSET = "default"
"""What a choice or a file says that is left to the preset or the model."""

PICTURES = {"image": "IMAGE", "video": "IMAGE"}
"""Options that name a file elsewhere and are a socket here."""

FOLDERS = {
    "transformer": ("diffusion_models", "unet_gguf"),
    "transformer_2": ("diffusion_models", "unet_gguf"),
    "vae": ("vae", "vae_approx"),
    "text_encoder": ("text_encoders", "clip_gguf"),
}
"""Options that name a file of weights: the host's lists that it may be in."""

SOCKETS = {"lora": "MIGA_LORA"}
"""Options that another node gives."""

_SIGNED = -1e9  # below every number of an option that has no bound
_MOST_INT, _MOST_FLOAT = 2**64 - 1, 1e9


class Input(NamedTuple):
    """An input of a node: `kind` is a socket's type, or INT, FLOAT, STRING, BOOLEAN or COMBO.

    `unset` is the value that leaves the option to the engine; `folders` are lists of files, for a COMBO.
    """

    name: str
    kind: str
    default: Any = None
    help: str = ""
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    unset: Any = None
    is_optional: bool = False
    is_advanced: bool = False
    is_multiline: bool = False
    is_seed: bool = False


def inputs_of(record: Record, basic: Iterable[str] = (), without: Iterable[str] = ()) -> list[Input]:
    """An input for each option of a record that hosts can give; those not of `basic` are folded away at first."""
    basic, without = set(basic), set(without)
    shown = [option for option in form([record]) if option.name not in without]
    presets = {name for name, option in fields(record).items() if "FromPreset" in str(option.type)}
    return [
        _input(option, option.name in presets or issubclass(record, MigaConfig))._replace(
            is_advanced=option.name not in basic
        )
        for option in shown
    ]


def _input(option: Option, is_of_preset: bool) -> Input:
    """How an option is asked for. What it is left at means: as the preset, or the model, has it."""
    name, is_open = option.name, is_of_preset or option.default is None
    default = f" ({UNSET}: {option.shown or 'that of the preset'})" if is_open else ""
    unit = f", {option.unit}" if option.unit else ""
    made = Input(name, "STRING", help=option.help + unit + default, is_optional=True)
    if name in SOCKETS or name in PICTURES:
        return made._replace(kind=SOCKETS.get(name) or PICTURES[name], help=option.help)
    if name in FOLDERS:
        return made._replace(kind="COMBO", folders=FOLDERS[name], default=UNSET, unset=UNSET)
    if option.choices or option.kind == "true or false":
        choices = option.choices or ("on", "off")
        if is_open:
            return made._replace(kind="COMBO", choices=(UNSET, *choices), default=UNSET, unset=UNSET)
        if not option.choices:
            return made._replace(kind="BOOLEAN", default=option.default)
        return made._replace(kind="COMBO", choices=choices, default=option.default)
    if option.kind == "text":
        return made._replace(default="" if is_open else str(option.default), unset="" if is_open else None)
    is_whole = option.kind == "whole number"
    number = int if is_whole else float
    most = option.most if option.most is not None else _MOST_INT if is_whole else _MOST_FLOAT
    if not is_open:
        bounds = {"least": option.least, "most": most, "default": option.default}
        return made._replace(kind="INT" if is_whole else "FLOAT", is_seed=name == "seed", **bounds)
    # One below the least value says that there is none; where every number is a value, one that nobody gives.
    below = number(_SIGNED if option.least is None else option.least - 1)
    words = f" ({below:g}: {option.shown or 'that of the preset'})"
    made = made._replace(help=option.help + unit + words, least=below, most=most, default=below, unset=below)
    return made._replace(kind="INT" if is_whole else "FLOAT")


def taken(given: Mapping[str, Any], inputs: Iterable[Input]) -> dict[str, Any]:
    """The options that a node was given a value for, as the engine takes them."""
    options: dict[str, Any] = {}
    for asked in inputs:
        value = given.get(asked.name)
        if value is None or (asked.unset is not None and value == asked.unset):
            continue
        is_switch = asked.kind == "COMBO" and asked.choices[-2:] == ("on", "off")
        options[asked.name] = value in ("on", True) if is_switch else value
    return options


def whole(record: Record, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their kinds: a host's numbers may be floats without a fraction, as 8.0 for 8."""
    kinds = {option.name: kind_of(option) for option in dataclasses.fields(record)}
    return {
        name: int(value) if kinds.get(name) is int and isinstance(value, float) and value.is_integer() else value
        for name, value in options.items()
    }
