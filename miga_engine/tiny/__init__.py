"""The embedded model: its world of captioned scenes, its training recipe, its weights and its measures."""

from pathlib import Path

WEIGHTS_DIR = Path(__file__).parent / "weights"
"""Folder in the official Wan layout that holds the shipped weights."""

__all__ = ["WEIGHTS_DIR"]
