"""What a weights file of Wan's wide family is, told from its names and shapes alone: used, or refused by its name."""

from __future__ import annotations

import re
from typing import NamedTuple

from miga_engine.errors import CheckpointError
from miga_engine.models.wan import layouts, vae_layouts
from miga_engine.weights.checkpoint import Checkpoint, count_numbered

Shapes = dict[str, tuple[int, ...]]

TEXT_TO_VIDEO = "a Wan2.1 text-to-video transformer"
TI2V_CHANNELS = 48  # of the latents of Wan2.2 TI2V-5B and its VAE
_REMEDY = "give a Wan2.1 text-to-video model"
_PARTS = {
    "transformer": TEXT_TO_VIDEO,
    "vae": "a Wan VAE",
    "text_encoder": "a UMT5 text encoder",
    "tae": "TAEW2.1, the tiny decoder of previews",
    "lora": "a LoRA",
}
"""What the engine has a use for, by the option that takes it (`decoder` for tae)."""

_REMEDIES = {
    "transformer": "give it as the model, or with --transformer; it needs a VAE, a text encoder and a tokenizer",
    "high": "give it as the model, or with --transformer, and that for low noise beside it or with --transformer-2; "
    "they need a VAE, a text encoder and a tokenizer",
    "low": "give that for high noise as the model, or with --transformer, and this beside it or with --transformer-2; "
    "they need a VAE, a text encoder and a tokenizer",
    "vae": "give it with --vae",
    "text_encoder": "give it with --text-encoder; it needs a tokenizer, which some of these files hold",
    "tae": "give it with --vae and --decoder tae",
    "lora": "give it with --lora, beside the model that it was made for",
}

_I2V = "a Wan2.1 image-to-video model (I2V)"
_SKYREELS_I2V = "a SkyReels-V2 image-to-video model (I2V)"
FPS_KEY = "fps_embedding.weight"
"""Of SkyReels-V2-DF 1.3B alone, in every layout."""

# (what a name is when any key of the transformer matches), in this order: the more special first.
_TRANSFORMERS = (
    (r"vace_(patch_embedding|blocks)\.", "a Wan VACE model, which follows a control video"),
    (r"casual_audio_encoder\.", "a Wan2.2 speech-to-video model (S2V)"),
    (r"audio_(proj|model|attn)|blocks\.\d+\.audio_", "a HuMo or other audio-driven model"),
    (r"(face_adapter|face_encoder|motion_encoder)\.", "a Wan2.2 Animate model"),
    (r"control_adapter\.", "a Wan Fun-Camera model"),
    (r"img_emb\.emb_pos|condition_embedder\.image_embedder\.pos_embed", "a Wan2.1 first-last-frame model (FLF2V)"),
    (r"ref_conv\.", "a Wan Fun-Control model"),
    (r"img_emb\.|condition_embedder\.image_embedder\.|k_img\.|add_k_proj\.", _I2V),
    (r"\.proj_l\.", "a TurboDiffusion model with sparse-linear attention (SLA)"),
    (r"to_gate_compress\.", "a FastWan model with video sparse attention (VSA)"),
)
_EXPERT = re.compile(r"(high|low)[_-]?noise|wan[_-]?2[._]?2.*[_.-](high|low)(?![a-z])", re.IGNORECASE)
_LORA = re.compile(r"[._](lora[_.](A|B|up|down|mid|linear)|hada_w|lokr_w|oft_|dora_scale|diff_m|diff_b)|\.diff$")


class Kind(NamedTuple):
    """`part` is "transformer", "vae", "text_encoder", "tae" or "lora", or empty for what is of no use here."""

    name: str
    part: str
    remedy: str = _REMEDY
    channels: int = 0
    """Of a latent, by which a transformer and a VAE belong together; 0 where nothing tells."""


def kind_of(checkpoint: Checkpoint) -> Kind | None:
    """What a file or several are, by the names and shapes of their tensors; None where it is nothing of Wan's."""
    shapes = checkpoint.shapes
    if sum(bool(_LORA.search(key)) for key in shapes) > len(shapes) // 4:
        return _part("lora")
    if layouts.prefix_of(shapes, "transformer") is not None:
        return _transformer(checkpoint)
    if "decoder.22.bias" in shapes:
        width = shapes.get("decoder.1.weight", (0, 0))[1:2]
        return _part("tae") if width == (16,) else Kind("the tiny decoder of another model (TAEHV)", "", "give taew2_1")
    if layouts.prefix_of(shapes, "vae") is not None:
        return _vae(layouts.without_prefix(checkpoint, "vae").shapes)
    if layouts.prefix_of(shapes, "text_encoder") is not None:
        return _text_encoder(layouts.without_prefix(checkpoint, "text_encoder").shapes)
    if any(key.startswith(("vision_model.", "visual.")) for key in shapes):
        return Kind("the image encoder (CLIP) of image-to-video models", "")
    return None


def noise_of(name: str) -> str:
    """Whether a file's name says that it is for "high" noise or for "low", as those of Wan2.2 A14B do; else empty."""
    found = _EXPERT.search(name)
    return (found[1] or found[2]).lower() if found else ""


def stem_of(name: str) -> str:
    """What two files' names have in common that are for high and for low noise of one and the same model."""
    return re.sub(r"[_.-]*(?<![a-z])(high|low)(?=[_.-]|noise)([_.-]?noise)?[_.-]*", "|", name.lower(), count=1)


def describe(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """What a file is, and how it is used or why it is not; None where it is nothing of Wan's."""
    kind = kind_of(checkpoint)
    if kind is None:
        return None
    noise = noise_of(checkpoint.path.name) if kind.part == "transformer" else ""
    return kind.name, _REMEDIES.get(noise or kind.part, f"not here: {kind.remedy}")


def require(checkpoint: Checkpoint, part: str) -> None:
    """CheckpointError where a file is known to be of no use, or to be no network; no data are read.

    A network that is another than the one wanted is refused by `layouts`, which misses the keys.
    """
    kind = kind_of(checkpoint)
    if kind is not None and kind.part != part and (kind.part in ("", "lora", "tae") or part == "tae"):
        remedy = f"{_REMEDIES[kind.part]}, and {_PARTS[part]} here" if kind.part else kind.remedy
        raise CheckpointError(f"{checkpoint.path} is {kind.name}, and not {_PARTS[part]}: {remedy}")


def _part(part: str) -> Kind:
    return Kind(_PARTS[part], part, "")


def _transformer(checkpoint: Checkpoint) -> Kind:
    own = layouts.without_prefix(checkpoint, "transformer").shapes
    is_skyreels = FPS_KEY in own or "skyreels" in checkpoint.path.name.lower()
    for pattern, name in _TRANSFORMERS:
        if any(re.search(pattern, key) for key in own):
            return Kind(_SKYREELS_I2V if name == _I2V and is_skyreels else name, "")
    of_patch = own["patch_embedding.weight"]
    of_head = own.get("head.head.weight", own.get("proj_out.weight", (0,)))
    in_dim, patch = (of_patch[1], of_patch[2:]) if len(of_patch) == 5 else (0, ())
    out_dim = of_head[0] // max(1, _product(patch))
    if in_dim == 36 and out_dim == 16:
        name = "an image-to-video model without an image encoder (Wan2.2 I2V-A14B or Wan Fun-InP)"
        return Kind(_SKYREELS_I2V if is_skyreels else name, "")
    if in_dim == 48 and out_dim == 16:
        return Kind("a Wan Fun-Control model", "")
    if in_dim == 32 and out_dim == 16:
        return Kind("a Wan2.2 Fun-Camera model", "")
    if in_dim == out_dim == TI2V_CHANNELS:
        return Kind("the transformer of Wan2.2 TI2V-5B", "transformer", "", out_dim)
    if noise := noise_of(checkpoint.path.name):
        name = f"by its name one of the two networks of Wan2.2 T2V-A14B, that for {noise} noise"
        return Kind(name, "transformer", channels=out_dim)
    if FPS_KEY in own:
        name = "a SkyReels-V2-DF text-to-video transformer, which is told the frame rate"
        return Kind(name, "transformer", channels=out_dim)
    return _part("transformer")._replace(channels=out_dim)


def _vae(shapes: Shapes) -> Kind:
    if any(len(shapes.get(key, ())) == 4 for key in ("decoder.conv_in.weight", "encoder.conv_in.weight")):
        return Kind("the VAE of an image model", "", "give the VAE of the Wan model")
    name = "the VAE of Wan2.2 TI2V-5B" if vae_layouts.is_nested(shapes) else "a Wan2.1 VAE"
    return Kind(name, "vae", "", vae_layouts.latent_channels(shapes))


def _text_encoder(shapes: Shapes) -> Kind | None:
    tables = ("encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight", "enc.blk.{}.attn_rel_b.weight")
    for table in tables:
        num_blocks = count_numbered(shapes, table.partition("{}")[0].replace(".", r"\.") + r"(\d+)\.", "a file")
        if num_blocks > 1 and table.format(0) in shapes and table.format(1) not in shapes:
            return Kind("a T5 text encoder (of Flux or Stable Diffusion 3)", "", "give UMT5-XXL, Wan's text encoder")
    is_umt5 = "token_embedding.weight" not in shapes or "blocks.0.attn.q.weight" in shapes
    return _part("text_encoder") if is_umt5 else None


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
