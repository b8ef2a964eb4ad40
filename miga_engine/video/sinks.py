"""Sinks take uint8 frames as they are made and write them at once: mp4, lossless mkv, PNG sequence, raw, or a callback.

Nothing is created before the first frame. A new file then grows under its own name and is playable at any moment, also
after a kill: an mp4 is a chain of one-second fragments, a Matroska file one of one-second clusters. An existing file is
refused, or with `overwrite=True` kept until the new one, growing beside it as `name.part.suffix`, is closed.

A video is encoded in segments of one second, each by an encoder of its own, so that a video that was interrupted and
resumed is the same, frame for frame, as one that was not. `checkpoint` tells how many frames are on the disk and which
are not yet; `reopen_sink` goes on from there.
"""

import json
import os
import queue
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import av
import av.codec.context
import numpy as np
from av.bitstream import BitStreamFilterContext
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
    "reopen_sink",
]

Frames: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"

VIDEO_SUFFIXES = (".mp4", ".mkv")
FILE_SUFFIXES = (*VIDEO_SUFFIXES, ".rgb")
_ITU709, _LIMITED_RANGE = 1, 1  # FFmpeg's numbers for the colour tags
_DIGITS = re.compile(r"\d+")
_NUMBER_FIELD = re.compile(r"%0(\d)d")


class Sink(ABC):
    """Where frames go. As a context manager it closes at the end and on Ctrl-C, and aborts on any other exception."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.num_frames = 0
        self.is_closed = False
        self._behind: deque[np.ndarray[Any, Any]] = deque()  # frames taken, and not sure to be on the disk
        self._num_taken = 0  # of this sink, or of the one it goes on from

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
            self._behind.extend(array)
            self._num_taken += array.shape[0]
            try:
                self._write(array)
                self.num_frames += array.shape[0]
                self._settle()
            finally:  # what stays must not be a view of memory that the caller writes into
                for i in range(1, 1 + min(len(array), len(self._behind))):
                    self._behind[-i] = self._behind[-i].copy()

    def checkpoint(self) -> tuple[dict[str, Any], "torch.Tensor"]:
        """Where the output stands, for `reopen_sink`: ({"path", "growing_path", "num_frames"}, frames behind those
        uint8 [n,H,W,3]). Frames before `num_frames` are on the disk for good; path is None where there is no file.
        It may be asked after a failed write too.
        """
        import torch

        self._flush_to_disk()
        frames = np.stack(self._behind) if self._behind else np.empty((0, self.height, self.width, 3), np.uint8)
        return self._position(), torch.from_numpy(frames)

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

    def _settle(self) -> None:
        """Forget the frames that need not be written again, whatever happens."""
        self._behind.clear()

    def _flush_to_disk(self) -> None:
        return None

    def _position(self) -> dict[str, Any]:
        return {"path": None, "growing_path": None, "num_frames": self.num_frames}

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
    if os.path.isdir(name):
        raise OutputError(f"cannot write {name}: it is a folder; end the name with / to write a PNG sequence into it")
    target = check_output(name, FILE_SUFFIXES, overwrite=overwrite)
    if target.suffix.lower() == ".rgb":
        return RawFileSink(target, width, height)
    if target.suffix.lower() == ".mp4" and (width % 2 or height % 2):
        raise OutputError(
            f"cannot write {name}: an mp4 needs even width and height, not {width}×{height}; .mkv takes any size"
        )
    return VideoFileSink(target, fps, width, height, metadata or {})


def reopen_sink(
    position: Mapping[str, Any],
    frames: Frames,
    fps: float,
    width: int,
    height: int,
    metadata: Mapping[str, Any] | None = None,
) -> Sink:
    """Go on with a file as `Sink.checkpoint` left it, whatever was written to it afterwards.

    OutputError where the file is gone or holds fewer frames than it did; it is as it was then.
    """
    path, growing, num_frames = Path(position["path"]), Path(position["growing_path"]), int(position["num_frames"])
    if growing != path and not growing.exists():
        growing = path  # it was closed after all
    last_file = growing.with_name(growing.name % (num_frames - 1)) if path.suffix.lower() == ".png" else growing
    if num_frames and not last_file.exists():
        raise OutputError(f"cannot go on with {last_file}: it is gone; name the file with the frames made so far")
    sink: Sink
    if path.suffix.lower() == ".rgb":
        sink = RawFileSink(path, width, height, growing, num_frames)
    elif path.suffix.lower() == ".png":
        sink = ImageSequenceSink(str(path), width, height, overwrite=True, num_frames=num_frames)
    else:
        sink = VideoFileSink(path, fps, width, height, metadata or {}, growing, num_frames)
    sink.write(frames)
    return sink


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
        self.num_frames = sink.num_frames
        self._error: BaseException | None = None
        self._left: list[Frames] = []  # chunks that came after an error
        self._chunks: queue.Queue[tuple[Frames, Any] | None] = queue.Queue(max_chunks)
        self._thread = threading.Thread(target=self._run, name="miga-encode", daemon=True)
        self._thread.start()

    def write(self, frames: Frames) -> None:
        if self.is_closed:
            raise ValueError("the sink is closed")
        if self._error is not None:
            self._left.append(frames.copy() if isinstance(frames, np.ndarray) else frames.cpu())
            raise self._error
        self._chunks.put(_to_host(frames))

    def checkpoint(self) -> tuple[dict[str, Any], "torch.Tensor"]:
        """As of the other sink, with all that was written to this one."""
        import torch

        if not self.is_closed:
            self._chunks.join()
        position, frames = self._sink.checkpoint()
        return position, torch.cat([frames, *(torch.from_numpy(as_frames(left)) for left in self._left)])

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
            if copied is not None:
                copied.synchronize()
            if self._error is None:
                try:
                    self._write(frames)
                except BaseException as error:
                    self._error = error
            else:  # the queue is only emptied, so that no write waits for ever
                self._left.append(frames)
            del chunk, frames
            self._chunks.task_done()


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

    def __init__(
        self, path: Path, width: int, height: int, growing_path: Path | None = None, num_frames: int = 0
    ) -> None:
        """With growing_path: go on with that file behind its first num_frames frames."""
        super().__init__(width, height)
        self.path = path
        self.is_resumed = growing_path is not None
        if growing_path is None:
            growing_path = path.with_name(f"{path.stem}.part{path.suffix}") if path.exists() else path
        self.growing_path = growing_path
        self.num_frames = num_frames
        self._replaces = growing_path != path
        self._is_open = False

    def _write(self, frames: "np.ndarray[Any, Any]") -> None:
        with _reported(self.path):
            if not self._is_open:
                if not self._replaces and not self.is_resumed and self.path.exists():
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
        if self.is_resumed and not self._is_open and self.num_frames:
            with _reported(self.path):
                self._open()  # which drops the frames behind the last that counts
                self._is_open = True
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
        if not self.is_resumed:
            self.growing_path.unlink(missing_ok=True)

    def _position(self) -> dict[str, Any]:
        return {
            "path": os.path.abspath(self.path),
            "growing_path": os.path.abspath(self.growing_path),
            "num_frames": self._num_stored,
        }

    @property
    def _num_stored(self) -> int:
        return self.num_frames

    def _flush_to_disk(self) -> None:
        if self._is_open:
            _flush_file(self.growing_path)

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
        self._file = self.growing_path.open("r+b" if self.num_frames else "wb", buffering=0)
        if self.num_frames:
            length = self.num_frames * self.height * self.width * 3
            if self._file.seek(0, os.SEEK_END) < length:
                raise _too_short(self.growing_path, self.num_frames)
            self._file.truncate(length)
            self._file.seek(length)

    def _append(self, frames: "np.ndarray[Any, Any]") -> None:
        rest = memoryview(frames.data).cast("B")
        while rest:
            rest = rest[self._file.write(rest) :]

    def _finish(self) -> None:
        self._file.close()


class VideoFileSink(_FileSink):
    """mp4 (H.264, yuv420p, BT.709) or mkv (FFV1, every bit kept) through PyAV."""

    def __init__(
        self,
        path: Path,
        fps: float,
        width: int,
        height: int,
        metadata: Mapping[str, Any],
        growing_path: Path | None = None,
        num_frames: int = 0,
    ) -> None:
        super().__init__(path, width, height, growing_path, num_frames)
        self._fps = Fraction(fps).limit_denominator(1001)
        self._metadata = metadata
        self._is_mp4 = path.suffix.lower() == ".mp4"
        self._reformatter = VideoReformatter()
        self._container: Any = None
        self._encoder: Any = None
        self._next_frame = self._num_taken = num_frames
        # One second: what an interrupted file can lose, and seeking's grain. Each starts at a multiple of it.
        self._segment_frames = max(1, round(self._fps))
        self._stored = num_frames
        self._is_copied = num_frames == 0
        # A file that is gone on with is first copied, and stands in for the old one once it holds as many frames.
        self._beside: Path | None = None
        if self.is_resumed:
            self._beside = self.growing_path.with_name(f"{path.stem}.resumed{path.suffix}")

    @property
    def _num_stored(self) -> int:
        return self._stored

    def _settle(self) -> None:
        while len(self._behind) > self._num_taken - self._stored:
            self._behind.popleft()

    def _flush_to_disk(self) -> None:
        self._settle()  # after a failed write it is still to do
        if self._is_open and self._beside is None:
            _flush_file(self.growing_path)

    def _open(self) -> None:
        if self._is_mp4:
            kind, muxer = "mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        else:
            kind, muxer = "matroska", {"cluster_time_limit": "1000", "flush_packets": "1"}  # ms
        self._container = av.open(str(self._beside or self.growing_path), "w", format=kind, options=muxer)
        self._container.metadata.update(_container_metadata(self._metadata))
        self._stream = self._container.add_stream("libx264" if self._is_mp4 else "ffv1", rate=self._fps)
        self._configure(self._stream.codec_context)
        self._container.start_encoding()  # for the header, which names the encoder's parameters
        if self._stored:
            self._copy_packets()

    def _configure(self, context: Any) -> None:
        context.width, context.height = self.width, self.height
        context.pix_fmt = "yuv420p" if self._is_mp4 else "bgr0"
        context.gop_size = self._segment_frames
        context.time_base, context.framerate = 1 / self._fps, self._fps
        context.thread_count = 4  # a fixed number, because x264's output depends on it
        if self._is_mp4:
            # x264's macroblock tree reads memory nobody has written: with it, the same frames encode in many ways.
            context.options = {"crf": "17", "preset": "medium", "mbtree": "0"}
            context.flags |= av.codec.context.Flags.global_header
            context.colorspace = context.color_primaries = context.color_trc = _ITU709
            context.color_range = _LIMITED_RANGE
        else:
            context.options = {"level": "3", "slicecrc": "1"}

    def _copy_packets(self) -> None:
        """The first `_stored` frames of the old file, as they are."""
        with av.open(str(self.growing_path)) as old:
            source = old.streams.video[0]
            parameters = bytes(self._stream.codec_context.extradata or b"").split(b"\0\0\0\1")
            if not all(part in bytes(source.codec_context.extradata or b"") for part in parameters):
                raise OutputError(
                    f"cannot go on with {self.growing_path}: another version of the encoder wrote it; "
                    "resume with the packages it was made with"
                )
            # In mp4, H.264 has lengths in place of the start codes that the encoder's packets beside these have.
            bitstream = BitStreamFilterContext("h264_mp4toannexb" if self._is_mp4 else "null", source)
            frame_ticks = 1 / (self._fps * (source.time_base or 1))
            num_copied, first = 0, 0
            for packet in old.demux(source):
                if packet.size and num_copied < self._stored:
                    first = first if num_copied else packet.pts or 0
                    for copy in bitstream.filter(packet):
                        copy.pts = round(((copy.pts or 0) - first) / frame_ticks)
                        copy.dts = round(((copy.dts or 0) - first) / frame_ticks)
                        copy.time_base = 1 / self._fps
                        self._mux([copy])
                    num_copied += 1
        if num_copied < self._stored:
            raise _too_short(self.growing_path, self._stored)
        self._is_copied = True

    def _append(self, frames: "np.ndarray[Any, Any]") -> None:
        for image in frames:
            if self._encoder is None:
                self._encoder = av.CodecContext.create(self._stream.codec_context.codec.name, "w")
                self._configure(self._encoder)
            frame = self._reformatter.reformat(
                av.VideoFrame.from_ndarray(image, format="rgb24"),
                format=self._encoder.pix_fmt,
                dst_colorspace=Colorspace.ITU709 if self._is_mp4 else None,
                interpolation=Interpolation.BICUBIC,
            )
            frame.pts, frame.time_base = self._next_frame, 1 / self._fps
            self._mux(self._encoder.encode(frame))
            self._next_frame += 1
            if self._next_frame % self._segment_frames == 0:
                self._end_segment()
                # Its key frame has made the muxer write out what came before it.
                self._stored = self._next_frame - self._segment_frames
                self._replace_old()

    def _end_segment(self) -> None:
        if self._encoder is not None:
            encoder, self._encoder = self._encoder, None
            self._mux(encoder.encode(None))

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            packet.stream = self._stream
            self._container.mux(packet)

    def _replace_old(self) -> None:
        if self._beside is not None:
            _flush_file(self._beside)
            self._beside.replace(self.growing_path)
            self._beside = None

    def _finish(self) -> None:
        if self._container is None:
            return
        try:
            try:
                self._end_segment()
            finally:
                container, self._container = self._container, None
                container.close()
            if self._is_copied:
                self._replace_old()
        finally:
            if self._beside is not None:
                self._beside.unlink(missing_ok=True)


class ImageSequenceSink(Sink):
    """One PNG per frame, numbered from 0; each appears complete."""

    def __init__(self, name: str, width: int, height: int, *, overwrite: bool, num_frames: int = 0) -> None:
        """With num_frames: go on behind that many images."""
        super().__init__(width, height)
        self.num_frames = self._num_flushed = num_frames
        self._is_resumed = num_frames > 0
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

    def _close(self) -> None:
        if self._is_resumed:
            with _reported(self.folder):
                for path in self._old_images():
                    if (
                        int(_DIGITS.findall(path.name.removeprefix(self._pattern.partition("%")[0]))[0])
                        >= self.num_frames
                    ):
                        path.unlink()

    def _position(self) -> dict[str, Any]:
        path = os.path.abspath(self.folder / self._pattern)
        return {"path": path, "growing_path": path, "num_frames": self.num_frames}

    def _flush_to_disk(self) -> None:
        for number in range(self._num_flushed, self.num_frames):
            _flush_file(self.folder / (self._pattern % number))
        self._num_flushed = self.num_frames


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _too_short(path: Path, num_frames: int) -> OutputError:
    return OutputError(
        f"cannot go on with {path}: it holds fewer than the {num_frames} frames it had; name the file they are in"
    )


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
