"""The table of formats in docs/weights.md is what comes of writing and loading each of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import formats_table
import pytest
import torch
from written_formats import check, plain, saved
from written_loras import base, check_merged

from miga_engine.models import load_transformer


@pytest.mark.slow
def test_the_page_says_what_comes_of_each_format() -> None:
    for package in ("diffusers", "transformers", "peft", "huggingface_hub"):
        pytest.importorskip(package)
    page = formats_table.PAGE.read_text(encoding="utf-8")
    assert page.count(formats_table.BEGIN) == page.count(formats_table.END) == 1
    shown = page.partition(formats_table.BEGIN)[2].partition(formats_table.END)[0]
    made = formats_table.table()
    assert shown.splitlines() == made.splitlines(), "run: python tests/weights/formats_table.py"


def test_every_row_is_one_line_of_three_cells_and_stands_once() -> None:
    formats = [case.format for case in formats_table.CASES]
    assert len(set(formats)) == len(formats) > 100
    assert not any("|" in cell or "\n" in cell for case in formats_table.CASES for cell in case[:2])


@pytest.mark.parametrize("change", [torch.neg, lambda value: value * 1.001])
def test_the_comparison_has_teeth(tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    key = "blocks.1.ffn.2.bias"
    tensors = {**plain("transformer"), key: change(plain("transformer")[key])}
    network = load_transformer(saved(tmp_path / "a.safetensors", tensors))
    check(network, tensors)
    with pytest.raises(AssertionError, match=re.escape(key)):
        check(network, plain("transformer"))
    lora = saved(tmp_path / "lora.safetensors", {"blocks.1.ffn.2.diff_b": tensors[key] - plain("transformer")[key]})
    check_merged(base(tmp_path), lora, tensors, 1.0)
    with pytest.raises(AssertionError):
        check_merged(base(tmp_path), lora, plain("transformer"), 1.0)
