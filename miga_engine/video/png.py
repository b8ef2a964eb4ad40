"""PNG files through PyAV, so that the core needs no imaging library."""

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from miga_engine.video.pyav import require_av


def write_png(path: str | os.PathLike[str], image: "np.ndarray[Any, Any]") -> None:
    """Write uint8 [H,W,3]; the file appears complete or not at all."""
    av = require_av(f"write {path}")
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt = "rgb24"
    encoder.time_base = Fraction(1)
    encoder.thread_count = 1
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    data = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    partial = Path(f"{os.fspath(path)}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
