"""How far a run is from its first frame: in ticks, and in seconds from those it has done."""

from __future__ import annotations

import time
from collections.abc import Iterator

from miga_engine.runtime.events import Events
from miga_engine.runtime.layout import RunLayout
from miga_engine.runtime.stages import VideoRun
from miga_engine.runtime.steering import Ask, Steering
from miga_engine.runtime.wavefront import UnifiedPasses


def ticks_to_first_frame(layout: RunLayout) -> list[int]:
    """Latent frames that the network reads in each tick up to the one that gives the first frame; searches and the
    anchor's places in front are left out."""
    return list(_ticks(layout))


def _ticks(layout: RunLayout) -> Iterator[int]:
    config, width = layout.config, layout.config.zigzag_width
    if layout.num_given:
        return
    if config.warmup != "noise":
        yield from [layout.window_frames] * layout.num_steps
        if layout.num_still:
            return
    head, tail = layout.first_head, layout.first_head + layout.num_first_groups * width
    while (tail - head) // width < layout.num_groups - 1:
        tail += width
        yield from (_read(layout, head, tail, None, newest) for newest in range(config.passes_per_advance))
    if (tail - head) // width < layout.num_groups:
        tail += width
        yield 0
    passes, num_passes = layout.unified_passes(), 0
    while (passes.done[-1] if passes.done else head) < 1:
        if layout.end is not None and head >= layout.end:
            yield _advance(passes, layout.num_available(head))
            continue
        read = _read(layout, head, tail, num_passes, num_passes % config.passes_per_advance)
        num_passes += 1
        if num_passes % config.passes_per_advance == 0:
            head, tail = head + width, tail + width
            while (layout.end is None or head < layout.end) and (advanced := _advance(passes, head)):
                read += advanced
        yield read


def _advance(passes: UnifiedPasses, num_available: int) -> int:
    """Frames that the blocks read which are ready, now done."""
    blocks = passes.ready(num_available)
    for block in blocks:
        passes.done[block.level] = block.commit_stop
    return sum(block.stop - block.start for block in blocks)


def _read(layout: RunLayout, head: int, tail: int, num_passes: int | None, newest: int) -> int:
    return sum(len(window.frames) for window in layout.queue_windows(head, tail, num_passes, newest))


class ProgressMeter:
    """Tells, a pass, how far a run is: before the first frame from how long the passes before took, then in frames."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._reads: list[int] = []
        self._started: tuple[int, float] | None = None
        self._first_frames: tuple[int, float] | None = None
        self._told = 0

    def __call__(self, run: VideoRun, steering: Steering, num_frames_out: int) -> None:
        """Of a run whose stream has given so many frames.

        `seconds_to_first_frame` is None before a pass was seen, `frames_per_second` before there are frames,
        `latency_frames` where no change can be told any more: from the frame that is next to the first that a prompt
        told now would begin with.
        """
        if self._events.on_event is None:
            return
        now, ticks = time.perf_counter(), run.num_ticks
        if self._started is None:
            self._reads, self._started = ticks_to_first_frame(run.layout), (ticks, now)
        elif ticks == self._told:
            return
        self._told = ticks
        if num_frames_out and self._first_frames is None:
            self._first_frames = num_frames_out, now
        first, started = self._started
        done, left = sum(self._reads[first:ticks]), sum(self._reads[ticks:])
        self._events.progress({
            "passes": ticks,
            "passes_to_first_frame": len(self._reads),
            "seconds_to_first_frame": None if left and not done else (now - started) * left / max(done, 1),
            "num_frames_out": num_frames_out,
            "frames_per_second": self._rate(num_frames_out, now),
            "latency_frames": _latency(run, steering, num_frames_out),
        })  # fmt: skip

    def _rate(self, num_frames_out: int, now: float) -> float | None:
        if self._first_frames is None or num_frames_out == self._first_frames[0]:
            return None
        return (num_frames_out - self._first_frames[0]) / (now - self._first_frames[1])


def _latency(run: VideoRun, steering: Steering, num_frames_out: int) -> int | None:
    if not run.is_between_ticks:
        return None
    change = steering.change_of(Ask("any"))
    return None if change is None else change.frame - num_frames_out
