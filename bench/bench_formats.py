"""Loading the formats that people have, beside a plain read of the same file: `python bench/bench_formats.py`.

A random transformer (two blocks of Wan2.1 1.3B) is written to bench/tmp as bfloat16, in scaled fp8 (one scale a matrix,
and int8 with one a row), as GGUF (Q8_0, and Q4_K of random blocks), and as bfloat16 with a LoRA of rank 64 on every
matrix; each is loaded as bfloat16 in turns with a read of the whole file into new memory. The rate is bytes of the file
a second. The note of a row is about memory: bytes of the process that are not pages of files, at their peak while a
process of its own loads, above those before; beside the bytes of the loaded network and of its largest tensor in
float32. Rows go to bench/results/formats_<device>.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import timing
import torch
from bench_load import FOLDER, plain_read
from engine_runs import random_transformer
from safetensors.torch import save_file
from torch import Tensor

from miga_engine.models import load_transformer
from miga_engine.models.wan.dit import WAN_T2V_CONFIGS, WanDiTConfig

RANK = 64
Tensors = Mapping[str, Tensor]


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight")


def write_scaled(file: Path, tensors: Tensors, dtype: torch.dtype, by_row: bool) -> None:
    """Matrices in eight bits, with X.weight_scale a row or X.scale_weight in all."""
    most, stored = (448 if dtype is torch.float8_e4m3fn else 127), {}
    for name, tensor in tensors.items():
        stored[name] = tensor
        if is_matrix(name, tensor):
            scale = (tensor.float().abs().amax(1, keepdim=True) if by_row else tensor.float().abs().max()) / most
            scaled = tensor.float() / scale
            stored[name] = (scaled.round() if dtype is torch.int8 else scaled).to(dtype)
            stored[name.removesuffix("weight") + ("weight_scale" if by_row else "scale_weight")] = scale
    save_file(stored, file)


def write_gguf(file: Path, tensors: Tensors, kind: gguf.GGMLQuantizationType) -> None:
    """Matrices in Q8_0; for a kind that cannot be written here, blocks of random bytes with finite scales."""
    writer, rng = gguf.GGUFWriter(file, "wan"), np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for name, tensor in tensors.items():
        if not is_matrix(name, tensor):
            writer.add_tensor(name, tensor.float().numpy())
        elif kind == gguf.GGMLQuantizationType.Q8_0:
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        else:
            rows, columns = tensor.shape
            blocks = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
            blocks[..., :4] = np.array([1e-3, 1e-3], np.float16).view(np.uint8)
            writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_lora(file: Path, tensors: Tensors) -> None:
    pairs = {}
    for name, tensor in tensors.items():
        if is_matrix(name, tensor):
            module = "diffusion_model." + name.removesuffix(".weight")
            pairs[f"{module}.lora_A.weight"] = torch.randn(RANK, tensor.shape[1]).bfloat16() / RANK
            pairs[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], RANK).bfloat16() / RANK
    save_file(pairs, file)


def write_forms(folder: Path, config: WanDiTConfig) -> dict[str, tuple[Path, Path | None]]:
    """(weights file, LoRA) by the name of the form."""
    torch.manual_seed(0)
    tensors = {
        name: tensor.detach() for name, tensor in random_transformer(config, "cpu", torch.bfloat16).state_dict().items()
    }
    folder.mkdir(parents=True)
    sizes = dataclasses.asdict(config)
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v", **sizes}))
    save_file(tensors, folder / "bf16.safetensors")
    write_scaled(folder / "fp8.safetensors", tensors, torch.float8_e4m3fn, by_row=False)
    write_scaled(folder / "int8.safetensors", tensors, torch.int8, by_row=True)
    write_gguf(folder / "Q8_0.gguf", tensors, gguf.GGMLQuantizationType.Q8_0)
    write_gguf(folder / "Q4_K.gguf", tensors, gguf.GGMLQuantizationType.Q4_K)
    write_lora(folder / "lora.safetensors", tensors)
    forms: dict[str, tuple[Path, Path | None]] = {
        "bfloat16": (folder / "bf16.safetensors", None),
        "scaled fp8": (folder / "fp8.safetensors", None),
        "int8 by row": (folder / "int8.safetensors", None),
        "GGUF Q8_0": (folder / "Q8_0.gguf", None),
        "GGUF Q4_K": (folder / "Q4_K.gguf", None),
        f"bfloat16 + LoRA {RANK}": (folder / "bf16.safetensors", folder / "lora.safetensors"),
    }
    return forms


def loading(file: Path, lora: Path | None) -> Callable[[], torch.nn.Module]:
    return lambda: load_transformer(file, "cpu", torch.bfloat16, loras=[] if lora is None else [(lora, 1.0)])


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:"))) * 1024


def measure_peak(file: Path, lora: Path | None) -> None:
    """In a process of its own: prints bytes at the peak above those before, of the network, of its largest tensor."""
    torch.set_num_threads(1)
    load_transformer(file, "meta", torch.bfloat16)  # what the libraries hold for good is there
    torch.ones(2048, 2048).addmm_(torch.ones(2048, 64), torch.ones(64, 2048))
    if file.suffix == ".gguf":
        gguf.quants.dequantize(np.zeros((1, 34), np.uint8), gguf.GGMLQuantizationType.Q8_0)
    gc.collect()
    before, most, is_done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_done.is_set():
            most = max(most, anonymous_bytes())
            time.sleep(2e-4)

    thread = threading.Thread(target=watch)
    thread.start()
    network = loading(file, lora)()
    is_done.set()
    thread.join()
    parameters = list(network.parameters())
    print(most - before, sum(p.nbytes for p in parameters), max(4 * p.numel() for p in parameters))


def compare(name: str, file: Path, lora: Path | None, repeats: int) -> None:
    samples = timing.interleave({"op": loading(file, lora), "read": plain_read(file)}, "cpu", repeats)
    arguments = [sys.executable, __file__, "--peak", str(file), *([] if lora is None else [str(lora)])]
    told = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
    peak, loaded, largest = (int(number) / 2**20 for number in told)
    size = file.stat().st_size + (0 if lora is None else lora.stat().st_size)
    note = f"{peak:.0f} MiB at the peak, {loaded:.0f} loaded, {largest:.0f} the largest tensor"
    ceiling = file.stat().st_size / timing.best(samples["read"], "cpu") / 1e6
    rows = timing.append(
        "formats_cpu", "load_transformer", name, torch.bfloat16, samples, "cpu", num_bytes=size, ceiling=ceiling,
        notes={"op": note},
    )  # fmt: skip
    row = rows[0]
    print(
        f"{name:20} {size >> 20:4} MiB {row['min_ms']:>7} ms {row['rate']:>6} GB/s, {row['of_ceiling']} of "
        f"a read; {note}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="of 1.3B")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", nargs="+", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        measure_peak(options.peak[0], options.peak[1] if len(options.peak) > 1 else None)
        return
    torch.set_num_threads(1)
    config = dataclasses.replace(WAN_T2V_CONFIGS["1.3B"], num_layers=options.blocks)
    shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        for name, (file, lora) in write_forms(FOLDER / "forms", config).items():
            compare(name, file, lora, options.repeats)
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
