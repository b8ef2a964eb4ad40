"""The ``miga`` command: generate, resume, estimate, eval, convert, info."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miga_engine._version import __version__
from miga_engine.cli import measure as measure_command
from miga_engine.cli.config_file import (
    FLAG_NAMES,
    FLAGS_ALONE,
    MIGA_FIELDS,
    RELEASED_NAMES,
    REQUEST_OPTIONS,
    read_config,
    read_value,
    translated,
)
from miga_engine.cli.terminal import say
from miga_engine.config import ATTENTION_BACKENDS, PRESETS, fifo_config, replace_options
from miga_engine.errors import CheckpointError, ConfigError, MigaError, printable
from miga_engine.threads import share_processors

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from miga_engine.cli.render import Outputs
    from miga_engine.engine import Engine
    from miga_engine.memory import MemoryEstimate
    from miga_engine.runtime.ranks import Ranks
    from miga_engine.runtime.stream import Event, Stream


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message} (see: {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``miga``; the exit code. Errors are one sentence on standard error."""
    _keep_standard_streams()
    share_processors()
    arguments = [_hyphenate(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    log, warnings = logging.getLogger("miga_engine"), _Warnings(logging.WARNING)
    log.addHandler(warnings)
    try:
        if arguments[:2] == ["eval", "export"]:
            arguments[:2] = ["eval export"]
        options = _build_parser().parse_args(arguments)
        return options.run(options)
    except MigaError as error:
        say(f"miga: {error}")
        return 2
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        say("miga: interrupted")
        return 130
    finally:
        log.removeHandler(warnings)


class _Warnings(logging.Handler):
    """What the library logs as a warning, for the person who uses the command."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"miga: warning: {record.getMessage()}")


def _keep_standard_streams() -> None:
    """Nothing else may get the numbers of streams that the caller has closed: what is said would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process


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
    model.add_argument("--vae-dtype", choices=["float32", "tf32", "bfloat16", "float16"], help="of the VAE (default: "
                       "float32; tf32 on GPUs alone)")  # fmt: skip
    model.add_argument("--attention", choices=ATTENTION_BACKENDS, help="who computes self-attention (default: auto, "
                       "the fastest exact one installed); a name is obeyed or refused")  # fmt: skip
    video = run.add_argument_group("video")
    video.add_argument("--num-frames", type=int, metavar="N", help="video frames, exactly (default: 240)")
    video.add_argument("--height", type=int, metavar="PX")
    video.add_argument("--width", type=int, metavar="PX")
    video.add_argument("--fps", metavar="RATE", help="frames per second: 24, 29.97, 24000/1001")
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
    for name, field in MIGA_FIELDS.items():
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
    taken = {option for action in generate._actions for option in action.option_strings}
    released = generate.add_argument_group("names of the releases", "--task, --size, --frame_num, --base_seed, …, as "
                                           "Wan2.1's, FIFO-Diffusion's and MIGA's generate.py have them")  # fmt: skip
    for name in ("prompt", *FLAG_NAMES):
        if (flag := "--" + name.replace("_", "-")) not in taken:
            alone: dict[str, Any] = {"action": "store_const", "const": "true"} if name in FLAGS_ALONE else {}
            released.add_argument(flag, dest=f"released {name}", help=argparse.SUPPRESS, **alone)
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the video shows")
    generate.add_argument("--prompt-at", nargs=2, action="append", metavar=("FRAME", "PROMPT"),
                          help="from this video frame on, this prompt (repeatable)")  # fmt: skip
    output = generate.add_argument_group("output")
    output.add_argument("-o", "--output", metavar="FILE", help=".mp4, .mkv (lossless), folder/%%06d.png, .rgb "
                        "(default: miga.mp4)")  # fmt: skip
    output.add_argument("-y", "--overwrite", action="store_true", help="replace files that exist")
    output.add_argument("--contact-sheet", metavar="PNG", help="frames evenly spaced over the video in one picture")
    output.add_argument("--events", metavar="JSONL", help="scores, searches and chunks as JSON lines")
    output.add_argument("--checkpoint-every", type=int, metavar="N", help="video frames between two writings of the "
                        "session file (default: 500; 0 = only when stopped); given, the file is kept at the end, and "
                        "the video can be made longer")  # fmt: skip
    output.add_argument("--session", metavar="FILE", help="where the session file lies (default: beside the video, "
                        "NAME.session.safetensors); given, it is kept at the end")  # fmt: skip
    output.add_argument("--stop-on-drift", type=float, metavar="X", help="stop once colours have moved by more than "
                        "this share of their range since the beginning of the prompt")  # fmt: skip
    output.add_argument("--overlap-decode", action=argparse.BooleanOptionalAction,
                        help="decode in a second thread beside the network (default: on CUDA)")  # fmt: skip
    output.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    resume = commands.add_parser(
        "resume", help="go on with an interrupted run, or make a finished video longer",
        argument_default=argparse.SUPPRESS,
        description="Go on from a session file: the video becomes what it would have been without the interruption.",
    )  # fmt: skip
    resume.set_defaults(run=_resume)
    resume.add_argument("session", metavar="SESSION", help="NAME.session.safetensors, as `miga generate` wrote it")
    resume.add_argument("--num-frames", type=int, metavar="N", help="length of the whole video (default: as asked for)")
    resume.add_argument("-o", "--output", metavar="FILE", help="where the frames made so far lie (default: beside the "
                        "session file)")  # fmt: skip
    resume.add_argument("-y", "--overwrite", action="store_true", help="replace a video that is not this run's")
    resume.add_argument("--model", metavar="NAME|PATH", help="where the model lies (default: the embedded one, or one "
                        "beside or below the session file)")  # fmt: skip
    resume.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda where there is one)")
    resume.add_argument("--checkpoint-every", type=int, metavar="N", help="as of generate")
    resume.add_argument("--stop-on-drift", type=float, metavar="X", help="as of generate")
    resume.add_argument("--events", metavar="JSONL", help="scores, searches and chunks as JSON lines, appended")
    resume.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

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

    measure_command.add_parsers(commands, run, _load)

    info = commands.add_parser("info", help="show versions, devices, kernels, and what a model is")
    info.set_defaults(run=_info)
    info.add_argument("path", nargs="?", metavar="MODEL|VIDEO|SESSION", help="'tiny', a model folder, or a "
                      "video or session file made by miga")  # fmt: skip
    return parser


# generate --------------------------------------------------------------------------------------------------------


def _generate(options: argparse.Namespace) -> int:
    settings = _settings(options)
    prompt = _prompt_timeline(settings)
    from miga_engine.cli.render import Outputs
    from miga_engine.runtime.ranks import Ranks

    with Ranks.from_environment(settings.get("device")) as ranks:
        outputs = None
        if ranks is None or ranks.rank == 0:
            outputs = Outputs.check(
                str(settings.get("output", "miga.mp4")),
                sheet=settings.get("contact_sheet"),
                events=settings.get("events"),
                session=settings.get("session"),
                checkpoint_every=_checkpoint_every(settings),
                overwrite=bool(settings.get("overwrite")),
            )
        estimate = _estimate_memory(settings, prompt)
        _refuse_the_impossible(estimate)
        engine = _load_engine(settings, ranks)
        request = engine.resolve(prompt, **_request_options(engine, settings))
        stop_on_drift = settings.get("stop_on_drift")

        batches: list[int] = []

        def open_stream(on_event: Callable[[Event], None] | None, is_cancelled: Callable[[], bool] | None) -> Stream:
            stream = engine.run(
                request,
                on_event=on_event,
                is_cancelled=is_cancelled,
                overlap_decode=settings.get("overlap_decode"),
                stop_on_drift=stop_on_drift,
            )
            batches.append(stream.window_batch)
            return stream

        def expected() -> tuple[int, int]:
            on_device = (
                engine.running_bytes(request, batches[0]) if engine.device.type == "cuda" else estimate.device_total
            )
            return estimate.host_total, on_device

        return _write(engine, open_stream, outputs, expected, quiet=bool(settings.get("quiet")))


def _write(
    engine: Engine,
    open_stream: Callable[[Callable[[Event], None] | None, Callable[[], bool] | None], Stream],
    outputs: Outputs | None,
    expected: Callable[[], tuple[int, int]] | None,
    *,
    quiet: bool,
) -> int:
    """Render on the rank that writes; the others compute beside it.

    expected: bytes of the process and of the GPU, as estimated for the batch that the run began with.
    """
    import torch

    from miga_engine.cli.render import render, stop_signals

    code = 0
    if outputs is None:
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in stop_signals()}
        with open_stream(None, None) as stream:
            for _ in stream:
                pass
        for number, handler in previous.items():
            signal.signal(number, handler)
    else:
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.device)
        code = render(open_stream, outputs, model=engine.name, quiet=quiet)
        say(_peak_memory(engine.device, expected))
    return code


def _checkpoint_every(settings: dict[str, Any]) -> int | None:
    every = settings.get("checkpoint_every")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 0):
        raise ConfigError(f"checkpoint_every must be a whole number of video frames, 0 for never, got {every!r}")
    return every


# resume ----------------------------------------------------------------------------------------------------------


def _resume(options: argparse.Namespace) -> int:
    from miga_engine.cli.render import CHECKPOINT_EVERY, Outputs
    from miga_engine.engine import Engine
    from miga_engine.runtime.ranks import Ranks
    from miga_engine.runtime.session import load_session, model_of_session, video_of_session
    from miga_engine.video.paths import check_output

    settings = vars(options)
    path = Path(settings["session"])
    session = load_session(path)
    record, state = session.model, session.state
    video = settings.get("output") or video_of_session(path, session)
    model = settings.get("model") or model_of_session(path, session)
    with Ranks.from_environment(settings.get("device")) as ranks:
        engine = Engine.from_pretrained(
            model,
            settings.get("device"),
            record["dtype"],
            preset=record["preset"] or None,
            attention=record["attention"],
            vae_dtype=record["vae_dtype"],
            compile=record["compile"],
            ranks=ranks,
        )
        every = _checkpoint_every(settings)
        outputs = Outputs(
            str(video),
            events=check_output(settings["events"], (".jsonl",), overwrite=True) if settings.get("events") else None,
            session=path,
            checkpoint_every=CHECKPOINT_EVERY if every is None else every or None,
            keeps_session=every is not None or state.numbers["keeps_extension"],
            overwrite=bool(settings.get("overwrite")),
        )

        def open_stream(on_event: Callable[[Event], None] | None, is_cancelled: Callable[[], bool] | None) -> Stream:
            return engine.resume(
                path,
                settings.get("num_frames"),
                on_event=on_event,
                is_cancelled=is_cancelled,
                stop_on_drift=settings.get("stop_on_drift"),
            )

        is_writer = ranks is None or ranks.rank == 0
        return _write(engine, open_stream, outputs if is_writer else None, None, quiet=bool(settings.get("quiet")))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the --config file says, overridden by the flags."""
    given = vars(options)
    settings = read_config(given.pop("config")) if "config" in given else {}
    start = "released "
    released = {name.removeprefix(start): value for name, value in given.items() if name.startswith(start)}
    released = {name: read_value(name, value) for name, value in released.items()}
    given = {name: value for name, value in given.items() if not name.startswith(start)}
    if released:
        for name, value in translated(released, "the command line").items():
            ours = RELEASED_NAMES.get(name, name)
            if ours in given:
                raise ConfigError(f"{ours} is given twice, once as --{name}: keep one")
            given[ours] = value
    return {**settings, **given}


def _load(options: argparse.Namespace) -> tuple[Engine, dict[str, Any]]:
    """The engine of a run's options, and its options of `Engine.resolve`, num_frames only where it was given."""
    settings = _settings(options)
    engine = _load_engine(settings)
    request = _request_options(engine, settings)
    return engine, request if "num_frames" in settings else {k: v for k, v in request.items() if k != "num_frames"}


def _load_engine(settings: dict[str, Any], ranks: Ranks | None = None) -> Engine:
    from miga_engine.engine import Engine

    return Engine.from_pretrained(
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


def _request_options(engine: Engine, settings: dict[str, Any]) -> dict[str, Any]:
    """Options of `Engine.resolve` beside the prompt."""
    config = engine.preset.miga
    if settings.get("method") == "fifo":
        config = fifo_config(config, engine.bundle.window_frames)
    config = replace_options(config, {name: settings[name] for name in MIGA_FIELDS if name in settings})
    asked = {name: settings[name] for name in REQUEST_OPTIONS if name in settings}
    if settings.get("long_iter_nums") is not None and "num_frames" not in asked:
        groups = settings["long_iter_nums"]
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ConfigError(f"long_iter_nums must be a whole number of at least 1, got {groups!r}")
        asked["num_frames"] = engine.bundle.num_video_frames(groups * config.zigzag_width)
    return {"num_frames": 240, **asked, "miga": config}


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


# estimate --------------------------------------------------------------------------------------------------------


def _estimate(options: argparse.Namespace) -> int:
    import miga_engine.video.outputs  # noqa: F401 - part of what a run loads
    from miga_engine.video.pyav import require_av

    with contextlib.suppress(MigaError):  # another part
        require_av("write a video")

    settings = _settings(options)
    has_prompt = not settings.keys().isdisjoint(("prompt", "sample_prompt", "prompt_at"))
    print(_estimate_memory(settings, _prompt_timeline(settings) if has_prompt else "any"))
    return 0


def _refuse_the_impossible(estimate: MemoryEstimate) -> None:
    """ConfigError where a run needs more than twice the memory there is: no estimate is that wrong."""
    import torch

    from miga_engine.device import total_bytes
    from miga_engine.memory import amount

    total = total_bytes(torch.device("cpu"))
    if estimate.host_total > 2 * total:
        raise ConfigError(
            f"the run would need {amount(estimate.host_total)} of memory and this machine has {amount(total)}: "
            "make the picture smaller (see: miga estimate)"
        )


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


def _peak_memory(device: torch.device, expected: Callable[[], tuple[int, int]] | None) -> str:
    """The measured peaks beside the estimated ones, in a line."""
    import torch

    from miga_engine.memory import amount, peak_resident_bytes

    peak = peak_resident_bytes()
    on_host, on_device = ("", "") if expected is None else (f" (estimated {amount(size)})" for size in expected())
    line = f"memory: {amount(peak)} at most{on_host}"
    if device.type != "cuda":
        return line
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return f"{line}; on {device} {amount(allocated)} allocated, {amount(reserved)} reserved at most{on_device}"


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
    say(f"{target}: {num_tensors} tensors, {num_bytes / 1e9:.2f} GB")
    return 0


# info ------------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    import torch

    from miga_engine import _extension
    from miga_engine.runtime.session import describe_session, is_session, load_session
    from miga_engine.video.outputs import has_metadata

    rows = [
        ("miga_engine", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("devices", ", ".join(_devices())),
        ("C++ kernels", _extension.status()),
        *_kernels(),
    ]
    if options.path and os.path.isfile(options.path) and has_metadata(options.path):
        from miga_engine.video.reading import read_metadata

        rows += [(key, value) for key, value in read_metadata(options.path).items()]
    elif options.path and options.path.endswith(".safetensors") and is_session(options.path):
        rows += describe_session(load_session(options.path))
    elif options.path:
        from miga_engine.engine import Engine

        engine = Engine.from_pretrained(options.path, "cpu")
        rows += [(key, value) for key, value in engine.describe().items()]
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{printable(key):<{width}}  {printable(value)}")
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
