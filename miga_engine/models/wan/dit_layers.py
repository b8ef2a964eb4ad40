"""Layers of the Wan2.1 diffusion transformer.

Tokens of a window are [B,F,S,D]: F latent frames of S tokens. What depends on a frame's noise level is a row of a
table [R,D] that the frame names by index; it is never written out per token. The residual stream, the norms, the
modulation and the rotation are float32; matrix products run in the dtype of their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from miga_engine import ops
from miga_engine.models.layers import Linear, guidance_branches, linear_fp32

MAX_POSITIONS = 1024
"""Latent frame positions that the rotary table holds, as in the published code."""


class RotaryTable(NamedTuple):
    """Cosines and sines of positions in time [MAX_POSITIONS,2,t] and of a frame's tokens [S,2,D/heads/2 - t]."""

    temporal: Tensor
    spatial: Tensor


class FrameIndices(NamedTuple):
    """What a block needs to know of the latent frames of its windows."""

    level_rows: Tensor  # int64 [B,F]: row of the tables of noise levels
    positions: Tensor  # int64 [B,F]: position in time, for the rotation

    def take(self, keep: Tensor) -> FrameIndices:
        """Those frames alone that keep [B,K] names."""
        return FrameIndices(self.level_rows.gather(1, keep), self.positions.gather(1, keep))

    def repeat(self, count: int) -> FrameIndices:
        """The same for `count` copies of the windows, one after another."""
        return FrameIndices(self.level_rows.repeat(count, 1), self.positions.repeat(count, 1))


def take_frames(x: Tensor, keep: Tensor) -> Tensor:
    """x [B,F,S,D], keep int64 [B,K] → [B,K,S,D]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], keep]


def rotary_table(height: int, width: int, head_dim: int, device: torch.device) -> RotaryTable:
    """Cosines and sines in float32 for frames of height x width tokens.

    The channels of a head are shared out as head_dim - 4·(head_dim // 6) to time and 2·(head_dim // 6) each to height
    and width; angles are position · 10000^(-2i / share), taken in float64.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for size, share in ((MAX_POSITIONS, head_dim - 2 * side), (height, side), (width, side)):
        frequencies = torch.pow(10000.0, -torch.arange(0, share, 2, dtype=torch.float64) / max(share, 1))
        angles.append(torch.outer(torch.arange(size, dtype=torch.float64), frequencies))
    along_height = angles[1][:, None].expand(-1, width, -1)
    along_width = angles[2][None].expand(height, -1, -1)
    spatial = torch.cat([along_height, along_width], dim=-1).flatten(0, 1)
    tables = (torch.stack([part.cos(), part.sin()], dim=1).float().to(device) for part in (angles[0], spatial))
    return RotaryTable(*tables)


class AttentionProjections(nn.Module):
    """Query, key, value and output maps; q and k are normalised over the whole width before the heads are split."""

    def __init__(self, dim: int, num_heads: int, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = eps
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps) if qk_norm else None
        self.norm_k = nn.RMSNorm(dim, eps) if qk_norm else None

    def heads(self, x: Tensor) -> Tensor:
        """[...,D] → [...,heads,D/heads]."""
        return x.unflatten(-1, (self.num_heads, -1))

    def normed(self, x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """x [B,N,D], normalised in place where the network has the norm."""
        return x if norm is None else ops.rms_norm_(x, norm.weight.float(), eps=self.eps)


class SelfAttention(AttentionProjections):
    """Attention among all tokens of a window."""

    def forward(
        self, x: Tensor, frames: FrameIndices, table: RotaryTable, backend: str, keep: Tensor | None = None
    ) -> Tensor:
        """x [B,F,S,D] in the dtype of the weights → the same, of the frames keep [B,K] alone if given."""
        tokens = x.flatten(1, 2)
        k, v = self.k(tokens), self.v(tokens)
        if keep is None:
            q = self.q(tokens)
            self._norm_rotate(frames, table, q, self.norm_q, k)
        else:
            x = take_frames(x, keep)
            q = self.q(x.flatten(1, 2))
            self._norm_rotate(frames.take(keep), table, q, self.norm_q)
            self._norm_rotate(frames, table, k, self.norm_k)
        out = ops.frame_attention(self.heads(q), self.heads(k), self.heads(v), backend=backend)
        return self.o(out.flatten(2)).view_as(x)

    def _norm_rotate(
        self, frames: FrameIndices, table: RotaryTable, x: Tensor, norm: nn.RMSNorm | None, k: Tensor | None = None
    ) -> None:
        """x by its norm, and k if given by norm_k, in place."""
        ops.qk_norm_rope(
            x,
            k,
            None if norm is None else norm.weight.float(),
            None if self.norm_k is None or k is None else self.norm_k.weight.float(),
            temporal=table.temporal,
            spatial=table.spatial,
            positions=frames.positions,
            num_heads=self.num_heads,
            eps=self.eps,
        )


class CrossAttention(AttentionProjections):
    """Attention from the tokens of a window to a prompt, or from each frame to its own prompt."""

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded prompts [P,M,D] → keys and values [P,M,heads,D/heads], computed once per prompt."""
        return self.heads(self.normed(self.k(text), self.norm_k)), self.heads(self.v(text))

    def forward(self, x: Tensor, text: TextKeys, prompts: Tensor | None, backend: str) -> Tensor:
        """x [B,F,S,D] → same shape and dtype; prompts, int64 [B] or [B,F], are rows of the text keys."""
        q = self.heads(self.normed(self.q(x.flatten(1, 2)), self.norm_q))
        out = ops.frame_attention(q, text.keys, text.values, text.bias, key_rows=prompts, backend=backend)
        return self.o(out.flatten(2)).view_as(x)


class TextKeys(NamedTuple):
    """One layer's keys and values [P,M,heads,D/heads] of P prompts, and each key's bias [P,1,1,M]."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class ContextCache:
    """Cross-attention keys, values and biases of P prompts, computed once.

    All padding of a prompt has one key and one value; it is held once, with the logarithm of its count as bias, and
    the keys of a prompt shorter than the longest are hidden by a bias of -inf.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    bias: Tensor  # float32 [P,1,1,M]

    @property
    def num_prompts(self) -> int:
        """P, the number of rows a context_index may name."""
        return self.bias.shape[0]

    def text_keys(self, layer: int) -> TextKeys:
        """What cross-attention of a layer reads."""
        return TextKeys(*self.layers[layer], self.bias)

    def table(self, num_rows: int, num_keys: int) -> ContextCache:
        """A cache of so many rows and keys, of the kinds of this one, to `write` to."""

        def empty(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(num_rows, num_keys, *tensor.shape[2:])

        bias = self.bias.new_full((num_rows, 1, 1, num_keys), -torch.inf)
        return ContextCache(tuple((empty(keys), empty(values)) for keys, values in self.layers), bias)

    def write(self, row: int, prompt: ContextCache) -> None:
        """Make a cache of one prompt, which may have fewer keys, this row."""
        num_keys = prompt.bias.shape[3]
        for mine, theirs in zip(self.layers, prompt.layers, strict=True):
            for table, tensor in zip(mine, theirs, strict=True):
                table[row, :num_keys] = tensor[0]
        self.bias[row, ..., :num_keys] = prompt.bias[0]
        self.bias[row, ..., num_keys:] = -torch.inf

    def row(self, row: int, num_keys: int) -> ContextCache:
        """The first keys of a row, as `write` takes them, of the same memory."""
        one = slice(row, row + 1)
        layers = tuple((keys[one, :num_keys], values[one, :num_keys]) for keys, values in self.layers)
        return ContextCache(layers, self.bias[one, ..., :num_keys])

    def check_index(self, batch: int, num_frames: int, index: Tensor | None) -> int:
        """How many guidance branches the index names prompts for: G of [G·B] or [G·B,F].

        Without an index the cache holds one prompt for all windows or one for each. Raises ConfigError on other sizes.
        """
        return guidance_branches(self.num_prompts, batch, num_frames, index)


class Levels(NamedTuple):
    """Noise levels as the network sees them, computed once for a schedule."""

    time: Tensor  # float32 [T,D]
    projection: Tensor  # float32 [T,6,D], a 1 added to the scales


class Modulation(NamedTuple):
    """Tables [R,D] of a norm: its weight and bias, one row for each noise level or for each frame."""

    weight: Tensor | None
    bias: Tensor | None


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last gated by the noise level of each frame."""

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, eps: float, qk_norm: bool, cross_attn_norm: bool
    ) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = SelfAttention(dim, num_heads, eps, qk_norm)
        self.norm3 = nn.LayerNorm(dim, eps) if cross_attn_norm else None
        self.cross_attn = CrossAttention(dim, num_heads, eps, qk_norm)
        self.ffn = nn.Sequential(Linear(dim, ffn_dim, gelu=True), nn.Identity(), Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(nn.init.normal_(torch.empty(1, 6, dim), std=dim**-0.5))

    def table(self, time: Tensor) -> Tensor:
        """Modulation [R,6,D] of the noise levels' projections `time` [R,6,D], whose scales already hold their 1."""
        return self.modulation.float() + time

    def after_self_attention(self, x: Tensor, y: Tensor, table: Tensor, frames: FrameIndices) -> Tensor:
        """Add self-attention's output y to x [B,F,S,D] float32, in place; → what cross-attention reads."""
        affine = Modulation(None, None)
        if self.norm3 is not None:
            affine = Modulation(self.norm3.weight.float()[None], self.norm3.bias.float()[None])
        return self._close(x, y, table[:, 2], affine, frames, y.dtype)

    def finish(
        self,
        x: Tensor,
        h: Tensor,
        table: Tensor,
        following: Modulation,
        frames: FrameIndices,
        text: TextKeys,
        prompts: Tensor | None,
        backend: str,
        dtype: torch.dtype,
    ) -> Tensor:
        """Cross-attention and feed-forward on x in place; → x normalised and modulated by `following`, in `dtype`."""
        y = self.cross_attn(h, text, prompts, backend)
        h = self._close(x, y, None, Modulation(table[:, 4], table[:, 3]), frames, h.dtype)
        return self._close(x, self.ffn(h), table[:, 5], following, frames, dtype)

    def _close(
        self, x: Tensor, y: Tensor, gate: Tensor | None, norm: Modulation, frames: FrameIndices, dtype: torch.dtype
    ) -> Tensor:
        return ops.residual_norm_modulate(x, y, gate, *norm, frames.level_rows, eps=self.eps, dtype=dtype)


class Head(nn.Module):
    """Norm, modulation by each frame's own noise level, projection to patches; float32."""

    def __init__(self, dim: int, patch_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, patch_channels)
        self.modulation = nn.Parameter(nn.init.normal_(torch.empty(1, 2, dim), std=dim**-0.5))

    def norm(self, time: Tensor) -> Modulation:
        """Tables of the norm for time embeddings [R,D] float32."""
        shift, scale = (self.modulation.float() + time.unsqueeze(1)).unbind(1)
        return Modulation(1 + scale, shift)

    def forward(self, h: Tensor) -> Tensor:
        """h [B,F,S,D], normalised and modulated → [B,F,S,patch channels]."""
        return linear_fp32(self.head, h)
