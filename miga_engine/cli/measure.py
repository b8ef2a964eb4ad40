"""`miga eval FILE…` and `miga eval export OUT`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miga_engine.cli.settings import load_engine, read_settings, video_options
from miga_engine.cli.terminal import say
from miga_engine.errors import ConfigError, MigaError, printable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def add_parsers(commands: Any, run: argparse.ArgumentParser) -> None:
    """Registers `eval` and `eval export`; `run` holds the options of a run."""
    evaluate = commands.add_parser(
        "eval", help="measure videos: consistency, motion, drift, seams; `eval export` for VBench and NarrLV",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure videos, needing no weights: consistency and the motion beside it, colours, sharpness and "
        "noise\nalong the video, seams. docs/measures.md says what each measure sees and what it is blind to.",
    )  # fmt: skip
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("files", nargs="+", metavar="FILE", help="videos, or folders of frames")
    evaluate.add_argument("--baseline", metavar="FILE", help="a video to compare the others with")
    evaluate.add_argument("--num-frames", type=int, metavar="N", help="look at the first N frames only")
    evaluate.add_argument("--prompt", help="measure against the embedded world's truth (default: the prompt in the "
                          "video's metadata, where the embedded model made it)")  # fmt: skip
    evaluate.add_argument("--block", type=int, metavar="N", help="video frames in a committed block: measure seams")
    evaluate.add_argument("--block-offset", type=int, metavar="N", help="frame of the first border (default: --block)")
    evaluate.add_argument("--period", type=int, default=1, metavar="N", help="video frames a latent frame, 4 of Wan's "
                          "VAE: compare borders with the other steps between latent frames only")  # fmt: skip
    evaluate.add_argument("--flow", choices=["auto", "dis", "lucas-kanade"], default="auto",
                          help="who estimates motion (default: OpenCV's DIS where it is installed)")  # fmt: skip
    evaluate.add_argument("--features", default="auto", metavar="NAME|FILE", help="of the consistency: mobilenet, "
                          "descriptor, or weights (default: mobilenet where it is installed)")  # fmt: skip
    evaluate.add_argument("--subject-features", metavar="FILE", help="DINO's ViT-B/16, as VBench uses it")
    evaluate.add_argument(
        "--background-features", metavar="FILE", help="state_dict of CLIP's ViT-B-32, as VBench uses it"
    )
    evaluate.add_argument("--model", metavar="NAME|PATH", help="measure the latent consistency with this model's VAE")
    evaluate.add_argument("--device", default="cpu", help="of feature networks and VAE (default: cpu)")
    output = evaluate.add_argument_group("output")
    output.add_argument("-o", "--output", metavar="FILE", help="the table as .json (with curves) or .csv")
    output.add_argument("--picture", metavar="PNG", help="curves over time, and frames")
    output.add_argument("--json", action="store_true", help="print JSON in place of the table")

    export = commands.add_parser(
        "eval export", parents=[run], argument_default=argparse.SUPPRESS,
        description="Make the videos that VBench or NarrLV measure, in the folders they read, with a script run.sh "
        "beside them. An interrupted export goes on where it stopped. --num-frames defaults to the paper's protocol: "
        "128 of VideoCrafter2, 161 of Wan2.1.",
    )  # fmt: skip
    export.set_defaults(run=_export)
    export.add_argument("out", metavar="OUT", help="folder to write")
    export.add_argument("--format", required=True, choices=["vbench", "narrlv"])
    export.add_argument("--prompts", required=True, metavar="FILE", help="vbench: a prompt a line, or "
                        "VBench_full_info.json; narrlv: a file or the folder of its prompt_suite")  # fmt: skip
    export.add_argument("--samples", type=int, metavar="N", help="vbench: videos a prompt, seeds from --seed on "
                        "(default: 5, as it asks)")  # fmt: skip


def read_frames(path: str | Path, num_frames: int | None = None) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames uint8 [H,W,3] of a video file, or of a folder of pictures in the order of their names, one at a time.

    Raises ConfigError for a folder without pictures or of several sizes, MigaError for a file that cannot be read.
    """
    from miga_engine.video.reading import opened_video

    def decoded() -> Iterator[npt.NDArray[np.uint8]]:
        for file in _files(Path(path)):
            with opened_video(file) as video:
                yield from video.frames

    shape = None
    for frame in islice(decoded(), num_frames):
        shape = shape or frame.shape
        if frame.shape != shape:
            raise ConfigError(f"{path} holds pictures of several sizes")
        yield frame
    if shape is None:
        raise ConfigError(f"{path} holds no frames")


def read_clip(path: str | Path, num_frames: int | None = None) -> tuple[npt.NDArray[np.uint8], float | None]:
    """All frames of `read_frames` uint8 [T,H,W,3], and their rate; MigaError where they are too many to be held."""
    import numpy as np

    from miga_engine.video.reading import check_bytes

    frames: list[npt.NDArray[np.uint8]] = []
    for frame in read_frames(path, num_frames):
        check_bytes(path, frame.nbytes * (len(frames) + 1))
        frames.append(frame)
    return np.stack(frames), _rate(Path(path))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ConfigError(f"the folder {path} holds no pictures ({', '.join(IMAGE_SUFFIXES)}): give one that does")
    return files


def _rate(path: Path) -> float | None:
    from miga_engine.video.reading import opened_video

    if path.is_dir():
        return None
    with opened_video(path) as video:
        return None if video.fps is None else float(video.fps)


def _evaluate(options: argparse.Namespace) -> int:
    import numpy as np

    from miga_engine.measure import measures, report
    from miga_engine.video.outputs import suffixes_of
    from miga_engine.video.paths import check_output

    if options.num_frames is not None and options.num_frames < 2:
        raise ConfigError(f"--num-frames is {options.num_frames}: give 2 or more")
    for path, holds in ((options.output, "table"), (options.picture, "picture")):
        if path is not None:
            check_output(path, suffixes_of(holds), overwrite=True)
    vae = _load_vae(options.model, options.device) if options.model else None
    files = list(dict.fromkeys([*([options.baseline] if options.baseline else []), *options.files]))
    names = _names(files)
    results: dict[str, dict[str, Any]] = {}
    videos = {}
    for file, name in zip(files, names, strict=True):
        results[name] = measures.measure(
            measures.in_parts(read_frames(file, options.num_frames)),
            _rate(Path(file)),
            prompt=options.prompt or _prompt_of(file),
            block=options.block,
            block_offset=options.block_offset,
            period=options.period,
            flow=options.flow,
            features=options.features,
            subject_features=options.subject_features,
            background_features=options.background_features,
            vae=vae,
            device=options.device,
        )
        if options.picture:
            shown = report.shown_frames(results[name]["frames"])
            chosen = [frame for i, frame in enumerate(read_frames(file, shown[-1] + 1)) if i in shown]
            videos[name] = np.stack(chosen)
    baseline = names[0] if options.baseline else None
    told = json.dumps(results, ensure_ascii=False) if options.json else report.table(results, baseline)
    print("\n".join(map(printable, told.splitlines())))
    if options.output:
        report.write_table(options.output, results)
    if options.picture:
        first = options.block if options.block_offset is None else options.block_offset
        longest = max(result["frames"] for result in results.values())
        borders = range(first, longest, options.block) if options.block else ()
        report.write_picture(options.picture, results, videos, borders)
    return 0


def _names(files: list[str]) -> list[str]:
    """Names to show: the last part of each path, or the whole where those are not told apart by it."""
    short = [Path(file).name or file for file in files]
    return short if len(set(short)) == len(files) else files


def _prompt_of(file: str) -> str | dict[int, str] | None:
    """The prompt in a video's metadata, where the embedded model made it and names something of its world."""
    from miga_engine.tiny.text import read_prompt
    from miga_engine.video.reading import read_metadata

    if not Path(file).is_file():
        return None
    try:
        metadata = read_metadata(file)
        if metadata.get("model") != "tiny":
            return None
        prompt = metadata["prompt"]
        prompt = prompt if isinstance(prompt, str) else {int(k): v for k, v in prompt.items()}
    except (MigaError, KeyError):
        return None
    texts = [prompt] if isinstance(prompt, str) else prompt.values()
    return prompt if all(read_prompt(text) for text in texts) else None


def _load_vae(model: str, device: str) -> Any:
    from miga_engine.models import load_vae
    from miga_engine.tiny import WEIGHTS_DIR

    path = WEIGHTS_DIR if model == "tiny" else Path(model)
    if not path.exists():
        raise ConfigError(f"there is no model at {model!r}: give 'tiny', a model folder or a file")
    return load_vae(path, device)


def _export(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from miga_engine.measure import export

    out, prompts = Path(options.out), Path(options.prompts)
    samples = getattr(options, "samples", None)
    if samples is not None and (options.format != "vbench" or samples < 1):
        raise ConfigError(f"--samples is {samples} of {options.format}: give 1 or more, of vbench only")
    if options.format == "vbench":
        clips, files = export.plan_vbench(prompts, samples or 5)
    else:
        clips, files = export.plan_narrlv(prompts)
    settings = read_settings(options)
    engine, request = load_engine(settings), video_options(settings)
    if "num_frames" not in settings and "long_iter_nums" not in settings:
        del request["num_frames"]  # the paper's
    with tqdm(total=len(clips), unit="video", disable=None) as bar:
        made = export.export(engine, out, clips, files, on_clip=lambda clip: bar.update(), **request)
    say(f"{out}: {len(clips)} videos, {made} of them made now; sh {out}/run.sh measures them")
    return 0
