"""Is memory flat in the length, and when do the first frames leave? `python bench/bench_memory.py [--latents N]`.

One run of the engine, self-reflection and streamed decoding included, with narrowed networks of random weights, so that
10,000 latent frames take minutes; `--tiny FRAMES` runs the embedded model over that many video frames instead, and
`--model FOLDER` any other as it is (`--preset`, `--height`, `--width` and `--steps` where its defaults are too large;
searches of self-reflection take most of the time where weights are random). Prints
at several lengths the most that was resident in the process (on a GPU: in torch's allocator) and what was in use, then
the peak by quarters of the run, its growth, and the share of all network forwards done when the first frame left. Rows
are appended to bench/results/memory_<device>.csv.

Resident memory is the engine's and the allocator's: glibc keeps freed memory back, by some per cent and by chance.
What is in use (`mallinfo2`: every block handed out and not freed) tells whether the engine itself is flat;
`MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=65536` in the environment makes resident memory follow it.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import result_files
import torch
from engine_runs import random_transformer

from miga_engine import Engine
from miga_engine.models.wan.vae import WanVAE
from miga_engine.presets import PRESETS
from miga_engine.runtime.denoise import Denoiser, Window

LENGTHS = (200, 500, 1000, 5000, 10_000)
COLUMNS = (
    "model", "latent_frames", "peak_mib", "in_use_mib", "allocator", "allocated_mib", "reserved_mib", "x_1000",
    *result_files.ENVIRONMENT,
)  # fmt: skip
PROMPT = "a red balloon over snowy hills at dawn"


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    )


def in_use_mib() -> float | None:
    """Memory of this process that malloc has handed out; None where glibc (2.33 or newer) is not there to ask."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20


def narrowed(engine: Engine) -> Engine:
    """The embedded model's engine around networks of its shapes, but narrow, one block deep and with random weights."""
    bundle, device = engine.bundle, engine.device
    torch.manual_seed(0)
    config = dataclasses.replace(bundle.transformer.config, dim=32, ffn_dim=32, freq_dim=32, num_heads=1, num_layers=1)
    with torch.device(device):
        vae = WanVAE(dataclasses.replace(bundle.vae.config, dim=4, num_res_blocks=1)).eval().requires_grad_(False)
    transformer = random_transformer(config, device.type, bundle.dtype)
    parts = dataclasses.replace(bundle, transformer=transformer, vae=vae.to(device))
    return Engine(parts, engine.preset, name="narrow", device=device)


def _sizes(device: str) -> dict[str, float | None]:
    """MiB: the peak so far, and what is in use now."""
    if device == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        torch_sizes = {"allocated_mib": allocated / 2**20, "reserved_mib": reserved / 2**20}
    else:
        torch_sizes = {}
    return {"peak_mib": result_files.peak_resident_mib(), "in_use_mib": in_use_mib(), **torch_sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=max(LENGTHS), help="latent frames, but of the embedded model")
    parser.add_argument("--tiny", type=int, metavar="FRAMES", help="the embedded model, over this many video frames")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the model in this folder")
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    engine = Engine.from_pretrained(options.model or "tiny", options.device, preset=options.preset)
    if options.tiny is None:
        engine = engine if options.model else narrowed(engine)
        num_frames = engine.bundle.num_video_frames(options.latents)
    else:
        num_frames = options.tiny
    ratio = engine.bundle.frame_ratio
    total = engine.bundle.num_latent_frames(num_frames)
    forwards = 0

    forward_all = Denoiser._forward_all

    def counted(denoiser: Denoiser, windows: Sequence[Window]) -> None:
        """Windows, and not calls of the network, which a captured graph does without."""
        nonlocal forwards
        forwards += len(windows)
        forward_all(denoiser, windows)

    lengths = sorted({*(length for length in LENGTHS if length < total), total})
    measured: dict[int, dict[str, float | None]] = {}
    quarters: dict[int, float] = {}
    out = first_at = searches = 0

    def on_event(event: object) -> None:
        nonlocal searches
        searches += event.kind == "search_started"

    sizes = {"height": options.height, "width": options.width, "num_inference_steps": options.steps}
    # One window at a time, and not what the free memory of a GPU allows: the shortest passes, and one peak everywhere.
    miga = dataclasses.replace(engine.preset.miga, window_batch=1)
    model = f"{Path(engine.name).name} {options.preset or ''}".strip()
    reference: float | None = None
    with mock.patch.object(Denoiser, "_forward_all", counted):
        for chunk in engine.stream(PROMPT, num_frames, on_event=on_event, miga=miga, **sizes):
            first_at = first_at or forwards
            out += len(chunk.frames)
            latents = (out - 1) // ratio + 1
            quarter = min(3, (latents - 1) * 4 // total)
            now = torch.cuda.memory_allocated() / 2**20 if options.device == "cuda" else result_files.resident_mib()
            quarters[quarter] = max(quarters.get(quarter, 0.0), now)
            for length in lengths:
                if length not in measured and latents >= length:
                    measured[length] = _sizes(options.device)
                    if length == 1000 or length == total < 1000:
                        reference = measured[length][_key(options.device)]
                    _report(model, options.device, length, measured[length], reference)
    for quarter, peak in sorted(quarters.items()):
        print(f"latent frames to {(quarter + 1) * total // 4:>6}: at most {peak:7.1f} MiB")
    print(f"growth after the first quarter: {100 * (max(quarters.values()) / quarters[min(quarters)] - 1):.2f} %")
    print(f"first frames after {first_at} of {forwards} forwards: {100 * first_at / forwards:.1f} % of the work")
    print(f"{searches} searches of self-reflection")


def _key(device: str) -> str:
    return "allocated_mib" if device == "cuda" else "peak_mib"


def _report(model: str, device: str, length: int, sizes: dict[str, float | None], reference: float | None) -> None:
    """Print and append the row of a length as soon as it is reached; reference: the peak at 1,000, once it is known."""
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    row: dict[str, object] = {"model": model, "latent_frames": length, "allocator": " ".join(settings)}
    row |= {name: "" if size is None else f"{size:.2f}" for name, size in sizes.items()}
    key = _key(device)
    if reference is not None:
        row["x_1000"] = f"{(sizes[key] or 0) / reference:.4f}"
    result_files.record(f"memory_{device}", COLUMNS, [row], device)
    in_use = f", {row['in_use_mib']} MiB in use" if row["in_use_mib"] else ""
    ratio = f", {row['x_1000']} of that at 1,000" if reference is not None else ""
    print(f"{length:>6} latent frames: peak {row[key]} MiB{in_use}{ratio}", flush=True)


if __name__ == "__main__":
    main()
