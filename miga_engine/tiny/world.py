"""A world of procedural, captioned, endless scenes whose ground truth is known.

A scene is a subject with a colour, floating over three scrolling layers of hills under a sky with a sun or a moon; the
rich world adds patterns, trees, houses, a river, clouds, birds, landmarks, and what the subject disappears behind.
`scene` holds data and words, `rendering` draws, and this is all of it under one name.
"""

from __future__ import annotations

from miga_engine.tiny.rendering import away, render, render_frames, render_tensors, ring_of
from miga_engine.tiny.scene import (
    COLOUR_RGB,
    COLOURS,
    COVERS,
    FACTORS,
    LANDS,
    PACES,
    PATTERNS,
    SIDES,
    SKIES,
    SUBJECTS,
    TERRAINS,
    TIME_RGB,
    TIMES,
    Scene,
    all_captions,
    caption,
    rich_caption,
    sample_rich_scene,
    sample_scene,
)

__all__ = [
    "COLOURS",
    "COLOUR_RGB",
    "COVERS",
    "FACTORS",
    "LANDS",
    "PACES",
    "PATTERNS",
    "SIDES",
    "SKIES",
    "SUBJECTS",
    "TERRAINS",
    "TIMES",
    "TIME_RGB",
    "Scene",
    "all_captions",
    "away",
    "caption",
    "render",
    "render_frames",
    "render_tensors",
    "rich_caption",
    "ring_of",
    "sample_rich_scene",
    "sample_scene",
]
