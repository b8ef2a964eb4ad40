"""guidance_dots: of each latent frame, how the difference of the two branches lies to a direction of the rule's."""

import torch
from torch import Tensor

from miga_engine.ops._registry import register, require, require_indices, require_like, require_tensors

torch.library.define(
    "miga::guidance_dots",
    "(Tensor sample, Tensor velocity_cond, Tensor velocity_uncond, *, Tensor slots, Tensor direction) -> Tensor",
)


@torch.library.register_fake("miga::guidance_dots")
def _fake(
    sample: Tensor, velocity_cond: Tensor, velocity_uncond: Tensor, *, slots: Tensor, direction: Tensor
) -> Tensor:
    return sample.new_empty((slots.shape[0], 3))


def guidance_dots(
    sample: Tensor, velocity_cond: Tensor, velocity_uncond: Tensor, *, slots: Tensor, direction: Tensor
) -> Tensor:
    """Dot products over each of n latent frames, which guidance rules are made of: [n,3] of sample's dtype.

    With d = v_c − v_u and b = b_x·x + b_c·v_c + b_u·v_u, where direction[i] is b_x, b_c, b_u of frame i:
        ⟨d,b⟩, ⟨b,b⟩, ⟨d,d⟩, each a sum over C·H·W.

    sample (x): [L,C,H,W], float32 or float64, also the arithmetic. velocity_cond, velocity_uncond: [n,C,H,W], any float
    dtype. direction [n,3], any float dtype. slots [n] int64: frame i lies in row slots[i] of sample; −1 gives zeros. On
    a GPU indices are not looked at: a slot that is none gives zeros. What has weight 0 in b is left out of it, so the
    sample may be uninitialised memory there. Sources: CFG-Zero* (arXiv 2503.18886), APG (arXiv 2410.02416).
    """
    require_tensors(
        "sample velocity_cond velocity_uncond slots direction", sample, velocity_cond, velocity_uncond, slots, direction
    )
    require(sample.ndim == 4, "sample", "shape", tuple(sample.shape), "[L,C,H,W]")
    require(sample.dtype in (torch.float32, torch.float64), "sample", "dtype", sample.dtype, "float32 or float64")
    require(slots.ndim == 1, "slots", "shape", tuple(slots.shape), "[n]")
    require(slots.dtype == torch.int64, "slots", "dtype", slots.dtype, "int64")
    for name, frames in (("velocity_cond", velocity_cond), ("velocity_uncond", velocity_uncond)):
        require_like(name, frames, (slots.shape[0], *sample.shape[1:]), "[n,C,H,W]")
    require_like("direction", direction, (slots.shape[0], 3), "[n,3]")
    require_indices("slots", slots, -1, sample.shape[0] - 1)
    return torch.ops.miga.guidance_dots(sample, velocity_cond, velocity_uncond, slots=slots, direction=direction)


def guidance_dots_reference(
    sample: Tensor, velocity_cond: Tensor, velocity_uncond: Tensor, *, slots: Tensor, direction: Tensor
) -> Tensor:
    """The oracle: any device, any float dtype; no checks."""
    if slots.shape[0] == 0:
        return sample.new_empty((0, 3))
    v_cond, v_uncond = velocity_cond.to(sample.dtype), velocity_uncond.to(sample.dtype)
    values = (sample[slots.clamp(min=0)], v_cond, v_uncond)
    weights = direction.to(sample.dtype).view(-1, 3, 1, 1, 1).unbind(1)
    x, c, u = (torch.where(weight == 0, 0, weight * value) for weight, value in zip(weights, values, strict=True))
    b, d = x + c + u, v_cond - v_uncond
    dots = torch.stack([product.sum((1, 2, 3)) for product in (d * b, b * b, d * d)], 1)
    return torch.where(slots[:, None] >= 0, dots, 0)


register("guidance_dots", guidance_dots_reference, kernel="guidance_dots")
