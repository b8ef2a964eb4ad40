"""Weights as people have them, in small: a ComfyUI folder, GGUF and fp8 files with LoRAs, and the commands on them."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import gguf
import places
import pytest
import random_wan
import sentencepiece
import small_run
import torch
from safetensors.torch import load_file, save_file
from small_run import miga

NUM_FRAMES = 61
EXTRA = json.dumps({"window_frames": 5, "default_negative_prompt": "blurry"})
WORDS = (
    *("a", "red", "balloon", "blue", "kite", "plane", "at", "night", "over", "the", "hills", "blurry", "sea", "storm"),
    *("wind", "cloud", "tree", "house", "river"),
)
KILLED = """
import sys, kills
from miga_engine.cli import main
kills._signal_in_session(kills.Plan("state", 3, "replaced"))
sys.exit(main(sys.argv[1:]))
"""


def spiece() -> torch.Tensor:
    """A SentencePiece model with umt5's ids, as small as the small text encoder's table, as ComfyUI's file holds it."""
    rng, out = random.Random(0), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choices(WORDS, k=8)) for _ in range(800)), model_writer=out,
        model_type="unigram", vocab_size=320, byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    assert sentencepiece.SentencePieceProcessor(model_proto=out.getvalue()).get_piece_size() <= 384
    return torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8)


def build_comfy(folder: Path) -> Path:
    """A ComfyUI folder whose text encoder holds its tokenizer."""
    random_wan.comfy(folder)
    file = folder / "models" / "text_encoders" / "umt5_xxl_fp16.safetensors"
    save_file({**load_file(file), "spiece_model": spiece()}, file)
    (folder / "miga.json").write_text(EXTRA)
    return folder


def write_gguf(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Matrices in Q8_0, all else in F32."""
    writer = gguf.GGUFWriter(path, "wan")
    kinds = gguf.GGMLQuantizationType
    for key, value in tensors.items():
        kind = kinds.Q8_0 if value.ndim == 2 else kinds.F32
        writer.add_tensor(key, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_lora(path: Path, seed: int, rank: int = 4) -> Path:
    generator = torch.Generator().manual_seed(seed)
    dim, tensors = random_wan.CONFIG.dim, {}
    for block in range(random_wan.CONFIG.num_layers):
        for layer in ("self_attn.q", "self_attn.o", "cross_attn.v"):
            name = f"diffusion_model.blocks.{block}.{layer}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, dim, generator=generator) / 8
            tensors[f"{name}.lora_B.weight"] = torch.randn(dim, rank, generator=generator) / 8
    save_file(tensors, path)
    return path


def build_parts(folder: Path) -> Path:
    """Files from here and there: a transformer in GGUF, a text encoder in scaled fp8, two LoRAs."""
    folder.mkdir()
    write_gguf(gguf_of(folder), random_wan.transformer())
    text = random_wan.scaled_fp8(random_wan.text_encoder("hf"))
    save_file({key: value.contiguous() for key, value in text.items()}, folder / "umt5_fp8_scaled.safetensors")
    save_file(random_wan.vae(), folder / "wan_2.1_vae.safetensors")
    shutil.copy(random_wan.TOKENIZER, folder)
    for seed, name in enumerate(("style", "other")):
        write_lora(folder / f"{name}.safetensors", seed)
    (folder / "miga.json").write_text(EXTRA)
    return folder


def gguf_of(parts: Path) -> Path:
    return parts / "wan2.1-t2v-Q8_0.gguf"


def flags(parts: Path, lora: str | None = ":0.7") -> list[object]:
    """Where the parts are beside the transformer; `lora` is what stands behind the name of the LoRA, None for none."""
    named: list[object] = ["--text-encoder", parts / "umt5_fp8_scaled.safetensors"]
    named += ["--vae", parts / "wan_2.1_vae.safetensors", "--tokenizer", parts / "tokenizer.json"]
    return [*named, "--lora", f"{parts / 'style.safetensors'}{lora}"] if lora is not None else named


def generate(model: object, video: object, *more: object) -> list[object]:
    """Arguments of `miga generate` for a video of `NUM_FRAMES`."""
    return small_run.generate(model, video, NUM_FRAMES, *more)  # type: ignore[arg-type]


def kill(*arguments: object) -> None:
    """The command in a process of its own, which is killed at its third saving."""
    paths = os.pathsep.join(map(str, (places.TESTS, places.ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments), "--checkpoint-every", "8"],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


def told(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """What the command says, with this exit code: one sentence where that is 2."""
    capsys.readouterr()
    assert miga(*arguments) == code
    said = capsys.readouterr()
    assert code != 2 or (said.err.startswith("miga: ") and said.err.count("\n") == 1), said.err
    return said.err if code else said.out


def content(folder: Path) -> dict[str, bytes]:
    """Files by name, without locks."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".lock")
    return {path.name: path.read_bytes() for path in files}
