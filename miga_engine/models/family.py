"""What a family of models answers, so that nobody above need know which it is.

A family is a folder beside this file whose `family.py` fills in one `Family`, and a line in `models.loading.FAMILIES`.
Families import nothing of each other. What more kinds of model will need has its place:

- Conditions (a first image, a clip): a family names the kinds it takes in `ModelFacts.conditions`; they are encoded by
  its VAE and lie in the queue as clean frames, so a network need not know of them.
- Networks by noise level (the two experts of Wan2.2): the family's `open_bundle` makes one `Transformer` that holds
  them and has a `boundary_timestep`; who calls it says which is meant, and knows nothing else of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miga_engine.config import PARTS
from miga_engine.models.bundle import ModelBundle
from miga_engine.models.protocols import VAE, TextEncoder, Tokenizer, Transformer
from miga_engine.weights.checkpoint import Checkpoint

Device = torch.device | str | None


@dataclass(frozen=True)
class Sources:
    """Where the parts of a model lie, and what is merged into them.

    `root` is the model's folder, or the weights file of its transformer; a part that is named lies there instead: a
    folder or a file each.
    """

    root: Path
    transformer: Path | None = None
    transformer_2: Path | None = None
    """The network for low noise, of a model that has one for high noise beside it."""
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    """LoRA files and their strengths, merged into the transformer in this order."""
    decoder: str = "vae"
    """"vae", or "tae" for a tiny decoder in the place of the VAE, which then has the `vae` path."""
    experts: str = "resident"
    """Of two networks by noise level: "resident", both on the device, or "swap", one at a time."""
    hub: tuple[tuple[str, str], ...] = ()
    """Options by which the root was found in the cache of a hub."""

    @property
    def leading(self) -> Path:
        """By which the family is told: the transformer."""
        return self.transformer or self.root

    @property
    def folder(self) -> Path:
        """That which messages name, and miga.json lies in."""
        return self.root.parent if self.root.is_file() else self.root

    def apart(self) -> dict[str, str]:
        """Absolute paths of the parts that are named, by their options."""
        paths = {name: getattr(self, name) for name in PARTS}
        return {name: os.path.abspath(path) for name, path in paths.items() if path is not None}


@dataclass(frozen=True)
class Components:
    """Parts of a model that are in memory: modules or state dicts, under the names of any layout.

    `transformer_config` and `vae_config` are their config.json, where they are state dicts, or what is not in a
    module's own config.
    """

    transformer: Any
    vae: Any
    transformer_2: Any = None
    text_encoder: Any = None
    """None: every prompt has an embedding."""
    tokenizer: Any = None
    """One of `tokenizers` or transformers, a file, or what answers as `models.protocols.Tokenizer`."""
    transformer_config: Mapping[str, Any] | None = None
    vae_config: Mapping[str, Any] | None = None
    decoder: str = "vae"
    name: str = "components"


@dataclass(frozen=True)
class Family:
    """What it answers of a path (a model's folder, a component's, or a weights file) or of the sources of a model. Each
    failure is a CheckpointError."""

    name: str
    window_bound: int
    """Latent frames that a window may have at most, whatever the model's miga.json says."""
    recognises: Callable[[Path], bool]
    """Whether the names or the keys under a path are this family's. No weights are read."""
    open_bundle: Callable[[Sources, Device, torch.dtype | None, torch.dtype], ModelBundle]
    """All networks on a device: dtype of the transformer and the text encoder, then that of the VAE."""
    load_transformer: Callable[[Sources, Device, torch.dtype | None], Transformer]
    load_vae: Callable[[Sources, Device, torch.dtype], VAE]
    load_text_encoder: Callable[[Sources, Device, torch.dtype | None], TextEncoder]
    load_tokenizer: Callable[[Sources, int | None], Tokenizer]
    """With the number of tokens that a prompt is cut to, None for the family's own."""
    network_bytes: Callable[[Sources], dict[str, int]]
    """Bytes that each network takes of its files, in the order in which they are read."""
    kept_dtypes: Callable[[Checkpoint], Callable[[str], bool] | None]
    """Of a file's own keys those whose tensors stay as they are when it is stored in another dtype; None where the file
    is not this family's."""
    plain_files: Callable[[Sources], dict[str, Checkpoint | dict[str, Any] | bytes]]
    """A model as its makers lay it out in a folder: tensors, JSON and bytes by file name, LoRAs merged."""
    of_components: Callable[[Components, Device, torch.dtype | None, torch.dtype | None], ModelBundle] | None = None
    """All networks of parts in memory, whose tensors are shared where device and dtype stay; None of a dtype: as they
    are. None where the family's networks are read from files alone."""
    refuses: Callable[[Path], None] = lambda folder: None
    """Raises for a folder whose JSON files alone tell that its model is of no use here."""
    describe: Callable[[Checkpoint], tuple[str, str] | None] = lambda checkpoint: None
    """What a weights file is, and what it takes to use it or why it is of no use; None for another family's."""
