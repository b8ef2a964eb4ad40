"""How Wan's checkpoints are laid out: official and Diffusers key names, and sizes read off the shapes.

The VAEs' own names and sizes are in `vae_layouts`.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from miga_engine.errors import CheckpointError, ConfigError
from miga_engine.models.wan.dit import WanDiT, WanDiTConfig
from miga_engine.models.wan.umt5 import MAX_DISTANCE, UMT5Config
from miga_engine.weights.checkpoint import Checkpoint, count_numbered
from miga_engine.weights.quantized import dequantized
from miga_engine.weights.renamed import RenamedCheckpoint
from miga_engine.weights.untrusted import short

Config = TypeVar("Config")

HEAD_DIM = 128  # of every published Wan2.1 transformer
TEXT_LEN = 512
MAX_TEXT_LEN = 4096  # no tensor tells it
MAX_VOCABULARY = 32 * 2**20  # bytes; of umt5-xxl 4.5 million

# Under which single files put the names of a network, and what stands beside them where all networks are in one file.
_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "net."),
    "vae": ("vae.", "first_stage_model.", "model."),
    "text_encoder": ("text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl.", "text_encoder.", "model."),
}
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")  # of torch, in trainings
_OTHER_NETWORKS = ("vae.", "first_stage_model.", "text_encoders.", "text_encoder.", "model.diffusion_model.")

_TRANSFORMER_MARKS = ("patch_embedding.weight",)
VAE_MARKS = ("decoder.conv1.weight", "decoder.conv_in.weight")
_TEXT_ENCODER_MARKS = (
    "token_embedding.weight",
    "shared.weight",
    "encoder.embed_tokens.weight",
    "token_embd.weight",
)
_MARKS = {"transformer": _TRANSFORMER_MARKS, "vae": VAE_MARKS, "text_encoder": _TEXT_ENCODER_MARKS}
"""Keys that the sizes of a network are read from, in any of its layouts."""

_VOCABULARY = "spiece_model"  # the tokenizer, in a file of the text encoder

# (pattern in Diffusers keys, official replacement), applied one after the other.
DIT_RULES = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^fps_projection\.net\.0\.proj\.", "fps_projection.0."),
    (r"^fps_projection\.net\.2\.", "fps_projection.2."),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.norm2\.", ".norm3."),
)
_UMT5_RULES = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)
_GGUF_UMT5_RULES = (
    (r"^token_embd\.", "token_embedding."),
    (r"^enc\.output_norm\.", "norm."),
    (r"^enc\.blk\.", "blocks."),
    (r"\.attn_rel_b\.", ".pos_embedding.embedding."),
    (r"\.attn_([qkvo])\.", r".attn.\1."),
    (r"\.attn_norm\.", ".norm1."),
    (r"\.ffn_norm\.", ".norm2."),
    (r"\.ffn_gate\.", ".ffn.gate.0."),
    (r"\.ffn_up\.", ".ffn.fc1."),
    (r"\.ffn_down\.", ".ffn.fc2."),
)


def official_transformer(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under official transformer keys. Raises CheckpointError when it holds something else."""
    checkpoint = without_prefix(checkpoint, "transformer")
    require_key(checkpoint, "a Wan2.1 transformer", *_TRANSFORMER_MARKS)
    if "proj_out.weight" in checkpoint.shapes:
        checkpoint = RenamedCheckpoint(checkpoint, lambda key: renamed(DIT_RULES, key))
    return dequantized(checkpoint)


def prefix_of(shapes: Mapping[str, tuple[int, ...]], part: str) -> str | None:
    """What stands before the names of a network ("transformer", "vae", "text_encoder"); None where it is not there."""
    for prefix in ("", *_PREFIXES[part]):
        if any(prefix + mark in shapes for mark in _MARKS[part]):
            is_image = part == "vae" and prefix and len(shapes.get(prefix + "decoder.conv_in.weight", ())) == 4
            return None if is_image else prefix  # image models have the like
    return None


def without_prefix(checkpoint: Checkpoint, part: str) -> Checkpoint:
    """One network of a file, under its own names; of a file of all networks nothing but this one."""
    if any(_WRAPPERS.search(key) for key in checkpoint.shapes):
        checkpoint = RenamedCheckpoint(checkpoint, lambda key: _WRAPPERS.sub("", key))
    prefix = prefix_of(checkpoint.shapes, part)
    if not prefix:
        return checkpoint

    def rename(key: str) -> str | None:
        return key[len(prefix) :] if key.startswith(prefix) else None if key.startswith(_OTHER_NETWORKS) else key

    return RenamedCheckpoint(checkpoint, rename)


def is_network(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these are the keys of one of Wan's networks, in any layout."""
    return any(prefix_of(shapes, part) is not None for part in _MARKS)


def keeps_fp32(checkpoint: Checkpoint) -> Callable[[str], bool]:
    """Of a Wan2.1 file's own keys, those whose tensors stay as they are when the networks are stored in another dtype.

    True of what the transformer uses in float32 whatever its dtype, and of the VAE, which is meant to run in it.
    """
    if prefix_of(checkpoint.shapes, "transformer") is not None:
        official = official_transformer(checkpoint)
        kept = {official.key_in_file(key) for key in official.shapes if WanDiT.keeps_fp32(key)}
        return kept.__contains__
    is_vae = prefix_of(checkpoint.shapes, "vae") is not None
    return lambda key: is_vae


def official_text_encoder(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under official UMT5 keys. Raises CheckpointError when it holds something else."""
    checkpoint = without_prefix(checkpoint, "text_encoder")
    require_key(checkpoint, "a UMT5 text encoder", *_TEXT_ENCODER_MARKS)
    is_official = "token_embedding.weight" in checkpoint.shapes
    rules = () if is_official else _GGUF_UMT5_RULES if "token_embd.weight" in checkpoint.shapes else _UMT5_RULES
    has_shared = "shared.weight" in checkpoint.shapes

    def rename(key: str) -> str | None:
        if key == "encoder.embed_tokens.weight":  # the same table once more
            return None if has_shared else "token_embedding.weight"
        return None if key == _VOCABULARY else renamed(rules, key)

    return dequantized(RenamedCheckpoint(checkpoint, rename))


def vocabulary(checkpoint: Checkpoint) -> bytes | None:
    """The SentencePiece model that lies in a file of the text encoder; None where there is none."""
    checkpoint = without_prefix(checkpoint, "text_encoder")
    shape = checkpoint.shapes.get(_VOCABULARY)
    if shape is None:
        return None
    if len(shape) != 1 or shape[0] > MAX_VOCABULARY or checkpoint.stored_dtype(_VOCABULARY) is not torch.uint8:
        raise CheckpointError(
            f"{checkpoint.path} holds a {_VOCABULARY} {list(shape)}, which is none: download it again"
        )
    return checkpoint.read(_VOCABULARY).numpy().tobytes()


def transformer_config(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> WanDiTConfig:
    """Sizes from the shapes under official keys; what a config.json of either layout stores takes precedence.

    Raises CheckpointError for other model types, where the number of heads cannot be known, and for sizes that are no
    whole numbers or larger than all the weights together.
    """
    refuse_types(checkpoint.path, stored)
    shapes = RequiredShapes(checkpoint)
    dim, in_dim, *patch = shapes.of("patch_embedding.weight", 5)
    num_weights = sum(math.prod(shape) for shape in checkpoint.shapes.values())

    def size(*names: str, default: int = 0, most: int = num_weights) -> int:
        """What config.json says under one of its names, or the default."""
        name, value = next(((name, stored[name]) for name in names if stored.get(name) is not None), ("", default))
        if name and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most):
            raise CheckpointError(
                f"the config.json beside {checkpoint.path} says {name} {reprlib.repr(value)}, where its weights allow "
                f"whole numbers from 1 to {most}: give weights and config.json of one and the same model"
            )
        return value

    num_heads = size("num_heads", "num_attention_heads")
    if not num_heads:
        if dim % HEAD_DIM:
            raise CheckpointError(
                f"{checkpoint.path} does not tell its number of heads and its width of {dim} is no multiple of "
                f"{HEAD_DIM}: put its config.json beside it"
            )
        num_heads = dim // HEAD_DIM

    eps = stored.get("eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, float | int) or not 0 < eps < 1:
        raise CheckpointError(
            f"the config.json beside {checkpoint.path} says eps {reprlib.repr(eps)}, which must lie between 0 and 1: "
            "download it again"
        )
    patch_channels = shapes.of("head.head.weight", 2)[0]
    num_layers = count_numbered(checkpoint.shapes, r"blocks\.(\d+)\.", checkpoint.path)

    def build() -> WanDiTConfig:
        return WanDiTConfig(
            dim=size("dim", default=num_heads * size("attention_head_dim") or dim),
            ffn_dim=size("ffn_dim", default=shapes.of("blocks.0.ffn.0.weight", 2)[0]),
            freq_dim=size("freq_dim", default=shapes.of("time_embedding.0.weight", 2)[1]),
            num_heads=num_heads,
            num_layers=size("num_layers", default=num_layers, most=len(checkpoint.shapes)),
            text_dim=size("text_dim", default=shapes.of("text_embedding.0.weight", 2)[1]),
            text_len=size("text_len", default=TEXT_LEN, most=MAX_TEXT_LEN),
            in_dim=size("in_dim", "in_channels", default=in_dim),
            out_dim=size("out_dim", "out_channels", default=patch_channels // math.prod(patch)),
            patch_size=(patch[0], patch[1], patch[2]),
            eps=float(eps),
            cross_attn_norm="blocks.0.norm3.weight" in checkpoint.shapes,
            qk_norm="blocks.0.self_attn.norm_q.weight" in checkpoint.shapes,
            inject_sample_info="fps_embedding.weight" in checkpoint.shapes,
        )

    return checked(checkpoint, build)


def refuse_types(path: Path, stored: Mapping[str, Any]) -> None:
    """CheckpointError where a config.json is that of another kind of model."""
    if str(stored.get("model_type", "t2v")) not in ("t2v", "ti2v") or stored.get("image_dim") is not None:
        raise CheckpointError(
            f"{path} belongs to a {short(str(stored.get('model_type', 'image-conditioned')))} model: "
            "give a Wan2.1 text-to-video model"
        )


def text_encoder_config(checkpoint: Checkpoint) -> UMT5Config:
    """Sizes from the shapes under official keys. Raises CheckpointError."""
    shapes = RequiredShapes(checkpoint)
    vocab_size, dim = shapes.of("token_embedding.weight", 2)
    num_buckets, num_heads = shapes.of("blocks.0.pos_embedding.embedding.weight", 2)
    dim_attn = shapes.of("blocks.0.attn.q.weight", 2)[0]
    if dim_attn % num_heads or not 4 <= num_buckets < 4 * MAX_DISTANCE:
        raise CheckpointError(
            f"{checkpoint.path} has {num_heads} heads and {num_buckets} buckets of positions for a width of "
            f"{dim_attn}, which is no UMT5 text encoder: download it again"
        )
    return UMT5Config(
        vocab_size=vocab_size,
        dim=dim,
        dim_attn=dim_attn,
        dim_ffn=shapes.of("blocks.0.ffn.fc1.weight", 2)[0],
        num_heads=num_heads,
        num_layers=count_numbered(checkpoint.shapes, r"blocks\.(\d+)\.", checkpoint.path),
        num_buckets=num_buckets,
    )


class RequiredShapes:
    """Shapes of a checkpoint, of which a missing or impossible one is a CheckpointError."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def of(self, key: str, rank: int) -> tuple[int, ...]:
        """Shape of `key`, which must have `rank` dimensions, none of them empty."""
        shape = self._checkpoint.shapes.get(key)
        if shape is None:
            raise CheckpointError(
                f"{self._checkpoint.path} lacks {key}, from which the model's size is read: give the complete weights"
            )
        if len(shape) != rank or 0 in shape:
            raise CheckpointError(
                f"{self._checkpoint.path} holds {key} as {list(shape)} where the model has {rank} dimensions: "
                "give weights of a Wan2.1 model"
            )
        return shape


def checked(checkpoint: Checkpoint, build: Callable[[], Config]) -> Config:
    """What `build` makes of a checkpoint's sizes, any failure being a CheckpointError."""
    try:
        return build()
    except CheckpointError:
        raise
    except (ConfigError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{checkpoint.path} and its config.json do not describe a model ({error}): download both again"
        ) from error


def require_key(checkpoint: Checkpoint, what: str, *keys: str) -> None:
    """CheckpointError where a checkpoint has none of the keys by which `what` is known."""
    if not any(key in checkpoint.shapes for key in keys):
        raise CheckpointError(
            f"{checkpoint.path} does not hold {what} (no {' or '.join(keys)} in it): give the file or folder that does"
        )


def renamed(rules: tuple[tuple[str, str], ...], key: str) -> str:
    """The key after all replacements, one after the other."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
