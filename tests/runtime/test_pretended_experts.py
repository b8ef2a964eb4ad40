"""Two networks by noise level on a pretended GPU: both resident, or one at a time in the same memory there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import random_wan
import torch
from pretended_runs import CAN_PRETEND
from safetensors.torch import save_file
from torch import Tensor

from miga_engine.models import load_transformer
from miga_engine.models.wan.experts import WanExperts

pytestmark = CAN_PRETEND


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for i, name in enumerate(("high_noise_model", "low_noise_model")):
        (tmp_path / name).mkdir()
        save_file(random_wan.transformer(seed=i), tmp_path / name / random_wan.TRANSFORMER)
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": "WanModel", "text_len": 16}))
    return tmp_path


def outputs(both: WanExperts, device: str) -> list[Tensor]:
    """Of calls that go from one network to the other and back, by tables that are made once."""
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 16, 3, 4, 6, generator=generator), torch.randn(1, 4, 32, generator=generator)
    levels = both.encode_timesteps(torch.tensor([900.0, 500.0, 100.0]).to(device))
    context = both.encode_context(text.to(device))
    rows = torch.tensor([[0, 1, 2]]).to(device)
    return [both(latents.to(device), (levels, rows), context, expert=expert).cpu() for expert in (0, 1, 1, 0)]


@pytest.mark.slow
def test_swapping_gives_what_residents_give(gpu, model: Path) -> None:
    on_cpu = load_transformer(model, dtype=torch.float32)
    resident = load_transformer(model, "cuda", torch.float32)
    swapped = load_transformer(model, "cuda", torch.float32, experts="swap")
    assert isinstance(on_cpu, WanExperts)
    assert isinstance(resident, WanExperts)
    assert isinstance(swapped, WanExperts)
    assert {p.device.type for p in resident.parameters()} == {p.device.type for p in swapped.bring(0).parameters()}
    assert {p.device.type for p in swapped.parameters()} == {"cpu"}
    expected = outputs(resident, "cuda")
    for here, there, host in zip(outputs(swapped, "cuda"), expected, outputs(on_cpu, "cpu"), strict=True):
        assert torch.equal(here, there)
        assert (there - host).abs().max() <= 3e-5 * host.abs().max()
    assert not torch.equal(expected[0], expected[1])
    assert swapped.num_moves == 5  # to begin with, for each table one, where the calls go over and back
