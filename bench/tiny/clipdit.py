"""The Wan DiT and the UMT5 encoder in a form for training: one timestep a clip, plain operations, parameters by name.

The functions take the official parameters (`dict(dit.named_parameters())`, the same of the encoder) and equal `WanDiT`
and `UMT5Encoder`; they compile as a whole and run under autocast, which the released form does not aim at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Params = Mapping[str, Tensor]

TEXT_DIM, TEXT_HEADS, TEXT_FFN, TEXT_LAYERS = 96, 4, 192, 2
HEAD_DIM = 64


def init_dit(seed: int = 0, dim: int = 192, ffn: int = 768, layers: int = 6) -> dict[str, Tensor]:
    """Fresh DiT parameters, drawn as Wan draws them: Xavier, zero head."""
    g = torch.Generator().manual_seed(seed)
    freq = 64
    p: dict[str, Tensor] = {}

    def linear(name: str, cin: int, cout: int, std: float | None = None) -> None:
        std = math.sqrt(2 / (cin + cout)) if std is None else std
        p[f"{name}.weight"] = torch.randn(cout, cin, generator=g) * std
        p[f"{name}.bias"] = torch.zeros(cout)

    p["patch_embedding.weight"] = torch.randn(dim, 16, 1, 2, 2, generator=g) * math.sqrt(2 / (64 + dim))
    p["patch_embedding.bias"] = torch.zeros(dim)
    linear("text_embedding.0", TEXT_DIM, dim, 0.05)
    linear("text_embedding.2", dim, dim, 0.05)
    linear("time_embedding.0", freq, dim, 0.05)
    linear("time_embedding.2", dim, dim, 0.05)
    linear("time_projection.1", dim, 6 * dim)
    for i in range(layers):
        for attn in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"blocks.{i}.{attn}.{part}", dim, dim)
            p[f"blocks.{i}.{attn}.norm_q.weight"] = torch.ones(dim)
            p[f"blocks.{i}.{attn}.norm_k.weight"] = torch.ones(dim)
        p[f"blocks.{i}.norm3.weight"], p[f"blocks.{i}.norm3.bias"] = torch.ones(dim), torch.zeros(dim)
        linear(f"blocks.{i}.ffn.0", dim, ffn)
        linear(f"blocks.{i}.ffn.2", ffn, dim)
        p[f"blocks.{i}.modulation"] = torch.randn(1, 6, dim, generator=g) / dim**0.5
    p["head.modulation"] = torch.randn(1, 2, dim, generator=g) / dim**0.5
    linear("head.head", dim, 64, 0.0)
    return p


def init_text_encoder(vocab: int, seed: int = 0) -> dict[str, Tensor]:
    """Fresh encoder parameters."""
    g = torch.Generator().manual_seed(seed)
    p = {"token_embedding.weight": torch.randn(vocab, TEXT_DIM, generator=g)}
    for i in range(TEXT_LAYERS):
        b = f"blocks.{i}"
        for part in "qkvo":
            std = TEXT_DIM**-0.5 * ((TEXT_DIM // TEXT_HEADS) ** -0.5 if part == "q" else 1.0)
            p[f"{b}.attn.{part}.weight"] = torch.randn(TEXT_DIM, TEXT_DIM, generator=g) * std
        p[f"{b}.norm1.weight"], p[f"{b}.norm2.weight"] = torch.ones(TEXT_DIM), torch.ones(TEXT_DIM)
        p[f"{b}.pos_embedding.embedding.weight"] = torch.randn(32, TEXT_HEADS, generator=g) * 0.1
        p[f"{b}.ffn.gate.0.weight"] = torch.randn(TEXT_FFN, TEXT_DIM, generator=g) * TEXT_DIM**-0.5
        p[f"{b}.ffn.fc1.weight"] = torch.randn(TEXT_FFN, TEXT_DIM, generator=g) * TEXT_DIM**-0.5
        p[f"{b}.ffn.fc2.weight"] = torch.randn(TEXT_DIM, TEXT_FFN, generator=g) * TEXT_FFN**-0.5
    p["norm.weight"] = torch.ones(TEXT_DIM)
    return p


def _rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def relative_buckets(length: int) -> Tensor:
    """T5's bidirectional bucket of every (query, key) pair `[L,L]`: 32 buckets, largest distance 128."""
    rel = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    n = rel.abs()
    far = 8 + (torch.log(n.clamp(min=1).float() / 8) / math.log(128 / 8) * 8).long()
    return (rel > 0).long() * 16 + torch.where(n < 8, n, far.clamp(max=15))


def encode_text(p: Params, ids: Tensor, mask: Tensor) -> Tensor:
    """Text rows `[B,L,D]` of token ids `[B,L]`; rows outside the mask are zero."""
    b, length = ids.shape
    x = F.embedding(ids, p["token_embedding.weight"])
    buckets = relative_buckets(length).to(ids.device)
    hidden = torch.where(mask.bool(), 0.0, -1e9)[:, None, None, :]  # [B,1,1,L]
    for i in range(TEXT_LAYERS):
        name = f"blocks.{i}"
        y = _rms(x, p[f"{name}.norm1.weight"])
        q, k, v = (
            F.linear(y, p[f"{name}.attn.{s}.weight"]).view(b, length, TEXT_HEADS, -1).transpose(1, 2) for s in "qkv"
        )
        bias = F.embedding(buckets, p[f"{name}.pos_embedding.embedding.weight"]).permute(2, 0, 1)[None] + hidden
        y = (q.float() @ k.float().transpose(-1, -2) + bias).softmax(-1).to(v.dtype) @ v
        x = x + F.linear(y.transpose(1, 2).reshape(b, length, -1), p[f"{name}.attn.o.weight"])
        y = _rms(x, p[f"{name}.norm2.weight"])
        gate = F.gelu(F.linear(y, p[f"{name}.ffn.gate.0.weight"]), approximate="tanh")
        x = x + F.linear(F.linear(y, p[f"{name}.ffn.fc1.weight"]) * gate, p[f"{name}.ffn.fc2.weight"])
    return _rms(x, p["norm.weight"]) * mask[..., None].to(x.dtype)


def rope_table(frames: int, rows: int, columns: int) -> Tensor:
    """Angles `[N, HEAD_DIM/2]` of every token: the first part turns with the frame, then row, then column."""
    parts = []
    split = (HEAD_DIM - 4 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6))
    grid = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
    for axis, width in zip(grid, split, strict=True):
        freqs = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        parts.append(axis.reshape(-1, 1).double() * freqs)
    return torch.cat(parts, 1).float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B,N,H,32]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)


def _linear(p: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def _attend(p: Params, name: str, x: Tensor, y: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    q = _rms(_linear(p, f"{name}.q", x), p[f"{name}.norm_q.weight"]).unflatten(-1, (-1, HEAD_DIM))
    k = _rms(_linear(p, f"{name}.k", y), p[f"{name}.norm_k.weight"]).unflatten(-1, (-1, HEAD_DIM))
    v = _linear(p, f"{name}.v", y).unflatten(-1, (-1, HEAD_DIM))
    if rope is not None:
        q, k = _rotate(q, *rope), _rotate(k, *rope)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if x.is_cuda:
        out = F.scaled_dot_product_attention(q, k, v)
    else:  # on a CPU a training step is 1.4 times as fast with plain products as with fused attention
        out = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(-1).to(v.dtype) @ v
    return _linear(p, f"{name}.o", out.transpose(1, 2).flatten(2))


def init_motion_head(dim: int, seed: int = 0) -> dict[str, Tensor]:
    """A head that reads motion from the middle of the DiT; it helps in training and is never exported."""
    g = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(12, dim, generator=g) * 0.02, "bias": torch.zeros(12)}


def velocity(p: Params, x: Tensor, timesteps: Tensor, text: Tensor, rope: Tensor) -> Tensor:
    """Velocity `[B,C,F,H,W]` of noisy latents at one timestep (1000·sigma) a clip.

    `text` is `[B,text_len,D]`, zero rows after the prompt; `rope` comes from `rope_table(F, H/2, W/2)`.
    """
    return velocity_and_motion(p, None, x, timesteps, text, rope)[0]


def velocity_and_motion(
    p: Params, head: Params | None, x: Tensor, timesteps: Tensor, text: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`velocity`, and what the motion head reads after half of the blocks: `[B,3,F,H,W]`, flow right and down in pixels
    a frame, and the subject's share of the cell."""
    b, c, f, h, w = x.shape

    def unpatched(tokens: Tensor) -> Tensor:
        cells = tokens.reshape(b, f, h // 2, w // 2, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return cells.reshape(b, -1, f, h, w)

    patches = x.reshape(b, c, f, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(b, -1, 4 * c)
    h_ = F.linear(patches, p["patch_embedding.weight"].flatten(1), p["patch_embedding.bias"]).float()
    half = p["time_embedding.0.weight"].shape[1] // 2
    freqs = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = timesteps.float()[:, None] * freqs
    with torch.autocast(x.device.type, enabled=False):
        e = _linear(p, "time_embedding.0", torch.cat([angle.cos(), angle.sin()], 1))
        e = _linear(p, "time_embedding.2", F.silu(e))
        e6 = _linear(p, "time_projection.1", F.silu(e)).unflatten(1, (6, -1))  # [B,6,D]
    context = _linear(p, "text_embedding.2", F.gelu(_linear(p, "text_embedding.0", text), approximate="tanh"))
    turn = (rope.cos()[None, :, None], rope.sin()[None, :, None])
    num_layers = sum(1 for k in p if k.endswith(".ffn.0.weight"))
    motion = None
    for i in range(num_layers):
        name = f"blocks.{i}"
        m = (p[f"{name}.modulation"] + e6)[:, :, None].unbind(1)  # 6 of [B,1,D]
        y = _layer_norm(h_) * (1 + m[1]) + m[0]
        h_ = h_ + _attend(p, f"{name}.self_attn", y, y, turn).float() * m[2]
        y = _layer_norm(h_) * p[f"{name}.norm3.weight"] + p[f"{name}.norm3.bias"]
        h_ = h_ + _attend(p, f"{name}.cross_attn", y, context, None).float()
        y = _layer_norm(h_) * (1 + m[4]) + m[3]
        y = _linear(p, f"{name}.ffn.2", F.gelu(_linear(p, f"{name}.ffn.0", y), approximate="tanh"))
        h_ = h_ + y.float() * m[5]
        if head is not None and i == num_layers // 2 - 1:
            motion = unpatched(F.linear(_layer_norm(h_), head["weight"], head["bias"]).float())
    m = (p["head.modulation"] + e[:, None])[:, :, None].unbind(1)
    out = _linear(p, "head.head", _layer_norm(h_) * (1 + m[1]) + m[0]).float()
    return unpatched(out), motion
