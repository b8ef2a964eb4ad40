"""Reading weights: `load_transformer` against safetensors' `load_file` and a plain read: `python bench/bench_load.py`.

A folder in the official layout with random float32 weights (two blocks of Wan2.1 1.3B, 0.5 GB) is written to
bench/tmp, read in turns and removed; the operating system holds the file in memory all along, so that no disk is
measured. The rival, `eager`, is what is written by hand: a module without initialisation, cast, then
`load_state_dict(load_file(path))`, on a GPU with `assign=True` and the tensors read to the device. The ceiling is a
read of the whole file into new memory (on a GPU: into pinned memory that exists, and over the link from there); who
casts to half the bytes allocates less than that. Rows go to bench/results/load_<device>.csv, by dtype of the module.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import timing
import torch
from engine_runs import random_transformer
from safetensors.torch import load_file, save_file

from miga_engine.models import load_transformer
from miga_engine.models.wan.dit import WAN_T2V_CONFIGS, WanDiT, WanDiTConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FOLDER = Path(__file__).parent / "tmp"


def write_folder(folder: Path, config: WanDiTConfig) -> Path:
    """An official transformer folder; its weights file."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file(random_transformer(config, "cpu", torch.float32).state_dict(), weights)
    sizes = dataclasses.asdict(config)
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v", **sizes}))
    return weights


def by_hand(weights: Path, config: WanDiTConfig, dtype: torch.dtype) -> WanDiT:
    with torch.device("meta"):
        module = WanDiT(config)
    if DEVICE == "cuda":
        tensors = load_file(weights, device=DEVICE)
        module.load_state_dict(tensors, assign=True)
        for name, parameter in module.named_parameters():
            if not WanDiT.keeps_fp32(name):
                parameter.data = parameter.data.to(dtype)
        return module
    for name, parameter in module.named_parameters():
        if not WanDiT.keeps_fp32(name):
            parameter.data = parameter.data.to(dtype)
    module.to_empty(device=DEVICE)
    module.load_state_dict(load_file(weights))  # maps the file; here the data is read
    return module


def plain_read(weights: Path) -> Callable[[], torch.Tensor]:
    size = weights.stat().st_size
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True) if DEVICE == "cuda" else None

    def read() -> torch.Tensor:
        host = torch.empty(size, dtype=torch.uint8) if pinned is None else pinned
        with weights.open("rb", buffering=0) as stream:
            view = memoryview(host.numpy())
            while count := stream.readinto(view):
                view = view[count:]
        return host if pinned is None else host.to(DEVICE, non_blocking=True)

    return read


def compare(folder: Path, weights: Path, config: WanDiTConfig, dtype: torch.dtype, repeats: int) -> None:
    def load() -> WanDiT:
        return load_transformer(folder, DEVICE, dtype)

    expected, rival = load().state_dict(), by_hand(weights, config, dtype).state_dict()
    for name, tensor in expected.items():
        assert tensor.dtype == rival[name].dtype, f"{name}: {tensor.dtype} and {rival[name].dtype}: nothing is measured"
        assert torch.equal(tensor, rival[name]), f"{name} differs between the two ways to load: nothing is measured"
    del expected, rival
    gc.collect()
    contenders = {"op": load, "eager": lambda: by_hand(weights, config, dtype), "read": plain_read(weights)}
    samples = timing.interleave(contenders, DEVICE, repeats)
    size = weights.stat().st_size
    ceiling = size / timing.best(samples["read"], DEVICE) / 1e6
    rows = timing.append(
        f"load_{DEVICE}", "load_transformer", f"{size >> 20} MiB", dtype, samples, DEVICE,
        num_bytes=size, ceiling=ceiling,
    )  # fmt: skip
    for row in rows:
        print(
            f"{row['op']} {row['shape']} to {row['dtype']:9} {row['implementation']:6} {row['min_ms']:>6} ms "
            f"{row['rate']:>6} GB/s, {row['of_ceiling']} of a plain read, {row['x_eager']} times faster than load_file"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="of 1.3B, 0.19 GB each beside 0.1 GB")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    config = dataclasses.replace(WAN_T2V_CONFIGS["1.3B"], num_layers=options.blocks)
    shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        weights = write_folder(FOLDER / "transformer", config)
        for dtype in (torch.float32, torch.bfloat16):
            compare(FOLDER, weights, config, dtype, options.repeats)
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
