"""The programs in examples/ are run as they are; the one in C in tests/integrations/test_embed.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import golden_model
import live_modules
import numpy as np
import pytest
import torch
from places import ROOT

from miga_engine import Engine
from miga_engine.video.reading import read_video

EXAMPLES = ROOT / "examples"


def _start(name: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / name)], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.iterdir()}
    assert len(lengths) >= 3
    assert {name for name, length in lengths.items() if length > 45} == set()


@pytest.mark.slow
def test_a_prompt_that_is_typed_is_seen_and_replayed(tmp_path: Path) -> None:
    program = _start("live_prompt.py", tmp_path)
    assert program.stdin is not None
    assert program.stderr is not None
    program.stdin.write("a red balloon over snowy hills at night\n")
    program.stdin.flush()
    said = ""
    while "from frame" not in said:
        line = program.stderr.readline()
        assert line, said
        said += line
    while not (tmp_path / "live.mp4").exists():
        assert program.poll() is None
        time.sleep(0.1)
    program.stdin.write("\n")
    _, errors = program.communicate(timeout=120)
    assert program.returncode == 0, errors
    frames = read_video(tmp_path / "live.mp4")
    engine = Engine.from_pretrained("tiny")
    replay = engine.replay(tmp_path / "live.session.safetensors")
    assert [change.prompt for change in replay.request.changes] == ["a red balloon over snowy hills at night"]
    again = torch.cat([chunk.frames for chunk in replay]).numpy()
    assert len(frames) == len(again) >= 49
    assert 10 * np.log10(255**2 / np.square(frames.astype(float) - again).mean()) > 30  # what H.264 costs


@pytest.mark.slow
def test_two_videos_in_one_event_loop(tmp_path: Path) -> None:
    output, errors = (program := _start("asyncio_stream.py", tmp_path)).communicate(timeout=240)
    assert program.returncode == 0, errors
    levels = {name: [int(n) for n in re.findall(rf"{name}, frame \d+: (\d+)", output)] for name in ("balloon", "kite")}
    assert [len(seconds) for seconds in levels.values()] == [7, 7]
    assert levels["balloon"][-1] < 0.7 * levels["balloon"][0]  # night has come
    assert levels["kite"][-1] > 0.7 * levels["kite"][0]


@pytest.mark.slow
def test_parts_in_memory_make_a_video(tmp_path: Path) -> None:
    printed, errors = _start("components.py", tmp_path).communicate(timeout=120)
    lines = printed.splitlines()
    assert [line for line in lines if line.startswith("frames ")][-1].endswith(" to 48"), errors
    assert int(lines[-2].split()[0]) > 0
    assert lines[-1] == "0 MiB of weights"


@pytest.mark.slow
def test_a_pipeline_of_diffusers_makes_a_long_video(tmp_path: Path) -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    parts = live_modules.modules_of(golden_model.build(tmp_path / "wan"))
    WanPipeline(**parts, scheduler=UniPCMultistepScheduler()).save_pretrained(tmp_path / "pipe")
    program = (EXAMPLES / "diffusers_pipeline.py").read_text()
    made = "MigaPipeline.from_pipe(short)"
    program = program.replace(made, f"{made}.configure(preset='wan2.1-4step')")  # or it takes two minutes
    assert "4step" in program
    command = [sys.executable, "-c", program, "pipe", "--cpu"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=300)
    assert (tmp_path / "last.png").exists()
    assert len(read_video(tmp_path / "long.mp4")) == 97
