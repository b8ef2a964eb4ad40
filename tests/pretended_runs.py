"""Small runs on the pretended GPU, and how far their frames are from the CPU's."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from typing import Any

import golden_model
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from miga_engine import Engine
from miga_engine.presets import PRESETS

CAN_PRETEND = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here: its own guard must stay"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="the pretended device guard needs a C++ compiler"),
]

PROMPT = "a red balloon over snowy hills at dawn"
TINY = {"height": 32, "width": 48, "num_inference_steps": 6}


def options_of(family: str) -> dict[str, Any]:
    if family == "tiny":
        # a queue of several windows, so that there are batches; branches that read different frames
        miga = dataclasses.replace(
            PRESETS["tiny"].miga, zigzag_width=4, stage2_steps=2, window_batch=2, judge_step=2, reference_groups=1,
            past_context=True, history_guidance="all",
        )  # fmt: skip
        return {**TINY, "num_frames": 61, "miga": miga}
    known = golden_model.FAMILIES[family]
    miga = dataclasses.replace(known.options["miga"], window_batch=2)
    return {**known.options, "num_frames": known.num_frames, "miga": miga}


def frames_by(engine: Engine, family: str, prompt: Any = PROMPT, **changes: Any) -> Tensor:
    with _disable_current_modes() if engine.device.type == "cpu" else contextlib.nullcontext():
        return engine.generate(prompt, **{**options_of(family), **changes}).frames


def levels_apart(one: Tensor, other: Tensor) -> int:
    """The largest difference: that of roundings, where norms and attention are other code than the CPU's, is 1."""
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())
