"""A stream into files: video, contact sheet, events, and the session file from which an interrupted run goes on."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from miga_engine.cli.event_log import EventLog
from miga_engine.cli.preview import Preview, check_preview
from miga_engine.cli.terminal import Screen, say
from miga_engine.cli.write_options import CHECKPOINT_EVERY, WriteOptions
from miga_engine.errors import ConfigError, MigaError, OutputError
from miga_engine.runtime.session import SUFFIX, Session, check_session_path, load_session, locked, remove_session
from miga_engine.runtime.session_info import model_of_session, parts_of_session, video_of_session, weighted
from miga_engine.runtime.stream import Event, Stream
from miga_engine.video.contact_sheet import ContactSheet
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import is_sequence, open_sink, sink_for, suffixes_of
from miga_engine.video.paths import check_output
from miga_engine.video.sink import Sink

if TYPE_CHECKING:
    from tqdm import tqdm

OpenStream = Callable[[Callable[[Event], None], Callable[[], bool]], Stream]
"""(on_event, is_cancelled) → the stream to write."""


@dataclass(frozen=True)
class Outputs:
    """What a run writes.

    `video` is a name for `video.open_sink`; `session` None writes none. The session file is deleted when the video
    is complete, unless `keeps_session`; `checkpoint_every` None writes it only when the run is stopped.
    """

    video: str
    sheet: Path | None = None
    preview: str | None = None
    events: Path | None = None
    session: Path | None = None
    checkpoint_every: int | None = CHECKPOINT_EVERY
    keeps_session: bool = False
    overwrite: bool = False

    @classmethod
    def check(cls, asked: WriteOptions) -> Outputs:
        """The outputs of a new run, each known to be writable before a model is loaded; OutputError otherwise."""
        video, overwrite = asked.output, asked.overwrite
        open_sink(video, 16, 16, 16, overwrite=overwrite).abort()  # sinks touch nothing before their first frame
        sheet_path, events_path = (
            check_output(name, suffixes, overwrite=overwrite) if name else None
            for name, suffixes in ((asked.contact_sheet, suffixes_of("picture")), (asked.events, suffixes_of("events")))
        )
        session_path = check_session_path(asked.session) if asked.session else session_beside(video)
        if session_path is not None and session_path.exists() and not overwrite:
            raise OutputError(
                f"cannot write {session_path}: it is the session file of another run; go on with it (miga resume "
                f"{session_path}), or give --overwrite"
            )
        every = CHECKPOINT_EVERY if asked.checkpoint_every is None else asked.checkpoint_every or None
        keeps = asked.session is not None or asked.checkpoint_every is not None
        preview = check_preview(asked.preview, overwrite=overwrite) if asked.preview else None
        return cls(video, sheet_path, preview, events_path, session_path, every, keeps, overwrite)

    @classmethod
    def of_session(
        cls, asked: WriteOptions, video: str | os.PathLike[str], path: Path, session: Session, *, keeps: bool = False
    ) -> Outputs:
        """The outputs of a run that goes on from a session file, which it keeps where that is asked for anyhow."""
        every = asked.checkpoint_every
        return cls(
            os.fspath(video),
            events=check_output(asked.events, suffixes_of("events"), overwrite=True) if asked.events else None,
            session=path,
            checkpoint_every=CHECKPOINT_EVERY if every is None else every or None,
            keeps_session=keeps or every is not None or session.state.numbers["keeps_extension"],
            overwrite=asked.overwrite,
        )


def session_beside(video: str) -> Path | None:
    """Where the session file of a video lies by default: video.mp4 → video.session.safetensors; none of a pipe."""
    if video == "-":
        return None
    path = Path(video.rstrip("/"))
    if is_sequence(path):
        path = path.parent if path.parent.name else path.with_name("frames")
    return path.with_name(f"{path.stem}.session{SUFFIX}")


def render(open_stream: OpenStream, outputs: Outputs, *, model: Mapping[str, Any], quiet: bool = False) -> int:
    """Write a stream's chunks as they come. The exit code: 0 complete, 2 failed, 128 + signal where interrupted.

    At the first Ctrl-C, SIGTERM or SIGHUP the pass at hand is finished, files are closed and the session is saved; a
    second Ctrl-C stops at once. The session file is locked meanwhile. `model` is what the video's metadata say of it.
    """
    with contextlib.nullcontext() if outputs.session is None else locked(outputs.session):
        return _render(open_stream, outputs, model=model, quiet=quiet)


def _render(open_stream: OpenStream, outputs: Outputs, *, model: Mapping[str, Any], quiet: bool) -> int:
    from tqdm import tqdm

    started = time.perf_counter()
    first_frame_after: float | None = None
    failure: MigaError | None = None
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(interruptible())
        bar = stack.enter_context(tqdm(unit="frame", disable=True if quiet else None, file=Screen()))
        log = EventLog(outputs.events)
        stack.callback(log.close)

        preview = Preview(outputs.preview) if outputs.preview else None

        def on_event(event: Event) -> None:
            if event.kind != "progress":
                log.write(event)
            elif first_frame_after is None:
                _show_progress(bar, event)
                if preview is not None:
                    preview.on_event(event, stream)

        stream = stack.enter_context(open_stream(on_event, lambda: bool(interrupted)))
        request = stream.request
        start = num_out = stream.num_frames_out
        bar.total, bar.n = stream.num_frames, num_out
        bar.refresh()
        metadata = request.metadata(**model)  # completed before the sink's first frame, which writes it
        sink = EncoderThread(_open_output(stream, outputs, metadata))
        sheet = ContactSheet(num_frames=stream.num_frames) if outputs.sheet else None
        try:
            with sink:
                log.open(after=stream.resumed_at_event, overwrite=outputs.overwrite)
                if outputs.session is not None:
                    if outputs.overwrite and not stream.is_resumed:
                        remove_session(outputs.session)
                    stream.save_every(
                        outputs.checkpoint_every, outputs.session, sink, keep_extension=outputs.keeps_session
                    )
                for chunk in stream:
                    if first_frame_after is None:
                        first_frame_after = time.perf_counter() - started
                        bar.set_description_str(outputs.video)
                        bar.set_postfix_str(f"first after {first_frame_after:.1f} s")
                    metadata |= stream.metadata()
                    sink.write(chunk.frames)
                    if sheet is not None:
                        sheet.add(chunk.frames)
                    num_out += len(chunk.frames)
                    bar.update(len(chunk.frames))
        except MigaError as error:
            failure = error
            if outputs.session is not None:  # the last one stands where this cannot be saved
                with contextlib.suppress(MigaError):
                    stream.save(outputs.session, sink)
        is_finished = stream.is_finished and failure is None
    seconds = time.perf_counter() - started
    if sheet is not None and outputs.sheet is not None and num_out:
        sheet.save(outputs.sheet)
    if is_finished and outputs.session is not None and not outputs.keeps_session:
        remove_session(outputs.session)
    if first_frame_after is not None:
        part = f"{num_out} frames" if not start else f"{num_out} frames, {num_out - start} of them now"
        say(
            f"{outputs.video}: {part}, {request.width}×{request.height}, {request.fps} fps; {seconds:.1f} s "
            f"({(num_out - start) / seconds:.1f} frames/s, first after {first_frame_after:.1f} s)"
        )
    if failure is not None:
        say(f"miga: {failure}")
    elif interrupted:
        made = f"{outputs.video} holds the {num_out} frames made so far" if num_out else "there was no frame yet"
        say(f"miga: interrupted; {made}")
    if not is_finished and outputs.session is not None and outputs.session.exists():
        saved = load_session(outputs.session)
        command = _resume_command(outputs, saved)
        say(f"miga: to go on from frame {saved.state.numbers['num_frames_out']}: {command}")
    return 2 if failure is not None else 128 + interrupted[0] if interrupted else 0


def _show_progress(bar: tqdm[Any], event: Event) -> None:
    """What there is to say before the first frame."""
    passes, num_passes = event.data["passes"], event.data["passes_to_first_frame"]
    seconds = event.data["seconds_to_first_frame"]
    bar.set_description_str(f"pass {passes} of {num_passes} to the first frame", refresh=False)
    bar.set_postfix_str("" if seconds is None else f"in {seconds:.0f} s" if seconds >= 1 else "soon", refresh=False)
    bar.update(0)


def _resume_command(outputs: Outputs, session: Session) -> str:
    """What goes on from the session file, with what is not taken from it unasked."""
    assert outputs.session is not None
    words = ["miga", "resume", str(outputs.session)]
    for option, value, find in (
        ("--output", outputs.video, video_of_session),
        ("--model", session.model["name"], model_of_session),
    ):
        try:
            find(outputs.session, session)
        except ConfigError:
            words += [option, value]
    try:
        parts_of_session(outputs.session, session, {})
    except ConfigError:
        for part, path in session.model.get("files", {}).items():
            words += ["--" + part.replace("_", "-"), path]
        for path, strength, _ in session.model.get("lora", []):
            words += ["--lora", weighted(path, strength)]
    for option, value in session.model.get("hub", {}).items():
        words += ["--" + option.replace("_", "-"), value]
    position = session.state.numbers["output"] or {}
    if outputs.overwrite and not position.get("num_frames") and is_sequence(str(position.get("path"))):
        words.append("--overwrite")  # the older pictures are there until the first frame is
    return shlex.join(words)


def _open_output(stream: Stream, outputs: Outputs, metadata: dict[str, Any]) -> Sink:
    request = stream.request
    fps, width, height = request.fps, request.width, request.height
    return sink_for(outputs.video, stream.output, fps, width, height, metadata, overwrite=outputs.overwrite)


def stop_signals() -> list[int]:
    """Signals at which a run saves and stops; a SIGHUP that is ignored, as under nohup, is none."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Numbers of the signals that came; a second Ctrl-C raises KeyboardInterrupt at once."""
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, remember) for number in stop_signals()}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
