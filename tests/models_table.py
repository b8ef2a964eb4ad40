"""What each preset asks of its network for a second of video: the table in docs/models.md.

`python tests/models_table.py` makes it anew, from the options alone.
"""

from __future__ import annotations

from pathlib import Path

import places

from miga_engine.models.wan.variants import VARIANTS
from miga_engine.presets import PRESETS
from miga_engine.runtime.layout import RunLayout
from miga_engine.schedule import make_schedule

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- calls -->\n", "<!-- /calls -->\n"
HEAD = (
    "| preset | window | picture, fps | T | branches | windows for each latent frame | latent frames read for each, in "
    "all branches | network calls for a second |\n| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |\n"
)
# Of each preset, by the beginning of its name: latent frames of the model's window, video frames a latent frame.
MODELS = {"tiny": (13, 4), "videocrafter2": (16, 1), "pusa": (21, 4)}
MODELS |= {variant.default_preset: (variant.window_frames, 4) for variant in VARIANTS}


def row(name: str) -> str:
    """A preset's line. A call is one window in one branch."""
    preset = PRESETS[name]
    window, ratio = next(model for prefix, model in MODELS.items() if name.startswith(prefix))
    sampling = preset.sampling_for(preset.miga)
    layout = RunLayout(preset.miga, sampling.num_inference_steps, window, None, boundary_step=_boundary_step(name))
    branches = 1 if sampling.guidance_scale == 1 else 2
    windows, frames = layout.reading
    cells = (
        f"`{name}`", window, f"{preset.height}×{preset.width}, {preset.fps}", sampling.num_inference_steps, branches,
        f"{windows:.2f}", f"{branches * frames:.1f}", f"{branches * windows * preset.fps / ratio:.1f}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


def _boundary_step(name: str) -> int | None:
    """The first step of the second network of a preset's model, None where it has one."""
    boundary = next((v.boundary_timestep for v in VARIANTS if v.default_preset == name), None)
    if boundary is None:
        return None
    sampling = PRESETS[name].sampling
    return make_schedule(sampling.solver, sampling.num_inference_steps, sampling.shift).num_steps_from(boundary)


def table() -> str:
    """Markdown, a line for each preset."""
    return HEAD + "".join(map(row, PRESETS))


def main() -> None:
    """Put the table into the page."""
    places.put_between(PAGE, BEGIN, END, table())


if __name__ == "__main__":
    main()
