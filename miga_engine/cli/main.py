"""The `miga` command: generate, resume, replay, batch, serve, estimate, eval, convert, info."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from miga_engine._version import __version__
from miga_engine.cli import batch, gap, generate, info, measure, serve
from miga_engine.cli.config_file import FLAG_NAMES, FLAGS_ALONE
from miga_engine.cli.settings import PLACES
from miga_engine.cli.terminal import say
from miga_engine.cli.write_options import WriteOptions
from miga_engine.config import DTYPES, NUM_FRAMES, LoadOptions, MigaConfig, StreamOptions
from miga_engine.errors import ConfigError, MigaError
from miga_engine.integrations.batch.settings import BatchOptions
from miga_engine.integrations.server.settings import ServeOptions
from miga_engine.options import add_flags
from miga_engine.request import Request
from miga_engine.threads import share_processors


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message} (see: {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `miga`; the exit code. Errors are one sentence on standard error."""
    _keep_standard_streams()
    share_processors()
    arguments = [_hyphenate(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    log, warnings = logging.getLogger("miga_engine"), _Warnings(logging.WARNING)
    log.addHandler(warnings)
    try:
        if arguments[:1] == ["eval"] and arguments[1:2] in (["export"], ["gap"]):
            arguments[:2] = [" ".join(arguments[:2])]
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
    add_flags(run, LoadOptions)
    add_flags(run, Request, help={"num_frames": f"video frames, exactly (default: {NUM_FRAMES})"})
    add_flags(run, MigaConfig)

    generating = commands.add_parser(
        "generate", help="make a video from a prompt", parents=[run], argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make a video from a prompt; it is written while it is being made.",
    )  # fmt: skip
    generating.set_defaults(run=generate.generate)
    generating.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the video shows")
    generating.add_argument("--prompt-at", nargs=2, action="append", metavar=("FRAME", "PROMPT"),
                            help="from this video frame on, this prompt (repeatable)")  # fmt: skip
    add_flags(generating, WriteOptions)
    add_flags(generating, StreamOptions)
    _add_released_names(generating)

    resuming = commands.add_parser(
        "resume", help="go on with an interrupted run, or make a finished video longer",
        argument_default=argparse.SUPPRESS,
        description="Go on from a session file: the video becomes what it would have been without the interruption.",
    )  # fmt: skip
    resuming.set_defaults(run=generate.resume)
    resuming.add_argument("session", metavar="SESSION", help="NAME.session.safetensors, as `miga generate` wrote it")
    add_flags(resuming, Request, ["num_frames"], {"num_frames": "length of the whole video (default: as asked for)"})
    add_flags(
        resuming, WriteOptions, ["output", "overwrite", "checkpoint_every", "events", "quiet"],
        {"output": "where the frames made so far lie (default: beside the session file)",
         "overwrite": "replace a video that is not this run's",
         "events": "scores, searches, chunks and changes as JSON lines, appended"},
    )  # fmt: skip
    _add_flags_of_session(resuming)

    replaying = commands.add_parser(
        "replay", help="make the video of a session once more, as it was seen", argument_default=argparse.SUPPRESS,
        description="Make the video of a session once more, from its first frame to the last that the session has: "
        "with all that its stream was told while it ran, at the same moments, bit for bit.",
    )  # fmt: skip
    replaying.set_defaults(run=generate.replay)
    replaying.add_argument("path", metavar="SESSION", help="NAME.session.safetensors of the run")
    add_flags(replaying, Request, ["image", "video"], {"image": "the picture that it began with",
                                                       "video": "the clip that it went on with"})  # fmt: skip
    add_flags(replaying, WriteOptions, help={"output": "default: NAME.replay.mp4 beside the session file"})
    _add_flags_of_session(replaying)

    serving = commands.add_parser(
        "serve", help="make videos over HTTP, with a page to watch and steer them", argument_default=argparse.SUPPRESS,
        description="Make videos over HTTP, several at once on one engine. Jobs lie on disk and are gone on with after "
        "a stop, or a kill. It needs the packages of miga_engine[server].",
    )  # fmt: skip
    serving.set_defaults(run=serve.serve)
    add_flags(serving, ServeOptions)
    add_flags(serving, LoadOptions)

    batching = commands.add_parser(
        "batch", help="make many videos, by several processes or on a Ray cluster", parents=[run],
        argument_default=argparse.SUPPRESS,
        description="Make the videos of a file of jobs: .jsonl or .csv with a prompt and any option in each line, .txt "
        "with a prompt a line, or the manifest.jsonl of another batch. What is there is left out, what was begun is "
        "gone on with, frame for frame, and a worker that dies is replaced (docs/batch.md).",
    )  # fmt: skip
    batching.set_defaults(run=batch.batch)
    batching.add_argument("jobs", metavar="JOBS", help=".jsonl, .csv, .txt, or a manifest.jsonl")
    add_flags(batching, BatchOptions)
    add_flags(batching, StreamOptions)

    estimating = commands.add_parser(
        "estimate", help="show what a run will need of memory", parents=[run], argument_default=argparse.SUPPRESS,
        description="Show what `miga generate` with the same options will need of memory; no weights are read.",
    )  # fmt: skip
    estimating.set_defaults(run=generate.estimate)

    converting = commands.add_parser(
        "convert", help="rewrite a weights file or a model as plain safetensors",
        argument_default=argparse.SUPPRESS,
        description="Rewrite a weights file, such as VideoCrafter2's model.ckpt, as safetensors with the same keys; or "
        "a model with all its parts, whatever their formats, LoRAs merged, as a folder in the layout of its makers.",
    )  # fmt: skip
    converting.set_defaults(run=info.convert)
    converting.add_argument("model", metavar="MODEL", help="the weights file; for a folder any model that `generate` "
                            "takes")  # fmt: skip
    converting.add_argument("output", metavar="OUT.safetensors|FOLDER")
    converting.add_argument("--dtype", choices=DTYPES, help="of the transformer and the text encoder (default: as they "
                            "are, bfloat16 where they are in eight bits or packed)")  # fmt: skip
    add_flags(converting, LoadOptions, PLACES)
    converting.add_argument("-y", "--overwrite", action="store_true", default=False, help="replace a file that exists")

    measure.add_parsers(commands, run)
    gap.add_parser(commands, run)

    informing = commands.add_parser("info", help="show versions, devices, kernels, and what a model or a file is")
    informing.set_defaults(run=info.info)
    informing.add_argument("path", nargs="?", metavar="MODEL|FILE", help="'tiny', a model folder, a weights or "
                           "LoRA file, or a video or session file made by miga")  # fmt: skip
    return parser


def _add_flags_of_session(parser: argparse.ArgumentParser) -> None:
    """Of what a session file leaves open."""
    add_flags(
        parser, LoadOptions, ["model", "device", *PLACES, "experts"],
        {"model": "where the model lies (default: the embedded one, or one beside or below the session file)"},
    )  # fmt: skip
    add_flags(parser, StreamOptions)


def _add_released_names(parser: argparse.ArgumentParser) -> None:
    taken = {option for action in parser._actions for option in action.option_strings}
    released = parser.add_argument_group("names of the releases", "--task, --size, --frame_num, --base_seed, …, as "
                                         "Wan2.1's, FIFO-Diffusion's and MIGA's generate.py have them")  # fmt: skip
    for name in ("prompt", *FLAG_NAMES):
        if (flag := "--" + name.replace("_", "-")) not in taken:
            alone: dict[str, Any] = {"action": "store_const", "const": "true"} if name in FLAGS_ALONE else {}
            released.add_argument(flag, dest=f"released {name}", help=argparse.SUPPRESS, **alone)
