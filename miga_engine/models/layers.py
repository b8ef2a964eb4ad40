"""What the families share: linear layers, reshapes, timestep embeddings, and the sizes of what a caller gives."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine import ops
from miga_engine.errors import ConfigError, NumericsError


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """`einops.rearrange`, which is imported when a network first runs, not with the package."""
    import einops

    return einops.rearrange(x, pattern, **sizes)


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32, whatever the dtype of its weights."""
    return ops.linear(x.float(), layer.weight.float(), layer.bias.float())


class Linear(nn.Linear):
    """A linear map through `ops.linear`, with the tanh-approximated GELU of it if `gelu`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, gelu: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.gelu = gelu

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias, gelu=self.gelu)


class Conv2d(nn.Conv2d):
    """A convolution through `ops.conv2d`; `allow_tf32` is the network's own (`set_tf32`)."""

    allow_tf32 = False

    def forward(self, input: Tensor) -> Tensor:
        return ops.conv2d(
            input, self.weight, self.bias, stride=self.stride, padding=self.padding, allow_tf32=self.allow_tf32
        )


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the gradient of something computed of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution: x [...,C], weight [C',C] → [...,C']."""
    if wants_gradient(x, weight):  # the fast product has none
        return F.linear(x, weight, bias)
    return ops.linear(x, weight, bias)


def check_finite(what: str, given: Tensor, result: Tensor, dtype: torch.dtype) -> None:
    """NumericsError where a network made NaN or infinity of what it was given: one wait for the device.

    `what` says which network did what; dtype is the one it computes in. Shapes alone, on `meta`, are finite.
    """
    if result.is_meta or torch.compiler.is_compiling() or not result.numel() or _is_finite(result):
        return
    if given.is_floating_point() and not _is_finite(given):
        raise NumericsError(f"{what} was given NaN or infinity: look for what made it")
    name = str(dtype).removeprefix("torch.")
    choices = {"float16": "float32 or bfloat16", "bfloat16": "float32"}
    remedy = f"start anew in {choices[name]}, or " if name in choices else ""
    raise NumericsError(f"{what} gave NaN or infinity in {name}: {remedy}download its weights again")


def _is_finite(x: Tensor) -> bool:
    """In one reading, for the extremes of what holds NaN are NaN."""
    return bool(torch.stack(x.detach().aminmax()).isfinite().all())


Module = TypeVar("Module", bound=nn.Module)


def copied_to(device: torch.device, network: Module) -> Module:
    """The network on another device, in the same dtypes; the one that is given stays. On `meta` it has no data."""
    memo: dict[int, Any] = {id(buffer): buffer.to(device) for buffer in network.buffers()}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
    return copy.deepcopy(network, memo)


def set_tf32(network: nn.Module, allow: bool) -> None:
    """Whether the network's convolutions round float32 to TF32 on GPUs that have it."""
    for module in network.modules():
        if hasattr(module, "allow_tf32"):
            setattr(module, "allow_tf32", allow)  # noqa: B010 - one of several classes


def allows_tf32(network: nn.Module) -> bool:
    """Whether `set_tf32` allowed it."""
    return any(getattr(module, "allow_tf32", False) for module in network.modules())


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids [...,dim] in float32: cosines, then sines, of t · 10000^(-i / (dim/2)), taken in float64."""
    half = dim // 2
    frequencies = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=timesteps.device) / half)
    angles = timesteps.double().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def check_timesteps(timesteps: Tensor, batch: int, num_frames: int) -> None:
    """Raises ConfigError unless timesteps are one number, [B] or [B,F]."""
    # Compared one by one, because torch.compile may hold sizes as symbols.
    is_shared = timesteps.ndim == 0 or (timesteps.ndim == 1 and timesteps.shape[0] == 1)
    is_by_window = timesteps.ndim in (1, 2) and timesteps.shape[0] == batch
    if not (is_shared or (is_by_window and (timesteps.ndim == 1 or timesteps.shape[1] == num_frames))):
        raise ConfigError(
            f"timesteps has shape {tuple(timesteps.shape)}: give one number, [{batch}] or [{batch}, {num_frames}]"
        )


def guidance_branches(num_prompts: int, batch: int, num_frames: int, index: Tensor | None) -> int:
    """How many guidance branches an index names prompts for: G of [G·B] or [G·B,F].

    Without an index there is one prompt for all windows or one for each. Raises ConfigError on other sizes.
    """
    if index is None:
        if num_prompts not in (1, batch):
            raise ConfigError(
                f"the context holds {num_prompts} prompts for {batch} windows: "
                "give one, one for each window, or a context_index"
            )
        return 1
    branches, rest = divmod(index.shape[0], batch)
    is_by_frame = index.ndim == 2 and index.shape[1] == num_frames
    if rest or not branches or not (index.ndim == 1 or is_by_frame):
        raise ConfigError(
            f"context_index has shape {tuple(index.shape)}: give [{batch}] (a prompt for each window) "
            f"or [{batch}, {num_frames}] (one for each latent frame), or a multiple of {batch} rows for as many "
            "guidance branches"
        )
    return branches
