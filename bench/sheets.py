"""Draw the pictures of README and docs/ with the embedded model: `python bench/sheets.py [long|rivals|timeline]`.

long      one prompt a row over 481 frames
rivals    FIFO-Diffusion and MIGA with the same prompts, seeds and length, row under row
timeline  a prompt that changes from dawn to night at frame 160
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import cache
from pathlib import Path

import torch

from miga_engine import Engine
from miga_engine.config import fifo_config
from miga_engine.video.contact_sheet import write_contact_sheet

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROMPTS = (
    "a red balloon over snowy hills at dawn",
    "a yellow kite over green hills at noon",
    "a white plane over dark hills at dusk",
    "a green bird over a desert at night",
)
NUM_FRAMES = 481


@cache
def _video(engine: Engine, prompt: str, method: str) -> torch.Tensor:
    config = engine.preset.miga
    if method == "FIFO":
        config = fifo_config(config, engine.bundle.window_frames)
    return engine.generate(prompt, NUM_FRAMES, seed=1, miga=config).frames


def _row(engine: Engine, prompt: str, method: str, num_tiles: int) -> torch.Tensor:
    return _video(engine, prompt, method)[torch.linspace(0, NUM_FRAMES - 1, num_tiles).round().long()]


def long(engine: Engine) -> None:
    write_contact_sheet(DOCS / "long_videos.png", [_row(engine, prompt, "MIGA", 8) for prompt in PROMPTS])


def rivals(engine: Engine) -> None:
    pairs = [(prompt, method) for prompt in PROMPTS for method in ("FIFO", "MIGA")]
    rows = [_row(engine, prompt, method, 10) for prompt, method in pairs]
    write_contact_sheet(DOCS / "fifo_vs_miga.png", rows, [method for _, method in pairs])


def timeline(engine: Engine) -> None:
    prompts = {0: "a red balloon over snowy hills at dawn", 160: "a red balloon over snowy hills at night"}
    config = dataclasses.replace(engine.preset.miga, prompt_blend_frames=32)
    frames = engine.generate(prompts, 321, seed=1, miga=config).frames
    write_contact_sheet(DOCS / "timeline.png", [frames[0:160:20], frames[160:320:20]], ["0 …", "160 …"])


SHEETS = {"long": long, "rivals": rivals, "timeline": timeline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sheets", nargs="*", metavar="SHEET", help="default: all")
    engine = Engine.from_pretrained("tiny")
    for name in parser.parse_args().sheets or SHEETS:
        SHEETS[name](engine)
        print(f"docs/: {name} drawn")


if __name__ == "__main__":
    main()
