"""A loaded model as the runtime sees it: networks and facts, without the name of their family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine.device import own_modes
from miga_engine.errors import CheckpointError
from miga_engine.models.layers import check_finite
from miga_engine.models.protocols import VAE, TextEncoder, Tokenizer, Transformer
from miga_engine.weights.untrusted import short

MOST_EMBEDDINGS = 64  # prompts whose embeddings are kept, 4 MiB each at the published sizes


@dataclass(frozen=True)
class ModelFacts:
    """What a family of models says of itself, so that nothing above need know which it is."""

    window_frames: int
    """Latent frames the network was trained to see together."""
    size_multiple: int
    """Height and width of the video, in pixels, are multiples of this."""
    text_len: int
    """Tokens of the longest prompt."""
    prediction_type: str
    """What the network predicts: velocity or epsilon."""
    default_preset: str
    """Name of the defaults, in `presets.PRESETS`."""
    default_negative_prompt: str
    """Negative prompt where the caller gives none."""
    protocol_frames: int
    """Video frames of the clips that the MIGA paper measures."""
    conditions: tuple[str, ...] = ("image", "video")
    """What a video can be made to begin with: kinds of `request.Condition`."""


@dataclass(frozen=True)
class ModelBundle:
    """Transformer, VAE and, on demand, text encoder and tokenizer of one model.

    `extra` is what the folder's miga.json says; it may set window_frames and default_negative_prompt.
    """

    path: Path
    device: torch.device
    dtype: torch.dtype
    transformer: Transformer
    vae: VAE
    facts: ModelFacts
    open_text_encoder: Callable[..., TextEncoder] = field(repr=False)
    """On the bundle's device, or on the `device` that is named."""
    open_tokenizer: Callable[[], Tokenizer] = field(repr=False)
    rehearse: Callable[[], None] = field(repr=False)
    """Runs networks of the family in small, after which the libraries hold what a run needs of them."""
    extra: dict[str, Any] = field(default_factory=dict)
    texts_form: str = ""
    """How the text encoder's weights are stored: `weights.checkpoint.form_of`; empty where they lie with all others."""
    merged: tuple[tuple[str, float, str], ...] = ()
    """LoRAs in the transformer: path, strength, fingerprint."""
    given_embeddings: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Embeddings [T,D] by prompt, for which the text encoder is not asked; shared by the copies of a bundle."""
    _embeddings: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Read from its file at the first use."""
        return self.open_text_encoder()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read from its file at the first use."""
        return self.open_tokenizer()

    def release_text_encoder(self) -> None:
        """Give back the text encoder's memory; the next prompt reads it again."""
        self.__dict__.pop("text_encoder", None)

    @own_modes()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Text embeddings [P,T,D] on the bundle's device, zero rows behind the shorter ones, T the longest's tokens.

        Each prompt is encoded alone, so that its embedding does not depend on its neighbours. On a GPU the text
        encoder's memory is given back afterwards, and the newest embeddings are kept, on the host. Raises NumericsError
        where the text encoder gives NaN or infinity.
        """
        rows = []
        for prompt in prompts:
            if prompt in self.given_embeddings:
                rows.append(self.given_embeddings[prompt].to(self.device))
                continue
            row = self._embeddings.pop(prompt, None)
            if row is None:
                ids, mask = self.tokenizer([prompt])
                if int(ids.max()) >= self.text_encoder.config.vocab_size:
                    raise CheckpointError(
                        f"the tokenizer in {self.path} gives token {int(ids.max())} and the text encoder has "
                        f"embeddings for {self.text_encoder.config.vocab_size}: give both of one and the same model"
                    )
                row = self.text_encoder(ids.to(self.device), mask.to(self.device))[0]
                what = f"the text encoder (dtype), on the prompt {short(prompt)!r},"
                check_finite(what, ids, row, row.dtype)
            if self.device.type == "cuda":
                self._embeddings[prompt] = row.cpu()
            rows.append(row.to(self.device))
        for prompt in list(self._embeddings)[:-MOST_EMBEDDINGS]:
            self._embeddings.pop(prompt, None)  # which another thread may have done
        if self.device.type == "cuda":
            self.release_text_encoder()
        length = max(map(len, rows), default=0)
        return torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return self.vae.config.z_dim

    @property
    def text_dim(self) -> int:
        """Width of a text embedding."""
        return self.transformer.config.text_dim

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position, along height and width."""
        return self.vae.config.spatial_factor

    def frame_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of a latent frame of pictures of this size, in pixels."""
        return self.latent_channels, height // self.spatial_factor, width // self.spatial_factor

    @property
    def frame_ratio(self) -> int:
        """Video frames per latent frame after the first."""
        return self.vae.config.frame_ratio

    @property
    def size_multiple(self) -> int:
        """Height and width of the video, in pixels, are multiples of this."""
        return self.facts.size_multiple

    @property
    def window_frames(self) -> int:
        """Latent frames the network was trained to see together."""
        return int(self.extra.get("window_frames", self.facts.window_frames))

    @property
    def prediction_type(self) -> str:
        """What the network predicts: velocity or epsilon."""
        return self.facts.prediction_type

    @property
    def default_negative_prompt(self) -> str:
        """Negative prompt where the caller gives none."""
        return str(self.extra.get("default_negative_prompt", self.facts.default_negative_prompt))

    def num_video_frames(self, num_latents: int) -> int:
        """Frames that a clip of `num_latents` >= 1 latent frames decodes to."""
        return 1 + self.frame_ratio * (num_latents - 1)

    def num_latent_frames(self, num_video_frames: int) -> int:
        """Latent frames whose decoded clip has at least `num_video_frames` >= 1 frames."""
        return -(-(num_video_frames - 1) // self.frame_ratio) + 1

    def num_whole_latents(self, num_video_frames: int) -> int:
        """Latent frames that decode to at most `num_video_frames` >= 1 frames."""
        return (num_video_frames - 1) // self.frame_ratio + 1

    def first_video_frame(self, latent_frame: int) -> int:
        """Number of the first video frame that latent frame `latent_frame` (from 0) decodes to."""
        return self.num_video_frames(latent_frame) if latent_frame else 0
