"""Layers of the VideoCrafter2 3-D UNet.

The latent frames of all windows are images [N,C,H,W], N = B·F, channels last in memory: the same memory is tokens
[B,F,S,C] to an attention and, to a convolution over time, images [B,C,F,S] of F rows. Matrix products and
convolutions run in the dtype of their weights, as do the sums of the residual blocks; norms, the residual stream within
a transformer and the time path in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine import ops
from miga_engine.models import layers
from miga_engine.models.layers import Linear, guidance_branches, linear_fp32

GROUPS = 32  # of every group norm


class TextKeys(NamedTuple):
    """One layer's keys and values [P,T,heads,head_dim] of P prompts."""

    keys: Tensor
    values: Tensor


class LayerInputs(NamedTuple):
    """What the layers need to know of the latent frames beside their images."""

    batch: int
    time: Tensor  # float32 [N,4·model_channels], after its SiLU
    text: tuple[TextKeys, ...]
    prompts: Tensor | None  # int64 [B] or [B,F], rows of the text keys
    backend: str  # of attention within a frame
    short_backend: str  # of attention to a prompt and along time, which has few keys


@dataclass(frozen=True)
class ContextCache:
    """Cross-attention keys and values of P prompts, computed once."""

    layers: tuple[TextKeys, ...]

    @property
    def num_prompts(self) -> int:
        """P, the number of rows a context_index may name."""
        return self.layers[0].keys.shape[0]

    def table(self, num_rows: int, num_keys: int) -> ContextCache:
        """A cache of so many rows and keys, of the kinds of this one, to `write` to."""
        return ContextCache(
            tuple(
                TextKeys(*(tensor.new_zeros(num_rows, num_keys, *tensor.shape[2:]) for tensor in layer))
                for layer in self.layers
            )
        )

    def write(self, row: int, prompt: ContextCache) -> None:
        """Make a cache of one prompt, of as many keys, this row."""
        for mine, theirs in zip(self.layers, prompt.layers, strict=True):
            for table, tensor in zip(mine, theirs, strict=True):
                table[row] = tensor[0]

    def row(self, row: int, num_keys: int) -> ContextCache:
        """The first keys of a row, as `write` takes them, of the same memory."""
        one = slice(row, row + 1)
        return ContextCache(
            tuple(TextKeys(layer.keys[one, :num_keys], layer.values[one, :num_keys]) for layer in self.layers)
        )

    def check_index(self, batch: int, num_frames: int, index: Tensor | None) -> int:
        """How many guidance branches the index names prompts for: G of [G·B] or [G·B,F].

        Without an index the cache holds one prompt for all windows or one for each. Raises ConfigError on other sizes.
        """
        return guidance_branches(self.num_prompts, batch, num_frames, index)


def to_tokens(images: Tensor, batch: int) -> Tensor:
    """[N,C,H,W] channels last → [B,F,S,C] of the same memory."""
    return images.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, (batch, -1))


def to_images(tokens: Tensor, height: int) -> Tensor:
    """[B,F,S,C] → [N,C,H,W] channels last, of the same memory."""
    return tokens.flatten(0, 1).unflatten(1, (height, -1)).permute(0, 3, 1, 2)


class PointwiseConv1d(nn.Conv1d):
    """A linear map whose checkpoint holds it as a convolution of one tap."""

    def forward(self, input: Tensor) -> Tensor:
        """[...,C] → [...,C']."""
        return ops.linear(input, self.weight.squeeze(2), self.bias)


class GroupNorm(nn.GroupNorm):
    """Group norm in float32, which is also the dtype of its result."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(GROUPS, channels, eps)

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input.float(), GROUPS, self.weight.float(), self.bias.float(), self.eps)


class Conv2d(layers.Conv2d):
    """A convolution that takes any dtype and gives channels last in that of its weights."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype, memory_format=torch.channels_last))


class TemporalConv(nn.Conv3d):
    """A convolution over three neighbouring frames, on images whose rows are the frames."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, input: Tensor) -> Tensor:
        """[B,C,F,S] → the same shape, channels last, in the dtype of the weights."""
        x = input.to(self.weight.dtype, memory_format=torch.channels_last)
        return ops.conv2d(x, self.weight.squeeze(4), self.bias, padding=(1, 0))


class TemporalConvBlock(nn.Module):
    """Four convolutions over time with a residual connection; the norms' statistics are of the whole window."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(GroupNorm(channels), nn.SiLU(inplace=True), TemporalConv(channels))
        self.conv2, self.conv3, self.conv4 = (
            nn.Sequential(GroupNorm(channels), nn.SiLU(inplace=True), nn.Identity(), TemporalConv(channels))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,F,S] → the same shape and dtype."""
        return self.conv4(self.conv3(self.conv2(self.conv1(x)))).add_(x)


class ResBlock(nn.Module):
    """Two convolutions of each frame, the time embedding added between them, then convolutions over time."""

    def __init__(self, channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(inplace=True), Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(inplace=True),
            nn.Identity(),
            Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)
        self.temopral_conv = TemporalConvBlock(out_channels)  # spelt as in the published checkpoint

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        time = linear_fp32(cast(nn.Linear, self.emb_layers[1]), inputs.time)
        h = self.out_layers(self.in_layers(x) + time[:, :, None, None]).add_(self.skip_connection(x))
        rows = to_tokens(h, inputs.batch).permute(0, 3, 1, 2)  # [B,C,F,S]
        return to_images(self.temopral_conv(rows).permute(0, 2, 3, 1), x.shape[2])


class Attention(nn.Module):
    """Attention along the tokens of a row, or from all tokens of a window to its text."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        inner = num_heads * head_dim
        self.to_q = Linear(dim, inner, bias=False)
        self.to_k = Linear(context_dim, inner, bias=False)
        self.to_v = Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(Linear(inner, dim), nn.Identity())

    def heads(self, x: Tensor) -> Tensor:
        """[...,heads·head_dim] → [...,heads,head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def keys_values(self, context: Tensor) -> TextKeys:
        """Text embeddings or tokens [P,T,context_dim] → their keys and values."""
        return TextKeys(self.heads(self.to_k(context)), self.heads(self.to_v(context)))

    def along(self, x: Tensor, backend: str) -> Tensor:
        """x [B,R,T,C] → the same shape and dtype; the T tokens of each of the R rows see each other."""
        rows = x.flatten(0, 1)
        out = ops.frame_attention(self.heads(self.to_q(rows)), *self.keys_values(rows), backend=backend)
        return self.to_out(out.flatten(2)).view_as(x)

    def to_text(self, x: Tensor, text: TextKeys, prompts: Tensor | None, backend: str) -> Tensor:
        """x [B,F,S,C] → the same shape and dtype; prompts, int64 [B] or [B,F], are rows of the text keys."""
        q = self.heads(self.to_q(x.flatten(1, 2)))
        out = ops.frame_attention(q, *text, key_rows=prompts, backend=backend)
        return self.to_out(out.flatten(2)).view_as(x)


class GEGLU(nn.Module):
    """Values times the exact GELU of their gates."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)


class FeedForward(nn.Module):
    """Gated feed-forward of four times the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text (or, along time, self-attention once more) and feed-forward."""

    def __init__(self, dim: int, context_dim: int | None, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.reads_text = context_dim is not None
        self.text_layer = 0  # place in the context cache, set by the network
        self.attn1 = Attention(dim, dim, num_heads, head_dim)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, dim if context_dim is None else context_dim, num_heads, head_dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, inputs: LayerInputs, dtype: torch.dtype) -> Tensor:
        """x [B,R,T,C] float32, updated in place → the same in `dtype`."""
        backend = inputs.backend if self.reads_text else inputs.short_backend
        norm = self.norm1
        h = ops.norm_modulate(x, *_affine(norm), eps=norm.eps, dtype=dtype)
        h = self._close(x, self.attn1.along(h, backend), self.norm2)
        if self.reads_text:
            y = self.attn2.to_text(h, inputs.text[self.text_layer], inputs.prompts, inputs.short_backend)
        else:
            y = self.attn2.along(h, backend)
        h = self._close(x, y, self.norm3)
        return self._close(x, self.ff(h), None)

    def _close(self, x: Tensor, y: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        """Add y to x in place; → x by the norm, or as it is, in the dtype of y."""
        weight, bias = (None, None) if norm is None else _affine(norm)
        return ops.residual_norm_modulate(x, y, None, weight, bias, eps=self.norm1.eps, dtype=y.dtype)


def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight.float()[None], norm.bias.float()[None]


class SpatialTransformer(nn.Module):
    """Transformer blocks on the positions of each frame, which also read the frame's text."""

    def __init__(self, channels: int, context_dim: int, num_heads: int, head_dim: int, depth: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, 1e-6)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, num_heads, head_dim) for _ in range(depth)
        )
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """[N,C,H,W] → the same shape and dtype."""
        h = self.norm(x).to(x.dtype, memory_format=torch.channels_last)
        h = self.proj_in(to_tokens(h, inputs.batch))
        stream = h.float()
        for block in self.transformer_blocks:
            h = block(stream, inputs, h.dtype)
        return to_images(self.proj_out(h), x.shape[2]).add_(x)


class TemporalTransformer(nn.Module):
    """Transformer blocks along the frames of a window, for each position alone; the norm is of the whole window."""

    def __init__(self, channels: int, num_heads: int, head_dim: int, depth: int, *, is_first: bool = False) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.norm = GroupNorm(channels, 1e-6)
        self.proj_in = PointwiseConv1d(channels, inner, 1) if is_first else Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, None, num_heads, head_dim) for _ in range(depth)
        )
        self.proj_out = PointwiseConv1d(inner, channels, 1) if is_first else Linear(inner, channels)

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """[N,C,H,W] → the same shape and dtype."""
        tokens = to_tokens(x, inputs.batch)
        h = self.norm(tokens.permute(0, 3, 1, 2)).permute(0, 3, 2, 1)  # [B,S,F,C]
        h = self.proj_in(h.to(x.dtype, memory_format=torch.contiguous_format).contiguous())
        stream = h.float()
        for block in self.transformer_blocks:
            h = block(stream, inputs, h.dtype)
        return to_images(tokens + self.proj_out(h).transpose(1, 2), x.shape[2])


class Downsample(nn.Module):
    """Half the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the height and width, each pixel repeated before the convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
