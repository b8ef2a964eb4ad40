"""The Wan2.1 text-to-video diffusion transformer, with a noise level and a prompt for every latent frame.

Parameter names are those of the official `WanModel` checkpoints. Source: the Wan2.1 report (arXiv 2503.20314),
section 4.2; noise levels by frame as in FIFO-Diffusion and MIGA, with the head modulated by each frame's own level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine.errors import ConfigError
from miga_engine.models.wan.dit_layers import (
    Block,
    ContextCache,
    Head,
    RotaryTable,
    linear_fp32,
    rotary_table,
    timestep_embedding,
)


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

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(
                f"A width of {self.dim} does not split into {self.num_heads} heads of even size; "
                "correct dim or num_heads."
            )
        if self.patch_size[0] != 1:
            raise ConfigError(
                f"A patch of {self.patch_size[0]} latent frames cannot carry a noise level per frame; use (1, h, w)."
            )


def _published(dim: int, ffn_dim: int, num_heads: int, num_layers: int) -> WanDiTConfig:
    return WanDiTConfig(
        dim=dim, ffn_dim=ffn_dim, freq_dim=256, num_heads=num_heads, num_layers=num_layers,
        text_dim=4096, text_len=512, in_dim=16, out_dim=16,
    )  # fmt: skip


WAN_T2V_CONFIGS = {"1.3B": _published(1536, 8960, 12, 30), "14B": _published(5120, 13824, 40, 40)}
"""Sizes of the published Wan2.1 text-to-video transformers, for building them without their files."""


class WanDiT(nn.Module):
    """Velocity of B windows of F latent frames, each frame with its own timestep and, if wished, its own prompt.

    Matrix products run in the dtype of the weights; the time path, norms, modulation, rotation, residual stream and
    head in float32. `keeps_fp32` tells which parameters a loader leaves in float32.
    """

    def __init__(self, config: WanDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        patch_area = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(
            Block(dim, config.ffn_dim, config.num_heads, config.eps, config.qk_norm, config.cross_attn_norm)
            for _ in range(config.num_layers)
        )
        self.head = Head(dim, patch_area * config.out_dim, config.eps)
        self._rotary_tables: dict[tuple[int, int, int, torch.device], RotaryTable] = {}

    @staticmethod
    def keeps_fp32(name: str) -> bool:
        """True for the parameters that are used in float32 whatever the dtype of the matrix products."""
        return (
            name.startswith(("time_embedding.", "time_projection.", "head.")) or ".norm" in name or "modulation" in name
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return self.patch_embedding.weight.dtype

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | float,
        context: Tensor | ContextCache,
        context_index: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, C, F, H, W] in float32.

        latents [B, C, F, H, W]; timesteps one number, [B] or [B, F] (1000·sigma); context text embeddings [P, T, D],
        T <= text_len, or what `encode_context` made of them. context_index, int [B] or [B, F], names the prompt of each
        window or of each latent frame; without it P is 1 or B. Raises ConfigError on sizes that do not fit.
        """
        config = self.config
        self._check_latents(latents)
        batch, _, num_frames, height, width = latents.shape
        rows, columns = height // config.patch_size[1], width // config.patch_size[2]
        cache = context if isinstance(context, ContextCache) else self.encode_context(context)
        text = cache.for_windows(batch, num_frames, context_index)
        time, modulation = self._embed_time(timesteps, batch, num_frames, latents.device)
        table = self._rotary_table(num_frames, rows, columns, latents.device)
        x = self._to_tokens(latents, rows, columns)
        for block, keys_values in zip(self.blocks, text, strict=True):
            x = block(x, modulation, keys_values, table)
        return self._to_latents(self.head(x, time), rows, columns)

    def encode_context(self, context: Tensor) -> ContextCache:
        """Text embeddings [P, T, D], T <= text_len, -> every layer's cross-attention keys and values.

        Rows beyond T are zero rows up to text_len, which the network was trained to attend to like any other.
        """
        text_len, text_dim = self.config.text_len, self.config.text_dim
        if context.ndim != 3 or context.shape[2] != text_dim or context.shape[1] > text_len:
            raise ConfigError(
                f"The context has shape {tuple(context.shape)}; "
                f"give text embeddings [prompts, up to {text_len}, {text_dim}]."
            )
        padded = F.pad(context.to(self.dtype), (0, 0, 0, text_len - context.shape[1]))
        text = self.text_embedding(padded)
        blocks = (cast(Block, block) for block in self.blocks)
        return ContextCache(tuple(block.cross_attn.keys_values(text) for block in blocks))

    def _check_latents(self, latents: Tensor) -> None:
        in_dim, (_, patch_height, patch_width) = self.config.in_dim, self.config.patch_size
        if latents.ndim != 5 or latents.shape[1] != in_dim:
            raise ConfigError(f"The network takes latents [B, {in_dim}, F, H, W]; given {tuple(latents.shape)}.")
        height, width = latents.shape[3:]
        if height % patch_height or width % patch_width:
            raise ConfigError(
                f"Latents of {height}x{width} do not divide into patches of {patch_height}x{patch_width}; "
                f"choose a video height that is a multiple of {8 * patch_height} and a width of {8 * patch_width}."
            )

    def _embed_time(
        self, timesteps: Tensor | float, batch: int, num_frames: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Time embedding [B, F or 1, D] and its projection to six modulations [B, F or 1, 6, D], float32."""
        t = torch.as_tensor(timesteps, device=device)
        if tuple(t.shape) not in ((), (1,), (batch,), (batch, num_frames)):
            raise ConfigError(
                f"timesteps has shape {tuple(t.shape)}; give one number, [{batch}] or [{batch}, {num_frames}]."
            )
        t = t if t.ndim == 2 else t.reshape(-1, 1)
        sinusoid = timestep_embedding(t, self.config.freq_dim)
        first, last, projection = (
            cast(nn.Linear, layer)
            for layer in (self.time_embedding[0], self.time_embedding[2], self.time_projection[1])
        )
        time = linear_fp32(last, F.silu(linear_fp32(first, sinusoid)))
        modulation = linear_fp32(projection, F.silu(time)).unflatten(-1, (6, -1))
        return time, modulation

    def _rotary_table(self, num_frames: int, rows: int, columns: int, device: torch.device) -> RotaryTable:
        key = (num_frames, rows, columns, device)
        if key not in self._rotary_tables:
            head_dim = self.config.dim // self.config.num_heads
            with torch.inference_mode(False):  # an inference tensor kept here would bar a later backward pass
                self._rotary_tables[key] = rotary_table(num_frames, rows, columns, head_dim, device)
        return self._rotary_tables[key]

    def _to_tokens(self, latents: Tensor, rows: int, columns: int) -> Tensor:
        """[B, C, F, H, W] -> [B, F, S, D] float32; the patch convolution as the matrix product it is."""
        _, patch_height, patch_width = self.config.patch_size
        patches = latents.unflatten(4, (columns, patch_width)).unflatten(
            3, (rows, patch_height)
        )  # [B, C, F, r, p, c, q]
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3).to(self.dtype)  # [B, F, S, C·p·q]
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias).float()

    def _to_latents(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """[B, F, S, p·q·C] -> [B, C, F, H, W]."""
        _, patch_height, patch_width = self.config.patch_size
        x = patches.unflatten(3, (patch_height, patch_width, -1)).unflatten(2, (rows, columns))  # [B, F, r, c, p, q, C]
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
