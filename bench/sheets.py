"""Draw the pictures of README and docs/ with the embedded model: `python bench/sheets.py [long|timeline]`.

long      one prompt a row over 481 frames
timeline  a prompt that changes from dawn to night at frame 160
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from miga_engine import Engine
from miga_engine.video.contact_sheet import write_contact_sheet

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROMPTS = (
    "a red balloon over snowy hills at dawn",
    "a yellow kite over green hills at noon",
    "a white plane over dark hills at dusk",
    "a green bird over a desert at night",
)
NUM_FRAMES = 481


def long(engine: Engine) -> None:
    chosen = torch.linspace(0, NUM_FRAMES - 1, 8).round().long()
    rows = [engine.generate(prompt, NUM_FRAMES, seed=1).frames[chosen] for prompt in PROMPTS]
    write_contact_sheet(DOCS / "long_videos.png", rows)


def timeline(engine: Engine) -> None:
    prompts = {0: "a red balloon over snowy hills at dawn", 160: "a red balloon over snowy hills at night"}
    config = dataclasses.replace(engine.preset.miga, prompt_blend_frames=32)
    frames = engine.generate(prompts, 321, seed=1, miga=config).frames
    write_contact_sheet(DOCS / "timeline.png", [frames[0:160:20], frames[160:320:20]], ["0 …", "160 …"])


SHEETS = {"long": long, "timeline": timeline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sheets", nargs="*", metavar="SHEET", help="default: all")
    engine = Engine.from_pretrained("tiny")
    for name in parser.parse_args().sheets or SHEETS:
        SHEETS[name](engine)
        print(f"docs/: {name} drawn")


if __name__ == "__main__":
    main()
