"""The command `miga`: its options, what it prints, the files it writes."""

from miga_engine.cli.main import main

__all__ = ["main"]
