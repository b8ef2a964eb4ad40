"""The case of a whole block of Wan2.1's 1.3B network: ours, and the published form in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from op_cases import DEVICE, EPS, Case, Sizes, compile_whole, complex_rope, randn, rotation, shape_text
from torch import Tensor, nn

from miga_engine import ops
from miga_engine.models.wan.dit_layers import Block, FrameIndices, Modulation, RotaryTable, TextKeys


class PublishedBlock:
    """A block of the 1.3B network with a prompt of 64 tokens: ours, and the published form in plain PyTorch."""

    def __init__(self, dtype: torch.dtype, sizes: Sizes, tokens: int) -> None:
        batch, frames, width, heads = sizes.batch, sizes.frames, sizes.width, sizes.heads
        self.dtype, self.sizes, self.tokens = dtype, sizes, tokens
        with torch.device(DEVICE):
            self.block = Block(width, sizes.ffn_dim, heads, EPS, qk_norm=True, cross_attn_norm=True)
        self.block.requires_grad_(False)
        for name, parameter in self.block.named_parameters():
            if "norm" not in name and name != "modulation":
                parameter.data = parameter.data.to(dtype)
        self.x = randn(batch, frames, tokens, width)
        self.time = 0.1 * randn(batch * frames, 6, width)
        # The other rows of the text are padding, all of one key and one value.
        keys, values = (randn(batch, sizes.num_text + 1, heads, 128, dtype=dtype) for _ in range(2))
        padding = sizes.text_len - sizes.num_text
        self.padded = [torch.cat([t[:, :-1], t[:, -1:].expand(-1, padding, -1, -1)], dim=1) for t in (keys, values)]
        bias = torch.zeros(batch, 1, 1, sizes.num_text + 1, device=DEVICE)
        bias[..., -1] = math.log(padding)
        self.text = TextKeys(keys, values, bias)
        temporal, spatial, self.table = rotation(frames, tokens)
        self.rotary = RotaryTable(temporal, spatial)
        rows = torch.arange(batch * frames, device=DEVICE).view(batch, frames)
        self.frames = FrameIndices(rows, torch.arange(frames, device=DEVICE).expand(batch, frames).contiguous())
        self.with_one = self.time + torch.tensor([0.0, 1, 0, 0, 1, 0], device=DEVICE)[:, None]
        matmuls = 2 * 6 * width**2 + 4 * width * sizes.ffn_dim
        num_tokens = frames * tokens
        self.num_flops = batch * num_tokens * (matmuls + 4 * width * (num_tokens + sizes.text_len))

    def ours(self) -> Tensor:
        """As `WanDiT.forward` runs a block, whose successor has the same modulation."""
        block, frames = self.block, self.frames
        x, table = self.x.clone(), block.table(self.with_one)
        norm = Modulation(table[:, 1], table[:, 0])
        h = ops.norm_modulate(x, *norm, frames.level_rows, eps=EPS, dtype=self.dtype)
        y = block.self_attn(h, frames, self.rotary, "auto")
        h = block.after_self_attention(x, y, table, frames)
        block.finish(x, h, table, norm, frames, self.text, None, "auto", self.dtype)
        return x

    def published(self, wide: torch.dtype = torch.float32) -> Tensor:
        """Modulation written out by token, complex rotation in float64, all 512 rows of text; `wide` for residuals."""
        block, dtype = self.block, torch.float64 if wide == torch.float64 else self.dtype
        sizes, width = self.sizes, self.sizes.width

        def linear(layer: nn.Linear, x: Tensor) -> Tensor:
            return F.linear(x, layer.weight.to(dtype), layer.bias.to(dtype))

        def attend(layer: nn.Linear, *tensors: Tensor) -> Tensor:
            heads = [
                (t.unflatten(2, (sizes.heads, -1)) if t.ndim == 3 else t).transpose(1, 2).to(dtype) for t in tensors
            ]
            return linear(layer, F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

        def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            return F.layer_norm(x, (width,), *(t if t is None else t.to(wide) for t in (weight, bias)), eps=EPS)

        x = self.x.to(wide).flatten(1, 2)
        by_frame = self.time.to(wide).view(sizes.batch, sizes.frames, 6, width)
        by_token = by_frame.repeat_interleave(self.tokens, dim=1)  # [B,N,6,D]
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation.to(wide)[:, None] + by_token).unbind(2)
        own, cross = block.self_attn, block.cross_attn
        h = (norm(x) * (1 + scale1) + shift1).to(dtype)
        q = complex_rope(linear(own.q, h), own.norm_q.weight, self.table)
        k = complex_rope(linear(own.k, h), own.norm_k.weight, self.table)
        x = x + attend(own.o, q, k, linear(own.v, h)).to(wide) * gate1
        h = norm(x, block.norm3.weight, block.norm3.bias).to(dtype)
        q = F.rms_norm(linear(cross.q, h).to(wide), (width,), cross.norm_q.weight.to(wide), EPS)
        x = x + attend(cross.o, q, *self.padded)
        h = (norm(x) * (1 + scale2) + shift2).to(dtype)
        h = F.gelu(linear(block.ffn[0], h), approximate="tanh")
        return (x + linear(block.ffn[2], h).to(wide) * gate2).view_as(self.x)


def block(dtype: torch.dtype, sizes: Sizes) -> Case:
    """The whole block; its rival does the same work on the same text."""
    case = PublishedBlock(dtype, sizes, sizes.block_tokens)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        small = PublishedBlock(dtype, sizes, min(40, sizes.block_tokens))
        return small.ours(), small.published(), small.published(torch.float64)

    return Case(
        "block",
        shape_text(case.x),
        dtype,
        case.ours,
        {"eager": case.published, "compiled": compile_whole(case.published)},
        results,
        num_flops=case.num_flops,
    )
