"""What each exact saving gains, and what it changes: `python bench/bench_savings.py`.

The transformer with all savings against itself with one switched off, in turns, on a Stage-1 window of the embedded
model (on a GPU also of Wan2.1 1.3B with random weights): both guidance branches, half of the frames, a short prompt.
Rows go to bench/results/savings_<device>.csv; `error` is the relative L2 distance of the two outputs.
"""

from __future__ import annotations

import csv

import result_files
import timing
import torch

from miga_engine import Engine
from miga_engine.models.wan.dit import WAN_T2V_CONFIGS, WanDiT

SAVINGS = ("shares_branches", "skips_frames", "collapses_padding", "levels once")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(name: str, model: WanDiT, latents: torch.Tensor, context: torch.Tensor, keep: torch.Tensor) -> None:
    """Print and append a row for each saving."""
    windows, _, frames = latents.shape[:3]
    timesteps = torch.linspace(999, 20, frames, device=DEVICE)
    steps = torch.arange(frames, device=DEVICE).expand(windows, frames).contiguous()
    rows = torch.tensor([1] * windows + [0] * windows, device=DEVICE)
    levels = model.encode_timesteps(timesteps)
    cache = model.encode_context(context)
    model.collapses_padding = False
    whole_cache = model.encode_context(context)
    model.collapses_padding = True

    def run(without: str | None = None) -> torch.Tensor:
        if without in ("shares_branches", "skips_frames"):
            setattr(model, without, False)
        text = whole_cache if without == "collapses_padding" else cache
        times = timesteps.expand(windows, frames) if without == "levels once" else (levels, steps)
        output = model(latents, times, text, rows, keep=keep)
        if without in ("shares_branches", "skips_frames"):
            setattr(model, without, True)
        return output

    samples = timing.interleave({"all": run, **{s: (lambda s=s: run(s)) for s in SAVINGS}}, DEVICE, repeats=15)
    fastest = timing.best(samples["all"], DEVICE)
    result = run()
    path = result_files.RESULTS / f"savings_{DEVICE}.csv"
    columns = ["model", "saving", "gain", "error", "ms", *result_files.environment(DEVICE)]
    is_new = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for saving in SAVINGS:
            other = run(saving)
            error = ((other - result).norm() / result.norm()).item()
            gain = timing.best(samples[saving], DEVICE) / fastest
            print(f"{name:12} {saving:18} {gain:6.3f} times faster with it, relative L2 difference {error:.1e}")
            row = {
                "model": name,
                "saving": saving,
                "gain": f"{gain:.3f}",
                "error": f"{error:.2e}",
                "ms": f"{fastest:.4g}",
            }
            writer.writerow(row | result_files.environment(DEVICE))


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine.from_pretrained("tiny", DEVICE, dtype)
        context = engine.bundle.encode_prompts(["", "a red balloon over snowy hills at dawn"])
        latents = torch.randn(1, 16, 13, 8, 12, device=DEVICE).to(dtype)
        name = f"tiny {str(dtype).removeprefix('torch.')}"
        compare(name, engine.bundle.transformer, latents, context, torch.arange(7, device=DEVICE)[None])
    if DEVICE == "cuda":
        with torch.device("cuda"):
            model = WanDiT(WAN_T2V_CONFIGS["1.3B"]).to(torch.bfloat16).requires_grad_(False)
        context = torch.zeros(2, 512, 4096, device="cuda")
        context[:, :64] = torch.randn(2, 64, 4096, device="cuda")
        latents = torch.randn(1, 16, 21, 60, 104, device="cuda").to(torch.bfloat16)
        compare("1.3B bfloat16", model, latents, context, torch.arange(10, device="cuda")[None])


if __name__ == "__main__":
    main()
