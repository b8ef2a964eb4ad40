"""The VideoCrafter2 text-to-video UNet, with a noise level and a prompt for every latent frame.

Parameter names are those of the official `model.ckpt` under `model.diffusion_model.`. Source: VideoCrafter2
(arXiv 2401.09047) on the network of VideoCrafter1 (arXiv 2310.19512); noise levels by frame as in FIFO-Diffusion and
MIGA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine import ops
from miga_engine.errors import CheckpointError, ConfigError
from miga_engine.models.layers import check_timesteps, linear_fp32, rearrange, timestep_embedding
from miga_engine.models.protocols import Transformer
from miga_engine.models.videocrafter2.unet_layers import (
    GROUPS,
    ContextCache,
    Conv2d,
    Downsample,
    GroupNorm,
    LayerInputs,
    ResBlock,
    SpatialTransformer,
    TemporalTransformer,
    TransformerBlock,
    Upsample,
)
from miga_engine.weights.checkpoint import count_numbered

NATIVE_FPS = 8  # what the release conditions on, and the rate of its videos
NATIVE_WINDOW_FRAMES = 16  # latent frames of the clips it was trained on; no shape tells
INITIAL_HEADS = 8  # of the attention along time behind the first convolution, whatever its width

_FP32 = re.compile(
    r"(?:^|\.)(?:time_embed|fps_embedding|emb_layers|norm\d?|(?:in_layers|out_layers|conv[1-4])\.0)\.|^out\."
)


@dataclass(frozen=True)
class VideoUNetConfig:
    """Sizes of the UNet; there are no defaults for what a checkpoint decides."""

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_ratios: tuple[int, ...]
    """Downsampling ratios with attention; the middle has it at any ratio."""
    head_dim: int
    """Channels of a head everywhere; the initial attention has INITIAL_HEADS of them, the others their width's."""
    transformer_depth: int
    context_dim: int
    temporal_length: int = NATIVE_WINDOW_FRAMES
    """Latent frames it was trained to see together; the network knows no positions in time and takes any number."""

    def __post_init__(self) -> None:
        ratios = [1 << level for level in range(len(self.channel_mult))]
        if not set(self.attention_ratios) <= set(ratios):
            raise ConfigError(f"attention at ratios {self.attention_ratios} of the levels {ratios}: name levels only")
        for level, mult in enumerate(self.channel_mult):
            width = mult * self.model_channels
            has_heads = ratios[level] in self.attention_ratios or level + 1 == len(ratios)
            if width % GROUPS or (has_heads and (self.head_dim < 1 or width % self.head_dim)):
                raise ConfigError(
                    f"a width of {width} does not split into {GROUPS} groups and heads of {self.head_dim} channels: "
                    "correct model_channels, channel_mult or head_dim"
                )

    @property
    def text_dim(self) -> int:
        """Width of a text embedding."""
        return self.context_dim

    @property
    def size_multiple(self) -> int:
        """Height and width of the latents are multiples of this."""
        return 1 << (len(self.channel_mult) - 1)


VIDEOCRAFTER2_CONFIG = VideoUNetConfig(
    in_channels=4, out_channels=4, model_channels=320, channel_mult=(1, 2, 4, 4), num_res_blocks=2,
    attention_ratios=(1, 2, 4), head_dim=64, transformer_depth=1, context_dim=1024,
)  # fmt: skip
"""Sizes of the published network, for building it without its file."""


def unet_config(shapes: Mapping[str, tuple[int, ...]]) -> VideoUNetConfig:
    """Sizes read off the shapes of a checkpoint's tensors, under their names without `model.diffusion_model.`.

    Raises CheckpointError where a tensor that tells a size is missing or of another rank, ConfigError where the sizes
    make no network.
    """

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in shapes:
            raise CheckpointError(
                f"the UNet's weights lack {key}, from which its size is read: give the complete VideoCrafter2 model"
            )
        if len(shapes[key]) != rank or 0 in shapes[key]:
            raise CheckpointError(
                f"the UNet's weights hold {key} as {list(shapes[key])} where the network has {rank} dimensions: "
                "give weights of VideoCrafter2"
            )
        return shapes[key]

    model_channels, in_channels = shape("input_blocks.0.0.weight", 4)[:2]
    levels: list[list[int]] = [[]]  # widths of each level's residual blocks
    ratios: set[int] = set()
    for i in range(1, count_numbered(shapes, r"input_blocks\.(\d+)\.", "the UNet")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
            continue
        levels[-1].append(shape(f"input_blocks.{i}.0.in_layers.2.weight", 4)[0])
        if f"input_blocks.{i}.1.norm.weight" in shapes:
            ratios.add(1 << (len(levels) - 1))
    if any(len(set(widths)) != 1 or len(widths) != len(levels[0]) or widths[0] % model_channels for widths in levels):
        raise ConfigError(
            f"the UNet's levels have residual blocks of widths {levels}, not equally many of one multiple of "
            f"{model_channels} in each: give weights of VideoCrafter2"
        )
    return VideoUNetConfig(
        in_channels=in_channels,
        out_channels=shape("out.2.weight", 4)[0],
        model_channels=model_channels,
        channel_mult=tuple(widths[0] // model_channels for widths in levels),
        num_res_blocks=len(levels[0]),
        attention_ratios=tuple(sorted(ratios)),
        head_dim=shape("init_attn.0.proj_in.weight", 3)[0] // INITIAL_HEADS,
        transformer_depth=count_numbered(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.", "the UNet"),
        context_dim=shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
    )


class VideoUNet(Transformer):
    """Noise predicted in B windows of F latent frames, each frame with its own timestep and, if wished, its own prompt.

    Matrix products, convolutions and the sums between blocks run in the dtype of the weights; the time path, norms,
    the residual stream within transformers and the output in float32. `keeps_fp32` tells which parameters a loader
    leaves in float32. For inference: no gradient flows.

    `attention` is the backend of `ops.frame_attention`. One of `ops.SELF_ATTENTION_ONLY` serves attention within a
    frame; attention to the prompt and along time, of few keys, then stays with auto.
    """

    prediction_type = "epsilon"

    def __init__(self, config: VideoUNetConfig) -> None:
        super().__init__()
        self.config: VideoUNetConfig = config
        width = config.model_channels
        time_dim = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.fps_embedding = nn.Sequential(nn.Linear(width, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))

        def transformers(channels: int) -> list[nn.Module]:
            heads = channels // config.head_dim, config.head_dim
            return [
                SpatialTransformer(channels, config.context_dim, *heads, config.transformer_depth),
                TemporalTransformer(channels, *heads, config.transformer_depth),
            ]

        def block(channels: int, level: int) -> list[nn.Module]:
            out_channels = config.channel_mult[level] * width
            has_attention = 1 << level in config.attention_ratios
            return [ResBlock(channels, out_channels, time_dim), *(transformers(out_channels) if has_attention else [])]

        self.input_blocks = nn.ModuleList([nn.Sequential(Conv2d(config.in_channels, width, 3, padding=1))])
        self.init_attn = nn.ModuleList(
            [TemporalTransformer(width, INITIAL_HEADS, config.head_dim, config.transformer_depth, is_first=True)]
        )
        skipped, channels = [width], width  # widths that the output blocks will see again
        for level, mult in enumerate(config.channel_mult):
            if level:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skipped.append(channels)
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(nn.ModuleList(block(channels, level)))
                channels = mult * width
                skipped.append(channels)
        self.middle_block = nn.ModuleList(
            [
                ResBlock(channels, channels, time_dim),
                *transformers(channels),
                ResBlock(channels, channels, time_dim),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = block(channels + skipped.pop(), level)
                channels = mult * width
                if level and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(
            GroupNorm(channels), nn.SiLU(inplace=True), Conv2d(channels, config.out_channels, 3, padding=1)
        )
        for i, layer in enumerate(self._text_blocks()):
            layer.text_layer = i

    @staticmethod
    def keeps_fp32(name: str) -> bool:
        """True for the parameters that are used in float32 whatever the dtype of the matrix products."""
        return _FP32.search(name) is not None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products and convolutions."""
        convolution = cast(nn.Sequential, self.input_blocks[0])[0]
        return cast(Tensor, convolution.weight).dtype

    @torch.no_grad()
    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | float | tuple[Tensor, Tensor],
        context: Tensor | ContextCache,
        context_index: Tensor | None = None,
        fps: Tensor | float | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Noise [G·B,C,F,H,W] in float32, or [G·B,C,K,H,W] of the frames to keep.

        latents [B,C,F,H,W]; timesteps one number, [B] or [B,F] (0 … 999), or what `encode_timesteps` made of a
        schedule with each frame's row of it, int64 [B,F]; context text embeddings [P,T,D], every row of which is
        attended to, or what `encode_context` made of them. context_index, int64 [G·B] or [G·B,F], names the prompt of
        each window or of each latent frame in G guidance branches of the same windows, one branch after another;
        without it G is 1 and P is 1 or B. fps, one number or [B], is the rate the video shall have, NATIVE_FPS if None.
        keep, int64 [B,K], names the frames of each window whose noise is wanted. Raises ConfigError on sizes that do
        not fit.
        """
        self._check_latents(latents)
        batch, _, num_frames = latents.shape[:3]
        cache = context if isinstance(context, ContextCache) else self.encode_context(context)
        branches = cache.check_index(batch, num_frames, context_index)
        time = self._time(timesteps, fps, batch, num_frames, latents.device)  # [B,F,E]
        short_backend = "auto" if self.attention in ops.SELF_ATTENTION_ONLY else self.attention
        inputs = LayerInputs(batch, time.flatten(0, 1), cache.layers, context_index, self.attention, short_backend)

        x = self.input_blocks[0](rearrange(latents, "b c f h w -> (b f) c h w"))
        # What comes before the first time embedding and prompt is the same for all branches.
        x = torch.cat([self.init_attn[0](x, inputs)] * branches)
        inputs = inputs._replace(batch=branches * batch, time=inputs.time.repeat(branches, 1))
        skips = [x]
        for layers in self.input_blocks[1:]:
            x = _run(layers, x, inputs)
            skips.append(x)
        x = _run(self.middle_block, x, inputs)
        for layers in self.output_blocks:
            x = _run(layers, torch.cat([x, skips.pop()], dim=1), inputs)
        if keep is not None:
            rows = torch.arange(branches * batch, device=x.device)[:, None]
            x = x.unflatten(0, (-1, num_frames))[rows, keep.repeat(branches, 1)].flatten(0, 1)
        return rearrange(self.out(x).float(), "(b f) c h w -> b c f h w", b=branches * batch).contiguous()

    @torch.no_grad()
    def encode_timesteps(self, timesteps: Tensor, fps: float | None = None) -> Tensor:
        """Time embeddings [T,E] in float32 of timesteps [T], done once for a schedule.

        fps has no part in them: the rate that this network is told is `forward`'s, by default NATIVE_FPS.
        """
        return self._embedding(self.time_embed, timesteps)

    @torch.no_grad()
    def encode_context(self, context: Tensor) -> ContextCache:
        """Text embeddings [P,T,D] → every layer's cross-attention keys and values."""
        if context.ndim != 3 or context.shape[2] != self.config.context_dim:
            raise ConfigError(
                f"the context has shape {tuple(context.shape)}: "
                f"give text embeddings [prompts, tokens, {self.config.context_dim}]"
            )
        context = context.to(self.dtype)
        return ContextCache(tuple(block.attn2.keys_values(context) for block in self._text_blocks()))

    def num_text_keys(self, num_tokens: int) -> int:
        """Keys that `encode_context` makes of a text of so many tokens."""
        return num_tokens

    def _text_blocks(self) -> list[TransformerBlock]:
        return [layer for layer in self.modules() if isinstance(layer, TransformerBlock) and layer.reads_text]

    def _check_latents(self, latents: Tensor) -> None:
        channels, multiple = self.config.in_channels, self.config.size_multiple
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ConfigError(f"the network takes latents [B, {channels}, F, H, W]: given {tuple(latents.shape)}")
        height, width = latents.shape[3:]
        if height % multiple or width % multiple:
            raise ConfigError(
                f"latents of {height}x{width} cannot be halved {multiple.bit_length() - 1} times: "
                f"choose a video height and width that are multiples of {8 * multiple}"
            )

    def _time(
        self,
        timesteps: Tensor | float | tuple[Tensor, Tensor],
        fps: Tensor | float | None,
        batch: int,
        num_frames: int,
        device: torch.device,
    ) -> Tensor:
        """Activated embeddings [B,F,E] of each frame's noise level and the video's rate."""
        if isinstance(timesteps, tuple):
            levels, rows = timesteps
            time = levels[rows]
        else:
            t = _tensor(timesteps, device)
            check_timesteps(t, batch, num_frames)
            time = self.encode_timesteps(t if t.ndim == 2 else t.reshape(-1, 1))
        rate = _tensor(NATIVE_FPS if fps is None else fps, device)
        if rate.ndim > 1 or (rate.ndim == 1 and rate.shape[0] != 1 and rate.shape[0] != batch):
            raise ConfigError(f"fps has shape {tuple(rate.shape)}: give one number or [{batch}]")
        time = time + self._embedding(self.fps_embedding, rate.reshape(-1, 1))
        return F.silu(time).expand(batch, num_frames, -1)

    def _embedding(self, layers: nn.Sequential, values: Tensor) -> Tensor:
        """[...] → [...,E] float32."""
        first, last = cast(nn.Linear, layers[0]), cast(nn.Linear, layers[2])
        sinusoid = timestep_embedding(values.to(first.weight.device), self.config.model_channels)
        return linear_fp32(last, F.silu(linear_fp32(first, sinusoid)))


def _tensor(values: Tensor | float, device: torch.device) -> Tensor:
    """float32 on the device; a number is filled in there, for no copy from the host can be captured."""
    return (
        values.to(device, torch.float32) if isinstance(values, Tensor) else torch.full((), float(values), device=device)
    )


def _run(layers: nn.Module, x: Tensor, inputs: LayerInputs) -> Tensor:
    for layer in cast(nn.ModuleList, layers):
        x = layer(x, inputs)
    return x
