"""Pusa's LoRA files, as the library that trained them writes them: merged as they act, into one network or into two."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import random_wan
import torch
from safetensors.torch import save_file
from torch import Tensor

from miga_engine.models import load_transformer
from miga_engine.models.wan.dit import WanDiT

RANK = 512  # of the published files, wider than this network
STRENGTHS = (1.0, 1.4)


def trained(seed: int, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], WanDiT]:
    """What such a training saves, and the network that it trained, changed by its layers."""
    network = WanDiT(random_wan.CONFIG)
    network.load_state_dict(weights)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q", "k", "v", "o", "ffn.0", "ffn.2"])
    network = peft.inject_adapter_in_model(config, network)
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return {name: p.detach() for name, p in network.named_parameters() if "lora_" in name}, network


def wanted(changed: WanDiT, strength: float) -> dict[str, Tensor]:
    """The same by the library that trained it, at a strength."""
    for module in changed.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(strength)
            module.merge()
    state = changed.state_dict()
    return {name.replace(".base_layer", ""): value for name, value in state.items() if "lora_" not in name}


def assert_close(network: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    state = network.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_pickle_of_wan2_1_is_merged_as_its_layers_act(tmp_path: Path, strength: float) -> None:
    weights = random_wan.transformer()
    model = tmp_path / "model.safetensors"
    save_file(weights, model)
    lora, changed = trained(1, weights)
    assert any(key.endswith("blocks.0.self_attn.q.lora_A.default.weight") for key in lora)
    torch.save(lora, tmp_path / "pusa_v1.pt")
    merged = load_transformer(model, loras=[(tmp_path / "pusa_v1.pt", strength)])
    assert_close(merged, wanted(changed, strength))
    change = merged.blocks[0].ffn[0].weight - weights["blocks.0.ffn.0.weight"]
    assert change.abs().max() > 1e-2


def test_the_two_files_of_wan2_2_go_to_the_network_that_each_is_for(tmp_path: Path) -> None:
    expected, loras = [], []
    for i, (noise, strength) in enumerate((("high", 1.5), ("low", 1.4))):
        weights = random_wan.transformer(seed=i)
        folder = tmp_path / "Wan2.2-T2V-A14B" / f"{noise}_noise_model"
        folder.mkdir(parents=True)
        save_file(weights, folder / random_wan.TRANSFORMER)
        lora, changed = trained(i, weights)
        file = tmp_path / f"{noise}_noise_pusa.safetensors"
        save_file(lora, file)
        expected.append(wanted(changed, strength))
        loras.append((file, strength))
    both = load_transformer(tmp_path / "Wan2.2-T2V-A14B", loras=loras)
    for network, state in zip(both.children(), expected, strict=True):
        assert_close(network, state)
