"""How often what a prompt asks for is lost: losses an amount of frames, with an interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

LASTING_FRAMES = 4
"""Frames in a row that make something shown or lost; a frame alone may be misread."""

_TAIL = 0.025  # on either side of a 95 % interval


def losses(shown: npt.NDArray[np.float64], starts: Sequence[int] = (0,)) -> tuple[int, int]:
    """How often something was lost, and in how many frames it was there to be lost, by whether each frame shows it [T].

    It is there once 4 frames in a row show it, and lost once 4 in a row do not; it may come back and be lost again.
    What was never there cannot be lost. `starts`: the first frames of prompts, at each of which the count begins anew.
    """
    num_losses, num_frames = 0, 0
    is_shown = np.asarray(shown) > 0.5
    for piece in np.split(is_shown, [start for start in starts if 0 < start < len(is_shown)]):
        is_there = False
        for same in np.split(piece, np.flatnonzero(np.diff(piece)) + 1):
            if len(same) >= LASTING_FRAMES:
                num_losses += is_there and not same[0]
                is_there = bool(same[0])
            num_frames += is_there * len(same)
    return num_losses, num_frames


def hazard(num_losses: int, num_frames: int) -> tuple[float, float, float]:
    """Losses per 100 frames, and both ends of its exact 95 % interval; NaN of no frames.

    The losses are taken for Poisson events of a constant rate; those of several videos may be added up, with their
    frames. Source: Garwood, Fiducial Limits for the Poisson Distribution (Biometrika 1936).
    """
    if num_frames == 0:
        return float("nan"), float("nan"), float("nan")
    low = _mean_with(num_losses, 1 - _TAIL) if num_losses else 0.0
    high = _mean_with(num_losses + 1, _TAIL)
    return 100 * num_losses / num_frames, 100 * low / num_frames, 100 * high / num_frames


def _mean_with(count: int, chance: float) -> float:
    """The mean of the Poisson distribution that gives fewer than `count` events with this chance."""
    low, high = 0.0, count + 10 * count**0.5 + 20
    for _ in range(60):
        middle = (low + high) / 2
        fewer = float(torch.special.gammaincc(torch.tensor(float(count)).double(), torch.tensor(middle).double()))
        low, high = (middle, high) if fewer > chance else (low, middle)
    return (low + high) / 2
