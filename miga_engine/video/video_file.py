"""mp4 and Matroska files that play while they grow, and that can be gone on with.

A video is encoded in segments of one second, each by an encoder of its own, so that a video that was interrupted and
resumed is the same, frame for frame, as one that was not.
"""

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from miga_engine.errors import OutputError
from miga_engine.video.pyav import require_av
from miga_engine.video.sink import FileSink, flush_file, too_short

_ITU709, _LIMITED_RANGE = 1, 1  # FFmpeg's numbers for the colour tags


class VideoFileSink(FileSink):
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
        self._av: Any = require_av(f"write {path}", OutputError, ", or write .rgb")
        self._failures = (OSError, self._av.FFmpegError)
        self._fps = Fraction(fps).limit_denominator(1001)
        self._metadata = metadata
        self._is_mp4 = path.suffix.lower() == ".mp4"
        self._reformatter = self._av.video.reformatter.VideoReformatter()
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
            flush_file(self.growing_path)

    def _open(self) -> None:
        if self._is_mp4:
            kind, muxer = "mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        else:
            kind, muxer = "matroska", {"cluster_time_limit": "1000", "flush_packets": "1"}  # ms
        self._container = self._av.open(str(self._beside or self.growing_path), "w", format=kind, options=muxer)
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
            context.flags |= self._av.codec.context.Flags.global_header
            context.colorspace = context.color_primaries = context.color_trc = _ITU709
            context.color_range = _LIMITED_RANGE
        else:
            context.options = {"level": "3", "slicecrc": "1"}

    def _copy_packets(self) -> None:
        """The first `_stored` frames of the old file, as they are."""
        with self._av.open(str(self.growing_path)) as old:
            source = old.streams.video[0]
            parameters = bytes(self._stream.codec_context.extradata or b"").split(b"\0\0\0\1")
            if not all(part in bytes(source.codec_context.extradata or b"") for part in parameters):
                raise OutputError(
                    f"cannot go on with {self.growing_path}: another version of the encoder wrote it; "
                    "resume with the packages it was made with"
                )
            # In mp4, H.264 has lengths in place of the start codes that the encoder's packets beside these have.
            bitstream = self._av.bitstream.BitStreamFilterContext(
                "h264_mp4toannexb" if self._is_mp4 else "null", source
            )
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
            raise too_short(self.growing_path, self._stored)
        self._is_copied = True

    def _append(self, frames: "np.ndarray[Any, Any]") -> None:
        for image in frames:
            if self._encoder is None:
                self._encoder = self._av.CodecContext.create(self._stream.codec_context.codec.name, "w")
                self._configure(self._encoder)
            enums = self._av.video.reformatter
            frame = self._reformatter.reformat(
                self._av.VideoFrame.from_ndarray(image, format="rgb24"),
                format=self._encoder.pix_fmt,
                dst_colorspace=enums.Colorspace.ITU709 if self._is_mp4 else None,
                interpolation=enums.Interpolation.BICUBIC,
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
            flush_file(self._beside)
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


def _container_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    if not metadata:
        return {}
    prompt = metadata.get("prompt", "")
    title = prompt if isinstance(prompt, str) else " / ".join(map(str, dict(prompt).values()))
    return {"title": title, "comment": json.dumps(metadata, ensure_ascii=False)}
