"""What presets of Wan's family need on a GPU at their own sizes, as `miga estimate` counts it; no GPU, no weights.

`python bench/bench_estimates.py` prints the table of docs/models.md. Each model is a folder of its makers' layout whose
safetensors have true names and shapes and no content: files with holes, of which no byte is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from miga_engine import Engine
from miga_engine.models.wan.dit import WAN22_TI2V_5B, WAN_T2V_CONFIGS, WanDiT, WanDiTConfig
from miga_engine.models.wan.umt5 import UMT5Config, UMT5Encoder
from miga_engine.models.wan.vae import WAN22_VAE, WanVAE, WanVAEConfig

TOKENIZER = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "umt5" / "tokenizer" / "tokenizer.json"
UMT5_XXL = UMT5Config(
    vocab_size=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24, num_buckets=32
)
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
SMALL, LARGE = WAN_T2V_CONFIGS["1.3B"], WAN_T2V_CONFIGS["14B"]


SHARD = 5 * 10**9
"""Bytes of a file at most: one that is longer than a machine's memory is not mapped everywhere."""


def hollow(file: Path, network: nn.Module, dtype: torch.dtype) -> None:
    """Safetensors of a network's names and shapes, as long as they would be, of which only the headers are there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shards: list[tuple[dict[str, object], int]] = [({}, 0)]
    for name, tensor in network.state_dict().items():
        size = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1][1] + size > SHARD:
            shards.append(({}, 0))
        entries, start = shards[-1]
        entries[name] = {"dtype": TYPES[dtype], "shape": list(tensor.shape), "data_offsets": [start, start + size]}
        shards[-1] = entries, start + size
    for number, (entries, size) in enumerate(shards, 1):
        header = json.dumps(entries).encode()
        whole = file.with_name(f"{file.stem}-{number:05}-of-{len(shards):05}.safetensors") if len(shards) > 1 else file
        with whole.open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            out.truncate(8 + len(header) + size)


def model(folder: Path, config: WanDiTConfig, vae: WanVAEConfig, networks: tuple[str, ...] = ("",)) -> Path:
    """The official folder of a model."""
    sizes = dataclasses.asdict(config)
    if not config.inject_sample_info:
        del sizes["inject_sample_info"]
    with torch.device("meta"):
        for name in networks:
            hollow(folder / name / "diffusion_pytorch_model.safetensors", WanDiT(config), torch.bfloat16)
            (folder / name / "config.json").write_text(json.dumps({"_class_name": "WanModel", **sizes}))
        name = "Wan2.2_VAE.safetensors" if vae.is_residual else "Wan2.1_VAE.safetensors"
        hollow(folder / name, WanVAE(vae), torch.float32)
        hollow(folder / "models_t5_umt5-xxl-enc-bf16.safetensors", UMT5Encoder(UMT5_XXL), torch.bfloat16)
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    shutil.copy(TOKENIZER, folder / "google" / "umt5-xxl")
    return folder


SKYREELS = dataclasses.replace(SMALL, inject_sample_info=True)
EXPERTS = ("high_noise_model", "low_noise_model")
CASES: Mapping[str, tuple[str, WanDiTConfig, WanVAEConfig, tuple[str, ...], dict[str, object]]] = {
    "Wan2.1 1.3B": ("wan2.1-ours", SMALL, WanVAEConfig(), ("",), {}),
    "Wan2.1 1.3B in 4 steps": ("wan2.1-4step", SMALL, WanVAEConfig(), ("",), {}),
    "Rolling Forcing": ("wan2.1-rolling", SMALL, WanVAEConfig(), ("",), {}),
    "Wan2.1 14B": ("wan2.1-ours", LARGE, WanVAEConfig(), ("",), {}),
    "Pusa": ("pusa", LARGE, WanVAEConfig(), ("",), {}),
    "SkyReels-V2-DF 1.3B": ("skyreels-v2-df", SKYREELS, WanVAEConfig(), ("",), {}),
    "SkyReels-V2-DF 14B": ("skyreels-v2-df", LARGE, WanVAEConfig(), ("",), {}),
    "Wan2.2 TI2V-5B": ("wan2.2-ti2v-5b", WAN22_TI2V_5B, WAN22_VAE, ("",), {}),
    "Wan2.2 T2V-A14B": ("wan2.2-t2v-a14b", LARGE, WanVAEConfig(), EXPERTS, {}),
    "Wan2.2 T2V-A14B, --experts swap": ("wan2.2-t2v-a14b", LARGE, WanVAEConfig(), EXPERTS, {"experts": "swap"}),
}
"""By the name of the model: preset, sizes, folders of its networks, options of loading."""


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def row(name: str) -> str:
    """A line of the table: bfloat16, one window at a time, both branches together."""
    preset, config, vae, networks, options = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = model(Path(folder) / name.replace(" ", "-"), config, vae, networks)
        found = Engine.estimate(str(path), "cuda", preset=preset, window_batch=1, **options)
    weights = sum(size for part, size in found.resident.items() if part.endswith("weights"))
    rings, forward = found.resident["rings of latent frames"], found.peaks["forward, with decoding beside it"]
    cells = (name, f"`{preset}`", gib(weights), gib(rings), gib(forward), gib(found.peaks["encoding prompts"]))
    return f"| {' | '.join(cells)} | {gib(found.device_total)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=CASES, metavar="NAME", help=", ".join(CASES))
    options = parser.parse_args()
    print("| model | preset | weights | ring | a forward, decoding beside it | encoding prompts | in all |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name in options.models:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
