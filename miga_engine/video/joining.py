"""Video files of one kind, one after the other in one file, packet by packet: nothing is decoded or encoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from miga_engine.errors import MigaError, OutputError
from miga_engine.files import open_own, written_whole
from miga_engine.video.pyav import require_av
from miga_engine.video.rate import frame_rate
from miga_engine.video.reading import opened_container
from miga_engine.video.video_file import MUXERS, container_metadata


def join(paths: Sequence[Path], target: Path, fps: object, metadata: Mapping[str, Any]) -> int:
    """Write `target`, of the suffix of all of them, and give its number of frames; OutputError where they differ in
    more than their frames, or it cannot be written. What was there is replaced once all of it is."""
    av: Any = require_av(f"write {target}", OutputError)
    kind, options = MUXERS[target.suffix.lower()]
    rate, num_frames, header = frame_rate(fps), 0, b""
    with (
        _written(av, target),
        written_whole(target) as file,
        av.open(file, "w", format=kind, options=options) as joined,
    ):
        joined.metadata.update(container_metadata(metadata))
        stream: Any = None
        for path in paths:
            with open_own(path) as part, opened_container(path, part) as container:
                source = container.streams.video[0]
                if stream is None:
                    stream, header = joined.add_stream_from_template(source), _header(source)
                if _header(source) != header:
                    raise OutputError(f"cannot join {path} to {paths[0]}: it was encoded otherwise; make it again")
                for packet in container.demux(source):
                    if packet.size:
                        packet.stream, packet.time_base, packet.duration = stream, 1 / rate, 1
                        packet.pts = packet.dts = num_frames
                        with _written(av, target):
                            joined.mux(packet)
                        num_frames += 1
    return num_frames


def _header(stream: Any) -> bytes:
    context = stream.codec_context
    return f"{context.name} {context.width}x{context.height} ".encode() + bytes(context.extradata or b"")


@contextlib.contextmanager
def _written(av: Any, target: Path) -> Iterator[None]:
    """What a library says of a disk, in a sentence."""
    try:
        yield
    except MigaError:
        raise
    except (OSError, av.FFmpegError) as error:
        raise OutputError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error
