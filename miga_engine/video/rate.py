"""Frame rates as people write them."""

from contextlib import suppress
from fractions import Fraction

from miga_engine.errors import ConfigError

_LARGEST_DENOMINATOR = 1_001_000  # as FFmpeg reads a rate: 23.976023976 is 24000/1001, and 29.97 is 2997/100


def frame_rate(fps: object) -> Fraction:
    """Frames per second from 0.001 to 1000: a number, or text such as "29.97" or "24000/1001"; else ConfigError."""
    rate = Fraction(0)
    if isinstance(fps, int | float | str | Fraction) and not isinstance(fps, bool) and len(str(fps)) <= 64:
        with suppress(ValueError, ArithmeticError):
            rate = Fraction(fps).limit_denominator(_LARGEST_DENOMINATOR)
    if not Fraction(1, 1000) <= rate <= 1000:
        raise ConfigError(
            f"fps must be frames per second from 0.001 to 1000, as 24, 29.97 or 24000/1001, got {str(fps)[:80]!r}"
        )
    return rate


def rate_text(rate: Fraction) -> int | str:
    """A rate for JSON, exact: 24, or "24000/1001"."""
    return rate.numerator if rate.denominator == 1 else str(rate)
