"""Frame rates as people write them."""

import re
import reprlib
from contextlib import suppress
from fractions import Fraction
from typing import Any

from miga_engine.errors import ConfigError

_LARGEST_DENOMINATOR = 1_001_000  # as FFmpeg reads a rate: 23.976023976 is 24000/1001, and 29.97 is 2997/100

_TEXT = re.compile(r"[0-9]{1,20}(\.[0-9]{0,20}|/[0-9]{1,20})?")


def frame_rate(fps: Any) -> Fraction:
    """Frames per second from 0.001 to 1000: a number, or text such as "29.97" or "24000/1001"; else ConfigError."""
    rate = Fraction(0)
    is_number = isinstance(fps, int | float | Fraction) and not isinstance(fps, bool)
    if is_number or (isinstance(fps, str) and _TEXT.fullmatch(fps)):  # of 1e999999999 all digits would be worked out
        with suppress(ValueError, ArithmeticError):
            rate = Fraction(fps).limit_denominator(_LARGEST_DENOMINATOR)
    if not Fraction(1, 1000) <= rate <= 1000:
        raise ConfigError(
            f"fps must be frames per second from 0.001 to 1000, as 24, 29.97 or 24000/1001, got {reprlib.repr(fps)}"
        )
    return rate


def rate_text(rate: Fraction) -> int | str:
    """A rate for JSON, exact: 24, or "24000/1001"."""
    return rate.numerator if rate.denominator == 1 else str(rate)
