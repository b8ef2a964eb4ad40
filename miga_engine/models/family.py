"""What a family of models answers, so that nobody above need know which it is.

A family is a folder beside this file whose `family.py` fills in one `Family`, and a line in `models.loading.FAMILIES`.
Families import nothing of each other. What more kinds of model will need has its place:

- Conditions (a first image, a clip): a family names the kinds it takes in `ModelFacts.conditions`; `config.Request`
  carries a `Condition`, refused unless it is of one of them; `runtime.network.Batch` has room for what it adds to the
  frames of windows.
- Networks by noise level (the two experts of Wan2.2): the family's `open_bundle` makes one `Transformer` that holds
  them and picks by the level in `encode_timesteps`, whose result it alone reads; nobody else learns that there are
  several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from miga_engine.models.bundle import ModelBundle
from miga_engine.models.protocols import VAE, TextEncoder, Tokenizer, Transformer
from miga_engine.weights.checkpoint import Checkpoint

Device = torch.device | str | None


@dataclass(frozen=True)
class Family:
    """Every path is a model's folder, a component's, or a weights file. Each failure is a CheckpointError."""

    name: str
    window_bound: int
    """Latent frames that a window may have at most, whatever the model's miga.json says."""
    recognises: Callable[[Path], bool]
    """Whether the names or the keys under a path are this family's. No weights are read."""
    open_bundle: Callable[[Path, Device, torch.dtype | None, torch.dtype], ModelBundle]
    """All networks on a device: dtype of the transformer and the text encoder, then that of the VAE."""
    load_transformer: Callable[[Path, Device, torch.dtype | None], Transformer]
    load_vae: Callable[[Path, Device, torch.dtype], VAE]
    load_text_encoder: Callable[[Path, Device, torch.dtype | None], TextEncoder]
    load_tokenizer: Callable[[Path, int | None], Tokenizer]
    """With the number of tokens that a prompt is cut to, None for the family's own."""
    network_bytes: Callable[[Path], dict[str, int]]
    """Bytes that each network takes of its files, in the order in which they are read."""
    kept_dtypes: Callable[[Checkpoint], Callable[[str], bool] | None]
    """Of a file's own keys those whose tensors stay as they are when it is stored in another dtype; None where the file
    is not this family's."""
