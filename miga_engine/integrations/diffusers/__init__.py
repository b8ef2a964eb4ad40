"""The host diffusers: `MigaPipeline`, and this folder as a custom pipeline. Loaded when it is first used."""

from typing import Any

__all__ = ["MigaPipeline"]


def __getattr__(name: str) -> Any:
    if name != "MigaPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from miga_engine.integrations.diffusers.pipeline import MigaPipeline

    return MigaPipeline
