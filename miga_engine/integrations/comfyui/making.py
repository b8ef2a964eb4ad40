"""A stream into pictures or a file, while ComfyUI watches; what was made is kept where it is interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from miga_engine.errors import MigaError
from miga_engine.integrations.comfyui.host import Comfy, InterruptedByUser, Managed, Progress
from miga_engine.runtime.session import SUFFIX, load_session, locked, remove_session
from miga_engine.runtime.session_info import video_of_session
from miga_engine.runtime.stream import Event, Stream
from miga_engine.video.encoder_thread import EncoderThread
from miga_engine.video.outputs import sink_for

OpenStream = Callable[[Callable[[Event], None], Callable[[], bool]], Stream]
"""(on_event, is_cancelled) → the stream."""


@dataclass(frozen=True)
class Files:
    """What a run writes: the session file is deleted with the last frame, unless `keeps_session`."""

    video: Path
    session: Path
    save_every: int | None
    keeps_session: bool

    @staticmethod
    def session_beside(video: Path) -> Path:
        """The name of a video's session file."""
        return video.with_name(f"{video.stem}.session{SUFFIX}")


def given_out(comfy: Comfy, model: Managed, open_stream: OpenStream) -> Iterator[Tensor]:
    """Frames uint8 `[n,H,W,3]` of a whole stream; ComfyUI's exception where it is interrupted."""
    with _watched(comfy, model, open_stream) as (stream, progress):
        yield from _frames(stream, progress)


def write(comfy: Comfy, model: Managed, open_stream: OpenStream, files: Files) -> None:
    """Write a stream's frames as they come, and its session.

    ComfyUI's exception where it is interrupted, once the file is closed and the session saved.
    """
    with locked(files.session), _watched(comfy, model, open_stream) as (stream, progress):
        metadata = stream.request.metadata(**model.engine.made_of())
        size = stream.request.width, stream.request.height
        with EncoderThread(sink_for(files.video, stream.output, stream.request.fps, *size, metadata)) as sink:
            stream.save_every(files.save_every, files.session, sink, keep_extension=files.keeps_session)
            try:
                for frames in _frames(stream, progress):
                    metadata |= stream.metadata()  # before the sink's first frame, which writes it
                    sink.write(frames)
            except BaseException as error:  # an interruption as well as a failure: what was made is kept
                with contextlib.suppress(MigaError):
                    stream.save(files.session, sink)
                if isinstance(error, MigaError):
                    raise
                interrupted: BaseException | None = error
            else:
                interrupted = None
        if interrupted is not None:  # past the sink, which keeps an unfinished file then
            raise interrupted
        if stream.is_finished and not files.keeps_session:
            remove_session(files.session)


def go_on(
    comfy: Comfy, model: Managed, session: Path, options: dict[str, Any], save_every: int | None, keeps_session: bool
) -> Path:
    """Go on with the video of a session file; the video. Raises MigaError, and as `write`."""
    saved = load_session(session)
    files = Files(Path(video_of_session(session, saved)), session, save_every, keeps_session)

    def open_stream(on_event: Callable[[Event], None], is_cancelled: Callable[[], bool]) -> Stream:
        return model.engine.resume(session, on_event=on_event, is_cancelled=is_cancelled, **options)

    write(comfy, model, open_stream, files)
    return files.video


@contextlib.contextmanager
def _watched(comfy: Comfy, model: Managed, open_stream: OpenStream) -> Iterator[tuple[Stream, Progress]]:
    """A stream that tells ComfyUI how far it is, and ends where the user asks for it."""
    listeners: list[Callable[[Event], None]] = []

    def on_event(event: Event) -> None:
        for listener in listeners:
            listener(event)

    try:
        with (
            comfy.interruptible(is_within_passes=not model.is_compiled),
            open_stream(on_event, comfy.is_interrupted) as stream,
        ):
            progress = comfy.progress(stream.num_frames)
            listeners.append(lambda event: progress.on_event(event, stream))
            yield stream, progress
    except InterruptedByUser:
        comfy.end_if_interrupted()
        raise
    comfy.end_if_interrupted()


def _frames(stream: Stream, progress: Progress) -> Iterator[Tensor]:
    for chunk in stream:
        yield chunk.frames
        progress.frames(chunk.frames, stream.num_frames_out)
