"""mp4 and Matroska files that play while they grow, and that can be gone on with.

A video is encoded in segments of one second, each by an encoder of its own, so that a video that was interrupted and
resumed is the same, frame for frame, as one that was not.
"""

import io
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from miga_engine.errors import MigaError, OutputError
from miga_engine.files import WholeFile, beside, create, hold, open_own
from miga_engine.video.growing_file import FileSink
from miga_engine.video.pyav import require_av
from miga_engine.video.rate import frame_rate
from miga_engine.video.reading import metadata_of, opened_container
from miga_engine.video.sink import identity, too_short

_ITU709, _LIMITED_RANGE = 1, 1  # FFmpeg's numbers for the colour tags
_HEADER_BYTES = 2**26  # more than the metadata of the longest timeline
MUXERS = {
    ".mp4": ("mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}),
    ".mkv": ("matroska", {"cluster_time_limit": "1000", "flush_packets": "1"}),  # ms
}
"""FFmpeg's format and its options for files that play while they grow, by suffix."""
_CLUSTER = b"\x1f\x43\xb6\x75\x83\xe7\x81\x00"  # of Matroska, at time 0, without a frame


class VideoFileSink(FileSink):
    """mp4 (H.264, yuv420p, BT.709) or mkv (FFV1, every bit kept) through PyAV."""

    def __init__(self, path: Path, fps: object, width: int, height: int, metadata: Mapping[str, Any]) -> None:
        super().__init__(path, width, height)
        self._av: Any = require_av(f"write {path}", OutputError, ", or write .rgb")
        self._failures = (OSError, self._av.FFmpegError)
        self._fps = frame_rate(fps)
        self._metadata = metadata
        self._is_mp4 = path.suffix.lower() == ".mp4"
        self._reformatter = self._av.video.reformatter.VideoReformatter()
        self._container: Any = None
        self._encoder: Any = None
        self._next_frame = 0
        # One second: what an interrupted file can lose, and seeking's grain. Each starts at a multiple of it.
        self._segment_frames = max(1, round(self._fps))
        self._num_stored = 0
        self._stored_digest = self._segment_digest = self._digest.copy()
        # A file that is gone on with is first copied, and stands in for the old one once it holds as many frames.
        self._beside: Path | None = None
        self._old: WholeFile | None = None
        self._is_copied = True

    def _stored(self) -> tuple[int, Any]:
        return self._num_stored, self._stored_digest

    def _settle(self) -> None:
        while len(self._behind) > self._num_taken - self._num_stored:
            self._behind.popleft()

    def _flush_to_disk(self) -> None:
        self._settle()  # after a failed write it is still to do
        if self._beside is None:
            super()._flush_to_disk()

    def go_on(self, growing_path: Path, num_frames: int, digest: object) -> None:
        super().go_on(growing_path, num_frames, digest)
        self._next_frame = self._num_taken = self._num_stored = num_frames
        self._stored_digest = self._segment_digest = self._digest.copy()
        if num_frames:
            self._old, self._file, self._is_copied = self._file, None, False

    def _is_own(self, digest: object) -> bool:
        assert self._file is not None
        try:
            if os.fstat(self._file.fileno()).st_size == 0:
                return self.num_frames == 0
            if not self.num_frames:
                return self._has_own_header(self._file)
            with opened_container(self.growing_path, self._file) as container:
                num_found = 0
                for packet in container.demux(container.streams.video[0]):
                    if packet.size:
                        self._digest.update(self._payload(bytes(packet), is_stored=True))
                        num_found += 1
                    if num_found == self.num_frames:  # what comes behind may be torn
                        break
        except MigaError:  # it cannot be read
            return False
        if num_found < self.num_frames:
            raise too_short(self.growing_path, self.num_frames)
        return self._digest.hexdigest() == digest and self.num_frames % self._segment_frames == 0

    def _has_own_header(self, file: WholeFile) -> bool:
        """Whether the metadata are the run's, in a file of which no frame need be there: FFmpeg reads no Matroska file
        without a cluster."""
        head = file.read(_HEADER_BYTES)
        with opened_container(self.growing_path, io.BytesIO(head if self._is_mp4 else head + _CLUSTER)) as container:
            own = identity(self._metadata)
            return own is not None and own == identity(metadata_of(self.growing_path, container))

    def _payload(self, packet: bytes, *, is_stored: bool = False) -> bytes:
        """What of a packet is the same in the file and from the encoder: in mp4, H.264 has the length of each unit in
        place of the start code before it."""
        if not self._is_mp4:
            return packet
        return b"".join(_units(packet) if is_stored else (unit.rstrip(b"\0") for unit in packet.split(b"\0\0\1")))

    def _from_encoder(self, packet: bytes) -> bytes:
        return b"".join(b"\0\0\0\1" + unit for unit in _units(packet)) if self._is_mp4 else packet

    def _open(self) -> None:
        kind, muxer = MUXERS[".mp4" if self._is_mp4 else ".mkv"]
        if self._old is None:
            self._create()
            assert self._file is not None
            self._file.seek(0)
            self._file.truncate()  # of this run, and without a frame that counts
        else:
            self._create_beside()
        self._container = self._av.open(self._file, "w", format=kind, options=muxer)
        self._container.metadata.update(container_metadata(self._metadata))
        self._stream = self._container.add_stream("libx264" if self._is_mp4 else "ffv1", rate=self._fps)
        self._configure(self._stream.codec_context)
        self._container.start_encoding()  # for the header, which names the encoder's parameters
        if self._old is not None:
            self._copy_packets(self._old)

    def _create_beside(self) -> None:
        """The copy has a name of its own for these frames, under which a killed process may have left it."""
        path = beside(self.path, self._stored_digest.hexdigest()[:8])
        with suppress(OSError):
            if stat.S_ISREG(os.lstat(path).st_mode):
                path.unlink()
        self._beside = path if not os.path.lexists(path) else beside(self.path)
        self._file = create(self._beside)
        hold(self._file)

    def _configure(self, context: Any) -> None:
        context.width, context.height = self.width, self.height
        context.pix_fmt = "yuv420p" if self._is_mp4 else "bgr0"
        context.gop_size = self._segment_frames
        context.time_base, context.framerate = 1 / self._fps, self._fps
        context.thread_count = 4  # a fixed number, because x264's output depends on it
        if self._is_mp4:
            # x264's macroblock tree reads memory nobody has written: with it, the same frames encode in many ways.
            # Frames that wait for later ones (bf) need an edit list, which a file that grows has not: its first frame
            # would come late, and short segments be told as longer than they are.
            context.options = {"crf": "17", "preset": "medium", "mbtree": "0", "bf": "0"}
            context.flags |= self._av.codec.context.Flags.global_header
            context.colorspace = context.color_primaries = context.color_trc = _ITU709
            context.color_range = _LIMITED_RANGE
        else:
            context.options = {"level": "3", "slicecrc": "1"}

    def _copy_packets(self, old_file: WholeFile) -> None:
        """The first frames of the old file, as they are."""
        old_file.seek(0)
        with opened_container(self.growing_path, old_file) as old:
            source = old.streams.video[0]
            parameters = bytes(self._stream.codec_context.extradata or b"").split(b"\0\0\0\1")
            if not all(part in bytes(source.codec_context.extradata or b"") for part in parameters):
                raise OutputError(
                    f"cannot go on with {self.growing_path}: another version of the encoder wrote it; "
                    "resume with the packages it was made with"
                )
            num_copied = 0
            for packet in old.demux(source):
                if packet.size:
                    copy = self._av.Packet(self._from_encoder(bytes(packet)))
                    copy.pts = copy.dts = num_copied
                    copy.is_keyframe = packet.is_keyframe
                    self._mux([copy])
                    num_copied += 1
                if num_copied == self._num_stored:
                    break
        if num_copied < self._num_stored:
            raise too_short(self.growing_path, self._num_stored)
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
            self._take(self._encoder.encode(frame))
            self._next_frame += 1
            if self._next_frame % self._segment_frames == 0:
                self._end_segment()
                # Its key frame has made the muxer write out what came before it.
                self._num_stored = self._next_frame - self._segment_frames
                self._stored_digest, self._segment_digest = self._segment_digest, self._digest.copy()
                self._replace_old()

    def _end_segment(self) -> None:
        if self._encoder is not None:
            encoder, self._encoder = self._encoder, None
            self._take(encoder.encode(None))

    def _take(self, packets: list[Any]) -> None:
        for packet in packets:
            self._digest.update(self._payload(bytes(packet)))
        self._mux(packets)

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            packet.stream, packet.time_base, packet.duration = self._stream, 1 / self._fps, 1
            self._container.mux(packet)

    def _replace_old(self) -> None:
        if self._beside is not None and self._file is not None:
            os.fsync(self._file.fileno())
            self._beside.replace(self.growing_path)
            self._beside = None

    def _discard(self) -> None:
        super()._discard()
        if self._file is not None and self._old is None:  # it stays; but half a header does not say whose it is
            with suppress(OSError), open_own(self.growing_path, "r+") as file:
                file.truncate(0)

    def _finish(self) -> None:
        try:
            if self._container is not None:
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
            for file in (self._old, self._file):
                if file is not None:
                    file.close()


def _units(packet: bytes) -> Iterator[bytes]:
    """The units of a packet of H.264 as an mp4 holds it, each behind its length."""
    start = 0
    while start < len(packet):
        end = start + 4 + int.from_bytes(packet[start : start + 4], "big")
        yield packet[start + 4 : end]
        start = end


def container_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    if not metadata:
        return {}
    prompt = metadata.get("prompt", "")
    title = prompt if isinstance(prompt, str) else " / ".join(map(str, dict(prompt).values()))
    return {"title": title, "comment": json.dumps(metadata, ensure_ascii=False)}
