"""The Wan video VAEs: smaller in space, 4x smaller in time after the first frame, causal, decodable as a stream.

That of Wan2.1 is 8x smaller in space. That of Wan2.2 TI2V-5B is 16x smaller: it sees patches of 2x2 pixels as channels,
has a decoder wider than its encoder, and a shortcut around each level. Parameter names are those of the official
`Wan2.1_VAE.pth` and `Wan2.2_VAE.pth`. Sources: the Wan2.1 report (arXiv 2503.20314), section 4.1; the code of Wan2.2
(github.com/Wan-Video/Wan2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miga_engine.errors import ConfigError
from miga_engine.models.layers import check_finite
from miga_engine.models.protocols import VAE
from miga_engine.models.wan.vae_layers import CausalConv3d, FeatureCache
from miga_engine.models.wan.vae_levels import Decoder, Encoder

# Statistics of the published latents, of 16 and of 48 channels, that bring them to zero mean and unit variance.
WAN_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
WAN22_LATENTS_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_LATENTS_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
_STATISTICS = {16: (WAN_LATENTS_MEAN, WAN_LATENTS_STD), 48: (WAN22_LATENTS_MEAN, WAN22_LATENTS_STD)}


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of the VAE; the defaults are the published Wan2.1 ones.

    `decoder_dim` is the decoder's `dim`, None for the same; pictures go in and come out as patches of `patch_size`²
    pixels; `is_residual` gives each level a shortcut, and keeps its channels where it resamples. `latents_mean` and
    `latents_std` hold z_dim numbers; None means the published statistics for 16 and 48 channels, and no normalisation
    for any other number of channels.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    decoder_dim: int | None = None
    patch_size: int = 1
    is_residual: bool = False
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
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def frame_ratio(self) -> int:
        """Video frames per latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of the latents by channel."""
        mean, std = _STATISTICS.get(self.z_dim, ((0.0,) * self.z_dim, (1.0,) * self.z_dim))
        return self.latents_mean or mean, self.latents_std or std


WAN22_VAE = WanVAEConfig(dim=160, z_dim=48, decoder_dim=256, patch_size=2, is_residual=True)
"""Sizes of the published VAE of Wan2.2 TI2V-5B."""


class WanVAE(VAE):
    """Video [B,3,T,H,W] in [-1,1] ↔ normalised latents [B,C,F,h,w], T = 1 + 4(F-1), h and w an 8th or 16th of H and W.

    It computes in the dtype of its weights (the published ones are float32) and leaves gradients to the caller.
    """

    def __init__(self, config: WanVAEConfig | None = None) -> None:
        super().__init__()
        self.config: WanVAEConfig = config or WanVAEConfig()
        config = self.config
        shape = (config.dim_mult, config.num_res_blocks)
        down, up = config.temporal_downsample, config.temporal_downsample[::-1]
        patch = 3 * config.patch_size**2
        self.encoder = Encoder(patch, config.dim, config.z_dim * 2, *shape, down, config.is_residual)
        self.conv1 = CausalConv3d(config.z_dim * 2, config.z_dim * 2, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(patch, config.decoder_dim or config.dim, config.z_dim, *shape, up, config.is_residual)
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

        Raises ConfigError unless T = 1 mod 4 and H, W divide into positions, NumericsError on NaN and infinity.
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
        frames = patchified(video.to(self.dtype).movedim(1, -1), self.config.patch_size).contiguous()
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
        patches = self.decoder(self.conv2(frames.to(self.dtype).contiguous()), cache)
        return unpatchified(patches, self.config.patch_size).movedim(-1, 1)

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


def patchified(x: Tensor, size: int) -> Tensor:
    """[B,T,H,W,C] → [B,T,H/size,W/size,C·size²]: the pixels of a patch as channels, of each colour column by column."""
    if size == 1:
        return x
    blocks = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B,T,h,row,w,column,C]
    return blocks.permute(0, 1, 2, 4, 6, 5, 3).flatten(4)


def unpatchified(x: Tensor, size: int) -> Tensor:
    """The inverse of `patchified`."""
    if size == 1:
        return x
    blocks = x.unflatten(-1, (-1, size, size))  # [B,T,h,w,C,column,row]
    return blocks.permute(0, 1, 2, 6, 3, 5, 4).flatten(4, 5).flatten(2, 3)


class StreamDecoder:
    """Decodes the latents of one clip piece by piece, one latent frame at a time, whatever the pieces."""

    def __init__(self, vae: WanVAE) -> None:
        self._vae = vae
        self._cache: FeatureCache = {}
        self._sizes: tuple[int, ...] | None = None

    def push(self, latents: Tensor) -> Tensor:
        """Next latents [B,C,n,h,w], n >= 1 → their frames [B,3,t,H,W] in [-1,1].

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
