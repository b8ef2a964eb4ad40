"""consistency_score: how alike groups of latent frames are, which self-reflection judges by."""

import torch
from torch import Tensor

from miga_engine.ops._registry import register, require, require_tensors

_CHANNEL_MODES = ("mean", "all")

torch.library.define("miga::consistency_score", '(Tensor reference, Tensor candidates, str channels="mean") -> Tensor')


@torch.library.register_fake("miga::consistency_score")
def _fake(reference: Tensor, candidates: Tensor, channels: str = "mean") -> Tensor:
    return candidates.new_empty((candidates.shape[0],), dtype=torch.float32)


def consistency_score(reference: Tensor, candidates: Tensor, channels: str = "mean") -> Tensor:
    """Mean cosine similarity between each candidate group of latent frames and a reference group: [k] float32.

    u = mean over channels of a frame, a vector over H·W (channels="mean"), or the whole frame, a vector over C·H·W
    ("all"); û = u/‖u‖, 0 for a zero frame; score = mean over frame pairs of ⟨û_E, û_R⟩ = ⟨mean û_E, mean û_R⟩, which is
    linear in the number of frames. reference [n,C,H,W], candidates [k,m,C,H,W], any float dtypes; arithmetic in float32
    at least. Source: MIGA (arXiv 2605.18233), consistency score of the dynamic correction.
    """
    if channels not in _CHANNEL_MODES:
        raise ValueError(f"channels is {channels!r}: choose {' or '.join(map(repr, _CHANNEL_MODES))}")
    require_tensors("reference candidates", reference, candidates)
    for name, frames in (("reference", reference), ("candidates", candidates)):
        require(frames.dtype.is_floating_point, name, "dtype", frames.dtype, "a floating point type")
    is_frames = reference.ndim == 4 and min(reference.shape[:2]) > 0
    require(is_frames, "reference", "shape", tuple(reference.shape), "[n,C,H,W], n ≥ 1, C ≥ 1")
    is_group = candidates.ndim == 5 and candidates.shape[1] > 0 and candidates.shape[2:] == reference.shape[1:]
    expected = f"[k,m,{','.join(map(str, reference.shape[1:]))}], m ≥ 1, frames as in reference"
    require(is_group, "candidates", "shape", tuple(candidates.shape), expected)
    return torch.ops.miga.consistency_score(reference, candidates, channels)


def consistency_score_reference(reference: Tensor, candidates: Tensor, channels: str = "mean") -> Tensor:
    """The oracle, [k] in float32 at least: any device, any float dtype; no checks."""
    reference_mean = _frame_directions(reference, channels).mean(0)  # [P]
    return _frame_directions(candidates, channels).mean(1) @ reference_mean


def _frame_directions(frames: Tensor, channels: str) -> Tensor:
    """[…,C,H,W] → unit vectors […,P], P = H·W (channel mean) or C·H·W (all); the zero vector stays zero."""
    import einops  # as late as a network does: `models.layers.rearrange`

    frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
    vectors = frames if channels == "all" else frames.mean(-3, keepdim=True)
    vectors = einops.rearrange(vectors, "... c h w -> ... (c h w)")
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, 1)


def _eager(reference: Tensor, candidates: Tensor, channels: str = "mean") -> Tensor:
    return consistency_score_reference(reference, candidates, channels).to(torch.float32)


register("consistency_score", _eager, kernel="consistency_score")
