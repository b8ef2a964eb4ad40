"""Dense optical flow between successive frames, and how well it explains them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.colour import LUMA
from miga_engine.errors import ConfigError, DeviceError

METHODS = ("auto", "dis", "lucas-kanade")
SHORT_SIDE = 256
"""Motion is told in pixels of a picture this many pixels high or wide, whichever is less."""
_BATCH = 16
_WINDOW = 9
_CONTRAST = 0.02  # of [0,1]; weaker texture is not brought to full contrast
_STIFFNESS = 1e-3
_LUMA = torch.tensor(LUMA)


def flow_method(method: str = "auto") -> str:
    """`dis` where OpenCV can be imported, else `lucas-kanade`; a method asked for by name is that or DeviceError."""
    if method not in METHODS:
        raise ConfigError(f"flow is {method!r}: choose {', '.join(METHODS)}")
    if method == "lucas-kanade":
        return method
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        if method == "auto":
            return "lucas-kanade"
        raise DeviceError(f'flow "dis" needs OpenCV ({error}): pip install "miga_engine[eval]"') from error
    return "dis"


def motion_and_warping(
    frames: npt.NDArray[np.uint8], method: str = "auto"
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Motion and warping error of every pair of successive frames of uint8 [T,H,W,3]: two float64 [T-1].

    Motion is the mean length of the flow vectors in pixels a frame, scaled to a picture with a short side of 256. The
    warping error is ΣM‖I_t − warp(I_{t+1})‖² / ΣM over RGB in [0,1] (Lai et al. 2018), M the pixels whose forward and
    backward flow agree: ‖f + b‖² < 0.01(‖f‖² + ‖b‖²) + 0.5 (Sundaram et al. 2010); NaN where none does. The flow is
    estimated at a short side of at most 256 by DIS, and 128 by Lucas-Kanade.
    """
    estimate, largest = (_dis, SHORT_SIDE) if flow_method(method) == "dis" else (lucas_kanade, SHORT_SIDE // 2)
    motion, error = [], []
    for start in range(0, len(frames) - 1, _BATCH):
        batch = torch.from_numpy(np.ascontiguousarray(frames[start : start + _BATCH + 1]))
        rgb = batch.permute(0, 3, 1, 2).float().div_(255)
        scale = largest / min(rgb.shape[2:])
        if scale < 1:
            size = [round(side * scale) for side in rgb.shape[2:]]
            rgb = F.interpolate(rgb, size, mode="area")
        luma = torch.einsum("nchw,c->nhw", rgb, _LUMA)
        forward, backward = estimate(luma[:-1], luma[1:]), estimate(luma[1:], luma[:-1])
        motion.append(torch.hypot(*forward.unbind(1)).mean((1, 2)) * (SHORT_SIDE / min(rgb.shape[2:])))
        back = warp(backward, forward)
        slack = 0.01 * (forward.square().sum(1) + back.square().sum(1)) + 0.5
        is_seen = (forward + back).square().sum(1) < slack  # [N,H,W]
        squares = (rgb[:-1] - warp(rgb[1:], forward)).square().sum(1)
        error.append((squares * is_seen).sum((1, 2)) / is_seen.sum((1, 2)))
    if not motion:
        return np.zeros(0), np.zeros(0)
    return torch.cat(motion).double().numpy(), torch.cat(error).double().numpy()


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """`image` [N,C,H,W] at x + flow(x), flow [N,2,H,W] in pixels (x, y); bilinear, the border repeated."""
    height, width = image.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([(x + flow[:, 0]) * (2 / max(width - 1, 1)), (y + flow[:, 1]) * (2 / max(height - 1, 1))], -1)
    return F.grid_sample(image, grid - 1, padding_mode="border", align_corners=True)


def lucas_kanade(before: Tensor, after: Tensor, *, iterations: int = 4) -> Tensor:
    """Flow [N,2,H,W] from `before` to `after`, both float [N,H,W] in [0,1]: Lucas-Kanade, coarse to fine.

    Each level solves for every pixel the least squares of its 9×9 neighbourhood. Pictures are brought to one local mean
    and contrast first, so that a change of brightness is no motion; where there is no texture the flow of the coarser
    level stays.
    """
    pyramid = [(before[:, None], after[:, None])]
    while min(pyramid[-1][0].shape[2:]) >= 32:
        pyramid.append(tuple(F.avg_pool2d(_pad(image, 1), 4, 2) for image in pyramid[-1]))  # type: ignore[arg-type]
    flow = before.new_zeros(len(before), 2, *pyramid[-1][0].shape[2:])
    for old, new in reversed(pyramid):
        size = old.shape[2:]
        if flow.shape[2:] != size:
            factors = flow.new_tensor([size[1] / flow.shape[3], size[0] / flow.shape[2]])[:, None, None]
            flow = F.interpolate(flow, size, mode="bilinear") * factors
        old, new = _normalised(old), _normalised(new)
        across = F.pad(old, (1, 1, 0, 0), mode="replicate").diff(dim=3)
        down = F.pad(old, (0, 0, 1, 1), mode="replicate").diff(dim=2)
        ix, iy = (across[..., 1:] + across[..., :-1]) / 2, (down[..., 1:, :] + down[..., :-1, :]) / 2
        slope = torch.cat([ix, iy], 1)
        xx, yy, xy = box(torch.cat([slope.square(), ix * iy], 1)).split(1, dim=1)
        xx, yy = xx + _STIFFNESS, yy + _STIFFNESS
        determinant = xx * yy - xy * xy
        for _ in range(iterations):
            bx, by = box(slope * (warp(new, flow) - old)).split(1, dim=1)
            step = torch.cat([xy * by - yy * bx, xy * bx - xx * by], 1) / determinant
            flow = flow + step.clamp(-1, 1)
        flow = F.avg_pool2d(_pad(flow, 1), 3, 1)
    return flow


def _pad(image: Tensor, margin: int) -> Tensor:
    return F.pad(image, (margin,) * 4, mode="replicate")


def _normalised(image: Tensor) -> Tensor:
    image = image - box(image)
    return image / (box(image.square()) + _CONTRAST**2).sqrt()


def box(image: Tensor, side: int = _WINDOW) -> Tensor:
    """Means of [N,C,H,W] over squares with an odd `side`, of what lies inside the picture."""
    for dim in (3, 2):
        position = torch.arange(image.shape[dim])
        first, last = (position - side // 2).clamp_min(0), (position + side // 2).clamp_max(len(position) - 1)
        image = _box_sums(image, dim, side) / (last - first + 1).to(image.dtype).view(-1, *[1] * (3 - dim))
    return image


def _box_sums(image: Tensor, dim: int, side: int) -> Tensor:
    """Sums of `side` neighbours along dim 2 or 3: those of 1, 2, 4, … make each other, and 8 + 1 make 9."""
    length = image.shape[dim]
    sums = F.pad(image, [side // 2] * 2 if dim == 3 else [0, 0, side // 2, side // 2])
    width, done, total = 1, 0, torch.zeros(())
    while width <= side:
        if side & width:
            total, done = total + sums.narrow(dim, done, length), done + width
        if 2 * width <= side:
            rest = sums.shape[dim] - width
            sums = sums.narrow(dim, 0, rest) + sums.narrow(dim, width, rest)
        width *= 2
    return total


def _dis(before: Tensor, after: Tensor) -> Tensor:
    """The same by dense inverse search (Kroeger et al. 2016), OpenCV's medium preset."""
    import cv2

    search: Any = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = zip(*((x * 255).round().byte().numpy() for x in (before, after)), strict=True)
    return torch.stack([torch.from_numpy(search.calc(a, b, None)).permute(2, 0, 1) for a, b in pairs])
