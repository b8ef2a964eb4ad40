"""The diffusion transformer of Wan's text-to-video models, with a noise level and a prompt for every latent frame.

Parameter names are those of the official `WanModel` checkpoints. Sources: the Wan2.1 report (arXiv 2503.20314),
section 4.2; noise levels by frame as in FIFO-Diffusion and MIGA, with the head modulated by each frame's own level;
the video's rate as SkyReels-V2 is told it (arXiv 2504.13074 and its code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine import ops
from miga_engine.errors import ConfigError
from miga_engine.models.layers import check_timesteps, linear_fp32, rearrange, timestep_embedding
from miga_engine.models.protocols import Transformer
from miga_engine.models.wan.dit_layers import (
    Block,
    ContextCache,
    FrameIndices,
    Head,
    Levels,
    Modulation,
    RotaryTable,
    rotary_table,
    take_frames,
)

NATIVE_FPS = 16
"""Frames a second of Wan2.1's videos, which SkyReels-V2 tells from all other rates."""


@dataclass(frozen=True)
class WanDiTConfig:
    """Sizes of the transformer; there are no defaults for what a checkpoint decides."""

    dim: int
    ffn_dim: int
    freq_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    text_len: int
    in_dim: int
    out_dim: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    cross_attn_norm: bool = True
    qk_norm: bool = True
    inject_sample_info: bool = False
    """Whether the network is told the video's rate, as SkyReels-V2-DF 1.3B is."""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(
                f"a width of {self.dim} does not split into {self.num_heads} heads of even size: "
                "correct dim or num_heads"
            )
        if self.patch_size[0] != 1:
            raise ConfigError(
                f"a patch of {self.patch_size[0]} latent frames cannot carry a noise level per frame: use (1, h, w)"
            )

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.num_heads


def _published(dim: int, ffn_dim: int, num_heads: int, num_layers: int, channels: int = 16) -> WanDiTConfig:
    return WanDiTConfig(
        dim=dim, ffn_dim=ffn_dim, freq_dim=256, num_heads=num_heads, num_layers=num_layers,
        text_dim=4096, text_len=512, in_dim=channels, out_dim=channels,
    )  # fmt: skip


WAN_T2V_CONFIGS = {"1.3B": _published(1536, 8960, 12, 30), "14B": _published(5120, 13824, 40, 40)}
"""Sizes of the published Wan2.1 text-to-video transformers, for building them without their files."""

WAN22_TI2V_5B = _published(3072, 14336, 24, 30, channels=48)
"""Sizes of the published transformer of Wan2.2 TI2V-5B."""


class WanDiT(Transformer):
    """Velocity of B windows of F latent frames, each frame with its own timestep and, if wished, its own prompt.

    Matrix products run in the dtype of the weights; the time path, norms, modulation, rotation, residual stream and
    head in float32. `keeps_fp32` tells which parameters a loader leaves in float32. For inference: no gradient flows.

    `attention` is the backend of `ops.frame_attention`. One of `ops.SELF_ATTENTION_ONLY` serves self-attention;
    cross-attention, of few keys with a bias for the padding, then stays with auto.

    Three savings leave the result as it is, up to rounding, and can be switched off: `shares_branches` (what comes
    before the first cross-attention is the same for both guidance branches), `skips_frames` (the last block computes
    only frames whose output is kept) and `collapses_padding` (one key for all padding of a prompt).
    """

    shares_branches = True
    skips_frames = True
    collapses_padding = True

    def __init__(self, config: WanDiTConfig) -> None:
        super().__init__()
        self.config: WanDiTConfig = config
        dim = config.dim
        patch_area = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        if config.inject_sample_info:
            self.fps_embedding = nn.Embedding(2, dim)
            self.fps_projection = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(
            Block(dim, config.ffn_dim, config.num_heads, config.eps, config.qk_norm, config.cross_attn_norm)
            for _ in range(config.num_layers)
        )
        self.head = Head(dim, patch_area * config.out_dim, config.eps)
        self._rotary_tables: dict[tuple[int, int, torch.device], RotaryTable] = {}

    @staticmethod
    def keeps_fp32(name: str) -> bool:
        """True for the parameters that are used in float32 whatever the dtype of the matrix products."""
        in_fp32 = ("time_embedding.", "time_projection.", "fps_embedding.", "fps_projection.", "head.")
        return name.startswith(in_fp32) or ".norm" in name or "modulation" in name

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return self.patch_embedding.weight.dtype

    @torch.no_grad()
    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | float | tuple[Levels, Tensor],
        context: Tensor | ContextCache,
        context_index: Tensor | None = None,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Velocity [G·B,C,F,H,W] in float32, or [G·B,C,K,H,W] of the frames to keep.

        latents [B,C,F,H,W]; timesteps one number, [B] or [B,F] (1000·sigma), or what `encode_timesteps` made of a
        schedule with each frame's row of it, int64 [B,F]; context text embeddings [P,T,D], T <= text_len, or what
        `encode_context` made of them. context_index, int64 [G·B] or [G·B,F], names the prompt of each window or of
        each latent frame in G guidance branches of the same windows, one branch after another; without it G is 1 and P
        is 1 or B. positions, int64 [B,F] below MAX_POSITIONS, are the latent frames' places in time, 0 … F-1 if None.
        keep, int64 [B,K], names the frames of each window whose velocity is wanted. Raises ConfigError on sizes that
        do not fit.
        """
        config = self.config
        self._check_latents(latents)
        batch, _, num_frames, height, width = latents.shape
        rows, columns = height // config.patch_size[1], width // config.patch_size[2]
        cache = context if isinstance(context, ContextCache) else self.encode_context(context)
        branches = cache.check_index(batch, num_frames, context_index)
        levels, level_rows = self._levels(timesteps, batch, num_frames, latents.device)
        if positions is None:
            positions = torch.arange(num_frames, device=latents.device).expand(batch, num_frames).contiguous()
        elif positions.ndim != 2 or positions.shape[0] != batch or positions.shape[1] != num_frames:
            raise ConfigError(f"positions has shape {tuple(positions.shape)}: give [{batch}, {num_frames}]")
        rotary = self._rotary_table(rows, columns, latents.device)
        cross_backend = "auto" if self.attention in ops.SELF_ATTENTION_ONLY else self.attention

        # While `shared`, x holds each window once; it is repeated where the branches part.
        shared = self.shares_branches and branches > 1
        copies = 1 if shared else branches
        x = self._to_tokens(latents, rows, columns)
        x = x if copies == 1 else x.repeat(copies, 1, 1, 1)
        frames, prompts = FrameIndices(level_rows, positions).repeat(copies), context_index
        keep = None if keep is None else keep.repeat(branches, 1)
        blocks = [cast(Block, block) for block in self.blocks]
        table = blocks[0].table(levels.projection)  # shift, scale, gate of self-attention, then of the feed-forward
        h = ops.norm_modulate(x, table[:, 1], table[:, 0], frames.level_rows, eps=config.eps, dtype=self.dtype)
        for i, block in enumerate(blocks):
            current, is_last = table, i + 1 == len(blocks)
            if is_last:
                following, dtype = self.head.norm(levels.time), torch.float32
            else:
                table, dtype = blocks[i + 1].table(levels.projection), self.dtype
                following = Modulation(table[:, 1], table[:, 0])
            if is_last and keep is not None and self.skips_frames:
                y = block.self_attn(h, frames, rotary, self.attention, keep[: x.shape[0]])
                x, frames = take_frames(x, keep[: x.shape[0]]), frames.take(keep[: x.shape[0]])
                prompts = prompts.gather(1, keep) if prompts is not None and prompts.ndim == 2 else prompts
            else:
                y = block.self_attn(h, frames, rotary, self.attention)
            h = block.after_self_attention(x, y, current, frames)
            if shared and i == 0:
                x, h, frames = x.repeat(branches, 1, 1, 1), h.repeat(branches, 1, 1, 1), frames.repeat(branches)
            h = block.finish(x, h, current, following, frames, cache.text_keys(i), prompts, cross_backend, dtype)
        if keep is not None and not self.skips_frames:
            h = take_frames(h, keep)
        return self._to_latents(self.head(h), rows, columns)

    @torch.no_grad()
    def encode_timesteps(self, timesteps: Tensor, fps: float | None = None) -> Levels:
        """The time path for timesteps [T], done once for a schedule.

        A network that is told the rate knows two kinds of video, those of 16 frames a second and all others, None too.
        """
        sinusoid = timestep_embedding(timesteps.to(self.head.modulation.device), self.config.freq_dim)
        first, last, layer = (
            cast(nn.Linear, layer)
            for layer in (self.time_embedding[0], self.time_embedding[2], self.time_projection[1])
        )
        time = linear_fp32(last, F.silu(linear_fp32(first, sinusoid)))
        projection = linear_fp32(layer, F.silu(time))
        if self.config.inject_sample_info:
            of_rate = self.fps_embedding.weight[0 if fps == NATIVE_FPS else 1]
            first, last = (cast(nn.Linear, layer) for layer in (self.fps_projection[0], self.fps_projection[2]))
            projection = projection + linear_fp32(last, F.silu(linear_fp32(first, of_rate)))
        projection = projection.unflatten(-1, (6, -1))
        projection[:, 1::3] += 1  # shift, scale, gate, twice
        return Levels(time, projection)

    @torch.no_grad()
    def encode_context(self, context: Tensor) -> ContextCache:
        """Text embeddings [P,T,D], T <= text_len, → every layer's cross-attention keys and values.

        Rows beyond T are zero rows up to text_len, which the network was trained to attend to like any other: a zero
        row, wherever it stands, counts as padding, and all padding shares one key. Waits for the device once.
        """
        text_len, text_dim = self.config.text_len, self.config.text_dim
        if context.ndim != 3 or context.shape[2] != text_dim or context.shape[1] > text_len:
            raise ConfigError(
                f"the context has shape {tuple(context.shape)}: "
                f"give text embeddings [prompts, up to {text_len}, {text_dim}]"
            )
        is_text = (context != 0).any(dim=2)  # [P,T]
        if not self.collapses_padding:
            context = F.pad(context, (0, 0, 0, text_len - context.shape[1]))
            is_text = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        length = max(is_text.any(dim=0).nonzero().flatten().tolist(), default=-1) + 1
        padding = text_len - is_text.sum(dim=1, keepdim=True)
        bias = torch.where(is_text[:, :length], 0.0, -torch.inf)
        bias = torch.cat([bias, padding.float().log()], dim=1)  # [P,length + 1], the last for the padding
        text = self.text_embedding(F.pad(context[:, :length], (0, 0, 0, 1)).to(self.dtype))
        blocks = (cast(Block, block) for block in self.blocks)
        return ContextCache(tuple(block.cross_attn.keys_values(text) for block in blocks), bias[:, None, None])

    def num_text_keys(self, num_tokens: int) -> int:
        """Keys that `encode_context` makes of a text of so many tokens, at most."""
        return 1 + (num_tokens if self.collapses_padding else self.config.text_len)

    def _check_latents(self, latents: Tensor) -> None:
        in_dim, (_, patch_height, patch_width) = self.config.in_dim, self.config.patch_size
        if latents.ndim != 5 or latents.shape[1] != in_dim:
            raise ConfigError(f"the network takes latents [B, {in_dim}, F, H, W]: given {tuple(latents.shape)}")
        height, width = latents.shape[3:]
        if height % patch_height or width % patch_width:
            raise ConfigError(
                f"latents of {height}x{width} do not divide into patches of {patch_height}x{patch_width}: "
                f"choose a video height that is a multiple of {8 * patch_height} and a width of {8 * patch_width}"
            )

    def _levels(
        self, timesteps: Tensor | float | tuple[Levels, Tensor], batch: int, num_frames: int, device: torch.device
    ) -> tuple[Levels, Tensor]:
        """Noise levels and each frame's row of them, int64 [B,F]."""
        if isinstance(timesteps, tuple):
            return timesteps
        t = torch.as_tensor(timesteps, device=device)
        check_timesteps(t, batch, num_frames)
        t = t if t.ndim == 2 else t.reshape(-1, 1)
        rows = torch.arange(t.numel(), device=device).view(t.shape).expand(batch, num_frames)
        return self.encode_timesteps(t.flatten()), rows.contiguous()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, which may be on another device, makes its own tables."""
        return {**super().__getstate__(), "_rotary_tables": {}}

    def _rotary_table(self, rows: int, columns: int, device: torch.device) -> RotaryTable:
        key = (rows, columns, device)
        if key not in self._rotary_tables:
            self._rotary_tables[key] = rotary_table(rows, columns, self.config.head_dim, device)
        return self._rotary_tables[key]

    def _to_tokens(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        """[B,C,F,H,W] → [B,F,S,D] float32; the patch convolution as the matrix product it is."""
        _, p, q = self.config.patch_size
        patches = rearrange(latents, "b c f (r p) (s q) -> b f (r s) (c p q)", r=rows, s=columns, p=p, q=q)
        weight = self.patch_embedding.weight.flatten(1)
        return ops.linear(patches.to(self.dtype), weight, self.patch_embedding.bias).float()

    def _to_latents(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """[B,F,S,p·q·C] → [B,C,F,H,W]."""
        _, p, q = self.config.patch_size
        return rearrange(patches, "b f (r s) (p q c) -> b c f (r p) (s q)", r=rows, s=columns, p=p, q=q)
