"""The image VAE of VideoCrafter2: 8x smaller in space, each frame on its own.

Parameter names are those of `model.ckpt` under `first_stage_model.`. Source: latent diffusion (arXiv 2112.10752), the
VAE with a KL term. Pictures are [B,C,H,W], channels-last in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine.errors import ConfigError
from miga_engine.models.layers import Conv2d, check_finite, pointwise
from miga_engine.models.protocols import VAE
from miga_engine.ops import frame_attention, untimed_backend


@dataclass(frozen=True)
class KLVAEConfig:
    """Sizes of the VAE; the defaults are the published ones. Latents are multiplied by `latents_scale`."""

    dim: int = 128
    z_dim: int = 4
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latents_scale: float = 0.18215

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along height and width."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def frame_ratio(self) -> int:
        """Video frames per latent frame."""
        return 1


class Pointwise(nn.Conv2d):
    """1x1 convolution as a matrix product: 2.1 times as fast on one CPU core (float32, 512 channels of 40x64)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] → [B,C',H,W]."""
        return pointwise(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Norm(nn.GroupNorm):
    """Group norm with 32 groups, followed by SiLU where `has_silu`."""

    def __init__(self, channels: int, has_silu: bool = True) -> None:
        super().__init__(32, channels, eps=1e-6)
        self.has_silu = has_silu

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.silu(x, inplace=not torch.is_grad_enabled()) if self.has_silu else x


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = Norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Norm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = Pointwise(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Self-attention with one head over the positions of a picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, has_silu=False)
        self.q = Pointwise(channels, channels)
        self.k = Pointwise(channels, channels)
        self.v = Pointwise(channels, channels)
        self.proj_out = Pointwise(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(2) for layer in (self.q, self.k, self.v))
        attended = (
            frame_attention(q, k, v, backend=untimed_backend(x.device))
            .squeeze(2)
            .transpose(1, 2)
            .unflatten(2, x.shape[2:])
        )  # from [B,H·W,1,C]
        return x + self.proj_out(attended)


class Downsample(nn.Module):
    """Halve height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks at one resolution and, except at the last level, the step to the next."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(*pair) for pair in pairwise(widths))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Encoder(nn.Module):
    """[B,3,H,W] → [B,2·z_dim,H/8,W/8] for four levels."""

    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__()
        widths = [config.dim * mult for mult in config.dim_mult]
        self.conv_in = Conv2d(3, config.dim, 3, padding=1)
        self.down = nn.ModuleList(
            Level(before, width, config.num_res_blocks) for before, width in pairwise([config.dim, *widths])
        )
        for level, width in zip(self.down[:-1], widths[:-1], strict=True):
            level.downsample = Downsample(width)
        self.mid = Middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = Conv2d(widths[-1], 2 * config.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    """[B,z_dim,h,w] → [B,3,8h,8w] for four levels; `up` counts them from the highest resolution."""

    def __init__(self, config: KLVAEConfig) -> None:
        super().__init__()
        widths = [config.dim * mult for mult in config.dim_mult]
        self.conv_in = Conv2d(config.z_dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(before, width, config.num_res_blocks + 1) for width, before in pairwise([*widths, widths[-1]])
        )
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = Norm(widths[0])
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))


class KLVAE(VAE):
    """Video [B,3,T,H,W] in [-1,1] ↔ scaled latents [B,C,T,H/8,W/8], one frame at a time.

    It computes in the dtype of its weights (the published ones are float32) and leaves gradients to the caller.
    """

    def __init__(self, config: KLVAEConfig | None = None) -> None:
        super().__init__()
        self.config: KLVAEConfig = config or KLVAEConfig()
        config = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Pointwise(2 * config.z_dim, 2 * config.z_dim)
        self.post_quant_conv = Pointwise(config.z_dim, config.z_dim)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the network computes."""
        return self.post_quant_conv.weight.dtype

    def encode(self, video: Tensor) -> Tensor:
        """Video [B,3,T,H,W] in [-1,1] → scaled mean latents [B,C,T,h,w].

        Raises ConfigError unless H and W are multiples of 8, NumericsError on NaN and infinity.
        """
        mean = self.encode_moments(video)[0]
        check_finite("the VAE, encoding (vae_dtype),", video, mean, self.dtype)
        return mean * self.config.latents_scale

    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video [B,3,T,H,W] → mean and log-variance of the latents before scaling, each [B,C,T,h,w]."""
        factor = self.config.spatial_factor
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] == 0:
            raise ConfigError(f"encode takes a video [B, 3, T >= 1, H, W]: the given tensor is {tuple(video.shape)}")
        height, width = video.shape[3:]
        if height % factor or width % factor:
            raise ConfigError(
                f"encode takes a height and width divisible by {factor} and was given {height}x{width}: "
                "crop or resize it"
            )
        frames = [self.quant_conv(self.encoder(self._picture(frame))) for frame in video.unbind(2)]
        mean, logvar = torch.stack(frames, dim=2).chunk(2, dim=1)
        return mean, logvar

    def stream_decoder(self) -> FrameDecoder:
        """A decoder that takes the latents of one clip in pieces and gives bit for bit the frames of `decode`."""
        return FrameDecoder(self)

    def decode_frame(self, latent: Tensor) -> Tensor:
        """Scaled latents [B,C,h,w] of one frame → pictures [B,3,8h,8w], not clamped."""
        return self.decoder(self.post_quant_conv(self._picture(latent / self.config.latents_scale)))

    def _picture(self, x: Tensor) -> Tensor:
        return x.to(self.dtype, memory_format=torch.channels_last)


class FrameDecoder:
    """Decodes latents one frame at a time, whatever the pieces; no frame depends on another."""

    def __init__(self, vae: KLVAE) -> None:
        self._vae = vae

    def push(self, latents: Tensor) -> Tensor:
        """Next latents [B,C,n,h,w], n >= 1 → their frames [B,3,n,8h,8w] in [-1,1].

        Raises NumericsError on NaN and infinity, which is waited for.
        """
        channels = self._vae.config.z_dim
        if latents.ndim != 5 or latents.shape[1] != channels or latents.shape[2] == 0:
            raise ConfigError(f"the VAE decodes latents [B, {channels}, n >= 1, h, w]: given {tuple(latents.shape)}")
        frames = torch.stack([self._vae.decode_frame(latent) for latent in latents.unbind(2)], dim=2)
        check_finite("the VAE, decoding (vae_dtype),", latents, frames, self._vae.dtype)
        return frames.clamp(-1.0, 1.0)

    def state(self) -> dict[str, Tensor]:
        """All that the next push depends on: nothing."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()` of another decoder. Raises ConfigError when it is the state of another VAE's."""
        if state:
            raise ConfigError(
                f"the saved decoder state names {min(state)}, which this VAE lacks: resume with its own VAE"
            )
