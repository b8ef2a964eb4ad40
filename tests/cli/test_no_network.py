"""A run needs no network."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import golden_model
import pytest
from places import ROOT

from miga_engine.video.reading import read_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return golden_model.build(tmp_path / "model")


@pytest.mark.slow
def test_nothing_is_asked_of_the_network(folder: Path, tmp_path: Path) -> None:
    """A video is made where Python can open no socket, and none is tried."""
    program = textwrap.dedent("""
        import sys

        asked = []

        def watch(event, arguments):
            if event.startswith("socket."):
                asked.append((event, arguments))
                raise OSError("no network")

        sys.addaudithook(watch)
        from miga_engine.cli import main
        code = main(sys.argv[1:])
        sys.exit(f"the network was asked for: {asked}" if asked else code)
    """)
    video = tmp_path / "a.mp4"
    options = [
        "--num-frames",
        "5",
        "--num-inference-steps",
        "10",
        "--zigzag-width",
        "2",
        "--stage2-steps",
        "3",
        "--quiet",
    ]
    options += ["--guidance-frames", "1", "--stride", "2", "--judge-step", "3", "--height", "32", "--width", "48"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-c", program, "generate", "a kite", "--model", str(folder), *options, "-o", str(video)],
        capture_output=True, text=True, timeout=120, check=False, env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(read_video(video)) == 5
