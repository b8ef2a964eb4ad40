"""Optical flow finds known shifts, and what is hidden counts as no error."""

import numpy as np
import pytest
import torch
from measured import SCENE

from miga_engine.measure import flow
from miga_engine.tiny import world


def _texture(height: int, width: int) -> torch.Tensor:
    noise = torch.rand(1, 1, height // 4, width // 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)[0, 0]


@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.5, -0.5), (-6.0, 3.0)])
def test_flow_finds_a_known_shift(shift):
    """Before and after are cut out of one picture; brightness changes in between and must not count as motion."""
    large = _texture(120, 160)
    moved = flow.warp(large[None, None], -torch.tensor(shift)[None, :, None, None].expand(1, 2, 120, 160))[0, 0]
    before, after = large[20:100, 20:140], 0.95 * moved[20:100, 20:140] + 0.03
    found = flow.lucas_kanade(before[None], after[None])[0, :, 8:-8, 8:-8]
    error = (found - torch.tensor(shift)[:, None, None]).norm(dim=0)
    assert error.median() < 0.1
    assert error.mean() < 0.2


@pytest.mark.slow
def test_motion_does_not_depend_on_the_size_and_warping_error_leaves_hidden_pixels_out():
    small, _ = world.render(SCENE, 0, 9)
    large, _ = world.render(SCENE, 0, 9, 128, 192)
    a, b = (flow.motion_and_warping(v, "lucas-kanade")[0].mean() for v in (small, large))
    assert a == pytest.approx(b, rel=0.2)
    ground = (_texture(96, 128) * 255).byte().numpy()
    square = 255 - ground[:32, :32]
    frames = np.stack([ground] * 2)
    frames[0, 30:62, 30:62], frames[1, 30:62, 36:68] = square, square
    frames = np.repeat(frames[..., None], 3, 3)
    motion, error = flow.motion_and_warping(frames, "lucas-kanade")
    still = ((frames[0] / 255 - frames[1] / 255) ** 2).sum(-1).mean()
    assert error[0] < still / 5
    assert motion[0] * 96 / 256 == pytest.approx(6 * 32 * 32 / (96 * 128), rel=0.5)
