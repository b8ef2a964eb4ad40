"""The Wan VAE in a form for training on whole clips.

Every 3x3x3 convolution of the embedded VAE is inert in time (only the tap of the current frame is non-zero), so all but
the temporal resamplers is a two-dimensional network over `B*T` frames, and time is learned in their (3,1,1)
convolutions alone. The functions take the official parameters by name (`dict(vae.named_parameters())`) and equal the
chunk-by-chunk encode and decode of `WanVAE` for such weights.

Shape letters: B clips, T frames, F latent frames (`T = 4*(F-1) + 1`), N = B*T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.models.wan.vae import WAN_LATENTS_MEAN, WAN_LATENTS_STD

Params = Mapping[str, Tensor]


def init_parameters(
    dim: int = 16, z_dim: int = 16, dim_mult: tuple[int, ...] = (1, 2, 4, 4), num_res_blocks: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """Fresh parameters under the official names; 3x3x3 convolutions are kept as their 3x3 current-frame tap.

    The temporal convolutions start near the identity on the current frame, so that a network that has learned single
    frames already plays clips, each frame repeated.
    """
    g = torch.Generator().manual_seed(seed)
    p: dict[str, Tensor] = {}
    temporal = (False, True, True)

    def conv(name: str, cin: int, cout: int, k: int, gain: float = 1.0) -> None:
        p[f"{name}.weight"] = torch.randn(cout, cin, k, k, generator=g) * gain * (cin * k * k) ** -0.5
        p[f"{name}.bias"] = torch.zeros(cout)

    def time_conv(name: str, c: int, copies: int) -> None:
        w = torch.randn(c * copies, c, 3, generator=g) * 0.1 * (3 * c) ** -0.5
        w[:, :, 2] += torch.eye(c).repeat(copies, 1)
        p[f"{name}.weight"], p[f"{name}.bias"] = w, torch.zeros(c * copies)

    def res(name: str, cin: int, cout: int) -> None:
        p[f"{name}.residual.0.gamma"] = torch.ones(cin)
        conv(f"{name}.residual.2", cin, cout, 3, 1.4)
        p[f"{name}.residual.3.gamma"] = torch.ones(cout)
        conv(f"{name}.residual.6", cout, cout, 3, 0.5)
        if cin != cout:
            conv(f"{name}.shortcut", cin, cout, 1)

    def middle(name: str, c: int) -> None:
        res(f"{name}.0", c, c)
        p[f"{name}.1.norm.gamma"] = torch.ones(c)
        conv(f"{name}.1.to_qkv", c, 3 * c, 1)
        conv(f"{name}.1.proj", c, c, 1, 0.1)
        res(f"{name}.2", c, c)

    dims = [dim * m for m in (1, *dim_mult)]
    conv("encoder.conv1", 3, dims[0], 3)
    slot = 0
    for i in range(len(dim_mult)):
        cin = dims[i]
        for _ in range(num_res_blocks):
            res(f"encoder.downsamples.{slot}", cin, dims[i + 1])
            cin, slot = dims[i + 1], slot + 1
        if i < len(dim_mult) - 1:
            conv(f"encoder.downsamples.{slot}.resample.1", cin, cin, 3)
            if temporal[i]:
                time_conv(f"encoder.downsamples.{slot}.time_conv", cin, 1)
            slot += 1
    middle("encoder.middle", dims[-1])
    p["encoder.head.0.gamma"] = torch.ones(dims[-1])
    conv("encoder.head.2", dims[-1], 2 * z_dim, 3)
    conv("conv1", 2 * z_dim, 2 * z_dim, 1)
    conv("conv2", z_dim, z_dim, 1)

    dims = [dim * m for m in (dim_mult[-1], *dim_mult[::-1])]
    conv("decoder.conv1", z_dim, dims[0], 3)
    middle("decoder.middle", dims[0])
    slot = 0
    for i in range(len(dim_mult)):
        cin = dims[i] // 2 if i > 0 else dims[i]
        for _ in range(num_res_blocks + 1):
            res(f"decoder.upsamples.{slot}", cin, dims[i + 1])
            cin, slot = dims[i + 1], slot + 1
        if i < len(dim_mult) - 1:
            conv(f"decoder.upsamples.{slot}.resample.1", cin, cin // 2, 3)
            if temporal[::-1][i]:
                time_conv(f"decoder.upsamples.{slot}.time_conv", cin, 2)
            slot += 1
    p["decoder.head.0.gamma"] = torch.ones(dims[-1])
    conv("decoder.head.2", dims[-1], 3, 3, 0.5)
    return p


def to_official(params: Params) -> dict[str, Tensor]:
    """The official shapes: 3x3 taps become inert 3x3x3 kernels, gammas and 1x1 kernels get their trailing axes."""
    out: dict[str, Tensor] = {}
    for name, value in params.items():
        v = value.detach()
        if name.endswith("gamma"):
            out[name] = v.reshape(-1, 1, 1) if ".norm." in name else v.reshape(-1, 1, 1, 1)
        elif v.ndim == 3:
            out[name] = v[..., None, None].clone()
        elif v.ndim == 4 and not any(s in name for s in (".resample.", ".to_qkv.", ".proj.")):
            taps = 3 if v.shape[-1] == 3 else 1
            kernel = v.new_zeros(*v.shape[:2], taps, *v.shape[2:])
            kernel[:, :, -1] = v
            out[name] = kernel
        else:
            out[name] = v.clone()
    return out


def from_official(state: Params) -> dict[str, Tensor]:
    """The inverse of `to_official`; raises if a 3x3x3 kernel is not inert in time."""
    out: dict[str, Tensor] = {}
    for name, v in state.items():
        if name.endswith("gamma"):
            out[name] = v.reshape(-1)
        elif v.ndim == 5 and v.shape[-1] == 1 and v.shape[2] == 3:
            out[name] = v[..., 0, 0]
        elif v.ndim == 5:
            if v.shape[2] == 3 and bool(v[:, :, :2].any()):
                raise ValueError(
                    f"{name} is not inert in time: give weights whose taps before the current frame are zero"
                )
            out[name] = v[:, :, -1]
        else:
            out[name] = v
    return out


def folded(params: Params, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Parameters whose latents, which had this mean and std `[z]`, have those of the published Wan2.1 VAE.

    The change of scale goes into the 1x1 convolutions `conv1`, after the encoder, and `conv2`, before the decoder.
    """
    p = {k: v.clone() for k, v in params.items()}
    wan_mean, wan_std = mean.new_tensor(WAN_LATENTS_MEAN), mean.new_tensor(WAN_LATENTS_STD)
    scale, z = wan_std / std, len(mean)
    p["conv1.weight"][:z] *= scale[:, None, None, None]
    p["conv1.bias"][:z] = (p["conv1.bias"][:z] - mean) * scale + wan_mean
    p["conv1.bias"][z:] += 2 * scale.log()
    weight = p["conv2.weight"][..., 0, 0]
    p["conv2.bias"] = p["conv2.bias"] + weight @ (mean - wan_mean / scale)
    p["conv2.weight"] = (weight / scale)[..., None, None]
    return p


def _norm(x: Tensor, gamma: Tensor) -> Tensor:
    y = x.float()
    return (y * (torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-12) * gamma[:, None, None])).to(x.dtype)


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(_norm(x, gamma))


norm_silu: Callable[[Tensor, Tensor], Tensor] = _norm_silu
"""The activation; a trainer replaces it by its compiled form, four times as fast on a CPU."""


def _conv(p: Params, name: str, x: Tensor, stride: int = 1) -> Tensor:
    w = p[f"{name}.weight"]
    return F.conv2d(x, w, p[f"{name}.bias"], stride=stride, padding=w.shape[-1] // 2 if stride == 1 else 0)


def _res(p: Params, name: str, x: Tensor) -> Tensor:
    h = _conv(p, f"{name}.residual.2", norm_silu(x, p[f"{name}.residual.0.gamma"]))
    h = _conv(p, f"{name}.residual.6", norm_silu(h, p[f"{name}.residual.3.gamma"]))
    return h + (_conv(p, f"{name}.shortcut", x) if f"{name}.shortcut.weight" in p else x)


def _attention(p: Params, name: str, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    qkv = _conv(p, f"{name}.to_qkv", _norm(x, p[f"{name}.norm.gamma"]))
    q, k, v = qkv.reshape(n, 3, c, h * w).transpose(2, 3).unbind(1)
    y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    return x + _conv(p, f"{name}.proj", y.transpose(1, 2).reshape(n, c, h, w))


def _middle(p: Params, name: str, x: Tensor) -> Tensor:
    return _res(p, f"{name}.2", _attention(p, f"{name}.1", _res(p, f"{name}.0", x)))


def _time_down(p: Params, name: str, x: Tensor, clips: int) -> Tensor:
    """Halves time: the first frame as it is, then one convolution over frames 2k-2 … 2k for every k >= 1."""
    _, c, h, w = x.shape
    x = x.reshape(clips, -1, c, h, w)
    if x.shape[1] == 1:
        return x.flatten(0, 1)
    weight = p[f"{name}.weight"]  # [C,C,3]
    taps = torch.cat([x[:, 0:-2:2], x[:, 1:-1:2], x[:, 2::2]], dim=2)  # [B,K,3C,H,W]
    k = taps.shape[1]
    y = F.conv2d(taps.flatten(0, 1), weight.permute(0, 2, 1).reshape(c, 3 * c, 1, 1), p[f"{name}.bias"])
    return torch.cat([x[:, :1].to(y.dtype), y.reshape(clips, k, c, h, w)], dim=1).flatten(0, 1)


def _time_up(p: Params, name: str, x: Tensor, clips: int) -> Tensor:
    """Doubles time after the first frame: that frame as it is, the others by a causal convolution that sees zeros
    where the first frame stood."""
    _, c, h, w = x.shape
    x = x.reshape(clips, -1, c, h, w)
    if x.shape[1] == 1:
        return x.flatten(0, 1)
    weight = p[f"{name}.weight"]  # [2C,C,3]
    rest = F.pad(x[:, 1:], (0, 0, 0, 0, 0, 0, 2, 0))  # [B,2+K,C,H,W]
    taps = torch.cat([rest[:, :-2], rest[:, 1:-1], rest[:, 2:]], dim=2)
    k = taps.shape[1]
    y = F.conv2d(taps.flatten(0, 1), weight.permute(0, 2, 1).reshape(2 * c, 3 * c, 1, 1), p[f"{name}.bias"])
    return torch.cat([x[:, :1].to(y.dtype), y.reshape(clips, 2 * k, c, h, w)], dim=1).flatten(0, 1)


def encode_clip(p: Params, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance `[B,z,F,H/8,W/8]` (not yet normalised) of clips `[B,3,T,H,W]` in [-1, 1], T = 4n + 1."""
    b = video.shape[0]
    x = video.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    x = _conv(p, "encoder.conv1", x)
    slot = 0
    while (name := f"encoder.downsamples.{slot}") and (
        f"{name}.resample.1.weight" in p or f"{name}.residual.2.weight" in p
    ):
        if f"{name}.resample.1.weight" in p:
            x = _conv(p, f"{name}.resample.1", F.pad(x, (0, 1, 0, 1)), stride=2)
            if f"{name}.time_conv.weight" in p:
                x = _time_down(p, f"{name}.time_conv", x, b)
        else:
            x = _res(p, name, x)
        slot += 1
    x = _middle(p, "encoder.middle", x)
    x = _conv(p, "encoder.head.2", norm_silu(x, p["encoder.head.0.gamma"]))
    x = _conv(p, "conv1", x).float()
    mean, logvar = x.reshape(b, -1, *x.shape[1:]).transpose(1, 2).chunk(2, dim=1)
    return mean, logvar


def decode_clip(p: Params, z: Tensor) -> Tensor:
    """Clips `[B,3,T,H,W]` (not clamped) of latents `[B,z,F,h,w]` (not normalised)."""
    b = z.shape[0]
    x = z.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    x = _conv(p, "decoder.conv1", _conv(p, "conv2", x))
    x = _middle(p, "decoder.middle", x)
    slot = 0
    while (name := f"decoder.upsamples.{slot}") and (
        f"{name}.resample.1.weight" in p or f"{name}.residual.2.weight" in p
    ):
        if f"{name}.resample.1.weight" in p:
            if f"{name}.time_conv.weight" in p:
                x = _time_up(p, f"{name}.time_conv", x, b)
            x = _conv(p, f"{name}.resample.1", F.interpolate(x, scale_factor=2, mode="nearest-exact"))
        else:
            x = _res(p, name, x)
        slot += 1
    x = _conv(p, "decoder.head.2", norm_silu(x, p["decoder.head.0.gamma"])).float()
    return x.reshape(b, -1, *x.shape[1:]).transpose(1, 2)
