"""A long run on `tiny`, killed half-way and resumed: memory over time, the file, the frame count.

    python bench/soak.py --num-frames 20000 --folder out/soak

Appends one row to bench/results/soak_cpu.csv and draws docs/soak.png.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import result_files

from miga_engine.video.contact_sheet import ContactSheet
from miga_engine.video.reading import opened_video

PROMPT = "a red balloon over snowy hills at dawn"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-frames", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=Path("out/soak"))
    parser.add_argument("--picture", type=Path, default=Path("docs/soak.png"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    video, events = options.folder / "soak.mp4", options.folder / "soak.jsonl"
    session = options.folder / "soak.session.safetensors"
    started = time.perf_counter()
    command = [sys.executable, "-m", "miga_engine"]
    output = ["-q", "--events", str(events), "--checkpoint-every", "500"]
    generate = [*command, "generate", PROMPT, "--num-frames", str(options.num_frames), "-o", str(video), "-y", *output]
    before = watch(generate, events, kill_at=options.num_frames // 2)
    made = frames_out(events)
    after = watch([*command, "resume", str(session), *output], events)
    seconds = time.perf_counter() - started
    row = {
        "frames": options.num_frames,
        "killed_at": made,
        "decoded_frames": draw(video, options.picture, options.num_frames),
        "seconds": round(seconds),
        **drift(events, options.num_frames),
        **{
            f"{part}_{name}": value
            for part, sizes in (("before", before), ("after", after))
            for name, value in growth(sizes)
        },
    }
    print(row)
    result_files.record("soak_cpu", [*row, *result_files.environment("cpu")], [row], "cpu")
    return 0 if row["decoded_frames"] == options.num_frames else 1


def watch(command: list[str], events: Path, kill_at: int | None = None) -> list[float]:
    """Resident MiB of the process, once a second, until it ends or is killed."""
    process = subprocess.Popen(command)
    sizes = []
    while process.poll() is None:
        sizes.append(result_files.resident_mib(process.pid))
        if kill_at is not None and frames_out(events) >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(1)
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), process.returncode
    return sizes


def drift(events: Path, num_frames: int) -> dict[str, float]:
    """How far colours have moved (`runtime.drift`): means over the first and the last fifth of the video, and most."""
    lines = [json.loads(line) for line in events.read_text().splitlines() if '"event": "drift"' in line]
    starts, values = (np.array([line[key] for line in lines]) for key in ("first_frame", "drift"))
    fifth = num_frames // 5
    return {
        "drift_first_fifth": round(float(values[starts < fifth].mean()), 4),
        "drift_last_fifth": round(float(values[starts >= num_frames - fifth].mean()), 4),
        "drift_most": round(float(values.max()), 4),
    }


def frames_out(events: Path) -> int:
    """Frames given out by the last chunk event."""
    if not events.exists():
        return 0
    with events.open("rb") as file:
        file.seek(max(0, events.stat().st_size - 4096))
        chunks = [line for line in file.read().split(b"\n")[1:-1] if b'"event": "chunk"' in line]
    last = json.loads(chunks[-1]) if chunks else {"first_frame": 0, "num_frames": 0}
    return last["first_frame"] + last["num_frames"]


def growth(sizes: list[float]) -> list[tuple[str, float]]:
    """(mean MiB in the second and in the last tenth of the time, change in per cent)."""
    tenth = max(1, len(sizes) // 10)
    early, late = np.mean(sizes[tenth : 2 * tenth]), np.mean(sizes[-tenth:])
    return [
        ("early_mib", round(float(early), 1)),
        ("late_mib", round(float(late), 1)),
        ("growth_pct", round(float(100 * (late / early - 1)), 2)),
    ]


def draw(video: Path, picture: Path, num_frames: int) -> int:
    """Frames evenly over the whole file in one picture; the number of frames that decode."""
    count = 0
    sheet = ContactSheet(num_tiles=24, num_columns=8, num_frames=num_frames)
    with opened_video(video) as opened:
        for frame in opened.frames:
            sheet.add(frame[None])
            count += 1
    sheet.save(picture)
    return count


if __name__ == "__main__":
    sys.exit(main())
