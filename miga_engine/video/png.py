"""PNG files by zlib alone, so that the core needs no imaging library."""

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

_PAETH = 4
_TRUE_COLOUR_8_BIT = (8, 2, 0, 0, 0)  # bits, colour type, compression, filter and interlace methods


def write_png(path: str | os.PathLike[str], image: "np.ndarray[Any, Any]") -> None:
    """Write uint8 [H,W,3]; the file appears complete or not at all."""
    height, width = image.shape[:2]
    data = b"\x89PNG\r\n\x1a\n" + b"".join([
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *_TRUE_COLOUR_8_BIT)),
        _chunk(b"IDAT", zlib.compress(_filtered(image), 6)),
        _chunk(b"IEND", b""),
    ])  # fmt: skip
    partial = Path(f"{os.fspath(path)}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _filtered(image: "np.ndarray[Any, Any]") -> bytes:
    """Every row after its filter's number, as differences from Paeth's predictor (PNG, section 9.4)."""
    height, width = image.shape[:2]
    padded = np.zeros((height + 1, width + 1, 3), np.int16)
    padded[1:, 1:] = image
    left, above, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    to_left, to_above = np.abs(above - corner), np.abs(left - corner)  # |left + above − corner − left|, and so on
    to_corner = np.abs(left + above - 2 * corner)
    is_left = (to_left <= to_above) & (to_left <= to_corner)
    predicted = np.where(is_left, left, np.where(to_above <= to_corner, above, corner))
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = _PAETH
    rows[:, 1:] = (padded[1:, 1:] - predicted).astype(np.uint8).reshape(height, -1)
    return rows.tobytes()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
