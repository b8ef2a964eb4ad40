"""Sinks take uint8 frames as they are made and write them at once: mp4, lossless mkv, PNG sequence, raw, or a callback.

Nothing is created before the first frame. A new file then grows under its own name and is playable at any moment, also
after a kill: an mp4 is a chain of one-second fragments, a Matroska file one of one-second clusters. An existing file is
refused, or with `overwrite=True` kept until the new one, growing beside it as `name.part.suffix`, is closed.
"""

import json
import os
import queue
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from miga_engine.errors import OutputError
from miga_engine.video.paths import check_folder, check_output, reason
from miga_engine.video.png import write_png
from miga_engine.video.reading import read_metadata

if TYPE_CHECKING:
    import torch

__all__ = [
    "CallbackSink",
    "EncoderThread",
    "ImageSequenceSink",
    "RawFileSink",
    "Sink",
    "StreamSink",
    "VideoFileSink",
    "open_sink",
    "read_metadata",
]

Frames: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"

VIDEO_SUFFIXES = (".mp4", ".mkv")
FILE_SUFFIXES = (*VIDEO_SUFFIXES, ".rgb")
_ITU709, _LIMITED_RANGE = 1, 1  # FFmpeg's numbers for the colour tags
_NUMBER_FIELD = re.compile(r"%0(\d)d")


class Sink(ABC):
    """Where frames go. As a context manager it closes at the end and on Ctrl-C, and aborts on any other exception."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.num_frames = 0
        self.is_closed = False

    def write(self, frames: Frames) -> None:
        """Append frames uint8 [n,H,W,3], numpy or torch on any device; OutputError if they cannot be stored."""
        if self.is_closed:
            raise ValueError("the sink is closed")
        array = as_frames(frames)
        if array.shape[1:3] != (self.height, self.width):
            raise ValueError(
                f"frames are {array.shape[2]}×{array.shape[1]}, and the sink was opened for {self.width}×{self.height}"
            )
        if array.shape[0]:
            self._write(array)
            self.num_frames += array.shape[0]

    def close(self) -> None:
        """Finish the output with the frames it has; calling it again does nothing."""
        if not self.is_closed:
            self.is_closed = True
            self._close()

    def abort(self) -> None:
        """Give up after a failure: frames already written stay readable, a file that was to be replaced stays."""
        if not self.is_closed:
            self.is_closed = True
            self._abort()

    @abstractmethod
    def _write(self, frames: "np.ndarray[Any, Any]") -> None: ...

    def _close(self) -> None:
        return None

    def _abort(self) -> None:
        self._close()

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt | GeneratorExit):
            self.close()
        else:
            self.abort()


def open_sink(
    path: str | os.PathLike[str] | Callable[["np.ndarray[Any, Any]"], object],
    fps: float,
    width: int,
    height: int,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Sink:
    """Choose a sink by name and check that it can be written, before any frame is made.

    `.mp4` (H.264), `.mkv` (FFV1, lossless), `folder/` or `name_%06d.png` (PNG sequence), `.rgb` (raw rgb24), `-` (raw
    to standard output), or a function called with each uint8 [n,H,W,3] array. mp4 and mkv carry `metadata`: `prompt` as
    the title and all of it as JSON in the comment, for `read_metadata`.
    """
    if callable(path):
        return CallbackSink(path, width, height)
    name = os.fspath(path)
    if name == "-":
        return StreamSink(sys.stdout.buffer, "standard output", width, height)
    if name.endswith("/") or name.lower().endswith(".png"):
        return ImageSequenceSink(name, width, height, overwrite=overwrite)
    if Path(name).is_dir():
        raise OutputError(f"cannot write {name}: it is a folder; end the name with / to write a PNG sequence into it")
    target = check_output(name, FILE_SUFFIXES, overwrite=overwrite)
    if target.suffix.lower() == ".rgb":
        return RawFileSink(target, width, height)
    if target.suffix.lower() == ".mp4" and (width % 2 or height % 2):
        raise OutputError(
            f"cannot write {name}: an mp4 needs even width and height, not {width}×{height}; .mkv takes any size"
        )
    return VideoFileSink(target, fps, width, height, metadata or {})


def as_frames(frames: Frames) -> "np.ndarray[Any, Any]":
    """uint8 [n,H,W,3] as a contiguous numpy array on the CPU."""
    array = frames if isinstance(frames, np.ndarray) else frames.detach().cpu().numpy()
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise ValueError(f"frames have shape {array.shape} and dtype {array.dtype}, expected [n, H, W, 3] and uint8")
    return np.ascontiguousarray(array)


class EncoderThread(Sink):
    """Writes to another sink in a thread, so that encoding does not hold up whoever makes the frames.

    At most `max_chunks` writes wait; the next one then blocks. Frames are read after `write` has returned, so they must
    stay as they are; on CUDA they are copied to pinned memory, queued behind the current stream's work. An error of the
    sink is raised by the next `write` or by `close`, with its own type and message. `num_frames` counts what the sink
    has taken. `close` and `abort` first write all that waits.
    """

    def __init__(self, sink: Sink, max_chunks: int = 4) -> None:
        super().__init__(sink.width, sink.height)
        self._sink = sink
        self._error: BaseException | None = None
        self._chunks: queue.Queue[tuple[Frames, Any] | None] = queue.Queue(max_chunks)
        self._thread = threading.Thread(target=self._run, name="miga-encode", daemon=True)
        self._thread.start()

    def write(self, frames: Frames) -> None:
        if self.is_closed:
            raise ValueError("the sink is closed")
        if self._error is not None:
            raise self._error
        self._chunks.put(_to_host(frames))

    def _write(self, frames: Frames) -> None:
        self._sink.write(frames)
        self.num_frames = self._sink.num_frames

    def _close(self) -> None:
        self._finish()
        if self._error is not None:
            self._sink.abort()
            raise self._error
        self._sink.close()

    def _abort(self) -> None:
        self._finish()
        self._sink.abort()

    def _finish(self) -> None:
        self._chunks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            frames, copied = chunk
            if self._error is None:  # after an error the queue is only emptied, so that no write waits for ever
                try:
                    if copied is not None:
                        copied.synchronize()
                    self._write(frames)
                except BaseException as error:
                    self._error = error
            del chunk, frames


def _to_host(frames: Frames) -> tuple[Frames, Any]:
    """(frames on the CPU, the CUDA event after which they are there, or None)."""
    if isinstance(frames, np.ndarray) or not frames.is_cuda:
        return frames, None
    import torch

    with torch.cuda.device(frames.device):
        host = frames.detach().to("cpu", non_blocking=True)  # pinned; its block is reused when the copy is done
        copied = torch.cuda.Event(blocking=True)
        copied.record()
    return host, copied


class CallbackSink(Sink):
    def __init__(self, function: Callable[["np.ndarray[Any, Any]"], object], width: int, height: int) -> None:
        super().__init__(width, height)
        self._function = function

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        self._function(frames)


class StreamSink(Sink):
    """Raw rgb24 bytes to an open stream, flushed after every write."""

    def __init__(self, stream: IO[bytes], name: str, width: int, height: int) -> None:
        super().__init__(width, height)
        self._stream, self._name = stream, name

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        with _reported(self._name):
            self._stream.write(frames.data)
            self._stream.flush()


class _FileSink(Sink):
    """One file: created at the first frame, in place if nothing is there, else beside it until closed."""

    def __init__(self, path: Path, width: int, height: int) -> None:
        super().__init__(width, height)
        self.path = path
        self._replaces = path.exists()
        self.growing_path = path.with_name(f"{path.stem}.part{path.suffix}") if self._replaces else path
        self._is_open = False

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        with _reported(self.path):
            if not self._is_open:
                if not self._replaces and self.path.exists():
                    raise OutputError(f"cannot write {self.path}: another program has created it meanwhile")
                try:
                    self._open()
                    self._is_open = True
                    self._append(frames)
                except BaseException:
                    self._discard()
                    raise
            else:
                self._append(frames)

    def _close(self) -> None:
        if self._is_open:
            with _reported(self.path):
                self._finish()
                if self._replaces:
                    self.growing_path.replace(self.path)

    def _abort(self) -> None:
        if self._is_open:
            with suppress(OutputError), _reported(self.path):
                self._finish()

    def _discard(self) -> None:
        self.is_closed = True
        with suppress(Exception):
            self._finish()
        self.growing_path.unlink(missing_ok=True)

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _append(self, frames: "np.ndarray[Any, Any]") -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class RawFileSink(_FileSink):
    """rgb24, frame after frame, no header."""

    _file: IO[bytes]

    def _open(self) -> None:
        self._file = self.growing_path.open("wb", buffering=0)

    def _append(self, frames: "np.ndarray[Any, Any]") -> None:
        rest = memoryview(frames.data).cast("B")
        while rest:
            rest = rest[self._file.write(rest) :]

    def _finish(self) -> None:
        self._file.close()


class VideoFileSink(_FileSink):
    """mp4 (H.264, yuv420p, BT.709) or mkv (FFV1, every bit kept) through PyAV."""

    def __init__(self, path: Path, fps: float, width: int, height: int, metadata: Mapping[str, Any]) -> None:
        super().__init__(path, width, height)
        self._fps = Fraction(fps).limit_denominator(1001)
        self._metadata = metadata
        self._is_mp4 = path.suffix.lower() == ".mp4"
        self._reformatter = VideoReformatter()
        self._container: Any = None

    def _open(self) -> None:
        keyframe_interval = max(
            1, round(self._fps)
        )  # one second: what an interrupted file can lose, and seeking's grain
        if self._is_mp4:
            kind, codec, pixels = "mp4", "libx264", "yuv420p"
            muxer = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
            coder = {"crf": "17", "preset": "medium", "rc-lookahead": str(min(40, keyframe_interval))}
        else:
            kind, codec, pixels = "matroska", "ffv1", "bgr0"
            muxer = {"cluster_time_limit": "1000", "flush_packets": "1"}  # ms
            coder = {"level": "3", "slicecrc": "1"}
        self._container = av.open(str(self.growing_path), "w", format=kind, options=muxer)
        self._container.metadata.update(_container_metadata(self._metadata))
        self._stream = self._container.add_stream(codec, rate=self._fps, options=coder)
        self._stream.width, self._stream.height, self._stream.pix_fmt = self.width, self.height, pixels
        context = self._stream.codec_context
        context.gop_size = keyframe_interval
        if self._is_mp4:
            context.colorspace = context.color_primaries = context.color_trc = _ITU709
            context.color_range = _LIMITED_RANGE
        self._pixels = pixels
        self._next_pts = 0

    def _append(self, frames: "np.ndarray[Any, Any]") -> None:
        for image in frames:
            frame = self._reformatter.reformat(
                av.VideoFrame.from_ndarray(image, format="rgb24"),
                format=self._pixels,
                dst_colorspace=Colorspace.ITU709 if self._is_mp4 else None,
                interpolation=Interpolation.BICUBIC,
            )
            frame.pts, frame.time_base = self._next_pts, 1 / self._fps
            self._next_pts += 1
            self._container.mux(self._stream.encode(frame))

    def _finish(self) -> None:
        if self._container is None:
            return
        try:
            if self._next_pts:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()


class ImageSequenceSink(Sink):
    """One PNG per frame, numbered from 0; each appears complete."""

    def __init__(self, name: str, width: int, height: int, *, overwrite: bool) -> None:
        super().__init__(width, height)
        pattern = Path(name) / "%06d.png" if name.endswith("/") else Path(name)
        if len(_NUMBER_FIELD.findall(pattern.name)) != 1 or pattern.name.count("%") != 1:
            raise OutputError(
                f"cannot write {name}: one image cannot hold a video; number the frames, as in {pattern.stem}_%06d.png"
            )
        self.folder, self._pattern = pattern.parent, pattern.name
        check_folder(self.folder if self.folder.exists() else self.folder.parent, name)
        if self._old_images() and not overwrite:
            raise OutputError(
                f"cannot write {name}: it holds images already, and --overwrite (overwrite=True) was not given"
            )

    def _old_images(self) -> list[Path]:
        start, digits, end = _NUMBER_FIELD.split(self._pattern)
        numbered = re.compile(re.escape(start) + rf"\d{{{digits},}}" + re.escape(end))
        return [path for path in self.folder.iterdir() if numbered.fullmatch(path.name)] if self.folder.is_dir() else []

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        with _reported(self.folder):
            if self.num_frames == 0:
                self.folder.mkdir(exist_ok=True)
                for path in self._old_images():
                    path.unlink()
            for number, image in enumerate(frames, self.num_frames):
                write_png(self.folder / (self._pattern % number), image)


def _container_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    if not metadata:
        return {}
    prompt = metadata.get("prompt", "")
    title = prompt if isinstance(prompt, str) else " / ".join(map(str, dict(prompt).values()))
    return {"title": title, "comment": json.dumps(metadata, ensure_ascii=False)}


@contextmanager
def _reported(name: str | os.PathLike[str]) -> Iterator[None]:
    """A failed write as one OutputError sentence."""
    try:
        yield
    except OutputError:
        raise
    except BrokenPipeError as error:
        raise OutputError(f"cannot write {name} any further: the program that read it has closed it") from error
    except (OSError, av.FFmpegError) as error:
        raise OutputError(f"cannot write {name}: {reason(error)}") from error
