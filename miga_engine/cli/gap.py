"""`miga eval gap`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miga_engine.cli.measure import read_clip
from miga_engine.cli.settings import load_engine, read_settings, video_options
from miga_engine.errors import ConfigError, MigaError

if TYPE_CHECKING:
    from miga_engine.measure.gap import Clip


def add_parser(commands: Any, run: argparse.ArgumentParser) -> None:
    """Registers `eval gap`; `run` holds the options of a run."""
    parser = commands.add_parser(
        "eval gap", parents=[run], argument_default=argparse.SUPPRESS,
        description="Profile a model on real clips, making no video: how much better or worse it denoises the frames "
        "that a queue's windows keep than the same frames in ordinary windows, by noise level. The options of a run "
        "say which queue; it is compared with FIFO-Diffusion, and by which end of a window it keeps.",
    )  # fmt: skip
    parser.set_defaults(run=_gap)
    parser.add_argument("--clips", nargs="+", required=True, metavar="FILE", help="videos, or folders of frames, in "
                        "the size to profile at; the text file beside each, CLIP.txt, is its caption")  # fmt: skip
    parser.add_argument("--caption", metavar="TEXT", help="of clips without a text file (default: the prompt in the "
                        "video's metadata, or none)")  # fmt: skip
    parser.add_argument("--passes", type=int, metavar="N", help="of the queue for each clip (default: 2)")
    parser.add_argument("-o", "--output", metavar="FILE", help="the table as .json")
    parser.add_argument("--picture", metavar="PNG", help="the table as curves over the noise levels")


def _gap(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from miga_engine.files import write_whole
    from miga_engine.measure import gap
    from miga_engine.video.outputs import suffixes_of
    from miga_engine.video.paths import check_output, reported

    given = vars(options)
    own = {name: given.pop(name, None) for name in ("clips", "caption", "passes", "output", "picture")}
    passes = 2 if own["passes"] is None else own["passes"]
    if passes < 1:
        raise ConfigError(f"--passes is {passes}: give 1 or more")
    if len(own["clips"]) < 2:
        raise ConfigError("--clips names one clip: give at least 2, for the profile has standard errors")
    if own["output"] is not None:
        check_output(own["output"], (".json",), overwrite=True)
    if own["picture"] is not None:
        check_output(own["picture"], suffixes_of("picture"), overwrite=True)
    settings = read_settings(options)
    engine = load_engine(settings)
    request = engine.resolve(prompt="any", **video_options(settings))
    compared = gap.patterns(request.miga, engine.bundle.window_frames)
    with tqdm(total=len(own["clips"]), unit="clip", disable=None) as bar:
        clips = _clips(own["clips"], own["caption"])
        bands, profiles = gap.gap_profile(engine, clips, compared, request, passes=passes, on_clip=bar.update)
    print(gap.table(bands, profiles))
    if own["output"] is not None:
        with reported(own["output"]):
            write_whole(Path(own["output"]), json.dumps(gap.to_record(bands, profiles), indent=1) + "\n")
    if own["picture"] is not None:
        gap.write_picture(own["picture"], bands, profiles)
    return 0


def _clips(files: list[str], caption: str | None) -> Iterator[Clip]:
    from miga_engine.measure.gap import Clip

    for file in files:
        beside = Path(file).with_suffix(".txt")
        if beside.is_file():
            text = beside.read_text(encoding="utf-8").strip()
        else:
            text = _prompt_of(file) if caption is None else caption
        yield Clip(read_clip(file)[0], text)


def _prompt_of(file: str) -> str:
    """The prompt that a video says it was made from, where it says one for all of it."""
    from miga_engine.video.reading import read_metadata

    try:
        prompt = read_metadata(file).get("prompt", "")
    except MigaError:
        return ""
    return prompt if isinstance(prompt, str) else ""
