"""What LoRA files call the modules of Wan's transformers, and their changes merged into its weights.

Names come with dots, official or of Diffusers, behind one or several prefixes, or with underscores, which are turned
back by the names that the model has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from miga_engine.models.wan.layouts import DIT_RULES
from miga_engine.weights.checkpoint import Checkpoint, count_numbered
from miga_engine.weights.lora import Lora, Names, merged

_PREFIXES = re.compile(r"(?:(?:base_model\.model|diffusion_model|transformer|pipe\.dit|model)\.)+")
_UNDERSCORED = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_+")
_BLOCK = re.compile(r"blocks([._])(\d{1,4})\1(.+)")

# Of models that are conditioned on an image, and which a text-to-video model lacks.
_IMAGE_RULES = (
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"^condition_embedder\.image_embedder\.", "img_emb."),
)
_IMAGE_MODULES = re.compile(r"blocks\.\d+\.cross_attn\.(k_img|v_img|norm_k_img)|img_emb(\..*)?")

# Diffusers' names, of which the rules make official ones.
_DIFFUSERS_MODULES = (
    *(
        f"blocks.0.{attention}.{part}"
        for attention in ("attn1", "attn2")
        for part in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
    ),
    *(f"blocks.0.{part}" for part in ("attn2.add_k_proj", "attn2.add_v_proj", "attn2.norm_added_k")),
    *(f"blocks.0.{part}" for part in ("ffn.net.0.proj", "ffn.net.2", "norm2", "scale_shift_table")),
    *(f"condition_embedder.{part}_embedder.linear_{i}" for part in ("time", "text") for i in (1, 2)),
    "condition_embedder.time_proj",
    "proj_out",
    "scale_shift_table",
)
_OFFICIAL_IMAGE_MODULES = tuple(f"blocks.0.cross_attn.{part}" for part in ("k_img", "v_img", "norm_k_img"))
_IMAGE_EMBEDDER = re.compile(r"(?:img_emb|condition_embedder_image_embedder)_(.+)")


def merge_loras(official: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """A transformer under official keys with the changes of LoRA files, in this order. Raises CheckpointError."""
    if not loras:
        return official
    modules = {key.rpartition(".")[0] or key for key in official.shapes} | official.shapes.keys()
    underscored = {}
    for name in (*_DIFFUSERS_MODULES, *_OFFICIAL_IMAGE_MODULES, *modules):
        # What a block holds is told by its name in any block: the file's may be one that this model lacks.
        block = _BLOCK.fullmatch(name)
        local, place = (block[3], "blocks.") if block else (name, "")
        official_name = _with_dots(name)
        target = _BLOCK.fullmatch(official_name)
        underscored[place + local.replace(".", "_")] = target[3] if block and target else official_name

    def official_module(name: str) -> str | None:
        prefix = _UNDERSCORED.match(name)
        if prefix is None:
            prefix = _PREFIXES.match(name)
            name = name[prefix.end() :] if prefix else name
            if "." in name or name in modules:
                return _with_dots(name)
        else:
            name = name[prefix.end() :].replace(".", "_")
        if image := _IMAGE_EMBEDDER.fullmatch(name):
            return f"img_emb.{image[1]}"
        if block := _BLOCK.fullmatch(name):
            local = underscored.get("blocks." + block[3])
            return local and f"blocks.{int(block[2])}.{local}"
        return underscored.get(name)

    count = count_numbered(official.shapes, r"blocks\.(\d+)\.", official.path)
    return merged(
        official,
        loras,
        Names(
            official=official_module,
            is_left_out=lambda name: _IMAGE_MODULES.fullmatch(name) is not None,
            size=f"{count} block{'s' if count != 1 else ''}",
        ),
    )


def _with_dots(name: str) -> str:
    """The official name of a module whose name, official or of Diffusers, is written with dots."""
    for pattern, replacement in DIT_RULES:
        name = re.sub(pattern, replacement, name)  # as a parameter's, of which some rules want the end
    name += "."
    for pattern, replacement in (*_IMAGE_RULES, *DIT_RULES):
        name = re.sub(pattern, replacement, name)
    return name.removesuffix(".")
