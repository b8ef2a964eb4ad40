"""Draw the pictures of README and docs/ with the embedded model: `python bench/sheets.py [long|rivals|timeline]`.

long      one prompt a row over 481 frames
rivals    FIFO-Diffusion and MIGA with the same prompts, seeds and length, row under row
timeline  a prompt that changes from dawn to night at frame 160
"""

from __future__ import annotations

import argparse
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


def _row(
    engine: Engine, prompt: str | dict[int, str], num_tiles: int, num_frames: int = NUM_FRAMES, **options
) -> torch.Tensor:
    frames = engine.generate(prompt, num_frames, seed=1, **options).frames
    return frames[torch.linspace(0, num_frames - 1, num_tiles).round().long()]


def long(engine: Engine) -> None:
    rows = [_row(engine, prompt, 8) for prompt in PROMPTS]
    write_contact_sheet(DOCS / "long_videos.png", rows)


def rivals(engine: Engine) -> None:
    fifo = fifo_config(engine.preset.miga, engine.bundle.window_frames)
    rows, labels = [], []
    for prompt in PROMPTS:
        for name, config in (("FIFO", fifo), ("MIGA", engine.preset.miga)):
            rows.append(_row(engine, prompt, 10, miga=config))
            labels.append(name)
    write_contact_sheet(DOCS / "fifo_vs_miga.png", rows, labels)


def timeline(engine: Engine) -> None:
    prompts = {0: "a red balloon over snowy hills at dawn", 160: "a red balloon over snowy hills at night"}
    frames = engine.generate(prompts, 321, seed=1).frames
    write_contact_sheet(DOCS / "timeline.png", [frames[0:160:20], frames[160:320:20]], ["0 …", "160 …"])


SHEETS = {"long": long, "rivals": rivals, "timeline": timeline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sheets", nargs="*", choices=[*SHEETS, []], metavar="SHEET", help="default: all")
    engine = Engine.from_pretrained("tiny")
    for name in parser.parse_args().sheets or SHEETS:
        SHEETS[name](engine)
        print(f"docs/: {name} drawn")


if __name__ == "__main__":
    main()
