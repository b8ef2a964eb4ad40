"""docs/models.md: its table is that of the presets, and what its cards say of a model is what the engine says."""

from __future__ import annotations

import re
from collections.abc import Iterator

import models_table
import pytest
import torch

from miga_engine.models.wan.dit import WAN_T2V_CONFIGS, WanDiT, WanDiTConfig
from miga_engine.models.wan.variants import VARIANTS
from miga_engine.options import form
from miga_engine.presets import PRESETS

TEXT = models_table.PAGE.read_text(encoding="utf-8")
SMALL, LARGE = WAN_T2V_CONFIGS["1.3B"], WAN_T2V_CONFIGS["14B"]
SIZES = {  # by the beginning of a card's name
    "Wan2.1 T2V-1.3B": SMALL,
    "Wan2.1 T2V-14B": LARGE,
    "SkyReels-V2-DF 1.3B": WanDiTConfig(**{**vars(SMALL), "inject_sample_info": True}),
    "SkyReels-V2-DF 14B": LARGE,
    "Wan2.2 TI2V-5B": WanDiTConfig(3072, 14336, 256, 24, 30, 4096, 512, 48, 48),
}


def cards() -> Iterator[list[str]]:
    section = TEXT.partition("## Cards")[2].partition("\n## ")[0]
    for line in section.splitlines()[4:]:
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_network_calls_is_that_of_the_presets() -> None:
    stored = TEXT.partition(models_table.BEGIN)[2].partition(models_table.END)[0]
    assert stored == models_table.table(), "run `python tests/models_table.py`"
    assert re.findall(r"^\| `([\w.-]+)`", stored, re.MULTILINE) == list(PRESETS)


def test_a_row_is_what_was_worked_out_by_hand() -> None:
    """Eight steps, one branch, groups of three: 7 groups in one window of 21, and Stage 2 a window every 10 frames."""
    assert models_table.row("wan2.1-8step").split(" | ")[3:] == ["8", "1", "0.43", "9.1", "1.7 |\n"]


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_of_the_cards_are_those_of_the_networks(name: str) -> None:
    (card,) = [card for card in cards() if card[0].startswith(name)]
    with torch.device("meta"):
        network = WanDiT(SIZES[name])
    assert f"{sum(p.numel() for p in network.parameters()) / 1e9:.2f} B" in card[1]


def test_each_model_of_the_family_has_a_card_with_its_window_and_its_preset() -> None:
    for variant in VARIANTS:
        name = variant.name.removesuffix(" 720P").removesuffix(" T2V")
        found = [card for card in cards() if card[0].startswith(name)]
        assert found, name
        assert all(f"`{variant.default_preset}`" in card[3] for card in found)
        assert any(f"{variant.window_frames} = {4 * variant.window_frames - 3}" in card[2] for card in found)


def test_presets_and_options_that_the_page_names_are_there() -> None:
    options = {"--" + option.name.replace("_", "-") for option in form()}
    assert set(re.findall(r"(--[a-z][\w-]+)", TEXT)) <= options
    for card in cards():
        assert set(re.findall(r"`(\w[\w.-]+)`", card[3])) <= set(PRESETS)
