"""The UMT5 text encoder of Wan2.1.

Parameter names are those of the official `models_t5_umt5-xxl-enc-bf16.pth`. Source: UniMax (arXiv 2304.09151) and T5
1.1: no scaling of q·k, no biases, a relative position bias in every layer, gated GELU, RMS norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine.models.layers import rearrange
from miga_engine.models.protocols import TextEncoder
from miga_engine.ops import frame_attention, untimed_backend

MAX_DISTANCE = 128  # positions further apart share the last bucket


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder; all follow from the shapes in a checkpoint."""

    vocab_size: int
    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    num_buckets: int


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the statistics in float32, eps 1e-6."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(self.weight.dtype) * self.weight


class RelativeBias(nn.Module):
    """A learned bias per head for the distance from query to key, in logarithmic buckets, both directions."""

    def __init__(self, num_buckets: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, length: int) -> Tensor:
        """→ [1,heads,length,length]."""
        positions = torch.arange(length, device=self.embedding.weight.device)
        distance = positions[None, :] - positions[:, None]
        half = self.embedding.num_embeddings // 2
        exact = half // 2
        steps = (distance.abs().float() / exact).log() / math.log(MAX_DISTANCE / exact) * (half - exact)
        far = (exact + steps.clamp(min=0).long()).clamp(max=half - 1)
        bucket = torch.where(distance.abs() < exact, distance.abs(), far) + half * (distance > 0)
        return self.embedding(bucket).permute(2, 0, 1).unsqueeze(0)


class Attention(nn.Module):
    """Bidirectional attention with an additive bias and unscaled q·k."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.k = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.v = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.o = nn.Linear(config.dim_attn, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B,T,D], bias [B,heads,T,T] → [B,T,D]."""
        q, k, v = (
            rearrange(layer(x), "b t (heads d) -> b t heads d", heads=self.num_heads)
            for layer in (self.q, self.k, self.v)
        )
        attended = frame_attention(q, k, v, bias=bias, scale=1.0, backend=untimed_backend(x.device))
        return self.o(attended.flatten(2))


class FeedForward(nn.Module):
    """fc2(fc1(x) · gelu(gate(x)))."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(config.dim, config.dim_ffn, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = nn.Linear(config.dim_ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float16:
            return self.fc2(self.fc1(x) * self.gate(x))
        hidden = self.fc1(x).float() * self.gate(x)  # both the product and its sums leave float16's range
        return F.linear(hidden, self.fc2.weight.float())


def _within_float16(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The stream in its dtype; float16, whose range the published weights leave, clamped as Transformers does."""
    x = x.to(dtype)
    if dtype != torch.float16:
        return x
    most = torch.finfo(dtype).max
    limit = torch.where(x.isinf().any(), most - 1000, most)
    return x.clamp(-limit, limit)


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.dim)
        self.ffn = FeedForward(config)
        self.pos_embedding = RelativeBias(config.num_buckets, config.num_heads)

    def forward(self, x: Tensor, is_text: Tensor) -> Tensor:
        """x [B,T,D], is_text bool [B,1,1,T] → [B,T,D]."""
        bias = self.pos_embedding(x.shape[1])
        bias = bias.masked_fill(~is_text, torch.finfo(bias.dtype).min)
        x = _within_float16(x + self.attn(self.norm1(x), bias), x.dtype)
        return _within_float16(x + self.ffn(self.norm2(x)), x.dtype)


class UMT5Encoder(TextEncoder):
    """Token ids → text embeddings, in the dtype of the weights (bfloat16 in the published checkpoint)."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config: UMT5Config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """token_ids int [B,T] and mask [B,T] (nonzero at text) → [B,T,D]; rows outside the mask mean nothing."""
        x = self.token_embedding(token_ids)
        is_text = mask.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, is_text)
        return self.norm(x)
