"""What the networks of a family are to all who use them: what they answer, and nothing of how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class TextTable(Protocol):
    """Cross-attention keys and values of prompts, by row."""

    def table(self, num_rows: int, num_keys: int) -> TextTable: ...
    def write(self, row: int, prompt: Any) -> None: ...
    def row(self, row: int, num_keys: int) -> TextTable: ...


class TransformerSizes(Protocol):
    """What is asked of a transformer's `config`: channels of a head, and width of a text embedding."""

    @property
    def head_dim(self) -> int: ...
    @property
    def text_dim(self) -> int: ...


class Transformer(nn.Module, ABC):
    """Called with latents [B,C,F,H,W], timesteps or (what `encode_timesteps` made, rows of it int64 [B,F]) and text
    embeddings or what `encode_context` made, it predicts [G·B,C,F,H,W] float32, a noise level and a prompt a frame.

    `context_index` names prompts of G guidance branches, int64 [G·B] or [G·B,F]; `keep`, int64 [B,K], frames wanted.
    """

    config: TransformerSizes
    attention: str = "auto"
    """Backend of `ops.frame_attention`."""
    boundary_timestep: float | None = None
    """From which timestep on the first of two networks, for high noise, is meant, and below it the second: `forward`
    then takes `expert`, 0 or 1, for all frames of a call. None: one network for all."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""

    @property
    def is_movable(self) -> bool:
        """Whether a copy can be on another device."""
        return True

    @abstractmethod
    def encode_timesteps(self, timesteps: Tensor, fps: float | None = None) -> Any:
        """Timesteps [T] as the network sees them, done once for a schedule; fps is the video's rate, for a network that
        is told it, None for the usual one."""

    @abstractmethod
    def encode_context(self, context: Tensor) -> Any:
        """Text embeddings [P,T,D] → a `TextTable` of every layer."""

    def bring(self, expert: int) -> Any:
        """Have the network 0 or 1 of two where it computes, before a call or a replay of one."""

    @abstractmethod
    def num_text_keys(self, num_tokens: int) -> int:
        """Keys that `encode_context` makes of a text of so many tokens, at most."""


class StreamDecoder(Protocol):
    """Decodes the latents of one clip piece by piece. A push that fails leaves it as it was."""

    def push(self, latents: Tensor, /) -> Tensor: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: dict[str, Tensor], /) -> None: ...


class VAESizes(Protocol):
    """What is asked of a VAE's `config`: latent channels, pixels a latent position, video frames a latent frame."""

    @property
    def z_dim(self) -> int: ...
    @property
    def spatial_factor(self) -> int: ...
    @property
    def frame_ratio(self) -> int: ...


class VAE(nn.Module, ABC):
    """Video [B,3,T,H,W] in [-1,1] ↔ latents [B,C,F,h,w]."""

    config: VAESizes

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the network computes."""

    @abstractmethod
    def encode(self, video: Tensor) -> Tensor:
        """Video [B,3,T,H,W] in [-1,1] → latents [B,C,F,h,w]."""

    @abstractmethod
    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes the latents of one clip in pieces and gives bit for bit the frames of `decode`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,C,F,h,w] → video [B,3,T,H,W], clamped to [-1,1]."""
        return self.stream_decoder().push(latents)


class TextEncoderSizes(Protocol):
    """What is asked of a text encoder's `config`: how many tokens have an embedding."""

    @property
    def vocab_size(self) -> int: ...


class TextEncoder(nn.Module):
    """Called with token ids int64 [B,T] and their mask, it gives embeddings [B,T,D]."""

    config: TextEncoderSizes


class Tokenizer(Protocol):
    """Prompts → token ids and mask, int64 [P,T]."""

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]: ...
