"""Measures of a video: `measure(frames, fps=...)`, the `miga eval` command, export to other benchmarks."""

from typing import Any

__all__ = ["measure", "measure_tiny"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from miga_engine.measure import measures

    return getattr(measures, name)
