"""Philox against published vectors and Triton, and the independence of a frame's noise from everything else asked."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from miga_engine import noise
from miga_engine.errors import ConfigError
from miga_engine.noise import CounterNoise, Purpose, normal, philox4x32

SHAPE = (3, 5, 7)  # 105 elements: the last counter is used in part

# Random123, kat_vectors, philox4x32 10: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

TRITON_SCRIPT = """
import sys, torch, triton, triton.language as tl

@triton.jit
def _philox_kernel(p_out, p_counter, seed, N: tl.constexpr):
    o = tl.arange(0, N)
    c0, c1 = tl.load(p_counter + o), tl.load(p_counter + N + o)
    c2, c3 = tl.load(p_counter + 2 * N + o), tl.load(p_counter + 3 * N + o)
    words = tl.philox(seed, c0, c1, c2, c3)
    tl.store(p_out + o, words[0])
    tl.store(p_out + N + o, words[1])
    tl.store(p_out + 2 * N + o, words[2])
    tl.store(p_out + 3 * N + o, words[3])

counter, seed = torch.load(sys.argv[1])
out = torch.empty_like(counter)
_philox_kernel[(1,)](out, counter, seed, counter.shape[1])
torch.save(out, sys.argv[2])
"""


def as_words(values):
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert tuple(word.item() for word in philox4x32(key, as_words(counter))) == expected


@pytest.mark.slow
def test_philox_matches_triton_bit_for_bit(tmp_path):
    pytest.importorskip("triton")
    script, given, returned = (tmp_path / name for name in ("kernel.py", "given.pt", "returned.pt"))
    script.write_text(TRITON_SCRIPT)
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 1 << 32, (4, 64), generator=generator)
    seed = 0x1234_5678_9ABC_DEF0
    torch.save(((counter - ((counter >> 31) << 32)).to(torch.int32), seed), given)
    subprocess.run(
        [sys.executable, script, given, returned], check=True, timeout=60, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    words = philox4x32((seed & 0xFFFFFFFF, seed >> 32), tuple(counter))
    assert torch.equal(torch.stack(words), torch.load(returned).to(torch.int64) & 0xFFFFFFFF)


def test_moments_and_tails():
    values = normal(3, Purpose.PUSH, range(8), (16, 60, 104)).double()
    count = values.numel()
    for power, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((values**power).mean() - expected) < 5 * (variance / count) ** 0.5
    flat = values.flatten(1)
    assert abs((flat[:, :-1] * flat[:, 1:]).mean()) < 5 / count**0.5
    assert abs((flat[:-1] * flat[1:]).mean()) < 5 / count**0.5
    assert values.abs().max() < 6.77  # sqrt(2·33·ln 2)


def test_a_frame_is_the_same_whatever_else_is_drawn(monkeypatch):
    frames = [5, 0, 2**40 + 1, 17]
    together = normal(-7, Purpose.REFINE, frames, SHAPE, series=9)
    monkeypatch.setattr(noise, "_BLOCK_COUNTERS_CPU", 5)
    for index, frame in enumerate(frames):
        assert torch.equal(together[index], normal(-7, Purpose.REFINE, torch.tensor([frame]), SHAPE, series=9)[0])


def test_thread_count_does_not_matter():
    before = torch.get_num_threads()
    draws = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            draws.append(normal(1, Purpose.PUSH, range(3), (16, 60, 104)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*draws)


def test_every_part_of_the_address_matters():
    addresses = [
        (seed, purpose, frame, series)
        for seed in (0, 1, 1 << 32, -1)
        for purpose in Purpose
        for frame in (0, 1, -1, 2**32, 2**33)
        for series in (0, 1, 256)
    ]
    drawn = {
        tuple(normal(seed, purpose, [frame], (4,), series=series)[0].tolist())
        for seed, purpose, frame, series in addresses
    }
    assert len(drawn) == len(addresses)


def test_bits_stay_as_they_are():
    """A saved run must resume with the noise it began with: these values never change."""
    drawn = normal(0, Purpose.SEED_CLIP, [0], (4,))
    expected = torch.tensor(
        [0.991137683391571, -0.9246625900268555, -0.6176089644432068, -0.48206859827041626], dtype=torch.float32
    )
    assert torch.equal(drawn[0], expected)


def test_one_series_a_frame_is_the_same_as_asking_one_by_one():
    together = normal(3, Purpose.SOLVER, [7, 8, 9], SHAPE, series=[5, 0, 2])
    alone = [normal(3, Purpose.SOLVER, [k], SHAPE, series=series)[0] for k, series in ((7, 5), (8, 0), (9, 2))]
    assert torch.equal(together, torch.stack(alone))


def test_empty_requests():
    assert normal(0, Purpose.PUSH, [], SHAPE).shape == (0, *SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1 << 64}, r"seed is 18446744073709551616: give an integer of at most 64 bits"),
        ({"series": -1}, r"series run from -1 to -1"),
        ({"purpose": 256}, r"purpose is 256"),
        ({"frame_numbers": [3, 1 << 55]}, r"frame numbers run from 3 to 36028797018963968: give numbers between"),
    ],
)
def test_unusable_addresses_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        normal(**{"seed": 0, "purpose": Purpose.PUSH, "frame_numbers": [0], "shape": SHAPE} | change)


def test_the_noise_of_a_frame_belongs_to_its_number_alone() -> None:
    """Whatever frames are drawn with it, in whatever order, by whichever object."""
    shape = (2, 3, 5)
    whole = CounterNoise(7, shape, "cpu")(Purpose.PUSH, np.arange(40))
    assert len({tuple(frame.flatten().tolist()) for frame in whole}) == 40
    for numbers in ([5], [5, 6], [6, 5], [39, 0, 17], list(range(11, 23))):
        drawn = CounterNoise(7, shape, "cpu")(Purpose.PUSH, np.array(numbers))
        assert torch.equal(drawn, whole[numbers])
