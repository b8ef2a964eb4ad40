"""Encoder and decoder of the Wan video VAEs: levels of residual blocks, between which a clip is made smaller or larger.

In the Wan2.1 VAE the layers of all levels follow one another. In that of Wan2.2 each level is a module, and its input,
brought to the size of its output without parameters, is added to that. Clips are [B,T,H,W,C] as in `vae_layers`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine.errors import ConfigError
from miga_engine.models.wan.vae_layers import (
    Causal,
    CausalConv3d,
    Downsample,
    FeatureCache,
    Upsample,
    head_block,
    middle_block,
    residual_blocks,
    run_sequence,
)


class Encoder(nn.Module):
    """[B,T,H,W,in_channels] → [B,F,H/8,W/8,out_channels] for four levels."""

    def __init__(
        self,
        in_channels: int,
        dim: int,
        out_channels: int,
        dim_mult: tuple[int, ...],
        num_res_blocks: int,
        temporal_downsample: tuple[bool, ...],
        is_residual: bool,
    ) -> None:
        super().__init__()
        channels = dim
        self.conv1 = CausalConv3d(in_channels, channels, (3, 3, 3), padding=1)
        levels: list[nn.Module] = []
        for level, mult in enumerate(dim_mult):
            layers = residual_blocks(channels, dim * mult, num_res_blocks)
            if level != len(dim_mult) - 1:
                layers.append(Downsample(dim * mult, temporal_downsample[level]))
            levels += [DownLevel(channels, dim * mult, layers)] if is_residual else layers
            channels = dim * mult
        self.downsamples = nn.Sequential(*levels)
        self.middle = middle_block(channels)
        self.head = head_block(channels, out_channels)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        x = run_sequence(self.downsamples, self.conv1(x, cache), cache)
        return run_sequence(self.head, run_sequence(self.middle, x, cache), cache)


class Decoder(nn.Module):
    """[B,F,h,w,z_dim] → [B,T,8h,8w,out_channels] for four levels."""

    def __init__(
        self,
        out_channels: int,
        dim: int,
        z_dim: int,
        dim_mult: tuple[int, ...],
        num_res_blocks: int,
        temporal_upsample: tuple[bool, ...],
        is_residual: bool,
    ) -> None:
        super().__init__()
        channels = dim * dim_mult[-1]
        self.conv1 = CausalConv3d(z_dim, channels, (3, 3, 3), padding=1)
        self.middle = middle_block(channels)
        levels: list[nn.Module] = []
        for level, mult in enumerate(reversed(dim_mult)):
            layers, width = residual_blocks(channels, dim * mult, num_res_blocks + 1), dim * mult
            if level != len(dim_mult) - 1:
                width = width if is_residual else width // 2
                layers.append(Upsample(dim * mult, width, temporal_upsample[level]))
            levels += [UpLevel(channels, width, layers)] if is_residual else layers
            channels = width
        self.upsamples = nn.Sequential(*levels)
        self.head = head_block(channels, out_channels)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        x = run_sequence(self.middle, self.conv1(x, cache), cache)
        return run_sequence(self.head, run_sequence(self.upsamples, x, cache), cache)


class DownLevel(Causal, nn.Module):
    """Layers plus the averages of what they are given."""

    def __init__(self, channels: int, out_channels: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.downsamples = nn.Sequential(*layers)
        self.out_channels = out_channels
        self.factors = _factors(layers[-1])
        _check_groups(channels * _volume(self.factors), out_channels)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        return run_sequence(self.downsamples, x, cache).add_(averaged(x, self.out_channels, *self.factors))


class UpLevel(Causal, nn.Module):
    """Layers plus the repetitions of what they are given, but for the last level, which has its layers alone."""

    def __init__(self, channels: int, out_channels: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.upsamples = nn.Sequential(*layers)
        self.out_channels = out_channels
        self.factors = _factors(layers[-1])
        if self.factors != (1, 1):
            _check_groups(out_channels * _volume(self.factors), channels)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        out = run_sequence(self.upsamples, x, cache)
        if self.factors == (1, 1):
            return out
        frames = repeated(x, self.out_channels, *self.factors)
        # A clip's first frame stays single, and is the last of its repetitions.
        return out.add_(frames[:, frames.shape[1] - out.shape[1] :])


def averaged(x: Tensor, out_channels: int, time: int, space: int) -> Tensor:
    """[B,T,H,W,C] → [B,⌈T/time⌉,H/space,W/space,out_channels]; zeros before the frames fill up the first group.

    The neighbours in a block of time·space² become channels, in the order (C, time, height, width), of which each
    group of C·time·space²/out_channels is averaged.
    """
    x = F.pad(x, (0, 0, 0, 0, 0, 0, -x.shape[1] % time, 0))
    blocks = x.unflatten(3, (-1, space)).unflatten(2, (-1, space)).unflatten(1, (-1, time))  # [B,T,t,H,s,W,s,C]
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4).unflatten(-1, (out_channels, -1)).mean(-1)


def repeated(x: Tensor, out_channels: int, time: int, space: int) -> Tensor:
    """[B,T,H,W,C] → [B,time·T,space·H,space·W,out_channels].

    Each channel is repeated out_channels·time·space²/C times, and what there is then are the neighbours of a block, in
    the order (out_channels, time, height, width).
    """
    channels = x.repeat_interleave(out_channels * time * space * space // x.shape[-1], dim=-1)
    blocks = channels.unflatten(-1, (out_channels, time, space, space))  # [B,T,H,W,C,t,s,s]
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(1, 2).flatten(2, 3).flatten(3, 4)


def _factors(layer: nn.Module) -> tuple[int, int]:
    """By how much a level's last layer changes time, and height and width."""
    if not isinstance(layer, Downsample | Upsample):
        return 1, 1
    return 1 if layer.time_conv is None else 2, 2


def _volume(factors: tuple[int, int]) -> int:
    return factors[0] * factors[1] ** 2


def _check_groups(many: int, few: int) -> None:
    if many % few:
        raise ConfigError(f"{many} channels of a level's shortcut are no groups for {few}: correct dim or dim_mult")
