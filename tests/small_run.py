"""Runs of `miga` on the small Wan model of `golden_model`, and session files with something changed in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_model
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from miga_engine.cli import main
from miga_engine.runtime import session as session_file
from miga_engine.runtime.stream import Stream

OPTIONS = {**golden_model.OPTIONS, "seed": 3, "miga": golden_model.MIGA}
NUM_FRAMES = 61

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def frames_of(stream: Stream) -> Tensor:
    """All that is left of a stream."""
    chunks = [chunk.frames for chunk in stream]
    return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)


def miga(*arguments: object) -> int:
    """The command in this process; its exit code."""
    return main([str(argument) for argument in arguments])


def generate(model: Path, video: object, num_frames: int, *more: object) -> list[object]:
    """Arguments of `miga generate` for a video of 48×32 at 6 fps."""
    config = golden_model.MIGA
    method = ["--zigzag-width", config.zigzag_width, "--stage2-steps", config.stage2_steps, "--guidance-frames", 1]
    method += ["--stride", config.stride, "--judge-step", config.judge_step, "--num-inference-steps"]
    method += [golden_model.OPTIONS["num_inference_steps"], "--seed", 3]
    size = ["--height", 32, "--width", 48, "--fps", 6, "--num-frames", num_frames, "-q"]
    return ["generate", "a red balloon", "--model", model, *size, *method, "-o", video, *more]


def rewritten(path: Path, change: Change) -> Path:
    """The session file with a change of (record, tensors), and the checksum right again."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, record = load_file(path), json.loads(metadata["record"])
    change(record, tensors)
    text = json.dumps(record)
    save_file(tensors, path, {**metadata, "record": text, "sha256": session_file._checksum(text, tensors)})
    return path
