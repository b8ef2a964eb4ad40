"""PNG files through PyAV, so that the core needs no imaging library."""

import os
import struct
import zlib
from fractions import Fraction
from typing import Any

import numpy as np

from miga_engine.files import write_whole
from miga_engine.video.pyav import require_av

_KEYWORD = b"miga_engine"
_HEADER_BYTES = 33  # the signature and the chunk IHDR, behind which a picture says whose it is


def write_png(path: str | os.PathLike[str], image: "np.ndarray[Any, Any]") -> None:
    """Write uint8 [H,W,3]; the file appears complete or not at all."""
    write_whole(path, encode_png(image))


def encode_png(image: "np.ndarray[Any, Any]", identity: str | None = None) -> bytes:
    """The bytes of a PNG file of uint8 [H,W,3], with a text chunk that names the run it is of."""
    av = require_av("write a picture")
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt = "rgb24"
    encoder.time_base = Fraction(1)
    encoder.thread_count = 1
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    data = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    return data if identity is None else data[:_HEADER_BYTES] + _text_chunk(identity) + data[_HEADER_BYTES:]


def has_identity(data: bytes, identity: str | None) -> bool:
    """Whether the bytes of a PNG file name this run."""
    return identity is not None and data[_HEADER_BYTES:].startswith(_text_chunk(identity))


def _text_chunk(text: str) -> bytes:
    body = b"tEXt" + _KEYWORD + b"\0" + text.encode("ascii")
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
