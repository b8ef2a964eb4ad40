"""What luma is made of, named once."""

LUMA = (0.2126, 0.7152, 0.0722)
"""Shares of red, green and blue: ITU-R BT.709, which videos are written in."""
