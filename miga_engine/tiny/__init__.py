"""The embedded model: its world of captioned scenes, the words for it, its weights, and a classifier that reads it."""

from pathlib import Path

WEIGHTS_DIR = Path(__file__).parent / "weights"
"""Folder in the official Wan layout that holds the shipped weights."""

__all__ = ["WEIGHTS_DIR"]
