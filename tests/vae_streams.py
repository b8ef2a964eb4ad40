"""What holds of every causal VAE's stream: pieces of a clip decode to the frames of the whole, resumed ones too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miga_engine.models.wan.vae import WanVAE


def assert_pieces_are_the_whole(vae: WanVAE, latents: Tensor, pieces: Sequence[int]) -> None:
    """Latents [B,C,n,h,w] in pieces of so many latent frames."""
    decoder = vae.stream_decoder()
    frames = [decoder.push(piece) for piece in latents.split(list(pieces), dim=2)]
    assert [f.shape[2] for f in frames] == [4 * n - 3 * (i == 0) for i, n in enumerate(pieces)]
    assert torch.equal(torch.cat(frames, dim=2), vae.decode(latents))


def assert_resumes(vae: WanVAE, latents: Tensor, done: int, file: Path) -> None:
    """Behind so many latent frames, from the state in a file."""
    whole = vae.decode(latents)
    decoder = vae.stream_decoder()
    decoder.push(latents[:, :, :done])
    save_file(decoder.state(), file)
    resumed = vae.stream_decoder()
    resumed.load_state(load_file(file))
    assert torch.equal(resumed.push(latents[:, :, done:]), whole[:, :, 4 * done - 3 :])
