"""TAEW2.1: a tiny decoder of Wan2.1's latents, for previews and speed, with the VAE's sizes and its own pictures.

Parameter names are those of the published `taew2_1` files. Every convolution sees one frame; time goes through blocks
that also read their own input of the frame before. Source: TAEHV (github.com/madebyollin/taehv, MIT).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine.errors import CheckpointError, ConfigError
from miga_engine.models.family import Device
from miga_engine.models.layers import check_finite
from miga_engine.models.protocols import VAE
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.load import load_module

NUM_LAYERS = 23
_OPENING = 3  # frames that a clip begins with and that are dropped: its first latent frame is one video frame
_GROWS = {7: 1, 13: 2, 19: 2}  # layers that make several frames of one
_WIDENS = (6, 12, 18)  # layers that make a position four
_MEMORIES = (3, 4, 5, 9, 10, 11, 15, 16, 17)


@dataclass(frozen=True)
class TinyDecoderConfig:
    """Latent channels, and the widths behind the layers 1, 8, 14 and 20; the defaults are the published ones."""

    z_dim: int = 16
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    spatial_factor: int = 8
    frame_ratio: int = 4


class MemoryBlock(nn.Module):
    """Three convolutions of a frame and the frame before, added to the frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, frames: Tensor, last: Tensor) -> Tensor:
        """Frames [T,C,H,W] of a clip and the frame before them [1,C,H,W] → [T,C,H,W]."""
        before = torch.cat((last, frames[:-1]))
        return F.relu(self.conv(torch.cat((frames, before), dim=1)) + frames)


class Grow(nn.Module):
    """One frame to several: a 1×1 convolution whose channels are those of each in turn."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * times, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[T,C,H,W] → [times·T,C,H,W]."""
        return self.conv(frames).reshape(-1, *frames.shape[1:])


class TinyDecoder(VAE):
    """Normalised latents [B,C,F,h,w] → video [B,3,T,H,W], T = 1 + 4(F-1), H = 8h, W = 8w. It has no encoder."""

    def __init__(self, config: TinyDecoderConfig | None = None) -> None:
        super().__init__()
        self.config: TinyDecoderConfig = config or TinyDecoderConfig()
        widths = self.config.widths
        layers: list[nn.Module] = [nn.Identity(), nn.Conv2d(self.config.z_dim, widths[0], 3, padding=1), nn.ReLU()]
        for level in range(3):
            grow = len(layers) + 4
            layers += [MemoryBlock(widths[level]) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(widths[level], _GROWS[grow])]
            layers += [nn.Conv2d(widths[level], widths[level + 1], 3, padding=1, bias=False)]
        layers += [nn.ReLU(), nn.Conv2d(widths[3], 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the network computes."""
        return cast(nn.Conv2d, self.decoder[1]).weight.dtype

    def encode(self, video: Tensor) -> Tensor:
        """Raises ConfigError: latents are the VAE's to make."""
        raise ConfigError("the decoder 'tae' makes no latents of videos: load the model with decoder 'vae'")

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,C,F,h,w] → video [B,3,T,H,W], clamped to [-1,1], one clip after the other."""
        return torch.cat([self.stream_decoder().push(clip) for clip in latents.split(1)])

    def stream_decoder(self) -> TinyStreamDecoder:
        """A decoder that takes the latents of one clip in pieces and gives bit for bit the frames of `decode`."""
        return TinyStreamDecoder(self)

    def decode_frame(self, latent: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """One latent frame [1,C,h,w] → its four frames [4,3,8h,8w], of [0,1] but for rounding; `memory` goes on."""
        x = torch.tanh(latent.to(self.dtype) / 3) * 3
        for i, layer in enumerate(self.decoder):
            if isinstance(layer, MemoryBlock):
                last = memory.get(str(i))
                x, memory[str(i)] = layer(x, torch.zeros_like(x[:1]) if last is None else last), x[-1:]
            else:
                x = layer(x)
        return x


class TinyStreamDecoder:
    """Decodes the latents of one clip piece by piece, one latent frame at a time, whatever the pieces."""

    def __init__(self, network: TinyDecoder) -> None:
        self._network = network
        self._memory: dict[str, Tensor] = {}

    def push(self, latents: Tensor) -> Tensor:
        """Next latents [1,C,n,h,w], n >= 1 → their frames [1,3,t,8h,8w] in [-1,1].

        t = 4n, less 3 in the piece that opens the clip. Raises ConfigError when the sizes differ from the earlier ones
        or there are several clips, NumericsError on NaN and infinity, which is waited for.
        """
        channels = self._network.config.z_dim
        if latents.ndim != 5 or latents.shape[:2] != (1, channels) or latents.shape[2] == 0:
            raise ConfigError(f"the decoder takes latents [1, {channels}, n >= 1, h, w]: given {tuple(latents.shape)}")
        first = self._memory.get(str(_MEMORIES[0]))
        if first is not None and first.shape[2:] != latents.shape[3:]:
            raise ConfigError(
                f"the stream was opened with (height, width) = {tuple(first.shape[2:])} and now gets "
                f"{tuple(latents.shape[3:])}: open a new stream_decoder() for another clip"
            )
        memory = dict(self._memory)  # a push that fails leaves the stream as it was
        singles = latents[0].transpose(0, 1).split(1)
        frames = torch.cat([self._network.decode_frame(latent, memory) for latent in singles])
        frames = frames[0 if self._memory else _OPENING :].transpose(0, 1)[None]
        check_finite("the tiny decoder (vae_dtype),", latents, frames, self._network.dtype)
        self._memory = memory
        return frames.clamp(0.0, 1.0) * 2 - 1

    def state(self) -> dict[str, Tensor]:
        """All that the next push depends on: the last frame [1,C,h,w] that each layer with a memory has read."""
        return dict(self._memory)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()`. Raises ConfigError on names that this decoder does not have."""
        unknown = sorted(set(state) - set(map(str, _MEMORIES)))
        if unknown:
            raise ConfigError(
                f"the saved decoder state names {unknown[0]}, which the decoder 'tae' lacks: resume with "
                "the decoder of the run"
            )
        device = next(self._network.parameters()).device
        self._memory = {name: tensor.to(device) for name, tensor in state.items()}


def load_tiny_decoder(checkpoint: Checkpoint, device: Device, dtype: torch.dtype) -> TinyDecoder:
    """The decoder of a `taew2_1` file, whose encoder is left out. Raises CheckpointError."""
    shapes = checkpoint.shapes
    sizes = [shapes.get(f"decoder.{i}.weight", ()) for i in (1, 8, 14, 20)]
    if any(len(size) != 4 or 0 in size for size in sizes):
        raise CheckpointError(f"{checkpoint.path} lacks a convolution of TAEW2.1: give the complete taew2_1 file")
    config = TinyDecoderConfig(sizes[0][1], tuple(size[0] for size in sizes))  # type: ignore[arg-type]
    return load_module(lambda: TinyDecoder(config), _LastFrames(checkpoint), device=device, dtype=dtype)


class _LastFrames(Checkpoint):
    """The decoder of a file; where a layer could make more frames of one than it is to, its last ones."""

    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source.path)
        self._source = source
        self.shapes = {key: shape for key, shape in source.shapes.items() if not key.startswith("encoder.")}
        for key in self.shapes:
            grow = re.fullmatch(r"decoder\.(\d{1,3})\.conv\.weight", key)
            if grow and int(grow[1]) in _GROWS and len(self.shapes[key]) == 4:
                num_rows, width, *kernel = self.shapes[key]
                self.shapes[key] = (min(num_rows, width * _GROWS[int(grow[1])]), width, *kernel)

    def read(self, key: str) -> Tensor:
        return self._source.read(key)[-self.shapes[key][0] :]

    def stored_dtype(self, key: str) -> torch.dtype:
        return self._source.stored_dtype(key)

    def key_in_file(self, key: str) -> str:
        return self._source.key_in_file(key)

    def close(self) -> None:
        self._source.close()
