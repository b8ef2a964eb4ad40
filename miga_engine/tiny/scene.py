"""The scenes of the embedded world in data and in words: what they are made of, and how they are told."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

SUBJECTS = ("balloon", "kite", "bird", "plane")
COLOURS = ("red", "yellow", "blue", "white", "green")
TERRAINS = ("green", "snowy", "desert", "dark")
TIMES = ("dawn", "noon", "dusk", "night")
PATTERNS = ("plain", "striped", "spotted", "banded")
LANDS = ("bare", "trees", "houses", "river")
SKIES = ("clear", "clouds", "birds")
SIDES = ("left", "right")
PACES = ("slow", "fast")
COVERS = ("clouds", "hills")
FACTORS: dict[str, tuple[str, ...]] = {
    "subject": SUBJECTS,
    "colour": COLOURS,
    "terrain": TERRAINS,
    "time": TIMES,
    "pattern": PATTERNS,
    "land": LANDS,
    "sky": SKIES,
    "side": ("", *SIDES),
    "pace": ("", *PACES),
    "behind": ("", *COVERS),
}
"""What a caption of the rich world may name or leave open: fields of a scene and their values, empty for none."""

COLOUR_RGB = {
    "red": (0.90, 0.12, 0.12),
    "yellow": (1.00, 0.83, 0.08),
    "blue": (0.12, 0.24, 0.88),
    "white": (0.97, 0.97, 0.97),
    "green": (0.10, 0.72, 0.25),
}
TERRAIN_RGB = {
    "green": (0.27, 0.60, 0.20),
    "snowy": (0.90, 0.94, 0.98),
    "desert": (0.87, 0.67, 0.36),
    "dark": (0.19, 0.21, 0.27),
}
_TERRAIN_PHRASE = {
    "green": "green hills",
    "snowy": "snowy hills",
    "desert": "desert hills",
    "dark": "dark hills",
}
# zenith, horizon, sun or moon, light on the land, light on the subject
TIME_RGB = {
    "dawn": ((0.50, 0.60, 0.90), (0.99, 0.80, 0.72), (1.00, 0.86, 0.58), (0.96, 0.86, 0.84), 1.00),
    "noon": ((0.27, 0.58, 0.95), (0.70, 0.88, 0.99), (1.00, 0.98, 0.80), (1.00, 1.00, 1.00), 1.00),
    "dusk": ((0.28, 0.17, 0.42), (0.90, 0.50, 0.38), (1.00, 0.60, 0.25), (0.80, 0.60, 0.55), 0.95),
    "night": ((0.02, 0.03, 0.10), (0.10, 0.14, 0.32), (0.90, 0.90, 0.84), (0.36, 0.40, 0.52), 0.85),
}
# of the far, middle and near layer: height of its mean, amplitude, wavelength, pixels a frame, share of haze
LAYERS = (
    (40.5, 2.6, 46.0, 0.12, 0.58),
    (47.5, 2.6, 38.0, 0.28, 0.30),
    (55.0, 2.4, 34.0, 0.60, 0.00),
)


@dataclass(frozen=True)
class Scene:
    """One scene: its attributes, and the seed that draws its layout and motion.

    The first four are those of the plain world. The rest makes it richer: a pattern on the subject, what is on the near
    hills, what is in the sky, the side of the sun, how fast the land goes by (both by the seed where empty), a ring of
    five landmarks in an order that the seed draws, which comes by again and again, and what the subject disappears
    behind from time to time, for 16 to 192 frames.
    """

    subject: str
    colour: str
    terrain: str
    time: str
    seed: int = 0
    pattern: str = "plain"
    land: str = "bare"
    sky: str = "clear"
    side: str = ""
    pace: str = ""
    ring: bool = False
    behind: str = ""

    def __post_init__(self) -> None:
        for name, known in FACTORS.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}: choose {', '.join(v for v in known if v)}")

    @property
    def labels(self) -> tuple[int, int, int, int]:
        """Indices of subject, colour, terrain and time in the world's tuples."""
        return (
            SUBJECTS.index(self.subject),
            COLOURS.index(self.colour),
            TERRAINS.index(self.terrain),
            TIMES.index(self.time),
        )


def caption(scene: Scene) -> str:
    """The scene in words, such as `a red balloon over snowy hills at dawn`."""
    return f"a {scene.colour} {scene.subject} over {_TERRAIN_PHRASE[scene.terrain]} at {scene.time}"


def all_captions() -> list[str]:
    """The captions of every combination of attributes, in a fixed order."""
    return [caption(Scene(s, c, te, ti)) for s in SUBJECTS for c in COLOURS for te in TERRAINS for ti in TIMES]


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn uniformly over attributes and layouts."""
    return Scene(
        SUBJECTS[rng.integers(len(SUBJECTS))],
        COLOURS[rng.integers(len(COLOURS))],
        TERRAINS[rng.integers(len(TERRAINS))],
        TIMES[rng.integers(len(TIMES))],
        int(rng.integers(2**31)),
    )


def rich_caption(scene: Scene, named: Collection[str] = tuple(FACTORS)) -> str:
    """The scene in words that tell the named factors alone, such as `a striped kite over hills with trees at dusk`."""

    def told(name: str, words: str, otherwise: str = "") -> str:
        return words if name in named else otherwise

    hills = f"{scene.terrain} hills" if "terrain" in named else "hills"
    land = {"bare": "bare land", "trees": "trees", "houses": "houses", "river": "a river"}[scene.land]
    sky = {"clear": "a clear sky", "clouds": "clouds", "birds": "birds"}[scene.sky]
    parts = [
        "a",
        told("pattern", scene.pattern),
        told("colour", scene.colour),
        told("subject", scene.subject, "thing"),
        f"over {hills}",
        told("land", f"with {land}"),
        told("sky", f"under {sky}"),
        told("time", f"at {scene.time}"),
        told("side", f"sun on the {scene.side}") if scene.side else "",
        told("pace", f"{scene.pace} flight") if scene.pace else "",
        told("behind", f"behind {scene.behind}") if scene.behind else "",
    ]
    return " ".join(p for p in parts if p)


def sample_rich_scene(rng: np.random.Generator) -> Scene:
    """A scene of the rich world, drawn uniformly; two in three disappear from time to time, half have the ring."""

    def pick(values: tuple[str, ...]) -> str:
        return values[int(rng.integers(len(values)))]

    return Scene(
        pick(SUBJECTS), pick(COLOURS), pick(TERRAINS), pick(TIMES), int(rng.integers(2**31)), pick(PATTERNS),
        pick(LANDS), pick(SKIES), pick(SIDES), pick(PACES), bool(rng.random() < 0.5), pick(("", *COVERS)),
    )  # fmt: skip
