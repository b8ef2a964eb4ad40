"""The words for the world's attributes, and what a prompt in such words names."""

from __future__ import annotations

import re

from miga_engine.tiny import world

SUBJECT_WORDS: dict[str, tuple[str, ...]] = {
    "balloon": ("balloon", "hot air balloon"),
    "kite": ("kite",),
    "bird": ("bird", "gull"),
    "plane": ("plane", "airplane", "aeroplane"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {"red": ("red", "crimson"), "yellow": ("yellow", "golden")}
TERRAIN_WORDS: dict[str, tuple[str, ...]] = {
    "green": ("green hills", "grassy hills", "green meadows"),
    "snowy": ("snowy hills", "snow covered hills", "snowy mountains", "snow"),
    "desert": ("desert hills", "a desert", "the desert", "sand dunes", "desert dunes"),
    "dark": ("dark hills", "dark mountains", "black hills"),
}
TIME_WORDS: dict[str, tuple[str, ...]] = {
    "dawn": ("at dawn", "at sunrise", "in the morning"),
    "noon": ("at noon", "at midday", "by day"),
    "dusk": ("at dusk", "at sunset", "in the evening"),
    "night": ("at night", "at midnight", "in the moonlight"),
}


def read_prompt(prompt: str) -> dict[str, str]:
    """The attributes (subject, colour, terrain, time) that a prompt in the world's wordings names."""
    rest = f" {prompt.lower()} "
    found = {}
    tables = {
        "time": TIME_WORDS,
        "terrain": TERRAIN_WORDS,
        "subject": SUBJECT_WORDS,
        "colour": {c: COLOUR_WORDS.get(c, (c,)) for c in world.COLOURS},
    }
    for attribute, words in tables.items():  # "green hills" is taken out before a colour is looked for
        phrases = sorted(((p, value) for value, ps in words.items() for p in ps), key=lambda entry: -len(entry[0]))
        for phrase, value in phrases:
            pattern = rf"\b{re.escape(phrase)}\b"
            if re.search(pattern, rest):
                found[attribute] = value
                rest = re.sub(pattern, " ", rest)
                break
    return found
