"""Frames to files and back: sinks, reading, contact sheets."""
