"""Is memory flat in the length, and when do the first frames leave? `python bench/bench_memory.py [FRAMES]`.

Prints the process's resident memory along a run of the embedded model, its growth between a quarter of the run and the
end, and the share of all network forwards that had been done when the first frame left. glibc keeps freed memory back,
by some per cent and by chance; `MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=65536` in the environment takes that out.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from miga_engine import Engine


def resident_mib() -> float:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", nargs="?", type=int, default=2000)
    num_frames = parser.parse_args().frames
    engine = Engine.from_pretrained("tiny")
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    engine.bundle.transformer.register_forward_hook(count)
    out, first_at, peaks = 0, 0, {}
    for chunk in engine.stream("a red balloon over snowy hills at dawn", num_frames):
        first_at = first_at or forwards
        out += len(chunk.frames)
        bucket = (out - 1) * 4 // num_frames
        peaks[bucket] = max(peaks.get(bucket, 0.0), resident_mib())
    for bucket, peak in sorted(peaks.items()):
        print(f"frames to {min(num_frames, (bucket + 1) * num_frames // 4):>6}: peak {peak:7.1f} MiB")
    print(f"growth after frame {num_frames // 4}: {100 * (max(peaks.values()) / peaks[0] - 1):.2f} %")
    print(f"first frames after {first_at} of {forwards} forwards: {100 * first_at / forwards:.1f} % of the work")


if __name__ == "__main__":
    main()
