"""Attention behind one face: the single place of the networks where it is computed, for kernels to take over."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def frame_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale · q kᵀ + bias) v, every query seeing every key.

    q [B, N, H, D], k and v [B, M, H, D], bias broadcastable to [B, H, N, M], scale defaulting to D^-1/2.
    Returns [B, N, H, D] in the dtype of q. The batch of k and v may be a broadcast (stride-0) view.
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=scale
    )
    return out.transpose(1, 2)
