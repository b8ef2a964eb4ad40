"""The Wan2.1 video VAE: 8x smaller in space, 4x in time after the first frame, causal, decodable as a stream.

Parameter names are those of the official `Wan2.1_VAE.pth`. Source: the Wan2.1 report (arXiv 2503.20314), section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miga_engine.errors import ConfigError
from miga_engine.models.layers import check_finite
from miga_engine.models.protocols import VAE
from miga_engine.models.wan.vae_layers import CausalConv3d, Decoder, Encoder, FeatureCache

# Statistics of the published 16-channel latents, by which they are brought to zero mean and unit variance.
WAN_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of the VAE; the defaults are the published Wan2.1 ones.

    `latents_mean` and `latents_std` hold z_dim numbers; None means the published statistics for 16 channels, and no
    normalisation for any other number of channels.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ConfigError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries for {len(self.dim_mult)} levels: "
                "give one entry for each level but the last"
            )
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if values is not None and len(values) != self.z_dim:
                raise ConfigError(f"{name} has {len(values)} numbers: give one for each of the {self.z_dim} channels")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along height and width."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def frame_ratio(self) -> int:
        """Video frames per latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of the latents by channel."""
        published = self.z_dim == len(WAN_LATENTS_MEAN)
        mean = WAN_LATENTS_MEAN if published else (0.0,) * self.z_dim
        std = WAN_LATENTS_STD if published else (1.0,) * self.z_dim
        return self.latents_mean or mean, self.latents_std or std


class WanVAE(VAE):
    """Video [B,3,T,H,W] in [-1,1] ↔ normalised latents [B,C,F,h,w], T = 1 + 4(F-1), h = H/8, w = W/8.

    It computes in the dtype of its weights (the published ones are float32) and leaves gradients to the caller.
    """

    def __init__(self, config: WanVAEConfig | None = None) -> None:
        super().__init__()
        self.config: WanVAEConfig = config or WanVAEConfig()
        config = self.config
        shape = (config.dim_mult, config.num_res_blocks)
        self.encoder = Encoder(config.dim, config.z_dim * 2, *shape, config.temporal_downsample)
        self.conv1 = CausalConv3d(config.z_dim * 2, config.z_dim * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config.dim, config.z_dim, *shape, config.temporal_downsample[::-1])
        for name, module in self.named_modules():
            if isinstance(module, CausalConv3d):
                module.cache_name = name
        # On the CPU even when the module is built on `meta`: they are constants, no checkpoint brings them.
        mean, std = (torch.tensor(v, dtype=torch.float32, device="cpu") for v in config.statistics())
        self.register_buffer("latents_mean", mean, persistent=False)
        self.register_buffer("latents_std", std, persistent=False)
        self.latents_mean: Tensor
        self.latents_std: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the network computes."""
        return self.conv2.weight.dtype

    def lay_out(self) -> WanVAE:
        """Lay the weights out for inference (`CausalConv3d.lay_out`); the same VAE."""
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.lay_out()
        return self

    def encode(self, video: Tensor) -> Tensor:
        """Video [B,3,T,H,W] in [-1,1] → normalised mean latents [B,C,F,h,w].

        Raises ConfigError unless T = 1 mod 4 and H, W are multiples of 8, NumericsError on NaN and infinity.
        """
        mean, _ = self.encode_moments(video)
        check_finite("the VAE, encoding (vae_dtype),", video, mean, self.dtype)
        frames = (mean.movedim(1, -1) - self.latents_mean) / self.latents_std
        return frames.to(self.dtype).movedim(-1, 1)

    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video [B,3,T,H,W] → mean and log-variance of the latents before normalisation, each [B,C,F,h,w].

        The clip runs through in chunks of 1, 4, 4, ... frames with causal caches, which is differentiable as a whole.
        """
        self._check_video(video)
        frames = video.to(self.dtype).movedim(1, -1).contiguous()
        cache: FeatureCache = {}
        ratio = self.config.frame_ratio
        starts = [0, *range(1, frames.shape[1], ratio)]
        parts = [self.encoder(frames[:, s : s + (ratio if s else 1)], cache) for s in starts]
        mean, logvar = self.conv1(torch.cat(parts, dim=1)).chunk(2, dim=-1)
        return mean.movedim(-1, 1), logvar.movedim(-1, 1)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes the latents of one clip in pieces and gives bit for bit the frames of `decode`."""
        return StreamDecoder(self)

    def decode_core(self, latents: Tensor, cache: FeatureCache | None = None) -> Tensor:
        """Like `decode`, all frames in one pass and not clamped: the path for training.

        `cache` continues a clip and is updated (entries are replaced, never written into).
        """
        frames = latents.movedim(1, -1) * self.latents_std + self.latents_mean
        return self.decoder(self.conv2(frames.to(self.dtype).contiguous()), cache).movedim(-1, 1)

    def _check_video(self, video: Tensor) -> None:
        ratio, factor = self.config.frame_ratio, self.config.spatial_factor
        if video.ndim != 5 or video.shape[1] != 3:
            raise ConfigError(f"encode takes a video [B, 3, T, H, W]: the given tensor is {tuple(video.shape)}")
        num_frames, height, width = video.shape[2:]
        if num_frames % ratio != 1 % ratio:
            longer = num_frames + (1 - num_frames) % ratio
            raise ConfigError(
                f"encode takes 1 + {ratio}·n frames and was given {num_frames}: "
                f"cut the clip to {max(1, longer - ratio)} frames or repeat its last frame up to {longer}"
            )
        if height % factor or width % factor:
            raise ConfigError(
                f"encode takes a height and width divisible by {factor} and was given {height}x{width}: "
                "crop or resize it"
            )


class StreamDecoder:
    """Decodes the latents of one clip piece by piece, one latent frame at a time, whatever the pieces."""

    def __init__(self, vae: WanVAE) -> None:
        self._vae = vae
        self._cache: FeatureCache = {}
        self._sizes: tuple[int, ...] | None = None

    def push(self, latents: Tensor) -> Tensor:
        """Next latents [B,C,n,h,w], n >= 1 → their frames [B,3,t,8h,8w] in [-1,1].

        t = 4n, less 3 in the piece that opens the clip. Raises ConfigError when the sizes differ from the earlier ones,
        NumericsError on NaN and infinity, which is waited for.
        """
        channels = self._vae.config.z_dim
        if latents.ndim != 5 or latents.shape[1] != channels or latents.shape[2] == 0:
            raise ConfigError(f"the VAE decodes latents [B, {channels}, n >= 1, h, w]: given {tuple(latents.shape)}")
        sizes = (latents.shape[0], *latents.shape[3:])
        if self._sizes is not None and self._sizes != sizes:
            raise ConfigError(
                f"the stream was opened with (batch, height, width) = {self._sizes} and now gets {sizes}: "
                "open a new stream_decoder() for another clip"
            )
        cache = dict(self._cache)  # a push that fails leaves the stream as it was
        frames = torch.cat([self._vae.decode_core(latent, cache) for latent in latents.split(1, dim=2)], dim=2)
        check_finite("the VAE, decoding (vae_dtype),", latents, frames, self._vae.dtype)
        pictures = frames.clamp(-1.0, 1.0)
        self._cache, self._sizes = cache, sizes
        return pictures

    def state(self) -> dict[str, Tensor]:
        """All that the next push depends on: a tensor [B,frames,h,w,C] by name of each layer that looks back."""
        return dict(self._cache)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()` of a decoder of the same VAE. Raises ConfigError on names this VAE does not have."""
        known = {m.cache_name for m in self._vae.modules() if isinstance(m, CausalConv3d)}
        unknown = sorted(set(state) - known)
        if unknown:
            raise ConfigError(
                f"the saved decoder state names {unknown[0]}, which this VAE lacks: resume with its own VAE"
            )
        device = self._vae.latents_mean.device
        self._cache = {name: tensor.to(device) for name, tensor in state.items()}
        self._sizes = None
