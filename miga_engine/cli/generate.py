"""`miga generate`, `miga resume`, `miga replay` and `miga estimate`."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miga_engine.cli.settings import load_engine, prompt_timeline, read_settings, video_options
from miga_engine.cli.terminal import say
from miga_engine.cli.write_options import WriteOptions
from miga_engine.config import LoadOptions, StreamOptions
from miga_engine.errors import ConfigError, MigaError, OutputError, printable
from miga_engine.options import as_recorded, picked

if TYPE_CHECKING:
    import torch

    from miga_engine.cli.render import Outputs
    from miga_engine.engine import Engine
    from miga_engine.memory import MemoryEstimate
    from miga_engine.request import Request
    from miga_engine.runtime.ranks import Ranks
    from miga_engine.runtime.session import Session
    from miga_engine.runtime.stream import Event, Stream


def generate(options: argparse.Namespace) -> int:
    """The command: check, estimate, load, write."""
    settings = read_settings(options)
    prompt, writing = prompt_timeline(settings), WriteOptions(**picked(settings, WriteOptions))
    from miga_engine.cli.render import Outputs
    from miga_engine.resolve import boundary_step, network_calls
    from miga_engine.runtime.ranks import Ranks
    from miga_engine.weights.files import opened_once

    with opened_once(), Ranks.from_environment(settings.get("device")) as ranks:
        is_writer, left = ranks is None or ranks.rank == 0, _left_session(writing, ranks)
        outputs = None
        if is_writer:
            keeps = writing.session is not None
            outputs = (
                Outputs.check(writing)
                if left is None
                else Outputs.of_session(writing, writing.output, *left, keeps=keeps)
            )
        asked = video_options(settings)
        estimate = _estimate_memory(settings, prompt, asked)
        _refuse_the_impossible(estimate)
        engine = load_engine(settings, ranks)
        request = engine.resolve(prompt, **asked)
        if outputs is not None and not writing.quiet:
            say(network_calls(request, engine.bundle.window_frames, boundary_step(request, engine.bundle)))
            if (given := request.condition) is not None:
                frames = "" if given.kind == "image" else f"the last {given.num_frames} frames of "
                say(f"begins with {frames}{printable(given.source)}, in {request.width}×{request.height}")
        batches: list[int] = []
        if left is not None:
            _check_same_video(request, *left)

        def open_stream(on_event: Callable[[Event], None] | None, is_cancelled: Callable[[], bool] | None) -> Stream:
            controls = {"on_event": on_event, "is_cancelled": is_cancelled, **picked(settings, StreamOptions)}
            stream = engine.run(request, **controls) if left is None else engine.resume(left[0], **controls)
            batches.append(stream.window_batch)
            return stream

        def expected() -> tuple[int, int]:
            on_device = (
                engine.running_bytes(request, batches[0]) if engine.device.type == "cuda" else estimate.device_total
            )
            return estimate.host_total, on_device

        return _write(engine, open_stream, outputs, expected, quiet=writing.quiet)


def _left_session(writing: WriteOptions, ranks: Ranks | None) -> tuple[Path, Session] | None:
    """The session that a run of this command has left, where it is to be gone on with; the same on every rank."""
    from miga_engine.cli.render import session_beside
    from miga_engine.runtime.session import load_session

    path = Path(writing.session) if writing.session else session_beside(writing.output)
    is_there = writing.goes_on and path is not None and path.exists()
    if ranks is not None:
        is_there = ranks.agree(is_there)
    return (path, load_session(path)) if is_there and path is not None else None


def _check_same_video(request: Request, path: Path, session: Session) -> None:
    """OutputError unless the session is of this very request."""
    from miga_engine.resuming import is_of

    if not is_of(request, session):
        raise OutputError(
            f"cannot go on with {path}: it is the session file of another run; go on with that (miga resume {path}), "
            "or name another output"
        )


def resume(options: argparse.Namespace) -> int:
    """The command: what the session leaves open comes from the flags."""
    from miga_engine.cli.render import Outputs
    from miga_engine.runtime.ranks import Ranks
    from miga_engine.runtime.session import load_session
    from miga_engine.runtime.session_info import video_of_session

    settings = vars(options)
    writing = WriteOptions(**picked(settings, WriteOptions))
    path = Path(settings["session"])
    session = load_session(path)
    video = settings.get("output") or video_of_session(path, session)
    with Ranks.from_environment(settings.get("device")) as ranks:
        engine = _engine_of_session(path, session, settings, ranks)
        outputs = Outputs.of_session(writing, video, path, session)

        def open_stream(on_event: Callable[[Event], None] | None, is_cancelled: Callable[[], bool] | None) -> Stream:
            return engine.resume(
                path,
                settings.get("num_frames"),
                on_event=on_event,
                is_cancelled=is_cancelled,
                **picked(settings, StreamOptions),
            )

        is_writer = ranks is None or ranks.rank == 0
        return _write(engine, open_stream, outputs if is_writer else None, None, quiet=writing.quiet)


def replay(options: argparse.Namespace) -> int:
    """The command: the session says what is made, the flags where it goes."""
    from miga_engine.cli.render import Outputs
    from miga_engine.runtime.ranks import Ranks
    from miga_engine.runtime.session import SUFFIX, load_session

    settings = vars(options)
    path = Path(settings["path"])
    name = path.name.removesuffix(SUFFIX).removesuffix(".session")
    writing = WriteOptions(**{"output": str(path.with_name(f"{name}.replay.mp4")), **picked(settings, WriteOptions)})
    session = load_session(path)
    with Ranks.from_environment(settings.get("device")) as ranks:
        outputs = Outputs.check(writing) if ranks is None or ranks.rank == 0 else None
        engine = _engine_of_session(path, session, settings, ranks)
        given = {kind: settings.get(kind) for kind in ("image", "video")}

        def open_stream(on_event: Callable[[Event], None] | None, is_cancelled: Callable[[], bool] | None) -> Stream:
            return engine.replay(
                path, on_event=on_event, is_cancelled=is_cancelled, **given, **picked(settings, StreamOptions)
            )

        return _write(engine, open_stream, outputs, None, quiet=writing.quiet)


def _engine_of_session(path: Path, session: Session, settings: dict[str, Any], ranks: Ranks | None) -> Engine:
    """The model that a session was made with, as the session has it but for what the flags say."""
    from miga_engine.engine import Engine
    from miga_engine.runtime.session_info import model_of_session, parts_of_session

    loading = picked(settings, LoadOptions)
    loading["model"] = loading.get("model") or model_of_session(path, session)
    loading = parts_of_session(path, session, {**as_recorded(session.model), **loading})
    return Engine.from_pretrained(**loading, ranks=ranks)


def estimate(options: argparse.Namespace) -> int:
    """The command: print what a run will need of memory."""
    import miga_engine.video.outputs  # noqa: F401 - part of what a run loads
    from miga_engine.video.pyav import require_av

    with contextlib.suppress(MigaError):  # another part
        require_av("write a video")

    settings = read_settings(options)
    has_prompt = not settings.keys().isdisjoint(("prompt", "sample_prompt", "prompt_at"))
    print(_estimate_memory(settings, prompt_timeline(settings) if has_prompt else "any", video_options(settings)))
    return 0


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
        code = render(open_stream, outputs, model=engine.made_of(), quiet=quiet)
        say(_peak_memory(engine.device, expected))
    return code


def _refuse_the_impossible(estimate: MemoryEstimate) -> None:
    """ConfigError where a run needs more than twice the memory there is: no estimate is that wrong."""
    import torch

    from miga_engine.device import amount, total_bytes

    total = total_bytes(torch.device("cpu"))
    if estimate.host_total > 2 * total:
        raise ConfigError(
            f"the run would need {amount(estimate.host_total)} of memory and this machine has {amount(total)}: "
            "make the picture smaller (see: miga estimate)"
        )


def _estimate_memory(settings: dict[str, Any], prompt: str | dict[int, str], asked: dict[str, Any]) -> MemoryEstimate:
    from miga_engine.engine import Engine

    return Engine.estimate(**picked(settings, LoadOptions), prompt=prompt, **asked)


def _peak_memory(device: torch.device, expected: Callable[[], tuple[int, int]] | None) -> str:
    """The measured peaks beside the estimated ones, in a line."""
    import torch

    from miga_engine.device import amount
    from miga_engine.memory import peak_resident_bytes

    peak = peak_resident_bytes()
    on_host, on_device = ("", "") if expected is None else (f" (estimated {amount(size)})" for size in expected())
    line = f"memory: {amount(peak)} at most{on_host}"
    if device.type != "cuda":
        return line
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return f"{line}; on {device} {amount(allocated)} allocated, {amount(reserved)} reserved at most{on_device}"
