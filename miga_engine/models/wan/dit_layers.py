"""Layers of the Wan2.1 diffusion transformer.

Tokens of a window are [B, F, S, D]: F latent frames of S tokens. What depends on a frame's noise level is
[B, F, ..., D] or [B, 1, ..., D] and is broadcast over the S tokens by indexing, never written out. The residual stream,
the norms, the modulation and the rotation are float32; matrix products run in the dtype of their weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine.errors import ConfigError
from miga_engine.ops import frame_attention

RotaryTable = tuple[Tensor, Tensor]


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32, whatever the dtype of its weights."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids [..., dim] in float32: cosines, then sines, of t · 10000^(-i / (dim/2)), taken in float64."""
    half = dim // 2
    frequencies = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def rotary_table(num_frames: int, height: int, width: int, head_dim: int, device: torch.device) -> RotaryTable:
    """Cosine and sine [F·h·w, 1, head_dim/2] in float32 of the positions of an F x h x w grid.

    The channels of a head are shared out as head_dim - 4·(head_dim // 6) to time and 2·(head_dim // 6) each to height
    and width; angles are position · 10000^(-2i / share), taken in float64.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for size, share in ((num_frames, head_dim - 2 * side), (height, side), (width, side)):
        frequencies = torch.pow(10000.0, -torch.arange(0, share, 2, dtype=torch.float64) / max(share, 1))
        angles.append(torch.outer(torch.arange(size, dtype=torch.float64), frequencies))
    grid = (num_frames, height, width)
    along_time = angles[0][:, None, None].expand(*grid, -1)
    along_height = angles[1][None, :, None].expand(*grid, -1)
    along_width = angles[2][None, None, :].expand(*grid, -1)
    table = torch.cat([along_time, along_height, along_width], dim=-1).reshape(-1, 1, head_dim // 2)
    return table.cos().float().to(device), table.sin().float().to(device)


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Turn neighbouring channel pairs of x [B, N, H, D] (float32) by the table's angles."""
    cos, sin = table
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """layer_norm(x) · (1 + scale) + shift in float32; x [B, F, S, D], shift and scale [B, F or 1, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)


class AffineNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class AttentionProjections(nn.Module):
    """Query, key, value and output maps; q and k are normalised over the whole width before the heads are split."""

    def __init__(self, dim: int, num_heads: int, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps) if qk_norm else nn.Identity()

    def heads(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., heads, D/heads]."""
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(AttentionProjections):
    """Attention among all tokens of a window."""

    def forward(self, x: Tensor, table: RotaryTable) -> Tensor:
        """x [B, F, S, D] in the dtype of the weights -> same shape and dtype."""
        tokens = x.flatten(1, 2)
        q = rotate(self.heads(self.norm_q(self.q(tokens)).float()), table).to(x.dtype)
        k = rotate(self.heads(self.norm_k(self.k(tokens)).float()), table).to(x.dtype)
        out = frame_attention(q, k, self.heads(self.v(tokens)))
        return self.o(out.flatten(2)).view_as(x)


class CrossAttention(AttentionProjections):
    """Attention from the tokens of a window to a prompt, or from each frame to its own prompt."""

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded prompts [P, T, D] -> keys and values [P, T, heads, D/heads], computed once per prompt."""
        return self.heads(self.norm_k(self.k(text)).to(text.dtype)), self.heads(self.v(text))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x [B, F, S, D]; keys and values [B, T, heads, d] or, with a prompt for each frame, [B·F, T, heads, d]."""
        tokens = x.flatten(1, 2) if keys.shape[0] == x.shape[0] else x.flatten(0, 1)
        q = self.heads(self.norm_q(self.q(tokens)).to(x.dtype))
        return self.o(frame_attention(q, keys, values).flatten(2)).view_as(x)


@dataclass(frozen=True)
class ContextCache:
    """Cross-attention keys and values of P prompts: one pair of [P, text_len, heads, D/heads] tensors per layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def num_prompts(self) -> int:
        """P, the number of rows a context_index may name."""
        return self.layers[0][0].shape[0]

    def cat(self, other: ContextCache) -> ContextCache:
        """The prompts of this cache followed by those of `other`, from the same network."""
        pairs = zip(self.layers, other.layers, strict=True)
        return ContextCache(tuple((torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs))

    def for_windows(self, batch: int, num_frames: int, index: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, one row per window ([B, ...]) or, for an index [B, F], per frame ([B·F, ...]).

        Without an index the cache holds one prompt for all windows or one for each. A layer's rows are gathered when
        its turn comes, so that only one layer's are held twice. Raises ConfigError on other sizes.
        """
        if index is None:
            if self.num_prompts not in (1, batch):
                raise ConfigError(
                    f"The context holds {self.num_prompts} prompts for {batch} windows; "
                    "give one, one for each window, or a context_index."
                )
            return ((k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in self.layers)
        if tuple(index.shape) not in ((batch,), (batch, num_frames)):
            raise ConfigError(
                f"context_index has shape {tuple(index.shape)}; give [{batch}] (a prompt for each window) "
                f"or [{batch}, {num_frames}] (one for each latent frame)."
            )
        rows = index.flatten()
        return ((k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.layers)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last gated by the noise level of each frame."""

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, eps: float, qk_norm: bool, cross_attn_norm: bool
    ) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = SelfAttention(dim, num_heads, eps, qk_norm)
        self.norm3 = AffineNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(dim, num_heads, eps, qk_norm)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor, text: tuple[Tensor, Tensor], table: RotaryTable) -> Tensor:
        """x [B, F, S, D] float32, time [B, F or 1, 6, D] float32, text keys and values, rotary table -> like x."""
        dtype = self.self_attn.q.weight.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time).split(1, dim=2)
        y = self.self_attn(modulated_norm(x, shift1, scale1, self.eps).to(dtype), table)
        x = torch.addcmul(x, y.float(), gate1)
        x = x + self.cross_attn(self.norm3(x).to(dtype), *text)
        y = self.ffn(modulated_norm(x, shift2, scale2, self.eps).to(dtype))
        return torch.addcmul(x, y.float(), gate2)


class Head(nn.Module):
    """Norm, modulation by each frame's own noise level, projection to patches; float32."""

    def __init__(self, dim: int, patch_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, patch_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, F, S, D], time [B, F or 1, D], both float32 -> [B, F, S, patch channels]."""
        shift, scale = (self.modulation.float() + time.unsqueeze(2)).split(1, dim=2)
        return linear_fp32(self.head, modulated_norm(x, shift, scale, self.eps))
