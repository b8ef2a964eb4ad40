"""Formats of weights, each written in small, loaded, and compared with what it was made of."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import random_wan
import torch
from golden_model import GOLDENS
from safetensors.torch import save_file
from test_gguf import Kind, quantised, random_blocks, write
from torch import Tensor
from wan_names import diffusers_name

from miga_engine import Engine
from miga_engine.errors import CheckpointError
from miga_engine.models import load_text_encoder, load_tokenizer, load_transformer, load_vae
from miga_engine.models.wan.spiece import spiece_of_gguf

Tensors = dict[str, Tensor]
Round = Callable[[Tensor], Tensor]

EQUAL = "loads, equal to the plain form"
DEQUANTISED = "loads, equal to the dequantised values"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOKENS = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
VOCABULARY = {
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": [-float(i) for i in range(len(TOKENS))],
    "tokenizer.ggml.token_type": [3, 3, 2] + [1] * (len(TOKENS) - 3),
}


class Case(NamedTuple):
    """A row: what a file is, who writes such files, and what tries it in an empty folder and says what came of it."""

    format: str
    writer: str
    tries: Callable[[Path], str]


@functools.cache
def plain(part: str) -> Tensors:
    """The part of the random Wan under the engine's own names."""
    if part == "transformer":
        return random_wan.transformer()
    load, goldens = (load_vae, "wan_vae") if part == "vae" else (load_text_encoder, "umt5")
    file = random_wan.VAE if part == "vae" else "models_t5_tiny.safetensors"
    return dict(load(GOLDENS / goldens / "official" / file).state_dict())


@functools.cache
def hf() -> Tensors:
    return random_wan.text_encoder("hf")


LOADS: dict[str, Callable[..., Any]] = {
    "transformer": load_transformer,
    "vae": load_vae,
    "text_encoder": load_text_encoder,
}


def check(network: torch.nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Raise AssertionError where a network holds anything but these values."""
    state = network.state_dict()
    wrong = [key for key, value in expected.items() if not torch.equal(state[key], value.to(state[key].dtype))]
    if state.keys() != expected.keys() or wrong:
        raise AssertionError(f"{wrong or state.keys() ^ expected.keys()} differ from what was written")


def equal(path: Path, part: str, rounded: Round = torch.clone, says: str = EQUAL) -> str:
    """Load a part in float32 and compare it with the plain form, rounded as its file is."""
    check(LOADS[part](path, dtype=torch.float32), {key: rounded(value).float() for key, value in plain(part).items()})
    return says


def refused(path: Path, load: Callable[..., object] = load_transformer) -> str:
    try:
        load(path)
    except CheckpointError as error:
        return "refused: it " + re.split("[:;]", re.sub(r"^/\S+ ", "", str(error)))[0]
    raise AssertionError(f"{path} was loaded")


def saved(path: Path, tensors: Mapping[str, Tensor], rounded: Round = torch.clone, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + key: rounded(value).contiguous() for key, value in tensors.items()}, path)
    return path


def is_linear(key: str, value: Tensor) -> bool:
    return value.ndim == 2 and key.endswith(".weight") and "bias" not in key and "shared" not in key


def all_equal(path: Path, says: str = EQUAL, transformer: Round = torch.clone, **parts: str) -> str:
    """The same of a whole model."""
    bundle = Engine.from_pretrained(str(path), "cpu", **parts).bundle
    for part, rounded in (("transformer", transformer), ("vae", torch.clone), ("text_encoder", torch.clone)):
        check(getattr(bundle, part), {key: rounded(value).float() for key, value in plain(part).items()})
    bundle.encode_prompts(["a corgi"])
    return says


def diffusers_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    c = random_wan.CONFIG
    transformer = WanTransformer3DModel(
        num_attention_heads=c.num_heads, attention_head_dim=c.dim // c.num_heads, in_channels=16, out_channels=16,
        text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.num_layers,
    )  # fmt: skip
    transformer.load_state_dict({diffusers_name(key): value for key, value in plain("transformer").items()})
    return transformer


def diffusers_folder(folder: Path, **options: Any) -> Path:
    """Of what diffusers and transformers write themselves."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5EncoderModel

    transformer = diffusers_transformer()
    transformer.save_pretrained(folder / "transformer", max_shard_size="2MB", **options)
    AutoencoderKLWan.from_pretrained(GOLDENS / "wan_vae" / "diffusers").save_pretrained(folder / "vae")
    encoder = UMT5EncoderModel.from_pretrained(GOLDENS / "umt5" / "hf" / "text_encoder")
    encoder.save_pretrained(folder / "text_encoder", max_shard_size="80KB")
    shutil.copytree(GOLDENS / "umt5" / "tokenizer", folder / "tokenizer")
    number = len(list((folder / "transformer").glob("*.safetensors")))
    assert number > 1
    return folder


def hub_cache(folder: Path) -> Path:
    """A model in the hub's cache: links in a snapshot to files named by their digests."""
    source, root = random_wan.official(folder / "model"), folder / "cache" / "models--Wan-AI--Wan2.1-T2V-1.3B"
    snapshot = root / "snapshots" / ("0" * 40)
    for i, file in enumerate(file for file in sorted(source.rglob("*")) if file.is_file()):
        blob, link = root / "blobs" / f"{i:064}", snapshot / file.relative_to(source)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    return snapshot


def wan(in_dim: int, out_dim: int = 16, *keys: str) -> Tensors:
    """The transformer with other channels and more tensors."""
    sizes = {"patch_embedding.weight": (128, in_dim, 1, 2, 2), "head.head.weight": (4 * out_dim, 128)}
    zeros = {key: torch.zeros(shape) for key, shape in {**sizes, "head.head.bias": (4 * out_dim,)}.items()}
    return plain("transformer") | zeros | {key: torch.zeros(2, 128) for key in keys}


def refused_transformer(*given: Any) -> Callable[[Path], str]:
    return lambda folder: refused(saved(folder / "a.safetensors", wan(*given)))


def transformer(name: str, rounded: Round = torch.clone, prefix: str = "") -> Callable[[Path], str]:
    return lambda folder: equal(
        saved(folder / name, plain("transformer"), rounded, prefix), "transformer", lambda t: rounded(t).float()
    )


def fp8(dtype: torch.dtype, is_all: bool = False, rest: torch.dtype = torch.float32) -> Callable[[Path], str]:
    """Without scales, and without a dtype that is asked for."""

    def low(key: str, value: Tensor) -> Tensor:
        return value.to(dtype if is_all or is_linear(key, value) else rest)

    def tries(folder: Path) -> str:
        tensors = {key: low(key, value) for key, value in plain("transformer").items()}
        network = load_transformer(saved(folder / "a.safetensors", tensors))
        check(network, {key: value.float() for key, value in tensors.items()})
        assert network.dtype == torch.bfloat16
        return DEQUANTISED + ", in bfloat16"

    return tries


def scaled(style: str, part: str = "transformer", **beside: Tensor) -> Callable[[Path], str]:
    def tries(folder: Path) -> str:
        stored = random_wan.scaled_fp8(plain(part) if part == "transformer" else hf(), style)
        meant = saved(folder / "meant.safetensors", random_wan.dequantized(stored))
        network = LOADS[part](saved(folder / "a.safetensors", stored | beside), dtype=torch.float32)
        check(network, LOADS[part](meant).state_dict())
        return DEQUANTISED

    return tries


def described(style: str, format: str, dtype: torch.dtype, most: float) -> Callable[[Path], str]:
    """Newer ComfyUI, or rows in int8."""

    def tries(folder: Path) -> str:
        stored, meant, layers = {}, {}, {}
        for key, value in plain("transformer").items():
            stored[key] = meant[key] = value
            if is_linear(key, value):
                layer = key.removesuffix(".weight")
                scale = value.abs().amax(1, keepdim=True) / most if style == "rows" else value.abs().amax() / most
                low = value / scale
                stored[key] = (low if dtype.is_floating_point else low.round()).to(dtype)
                stored[f"{layer}.weight_scale"], meant[key] = scale, stored[key].float() * scale
                layers[layer] = {"format": format}
                if style == "tensors":
                    said = json.dumps(layers[layer]).encode()
                    stored[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
        header = {"_quantization_metadata": json.dumps({"layers": layers})} if style == "header" else None
        save_file(stored, folder / "a.safetensors", header)
        check(load_transformer(folder / "a.safetensors", dtype=torch.float32), meant)
        return DEQUANTISED

    return tries


def packed(**parts: Tensor) -> Callable[[Path], str]:
    def tries(folder: Path) -> str:
        tensors = {key: value for key, value in plain("transformer").items() if key != "blocks.0.ffn.0.weight"}
        tensors |= {f"blocks.0.ffn.0.{name}": value for name, value in parts.items()}
        return refused(saved(folder / "a.safetensors", tensors))

    return tries


def in_gguf(name: str) -> Callable[[Path], str]:
    """The transformer as its converters write it; of types that the package cannot write one layer, of any bits."""

    def tries(folder: Path) -> str:
        kind, tensors, meant = Kind[name], {}, {}
        for key, value in plain("transformer").items():
            tensors[key], meant[key] = (value.numpy(), Kind.F32), value
            size = gguf.GGML_QUANT_SIZES[kind][0]
            if is_linear(key, value) and value.numel() > 1024 and value.shape[1] % size == 0:
                own = kind.name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16")
                content = quantised(value, kind)[0] if own else random_blocks(kind, len(value), value.shape[1] // size)
                tensors[key], meant[key] = (content, kind), torch.from_numpy(gguf.quants.dequantize(content, kind))
        assert sum(entry[1] is kind for entry in tensors.values()) > 1
        check(load_transformer(write(folder / "wan.gguf", tensors), dtype=torch.float32), meant)
        return DEQUANTISED

    return tries


def gguf_text_encoder(folder: Path) -> str:
    """With the names and the vocabulary of llama.cpp."""
    names = {"SelfAttention.": "attn_", "relative_attention_bias": "rel_b", "layer.0.layer_norm": "attn_norm"}
    names |= {"layer.1.layer_norm": "ffn_norm", "DenseReluDense.wi_0": "ffn_gate", "DenseReluDense.wi_1": "ffn_up"}
    names |= {"DenseReluDense.wo": "ffn_down", "encoder.final_layer_norm": "enc.output_norm", "shared": "token_embd"}
    names |= {"encoder.block.": "enc.blk.", "layer.0.": "", "layer.1.": ""}
    tensors, meant = {}, {}
    for key, value in hf().items():
        stored, meant[key] = (value.numpy(), Kind.F32), value
        if is_linear(key, value):
            stored = quantised(value, Kind.Q8_0)
            meant[key] = torch.from_numpy(gguf.quants.dequantize(*stored))
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        tensors[key] = stored
    path = write(folder / "umt5.gguf", tensors, **VOCABULARY)
    expected = load_text_encoder(saved(folder / "meant.safetensors", meant)).state_dict()
    check(load_text_encoder(path, dtype=torch.float32), expected)
    assert load_tokenizer(path)(["ab"])[0].tolist() == [[3, 4, 5, 1]]
    return f"{DEQUANTISED}; its tokenizer is used"


def with_vocabulary(part: Callable[[Path], str]) -> Callable[[Path], str]:
    def tries(folder: Path) -> str:
        said = part(folder)
        assert load_tokenizer(folder / "a.safetensors")(["ab"])[0].tolist() == [[3, 4, 5, 1]]
        return f"{said}; its tokenizer is used"

    return tries


SPIECE = torch.tensor(list(spiece_of_gguf(VOCABULARY, "a table")), dtype=torch.uint8)


def text_encoder(
    rounded: Round, is_official: bool = False, says: str = EQUAL, **beside: Tensor
) -> Callable[[Path], str]:
    def tries(folder: Path) -> str:
        source = random_wan.text_encoder() if is_official else hf()
        tensors = {key: rounded(value) for key, value in source.items()} | beside
        path = saved(folder / "a.safetensors", tensors)
        return equal(path, "text_encoder", lambda value: rounded(value).float(), says)

    return tries
