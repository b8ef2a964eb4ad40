"""The text encoder of VideoCrafter2: the text tower of OpenCLIP ViT-H/14, read before its last block.

Parameter names are those of `model.ckpt` under `cond_stage_model.model.`. Source: CLIP (arXiv 2103.00020).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine.models.layers import rearrange
from miga_engine.models.protocols import TextEncoder
from miga_engine.ops import frame_attention, untimed_backend


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of the encoder; the defaults are those of VideoCrafter2. `num_layers` counts the blocks that are used."""

    vocab_size: int = 49408
    dim: int = 1024
    dim_ffn: int = 4096
    num_heads: int = 16
    num_layers: int = 23
    text_len: int = 77


class Attention(nn.Module):
    """Self-attention in which no token sees a later one, q, k and v from one product."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.dim, config.dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.dim))
        self.out_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B,T,D], bias [1,1,T,T] → [B,T,D]."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "b t (three heads d) -> three b t heads d", three=3, heads=self.num_heads)
        attended = frame_attention(q, k, v, bias, backend=untimed_backend(x.device))
        return self.out_proj(attended.flatten(2))


class FeedForward(nn.Module):
    """c_proj(gelu(c_fc(x)))."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.dim, config.dim_ffn)
        self.c_proj = nn.Linear(config.dim_ffn, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.dim)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.dim)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B,T,D], bias [1,1,T,T] → [B,T,D]."""
        x = x + self.attn(self.ln_1(x), bias)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks, under the name that the checkpoint has for them."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))


class CLIPTextEncoder(TextEncoder):
    """Token ids → text embeddings, in the dtype of the weights."""

    def __init__(self, config: CLIPTextConfig | None = None) -> None:
        super().__init__()
        self.config: CLIPTextConfig = config or CLIPTextConfig()
        config = self.config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positional_embedding = nn.Parameter(torch.empty(config.text_len, config.dim))
        self.transformer = Transformer(config)
        self.ln_final = nn.LayerNorm(config.dim)

    def forward(self, token_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """token_ids int [B,77] → [B,77,D]; every row has a meaning, padding too, so `mask` is not looked at."""
        x = self.token_embedding(token_ids) + self.positional_embedding
        length = x.shape[1]
        bias = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)[None, None]
        for block in self.transformer.resblocks:
            x = block(x, bias)
        return self.ln_final(x)
