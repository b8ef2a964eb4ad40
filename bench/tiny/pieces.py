"""Whether the subject is one piece: connected areas of its colour in the sky, counted in every frame.

For scenes of a known colour and time of day. A pixel is the subject's if, up to its shading, it is nearer to the
subject's colour than to the sky of its row and to the sun or moon. A white subject at night cannot be counted: the moon
has its colour.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.tiny import world
from miga_engine.tiny.drawing import sky_ramp

_SKY = 35  # rows above every hill, of a picture 64 high
_SMALLEST, _SHARE = 10, 0.12  # a piece has at least so many pixels, and so large a share of the largest


def _off_axis(rgb: Tensor, colour: Tensor) -> Tensor:
    """Distance `[...]` of pixels `[...,3]` from the nearest shade, 0.65 to 1.15, of a colour `[3]`."""
    shade = ((rgb * colour).sum(-1) / colour.square().sum()).clamp(0.65, 1.15)
    return (rgb - shade[..., None] * colour).norm(dim=-1)


def subject_areas(frames: npt.NDArray[np.uint8], scene: world.Scene) -> Tensor:
    """Where the subject is in the sky `[T,35,W]`, true or false, of frames uint8 `[T,64,W,3]`."""
    rgb = torch.from_numpy(np.ascontiguousarray(frames[:, :_SKY])).float() / 255
    zenith, horizon, lamp, _, light = world.TIME_RGB[scene.time]
    colour = torch.tensor(world.COLOUR_RGB[scene.colour]) * light
    zenith_, horizon_, lamp_ = map(torch.tensor, (zenith, horizon, lamp))
    sky = zenith_ + sky_ramp(torch, (torch.arange(_SKY) + 0.5)[:, None]) * (horizon_ - zenith_)  # [H,3]
    # the glow around the lamp lies between sky and lamp: the distance from that line
    along = lamp_ - sky
    share = (((rgb - sky[:, None]) * along[:, None]).sum(-1) / along.square().sum(-1)[:, None]).clamp(0, 1)
    from_sky = (rgb - sky[:, None] - share[..., None] * along[:, None]).norm(dim=-1)
    return _off_axis(rgb, colour) < from_sky


def is_counted(scene: world.Scene) -> bool:
    """Whether the subject's colour is its own in the sky."""
    return (scene.colour, scene.time) != ("white", "night")


def pieces(areas: Tensor) -> Tensor:
    """How many pieces `[T]` the areas `[T,H,W]` of each frame have; what touches, or nearly, is one."""
    joined = F.max_pool2d(areas[:, None].float(), 3, 1, 1)
    count, height, width = areas.shape
    labels = (torch.arange(height * width).view(1, 1, height, width) + 1.0) * joined
    while True:
        spread = F.max_pool2d(labels, 3, 1, 1) * joined
        if torch.equal(spread, labels):
            break
        labels = spread
    found = torch.zeros(count, dtype=torch.long)
    for n in range(count):
        sizes = labels[n, 0][areas[n]].unique(return_counts=True)[1]
        if sizes.numel():
            found[n] = int((sizes >= max(_SMALLEST, _SHARE * int(sizes.max()))).sum())
    return found
