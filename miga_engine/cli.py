"""The ``miga`` command: generate, estimate, convert, info."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from miga_engine._version import __version__
from miga_engine.config import ATTENTION_BACKENDS, PRESETS, MigaConfig, SamplingConfig, fifo_config, replace_options
from miga_engine.errors import CheckpointError, ConfigError, MigaError

if TYPE_CHECKING:
    import torch

    from miga_engine.engine import Engine, Event, Request
    from miga_engine.memory import MemoryEstimate

RELEASED_NAMES = {
    "saw_width": "zigzag_width",
    "slide_size": "stride",
    "mem_frames": "guidance_frames",
    "index_bias": "guidance_offset",
    "resample": "self_reflection",
    "threshold": "score_drop",
    "adjust_num": "candidates",
    "sampling_steps": "num_inference_steps",
    "sample_steps": "num_inference_steps",
    "sample_solver": "solver",
    "sample_shift": "shift",
    "sample_guide_scale": "guidance_scale",
    "guide_scale": "guidance_scale",
    "base_seed": "seed",
    "sample_neg_prompt": "negative_prompt",
    "ckpt_dir": "model",
    "save_file": "output",
    "frame_num": "num_frames",
    "new_video_length": "num_frames",
    "video_length": "num_frames",
    "unconditional_guidance_scale": "guidance_scale",
    "ddim_eta": "eta",
}
"""Option names of the Wan2.1, FIFO-Diffusion and MIGA releases, understood in a --config file."""

_SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(SamplingConfig))
_MIGA_FIELDS = {f.name: f for f in dataclasses.fields(MigaConfig)}
_REQUEST_OPTIONS = ("num_frames", "seed", "height", "width", "negative_prompt", "fps", *_SAMPLING_FIELDS)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message} (see: {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``miga``; the exit code. Errors are one sentence on standard error."""
    arguments = [_hyphenate(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    try:
        options = _build_parser().parse_args(arguments)
        return options.run(options)
    except MigaError as error:
        print(f"miga: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1


def _hyphenate(argument: str) -> str:
    """--num_frames=240 → --num-frames=240: underscores are accepted in option names."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="miga", description="Endless, consistent video from short-clip diffusion models.")
    parser.add_argument("--version", action="version", version=f"miga_engine {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    run = _Parser(add_help=False, argument_default=argparse.SUPPRESS)  # options of generate that estimate takes too
    run.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it")
    model = run.add_argument_group("model")
    model.add_argument("--model", metavar="NAME|PATH", help="'tiny' (default), a Wan2.1 folder, or a weights file")
    model.add_argument("--preset", choices=list(PRESETS), help="set of defaults (default: by model)")
    model.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda where there is one)")
    model.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the transformer")
    model.add_argument("--vae-dtype", choices=["float32", "bfloat16", "float16"], help="of the VAE (default: float32)")
    model.add_argument("--attention", choices=ATTENTION_BACKENDS, help="who computes self-attention (default: auto, "
                       "the fastest exact one installed); a name is obeyed or refused")  # fmt: skip
    video = run.add_argument_group("video")
    video.add_argument("--num-frames", type=int, metavar="N", help="video frames, exactly (default: 240)")
    video.add_argument("--height", type=int, metavar="PX")
    video.add_argument("--width", type=int, metavar="PX")
    video.add_argument("--fps", type=int, metavar="N")
    video.add_argument("--seed", type=int, metavar="N", help="same seed, same video (default: 0)")
    sampling = run.add_argument_group("sampling")
    sampling.add_argument("--negative-prompt", metavar="TEXT")
    sampling.add_argument("--guidance-scale", type=float, metavar="W", help="classifier-free guidance; 1 = off")
    sampling.add_argument("--num-inference-steps", type=int, metavar="T")
    sampling.add_argument("--solver", help="unipc, dpmpp_2m, euler or ddim")
    sampling.add_argument("--shift", type=float)
    sampling.add_argument("--eta", type=float, help="ddim only")
    sampling.add_argument("--use-scale-array", action=argparse.BooleanOptionalAction,
                          help="ddim only: VideoCrafter2's scale of x0 by level")  # fmt: skip
    method = run.add_argument_group("method")
    method.add_argument("--method", choices=["miga", "fifo"], help="fifo: FIFO-Diffusion, for comparison")
    for name, field in _MIGA_FIELDS.items():
        kind: dict[str, Any] = {"help": field.metadata["help"]}
        if isinstance(field.default, bool):
            kind["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, str):
            kind["choices"] = field.metadata["choices"]
        else:
            kind |= {"type": float if isinstance(field.default, float) else int, "metavar": "N"}
        method.add_argument("--" + name.replace("_", "-"), **kind)

    generate = commands.add_parser(
        "generate", help="make a video from a prompt", parents=[run], argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make a video from a prompt; it is written while it is being made.",
    )  # fmt: skip
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the video shows")
    generate.add_argument("--prompt-at", nargs=2, action="append", metavar=("FRAME", "PROMPT"),
                          help="from this video frame on, this prompt (repeatable)")  # fmt: skip
    output = generate.add_argument_group("output")
    output.add_argument("-o", "--output", metavar="FILE", help=".mp4, .mkv (lossless), folder/%%06d.png, .rgb "
                        "(default: miga.mp4)")  # fmt: skip
    output.add_argument("-y", "--overwrite", action="store_true", help="replace files that exist")
    output.add_argument("--contact-sheet", metavar="PNG", help="frames evenly spaced over the video in one picture")
    output.add_argument("--events", metavar="JSONL", help="scores, searches and chunks as JSON lines")
    output.add_argument("--overlap-decode", action=argparse.BooleanOptionalAction,
                        help="decode in a second thread beside the network (default: on CUDA)")  # fmt: skip
    output.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    estimate = commands.add_parser(
        "estimate", help="show what a run will need of memory", parents=[run], argument_default=argparse.SUPPRESS,
        description="Show what `miga generate` with the same options will need of memory; no weights are read.",
    )  # fmt: skip
    estimate.set_defaults(run=_estimate)

    convert = commands.add_parser(
        "convert", help="rewrite a weights file as safetensors",
        description="Rewrite a weights file, such as VideoCrafter2's model.ckpt, as safetensors with the same keys.",
    )  # fmt: skip
    convert.set_defaults(run=_convert)
    convert.add_argument("model", metavar="MODEL", help="the weights file")
    convert.add_argument("output", metavar="OUT.safetensors")
    convert.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                         help="of the UNet and the text encoder (default: as they are)")  # fmt: skip
    convert.add_argument("-y", "--overwrite", action="store_true", help="replace a file that exists")

    info = commands.add_parser("info", help="show versions, devices, kernels, and what a model is")
    info.set_defaults(run=_info)
    info.add_argument("path", nargs="?", metavar="MODEL|VIDEO", help="'tiny', a model folder, or a video made by miga")
    return parser


# generate --------------------------------------------------------------------------------------------------------


def _generate(options: argparse.Namespace) -> int:
    settings = _settings(options)
    prompt = _prompt_timeline(settings)
    import torch

    from miga_engine.engine import Engine
    from miga_engine.runtime.ranks import Ranks

    ranks = Ranks.from_environment(settings.get("device"))
    outputs = _Outputs.check(settings) if ranks is None or ranks.rank == 0 else None
    estimate = _estimate_memory(settings, prompt)
    engine = Engine.from_pretrained(
        settings.get("model", "tiny"),
        settings.get("device"),
        settings.get("dtype"),
        preset=settings.get("preset"),
        attention=settings.get("attention", "auto"),
        vae_dtype=settings.get("vae_dtype", "float32"),
        compile=bool(settings.get("compile")),
        capture=settings.get("capture", True),
        ranks=ranks,
    )
    request = engine.resolve(prompt, **_request_options(engine, settings))
    if outputs is None:  # another rank writes
        with _interruptible():
            for _ in engine.run(request):
                pass
        if ranks is not None:
            ranks.close()
        return 0
    overlap = settings.get("overlap_decode")
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    code = _render(engine, request, outputs, overlap_decode=overlap, quiet=bool(settings.get("quiet")))
    print(_peak_memory(engine.device, estimate), file=sys.stderr)
    if ranks is not None:
        ranks.close()
    return code


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the --config file says, overridden by the flags."""
    given = vars(options)
    settings = _read_config(given.pop("config")) if "config" in given else {}
    return {**settings, **given}


def _request_options(engine: Engine, settings: dict[str, Any]) -> dict[str, Any]:
    """Options of `Engine.resolve` beside the prompt."""
    config = engine.preset.miga
    if settings.get("method") == "fifo":
        config = fifo_config(config, engine.bundle.window_frames)
    config = replace_options(config, {name: settings[name] for name in _MIGA_FIELDS if name in settings})
    asked = {name: settings[name] for name in _REQUEST_OPTIONS if name in settings}
    return {"num_frames": 240, **asked, "miga": config}


@dataclass(frozen=True)
class _Outputs:
    """Files a run writes, each known to be writable before a model is loaded."""

    video: str
    sheet: Path | None
    events: Path | None
    overwrite: bool

    @classmethod
    def check(cls, settings: dict[str, Any]) -> _Outputs:
        from miga_engine.video.paths import check_output
        from miga_engine.video.sinks import open_sink

        overwrite = bool(settings.get("overwrite"))
        video = str(settings.get("output", "miga.mp4"))
        open_sink(video, 16, 16, 16, overwrite=overwrite).abort()  # sinks touch nothing before their first frame
        sheet, events = (
            check_output(settings[name], suffixes, overwrite=overwrite) if settings.get(name) else None
            for name, suffixes in (("contact_sheet", (".png",)), ("events", (".jsonl",)))
        )
        return cls(video, sheet, events, overwrite)


def _render(engine: Engine, request: Request, outputs: _Outputs, *, overlap_decode: bool | None, quiet: bool) -> int:
    """Stream the request into the output files; 130 where it was interrupted, with what was made kept."""
    from tqdm import tqdm

    from miga_engine.video.contact_sheet import ContactSheet
    from miga_engine.video.sinks import EncoderThread, open_sink

    started = time.perf_counter()
    first_frame_after: float | None = None
    num_out = 0
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(_interruptible())
        sink = stack.enter_context(EncoderThread(
            open_sink(outputs.video, request.fps, request.width, request.height,
                      metadata=request.metadata(engine.name), overwrite=outputs.overwrite)
        ))  # fmt: skip
        events = stack.enter_context(outputs.events.open("w", buffering=1)) if outputs.events else None
        bar = stack.enter_context(tqdm(total=request.num_frames, unit="frame", disable=True if quiet else None))
        sheet = ContactSheet(num_frames=request.num_frames) if outputs.sheet else None

        def on_event(event: Event) -> None:
            if events is not None:
                print(event.to_json(), file=events)
            if event.kind == "stage" and first_frame_after is None:
                bar.set_description_str(event.data["stage"].replace("_", " "))

        for chunk in engine.run(request, on_event=on_event, is_cancelled=interrupted, overlap_decode=overlap_decode):
            if first_frame_after is None:
                first_frame_after = time.perf_counter() - started
                bar.set_description_str(outputs.video)
                bar.set_postfix_str(f"first after {first_frame_after:.1f} s")
            sink.write(chunk.frames)
            if sheet is not None:
                sheet.add(chunk.frames)
            num_out += len(chunk.frames)
            bar.update(len(chunk.frames))
    if sheet is not None and outputs.sheet is not None and num_out:
        sheet.save(outputs.sheet)
    seconds = time.perf_counter() - started
    if num_out == 0:
        print("miga: interrupted before the first frame; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{outputs.video}: {num_out} frames, {request.width}×{request.height}, {request.fps} fps; {seconds:.1f} s "
        f"({num_out / seconds:.1f} frames/s, first after {first_frame_after:.1f} s)",
        file=sys.stderr,
    )
    if interrupted():
        print(f"miga: interrupted; {outputs.video} holds the {num_out} frames made so far", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[Any]:
    """First Ctrl-C or SIGTERM: finish the chunk at hand and close the files; a second Ctrl-C stops at once."""
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _prompt_timeline(settings: dict[str, Any]) -> dict[int, str]:
    prompt = settings.get("prompt", settings.get("sample_prompt"))
    timeline = dict(prompt) if isinstance(prompt, dict) else {} if prompt is None else {0: prompt}
    for frame, text in settings.get("prompt_at", ()):
        try:
            number = int(frame)
        except ValueError:
            raise ConfigError(f"--prompt-at needs a video frame number before the prompt, got {frame!r}") from None
        if number in timeline:
            raise ConfigError(f"frame {number} has two prompts: {timeline[number]!r} and {text!r}; keep one")
        timeline[number] = text
    if not timeline:
        raise ConfigError('there is no prompt: describe the video in quotes, for instance miga generate "a red kite"')
    return timeline


def _read_config(path: str) -> dict[str, Any]:
    """Options of a YAML file, by our names; names of the releases are translated, unknown ones refused."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"--config {path} is not valid YAML{where}: mend it or leave it out") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a list of 'option: value' lines, got {type(content).__name__}")
    known = {"prompt", "prompt_at", "model", "preset", "device", "dtype", "vae_dtype", "attention", "method", "output",
             "overwrite", "overlap_decode", "compile", "capture", "events", "contact_sheet", "quiet",
             *_REQUEST_OPTIONS, *_MIGA_FIELDS}  # fmt: skip
    settings = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = RELEASED_NAMES.get(name, name)
        if name not in known:
            raise ConfigError(
                f"--config {path} has an unknown option {key!r}; the options are {', '.join(sorted(known))}"
            )
        if name in settings:
            raise ConfigError(f"--config {path} gives {name} twice (as {key!r} again): keep one")
        settings[name] = value
    return settings


# estimate --------------------------------------------------------------------------------------------------------


def _estimate(options: argparse.Namespace) -> int:
    import miga_engine.video.sinks  # noqa: F401 - part of what a run loads

    print(_estimate_memory(_settings(options), "any"))
    return 0


def _estimate_memory(settings: dict[str, Any], prompt: str | dict[int, str]) -> MemoryEstimate:
    from miga_engine.engine import Engine

    model, preset = settings.get("model", "tiny"), settings.get("preset")
    return Engine.estimate(
        model,
        device=settings.get("device"),
        dtype=settings.get("dtype"),
        preset=preset,
        vae_dtype=settings.get("vae_dtype", "float32"),
        prompt=prompt,
        **_request_options(Engine.from_pretrained(model, "meta", preset=preset), settings),
    )


def _peak_memory(device: torch.device, estimate: MemoryEstimate) -> str:
    """The measured peaks beside the estimated ones, in a line."""
    import torch

    from miga_engine.memory import amount, peak_resident_bytes

    line = f"memory: {amount(peak_resident_bytes())} at most (estimated {amount(estimate.host_total)})"
    if device.type != "cuda":
        return line
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return (
        f"{line}; on {device} {amount(allocated)} allocated, {amount(reserved)} reserved at most "
        f"(estimated {amount(estimate.device_total)})"
    )


# convert ---------------------------------------------------------------------------------------------------------


def _convert(options: argparse.Namespace) -> int:
    import torch

    from miga_engine.models.convert import convert
    from miga_engine.video.paths import check_output

    source, target = Path(options.model), check_output(options.output, (".safetensors",), overwrite=options.overwrite)
    if not source.is_file():
        raise CheckpointError(f"{source} is not a file: give a weights file such as model.ckpt")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    num_tensors, num_bytes = convert(source, target, dtype)
    print(f"{target}: {num_tensors} tensors, {num_bytes / 1e9:.2f} GB", file=sys.stderr)
    return 0


# info ------------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    import torch

    from miga_engine import _extension

    rows = [
        ("miga_engine", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("devices", ", ".join(_devices())),
        ("C++ kernels", _extension.status()),
        *_kernels(),
    ]
    if options.path and Path(options.path).is_file() and Path(options.path).suffix in (".mp4", ".mkv"):
        from miga_engine.video.sinks import read_metadata

        rows += [(key, value) for key, value in read_metadata(options.path).items()]
    elif options.path:
        from miga_engine.engine import Engine

        engine = Engine.from_pretrained(options.path, "cpu")
        rows += [(key, value) for key, value in engine.describe().items()]
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {value}")
    return 0


def _kernels() -> list[tuple[str, str]]:
    """Who computes what on the default device, and why the others do not."""
    import torch

    from miga_engine import ops

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        triton = f"{version('triton')} (GPUs only)"
    except PackageNotFoundError:
        triton = "not installed: on a GPU the ops would run in eager PyTorch"
    backends = ops.attention_backends(device, dtype).items()
    return [("Triton kernels", triton), *((f"attention {name}", reason or "available") for name, reason in backends)]


def _devices() -> list[str]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [*gpus, f"cpu ({torch.get_num_threads()} threads)"]
