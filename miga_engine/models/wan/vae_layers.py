"""Layers of the Wan video VAEs, causal in time.

Inside the network a clip is [B,T,H,W,C], contiguous: a frame is a picture to every 2-D operation (channels-last,
the layout that convolutions are fastest in on CPUs and GPUs), a norm reads neighbours in memory, a 1x1 convolution is a
matrix product, and a temporal convolution is a 2-D convolution over the channels of neighbouring frames.

Temporal state is a dict of tensors, one entry per layer that looks back, under the layer's name in the module tree. A
layer replaces its entry and never writes into it, so autograd may keep the old one. An absent entry means "nothing seen
yet".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine.models.layers import Conv2d, pointwise, wants_gradient
from miga_engine.ops import conv2d, frame_attention, untimed_backend

FeatureCache = dict[str, Tensor]


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a picture layer to each frame: [B,T,H,W,C] → [B,T,H',W',C']."""
    pictures = x.flatten(0, 1).permute(0, 3, 1, 2)  # [B·T,C,H,W], channels-last in memory
    return layer(pictures).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


class Causal:
    """A layer that is also given the temporal state of the clip: called as `layer(x, cache)`."""


class CausalConv3d(Causal, nn.Conv3d):
    """3-D convolution over [B,T,H,W,C] that sees the present and `kernel - 1` past frames, zeros before the first.

    The parameters are those of nn.Conv3d. It is computed as one 2-D convolution over the stacked channels of the frames
    in reach. On one CPU core (float32, best of 10) that took 1.9 ms against 8.1 of conv3d at 32 channels of 4x32x48,
    the embedded model's scale, and 52 against 49 (channels-last) or 64 ms at 96 channels of 4x64x96.
    """

    allow_tf32 = False

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], time_stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=(time_stride, 1, 1), padding=(0, padding, padding))
        self.cache_name = ""
        self._zero_past: tuple[tuple[int, int], bool] | None = None

    @property
    def reach(self) -> int:
        """Past frames the kernel looks at."""
        return self.kernel_size[0] - 1

    def is_pointwise_in_time(self) -> bool:
        """True where the taps on past frames contribute exactly nothing, so that they need neither work nor history."""
        if self.reach == 0:
            return True
        weight = self.weight
        if wants_gradient(weight):
            return False
        key = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._zero_past is None or self._zero_past[0] != key:
            self._zero_past = (key, not bool(weight[:, :, :-1].any()))
        return self._zero_past[1]

    def lay_out(self) -> None:
        """Put the weights in memory as the 2-D convolution reads them, which saves copies; their shape stays."""
        self.weight.data = self.weight.data.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)

    def taps(self, frames: Tensor, num_taps: int) -> Tensor:
        """Convolve with the last `num_taps` time taps, unpadded in time: T → (T - num_taps) // stride + 1 frames."""
        stride = self.stride[0]
        num_out = (frames.shape[1] - num_taps) // stride + 1
        span = stride * (num_out - 1) + 1
        if num_taps == 1:
            stacked = frames[:, :span:stride]
        else:
            stacked = torch.cat([frames[:, i : i + span : stride] for i in range(num_taps)], dim=-1)
        # [C',kh,kw,num_taps·C], dense: some taps of weights that are laid out lie apart, which rounds in another way.
        kernel = self.weight[:, :, -num_taps:].permute(0, 3, 4, 2, 1).flatten(3).contiguous()
        if self.kernel_size[1:] == (1, 1):
            return pointwise(stacked, kernel.flatten(1), self.bias)
        pictures = stacked.flatten(0, 1).permute(0, 3, 1, 2)
        out = conv2d(
            pictures, kernel.permute(0, 3, 1, 2), self.bias, padding=self.padding[1:], allow_tf32=self.allow_tf32
        )
        return out.permute(0, 2, 3, 1).unflatten(0, (frames.shape[0], num_out))

    def forward(self, x: Tensor, cache: FeatureCache | None = None) -> Tensor:
        """x [B,T,H,W,C], any T >= 1, continuing the clip in `cache` → [B,T,H',W',C']."""
        if self.is_pointwise_in_time():
            return self.taps(x, 1)
        past = None if cache is None else cache.get(self.cache_name)
        frames = x if past is None else torch.cat([past, x], dim=1)
        if cache is not None:
            cache[self.cache_name] = frames[:, -self.reach :].clone()  # a view would keep the whole chunk alive
        missing = self.reach + x.shape[1] - frames.shape[1]
        if x.shape[1] == 1:  # taps that would meet only the zeros before the clip are left out
            return self.taps(frames, self.kernel_size[0] - missing)
        if missing:
            frames = F.pad(frames, (0, 0, 0, 0, 0, 0, missing, 0))
        return self.taps(frames, self.kernel_size[0])


class ChannelNorm(nn.Module):
    """x / ‖x‖ · √C · γ over the channels of [...,C], followed by SiLU where `has_silu`."""

    def __init__(self, channels: int, is_video: bool = True, has_silu: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1) if is_video else torch.ones(channels, 1, 1))
        self.has_silu = has_silu

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.flatten()
        is_trained = wants_gradient(x, gamma)
        if x.is_cuda:
            out = F.rms_norm(x, gamma.shape, gamma, eps=1e-24)
        else:  # rms_norm has no fused form on CPUs; in place, for memory that is new costs more than arithmetic
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
            gain = gamma * gamma.numel() ** 0.5
            out = x / norm * gain if is_trained else (x / norm).mul_(gain)
        return F.silu(out, inplace=not is_trained) if self.has_silu else out


class ResidualBlock(Causal, nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # The identities stand where the original has SiLU and dropout, which keeps the numbers of the keys.
        self.residual = nn.Sequential(
            ChannelNorm(in_channels),
            nn.Identity(),
            CausalConv3d(in_channels, out_channels, (3, 3, 3), padding=1),
            ChannelNorm(out_channels),
            nn.Identity(),
            nn.Identity(),
            CausalConv3d(out_channels, out_channels, (3, 3, 3), padding=1),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        return run_sequence(self.residual, x, cache).add_(self.shortcut(x))


class AttentionBlock(nn.Module):
    """Self-attention with one head over the positions of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, is_video=False, has_silu=False)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(0, 1).flatten(1, 2).unsqueeze(2)  # [B·T,H·W,1,C]
        q, k, v = pointwise(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, dim=-1)
        out = pointwise(
            frame_attention(q, k, v, backend=untimed_backend(x.device)), self.proj.weight.flatten(1), self.proj.bias
        )
        return x + out.view(x.shape)


class Downsample(Causal, nn.Module):
    """Halve height and width, and from the second frame on also time when `is_temporal`."""

    def __init__(self, channels: int, is_temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2) if is_temporal else None

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        name = self.time_conv.cache_name
        past = None if cache is None else cache.get(name)
        if cache is not None:
            cache[name] = x[:, -1:].clone()
        if past is not None:
            return self.time_conv.taps(torch.cat([past, x], dim=1), 3)
        if x.shape[1] == 1:
            return x
        return torch.cat([x[:, :1], self.time_conv.taps(x, 3)], dim=1)


class Upsample(Causal, nn.Module):
    """Double height and width; double time too, after the first latent, when `is_temporal`."""

    def __init__(self, channels: int, out_channels: int, is_temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"), Conv2d(channels, out_channels, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if is_temporal else None

    def double_time(self, x: Tensor, cache: FeatureCache | None, time_conv: CausalConv3d) -> Tensor:
        """[B,T,H,W,C] → [B,2T,H,W,C]; the clip's first frame stays single and outside the history."""

        def doubled(frames: Tensor) -> Tensor:
            return time_conv(frames, cache).unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2)

        if cache is not None and time_conv.cache_name in cache:
            return doubled(x)
        rest = x[:, 1:]
        if cache is not None:
            cache[time_conv.cache_name] = rest[:, :0]  # no frames yet, yet no longer at the first
        if rest.shape[1] == 0:
            return x
        return torch.cat([x[:, :1], doubled(rest)], dim=1)

    def forward(self, x: Tensor, cache: FeatureCache | None) -> Tensor:
        if self.time_conv is not None:
            x = self.double_time(x, cache, self.time_conv)
        return per_frame(self.resample, x)


def run_sequence(layers: nn.Sequential, x: Tensor, cache: FeatureCache | None) -> Tensor:
    """nn.Sequential that hands the temporal state to the layers that keep one."""
    for layer in layers:
        x = layer(x, cache) if isinstance(layer, Causal) else layer(x)
    return x


def residual_blocks(channels: int, out_channels: int, count: int) -> list[nn.Module]:
    """So many residual blocks at one resolution."""
    return [ResidualBlock(channels if i == 0 else out_channels, out_channels) for i in range(count)]


def middle_block(channels: int) -> nn.Sequential:
    """Residual, attention, residual at the lowest resolution."""
    return nn.Sequential(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


def head_block(channels: int, out_channels: int) -> nn.Sequential:
    """Norm, SiLU and the last convolution."""
    return nn.Sequential(
        ChannelNorm(channels), nn.Identity(), CausalConv3d(channels, out_channels, (3, 3, 3), padding=1)
    )
