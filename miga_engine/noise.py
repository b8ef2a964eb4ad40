"""Counter-based Gaussian noise: Philox4x32-10 (Salmon et al. 2011) and Box–Muller.

    key     = (seed mod 2³², seed div 2³²)
    counter = (element div 4, frame mod 2³², series, purpose + 2⁸·(⌊frame/2³²⌋ mod 2²⁴))
    u_i     = (word_i + ½)·2⁻³²                                  in (0, 1)
    normals = √(−2 ln u_0)·(cos 2πu_1, sin 2πu_1), √(−2 ln u_2)·(cos 2πu_3, sin 2πu_3)

One counter yields four normals, for elements 4j … 4j+3 of a frame in row-major order. Distinct (seed, purpose, series,
frame, element) never share a counter: the noise of a frame does not depend on what else is drawn, on batch, device or
thread count. The integers are the same bits everywhere (also `tl.philox`). ln, cos, sin and √ are taken in float64 and
rounded once to float32: libraries that differ in the last bit of float64 then agree, but for one value in some 2²⁸ that
lies on a rounding boundary.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from miga_engine.device import to_device
from miga_engine.errors import ConfigError

_MASK = 0xFFFFFFFF
# Multipliers less 2³², so that products with 32-bit words stay within int64: M·x = (M − 2³²)·x + 2³²·x.
_MULTIPLIERS = (0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_PURPOSE_BITS = 8
_FRAME_LIMIT = 1 << 55
# Counters per block: on a CPU the int64 temporaries (512 KiB each) stay in cache, on a GPU they bound memory.
_BLOCK_COUNTERS_CPU = 1 << 16
_BLOCK_COUNTERS_GPU = 1 << 22


class Purpose(IntEnum):
    """What noise is for; part of the counter, so values are never renumbered. Tell further draws apart by `series`."""

    SEED_CLIP = 0
    WARMUP = 1  # re-noising of the seed clip; series: 0, or that of a queue that is grown anew
    PUSH = 2
    CANDIDATE = 3  # series: search and candidate
    REFINE = 4
    SOLVER = 5  # noise that a stochastic solver adds; series: stage and step_index
    PAST = 6  # what the unconditional branch reads in place of cleaner frames; series: step_index and position
    REFERENCE = 7  # what frames that are only read are shown with


class FrameNoise(NamedTuple):
    """Noise of n frames not drawn yet: what a kernel needs to draw it in place."""

    seed: int  # two's complement, a signed 64-bit integer
    counters: Tensor  # [n,3] int64: words 1, 2 and 3 of each frame's counters, 0 … 2³² − 1

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """`[n,*shape]` float32 on the device of the counters."""
        target = self.counters.device
        num_elements = math.prod(shape)
        counters_per_frame = -(-num_elements // 4)
        num_frames = self.counters.shape[0]
        num_counters = num_frames * counters_per_frame
        key = (self.seed & _MASK, (self.seed >> 32) & _MASK)
        block = _BLOCK_COUNTERS_CPU if target.type == "cpu" else _BLOCK_COUNTERS_GPU
        normals = torch.empty((num_counters, 4), dtype=torch.float32, device=target)
        for start in range(0, num_counters, block):
            index = torch.arange(start, min(start + block, num_counters), device=target)
            frame, series, high = self.counters[index // counters_per_frame].unbind(1)
            counter = (index % counters_per_frame, frame, series, high)
            _box_muller(philox4x32(key, counter), normals[start : start + block])
        return normals.view(num_frames, counters_per_frame * 4)[:, :num_elements].reshape(-1, *shape)


def normal(
    seed: int,
    purpose: Purpose,
    frame_numbers: Sequence[int] | Tensor,
    shape: tuple[int, ...],
    *,
    series: int | Sequence[int] | Tensor = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise `[n,*shape]` float32, one frame of `shape` per number; ranges as in `frame_noise`."""
    return frame_noise(seed, purpose, frame_numbers, series=series, device=device).draw(shape)


def frame_noise(
    seed: int,
    purpose: Purpose,
    frame_numbers: Sequence[int] | Tensor,
    *,
    series: int | Sequence[int] | Tensor = 0,
    device: torch.device | str | None = None,
) -> FrameNoise:
    """The noise of n frames by its counters, for `ops.sampler_update` to draw where it is used.

    seed: any 64-bit integer, signed or not (−1 and 2⁶⁴ − 1 are the same key); series: 0 … 2³² − 1, one for all
    frames or one a frame; frame numbers: −2⁵⁵ … 2⁵⁵ − 1 (frames before the video's first are numbered from −1 down).
    Ranges are not checked where the numbers come as a tensor on a GPU, which would wait for it.
    """
    if not -(1 << 63) <= seed < 1 << 64:
        raise ConfigError(f"seed is {seed}: give an integer of at most 64 bits")
    if not 0 <= purpose < 1 << _PURPOSE_BITS:
        raise ConfigError(f"purpose is {purpose}: give a member of Purpose")
    frames = torch.as_tensor(frame_numbers, dtype=torch.int64)
    _check_range("frame numbers", frames, -_FRAME_LIMIT, _FRAME_LIMIT - 1)
    numbers = torch.as_tensor(series, dtype=torch.int64)
    _check_range("series", numbers, 0, _MASK)
    target = torch.device(device) if device is not None else frames.device
    numbers = numbers.to(frames.device).expand(frames.shape[0])
    high = (frames >> 32 << _PURPOSE_BITS) & _MASK | int(purpose)
    signed_seed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return FrameNoise(signed_seed, to_device(torch.stack([frames & _MASK, numbers, high], dim=1), target))


class CounterNoise:
    """The noise of one video: `normal` with its seed, frame shape and device, for numbers that come as arrays."""

    def __init__(self, seed: int, shape: tuple[int, ...], device: torch.device | str) -> None:
        self.seed, self.shape, self.device = seed, shape, device

    def __call__(self, purpose: Purpose, frame_numbers: np.ndarray, *, series: int | np.ndarray = 0) -> Tensor:
        """`[n,*shape]` float32."""
        return self.undrawn(purpose, frame_numbers, series=series).draw(self.shape)

    def undrawn(self, purpose: Purpose, frame_numbers: np.ndarray, *, series: int | np.ndarray = 0) -> FrameNoise:
        """The same by its counters."""
        frames = torch.from_numpy(frame_numbers)
        return frame_noise(self.seed, purpose, frames, series=torch.as_tensor(series), device=self.device)


def _check_range(name: str, values: Tensor, least: int, most: int) -> None:
    if values.device.type == "cpu" and values.numel():
        lowest, highest = (int(bound) for bound in values.aminmax())
        if lowest < least or highest > most:
            raise ConfigError(f"{name} run from {lowest} to {highest}: give numbers between {least} and {most}")


def philox4x32(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random 32-bit words per counter, held in int64; counter words likewise, each in 0 … 2³² − 1.

    Ten rounds of (c0, c1, c2, c3) ← (hi(M₁·c2)^c1^k0, lo(M₁·c2), hi(M₀·c0)^c3^k1, lo(M₀·c0)), the key stepping by
    Weyl constants.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1 = high1.bitwise_xor_(c1).bitwise_xor_(k0), low1
        c2, c3 = high0.bitwise_xor_(c3).bitwise_xor_(k1), low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of (multiplier + 2³²)·word, for −2³⁰ < multiplier < 0: |product| < 2⁶²."""
    product = word * multiplier
    low = product & _MASK
    return product.bitwise_right_shift_(32).add_(word), low


def _box_muller(words: tuple[Tensor, ...], out: Tensor) -> None:
    """out [N,4] float32 from four 32-bit words."""
    for column in (0, 2):
        radius = _uniform(words[column]).log_().mul_(-2).sqrt_()
        angle = _uniform(words[column + 1]).mul_(2 * math.pi)
        out[:, column] = angle.cos().mul_(radius)
        out[:, column + 1] = angle.sin_().mul_(radius)


def _uniform(word: Tensor) -> Tensor:
    """(word + ½)·2⁻³², exact in float64."""
    return word.to(torch.float64).add_(0.5).mul_(2.0**-32)
