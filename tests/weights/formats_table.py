"""Writes each format of weights in small, loads it, and tells what came of it: the table in docs/weights.md.

`python tests/weights/formats_table.py` makes the table anew. Where weights load they are compared with what they were
made of; where that is not met the table is not made.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import places
import random_wan
import torch
from torch import Tensor
from written_formats import (
    DEQUANTISED,
    E4M3,
    E5M2,
    EQUAL,
    LOADS,
    SPIECE,
    Case,
    all_equal,
    check,
    described,
    diffusers_folder,
    equal,
    fp8,
    gguf_text_encoder,
    hf,
    hub_cache,
    in_gguf,
    packed,
    plain,
    refused,
    refused_transformer,
    saved,
    scaled,
    text_encoder,
    transformer,
    with_vocabulary,
)
from written_loras import CASES as LORAS

from miga_engine import Engine
from miga_engine.models import load_transformer, load_vae
from miga_engine.models.wan.vae import WanVAE, WanVAEConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "weights.md"
BEGIN, END = "<!-- formats -->\n", "<!-- /formats -->\n"
HEAD = "| format | written by | what happens |\n| --- | --- | --- |\n"
HALF, BF16 = torch.Tensor.half, torch.Tensor.bfloat16


def vae(name: str, rounded: Callable[[Tensor], Tensor] = torch.clone, prefix: str = "") -> Callable[[Path], str]:
    """As a file, and found by its name in a folder."""

    def tries(folder: Path) -> str:
        path = saved(folder / name, random_wan.vae(), rounded, prefix)
        equal(path, "vae", rounded)
        return equal(folder, "vae", rounded)

    return tries


def ti2v(part: str, name: str, prefix: str = "") -> Callable[[Path], str]:
    """A part of Wan2.2 TI2V-5B in one file."""

    def tries(folder: Path) -> str:
        tensors = random_wan.vae("ti2v") if part == "vae" else random_wan.transformer(kind="ti2v")
        if name.endswith(".pth"):
            torch.save(tensors, folder / name)
        else:
            saved(folder / name, tensors, prefix=prefix)
        check(LOADS[part](folder / name), tensors)
        return EQUAL

    return tries


def ti2v_folder(is_diffusers: bool) -> Callable[[Path], str]:
    def tries(folder: Path) -> str:
        model = folder / "model"
        path = random_wan.diffusers_ti2v(model) if is_diffusers else random_wan.official(model, "ti2v")
        bundle = Engine.from_pretrained(str(path), "cpu").bundle
        check(bundle.transformer, random_wan.transformer(kind="ti2v"))
        check(bundle.vae, random_wan.vae("ti2v"))
        return EQUAL

    return tries


def narrow_vae(folder: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        network = WanVAE(WanVAEConfig(dim=8, z_dim=16, dim_mult=(1, 2, 4, 4)))
    path = saved(folder / "lightvaew2_1.safetensors", network.state_dict())
    state = load_vae(path).state_dict()
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    return EQUAL


def pickled(name: str, *tables: str, prefix: str = "") -> Callable[[Path], str]:
    """The transformer under the first of the tables, and another network under those that follow."""

    def tries(folder: Path) -> str:
        content: dict[str, object] = {prefix + key: value for key, value in plain("transformer").items()}
        other = {prefix + key: value for key, value in random_wan.transformer(seed=1).items()}
        if tables:
            content = {table: content if table == tables[0] else other for table in tables[::-1]}
        torch.save(content, folder / name)
        return equal(folder / name, "transformer")

    return tries


def shards(folder: Path) -> str:
    names = sorted(plain("transformer"))
    for i in range(3):
        part = {name: plain("transformer")[name] for name in names[i::3]}
        saved(folder / f"model-{i + 1:05}-of-00003.safetensors", part)
    return equal(folder, "transformer")


def variant(folder: Path) -> str:
    return equal(diffusers_folder(folder / "model", variant="fp16") / "transformer", "transformer")


def hub_name(folder: Path) -> str:
    hub_cache(folder)
    return all_equal(Path("Wan-AI/Wan2.1-T2V-1.3B"), cache_dir=str(folder / "cache"))


def comfy(is_flat: bool) -> Callable[[Path], str]:
    def tries(folder: Path) -> str:
        tree = random_wan.comfy(folder / "ComfyUI")
        saved(tree / "models" / "text_encoders" / "umt5_xxl_fp16.safetensors", {**hf(), "spiece_model": SPIECE})
        if is_flat:
            for file in (tree / "models").rglob("*.safetensors"):
                file.rename(folder / file.name)
            shutil.rmtree(tree)
        return all_equal(folder if is_flat else tree, transformer=HALF)

    return tries


def experts(place: str, *names: str, alone: str = "") -> Callable[[Path], str]:
    """Both networks of Wan2.2 A14B under these names, or one of them alone."""

    def tries(folder: Path) -> str:
        tensors = dict(zip(names, (plain("transformer"), random_wan.transformer(seed=1)), strict=True))
        for name in [alone] if alone else names:
            saved(folder / place / name, tensors[name])
        if alone:
            return refused(folder / place / alone)
        both = load_transformer(folder / place)
        for network, expected in zip(both.children(), tensors.values(), strict=True):
            check(network, expected)
        return EQUAL

    return tries


def two_files(folder: Path) -> str:
    high = saved(folder / "1" / "a.safetensors", plain("transformer"))
    low = saved(folder / "2" / "b.safetensors", random_wan.transformer(seed=1))
    both = load_transformer(high, second=low)
    check(both.high_noise_model, plain("transformer"))
    check(both.low_noise_model, random_wan.transformer(seed=1))
    return EQUAL


def skyreels(folder: Path) -> str:
    """With the layers that are told the rate, official or as diffusers writes them itself."""
    from diffusers import SkyReelsV2Transformer3DModel

    c = random_wan.CONFIG
    theirs = SkyReelsV2Transformer3DModel(
        num_attention_heads=c.num_heads, in_channels=16, out_channels=16, text_dim=c.text_dim, freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim, num_layers=c.num_layers, inject_sample_info=True,
    )  # fmt: skip
    theirs.save_pretrained(folder / "transformer")
    state = load_transformer(folder).state_dict()
    saved(folder / "official" / "model.safetensors", state)
    check(load_transformer(folder / "official"), state)
    assert torch.equal(state["fps_projection.2.weight"], theirs.state_dict()["fps_projection.net.2.weight"])
    return EQUAL


def refused_file(name: str, part: str, **tensors: tuple[int, ...]) -> Callable[[Path], str]:
    """Tensors by their keys, with `__` for dots."""

    def tries(folder: Path) -> str:
        path = saved(folder / name, {key.replace("__", "."): torch.zeros(shape) for key, shape in tensors.items()})
        return refused(path, LOADS[part])

    return tries


def t5(folder: Path) -> str:
    tensors = {key: value for key, value in hf().items() if "attention_bias" not in key or ".block.0." in key}
    return refused(saved(folder / "t5xxl_fp16.safetensors", tensors), LOADS["text_encoder"])


COMFY_EXPERTS = ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors")
KIJAI_EXPERTS = ("Wan2_2-T2V-A14B_HIGH_bf16.safetensors", "Wan2_2-T2V-A14B-LOW_bf16.safetensors")
BYTES, ROWS = torch.zeros(256, 64, dtype=torch.uint8), torch.ones(256, 8)

CASES: tuple[Case, ...] = (
    Case("official folder", "Wan-AI", lambda folder: all_equal(random_wan.official(folder / "model"))),
    Case("`-Diffusers` folder, shards with indexes", "diffusers and transformers themselves",
         lambda folder: all_equal(diffusers_folder(folder / "model"))),
    Case("the same, `diffusion_pytorch_model.fp16-00001-of-….safetensors`", "diffusers itself", variant),
    Case("snapshot in the hub's cache, links to blobs", "huggingface_hub", lambda folder: all_equal(hub_cache(folder))),
    Case("a name on the hub, `Wan-AI/Wan2.1-T2V-1.3B`, in the cache", "huggingface_hub", hub_name),
    Case("ComfyUI folder, tokenizer inside the text encoder", "ComfyUI", comfy(is_flat=False)),
    Case("flat folder of the same files", "ComfyUI", comfy(is_flat=True)),
    Case("`model.safetensors`", "SkyReels-V2", transformer("model.safetensors")),
    Case("`model-0000N-of-….safetensors`", "SkyReels-V2-DF 14B", shards),
    Case("`fps_embedding`, `fps_projection`, official and of diffusers", "SkyReels-V2-DF 1.3B", skyreels),
    Case("one file, keys `model.diffusion_model.…`, bf16", "ComfyUI",
         transformer("a.safetensors", BF16, "model.diffusion_model.")),
    Case("one file, official keys, fp16", "ComfyUI, Kijai", transformer("a.safetensors", HALF)),
    Case("one file, keys `diffusion_model.…`", "ComfyUI", transformer("a.safetensors", prefix="diffusion_model.")),
    Case("one file, keys `model.…`", "Self-Forcing", transformer("a.safetensors", prefix="model.")),
    Case("`.sft`", "any", transformer("a.sft")),
    Case("`.pth`, a table of tensors", "PyTorch", pickled("a.pth")),
    Case("`.pt`, `generator_ema` beside `generator`", "Self-Forcing, CausVid",
         pickled("a.pt", "generator_ema", "generator", prefix="model.")),
    Case("`.pt`, `generator` alone", "Self-Forcing, CausVid", pickled("a.pt", "generator", prefix="model.")),
    Case("`.pt`, `model`", "trainers", pickled("a.pt", "model")),
    Case("`wan_2.1_vae.safetensors`", "ComfyUI", vae("wan_2.1_vae.safetensors")),
    Case("`Wan2_1_VAE_bf16.safetensors`", "Kijai", vae("Wan2_1_VAE_bf16.safetensors", BF16)),
    Case("VAE, keys `model.…`", "trainers", vae("Wan2.1_VAE.safetensors", prefix="model.")),
    Case("narrower VAE of the same keys", "LightX2V", narrow_vae),
    Case("official folder of Wan2.2 TI2V-5B", "Wan-AI", ti2v_folder(is_diffusers=False)),
    Case("`-Diffusers` folder of Wan2.2 TI2V-5B", "diffusers' names", ti2v_folder(is_diffusers=True)),
    Case("`wan2.2_ti2v_5B_fp16.safetensors`", "ComfyUI", ti2v("transformer", "wan2.2_ti2v_5B_fp16.safetensors")),
    Case("`Wan2.2_VAE.pth`", "Wan-AI", ti2v("vae", "Wan2.2_VAE.pth")),
    Case("`wan2.2_vae.safetensors`", "ComfyUI", ti2v("vae", "wan2.2_vae.safetensors")),
    Case("VAE of Wan2.2, keys `vae.…`", "any", ti2v("vae", "a.safetensors", prefix="vae.")),
    Case("text encoder, official keys, bf16", "Wan-AI, Kijai", text_encoder(BF16, is_official=True)),
    Case("text encoder, Hugging Face's keys, fp16", "transformers", text_encoder(HALF)),
    Case("`umt5_xxl_fp16.safetensors`, `spiece_model` inside", "ComfyUI",
         with_vocabulary(text_encoder(HALF, spiece_model=SPIECE))),
    Case("`umt5_xxl_fp8_e4m3fn_scaled.safetensors`, `spiece_model` inside", "ComfyUI",
         with_vocabulary(scaled("comfy", "text_encoder", spiece_model=SPIECE))),
    Case("text encoder, fp8 without scales", "Kijai", text_encoder(lambda value: value.to(E4M3), says=DEQUANTISED)),
    Case("fp8_e4m3fn without scales, all tensors", "ComfyUI", fp8(E4M3, is_all=True)),
    Case("fp8_e4m3fn without scales, matrices alone", "ComfyUI", fp8(E4M3, rest=torch.bfloat16)),
    Case("fp8_e4m3fn without scales, all else in float32", "Kijai", fp8(E4M3)),
    Case("fp8_e5m2 without scales", "Kijai", fp8(E5M2)),
    Case("`.scale_weight`, `scaled_fp8`", "ComfyUI, Kijai", scaled("comfy")),
    Case("`.weight_scale`, `_quantization_metadata` in the header", "newer ComfyUI",
         described("header", "float8_e4m3fn", E4M3, 448)),
    Case("`.weight_scale`, `.comfy_quant` by layer", "newer ComfyUI",
         described("tensors", "float8_e5m2", E5M2, 57344)),
    Case("`int8_tensorwise`", "newer ComfyUI", described("tensors", "int8_tensorwise", torch.int8, 127)),
    Case("fp8, `.weight_scale` by row", "LightX2V", described("rows", "", E4M3, 448)),
    Case("int8, `.weight_scale` by row", "LightX2V", described("rows", "", torch.int8, 127)),
    *(Case(f"GGUF, {name}", "the package gguf", in_gguf(name)) for name in
      ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")),
    *(Case(f"GGUF, {name}", "llama.cpp; here of random bits", in_gguf(name)) for name in
      ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS")),
    Case("GGUF, text encoder, llama.cpp's keys, Q8_0", "the package gguf", gguf_text_encoder),
    Case("nvfp4", "newer ComfyUI", packed(weight=BYTES, weight_scale=ROWS, weight_scale_2=torch.ones(()))),
    Case("mxfp8, scales of blocks", "newer ComfyUI",
         packed(weight=torch.zeros(256, 128).to(E4M3), weight_scale=torch.ones(256, 4, dtype=torch.uint8))),
    Case("awq", "AutoAWQ", packed(qweight=BYTES.int(), qzeros=BYTES.int(), scales=ROWS)),
    Case("bitsandbytes, nf4", "diffusers", packed(**{"weight": BYTES, "weight.absmax": torch.ones(512)})),
    Case("Wan2.2 A14B, `high_noise_model/`, `low_noise_model/`", "Wan-AI",
         experts("", *(f"{name}/{random_wan.TRANSFORMER}" for name in ("high_noise_model", "low_noise_model")))),
    Case("Wan2.2 A14B, `transformer/`, `transformer_2/`", "diffusers",
         experts("", *(f"{name}/{random_wan.TRANSFORMER}" for name in ("transformer", "transformer_2")))),
    Case("Wan2.2 A14B, `wan2.2_t2v_high_noise_14B_….safetensors` and `…low_noise…`", "ComfyUI",
         experts("models/diffusion_models", *COMFY_EXPERTS)),
    Case("Wan2.2 A14B, `Wan2_2-T2V-A14B_HIGH_…` and `…-LOW_…`", "Kijai", experts("", *KIJAI_EXPERTS)),
    Case("Wan2.2 A14B, two files of any names", "any", two_files),
    Case("one network of the two, alone", "ComfyUI", experts("", *COMFY_EXPERTS, alone=COMFY_EXPERTS[0])),
    Case("image-to-video, Wan2.1", "Wan-AI", refused_transformer(36, 16, "img_emb.proj.0.bias")),
    Case("first and last frame, Wan2.1", "Wan-AI", refused_transformer(36, 16, "img_emb.emb_pos")),
    Case("image-to-video, Wan2.2 A14B; Fun-InP", "Wan-AI, VideoX-Fun", refused_transformer(36)),
    Case("Fun-Control", "VideoX-Fun", refused_transformer(48)),
    Case("Fun-Camera", "VideoX-Fun", refused_transformer(32, 16, "control_adapter.conv.weight")),
    Case("VACE", "Wan-AI", refused_transformer(16, 16, "vace_patch_embedding.weight")),
    Case("S2V", "Wan-AI", refused_transformer(16, 16, "casual_audio_encoder.encoder.final_linear.weight")),
    Case("Animate", "Wan-AI", refused_transformer(36, 16, "face_adapter.fuser_blocks.0.k_norm.weight")),
    Case("HuMo", "HuMo", refused_transformer(36, 16, "audio_proj.audio_proj_glob_1.layer.bias")),
    Case("image-to-video, SkyReels-V2 1.3B", "SkyReels-V2", refused_transformer(36, 16, "fps_embedding.weight")),
    Case("sparse-linear attention", "TurboDiffusion",
         refused_transformer(16, 16, "blocks.0.self_attn.attn_op.local_attn.proj_l.weight")),
    Case("video sparse attention", "FastVideo", refused_transformer(16, 16, "blocks.0.to_gate_compress.weight")),
    Case("VAE of an image model", "any", refused_file(
        "a.safetensors", "vae", decoder__conv_in__weight=(8, 4, 3, 3))),
    Case("TAEW2.1 as the VAE", "taehv", refused_file(
        "a.safetensors", "vae", decoder__1__weight=(256, 16, 3, 3), decoder__22__bias=(3,))),
    Case("T5 of Flux or Stable Diffusion 3", "ComfyUI", t5),
    Case("CLIP, vision", "ComfyUI", refused_file(
        "a.safetensors", "text_encoder", vision_model__embeddings__class_embedding=(8,))),
    Case("LoRA as the model", "any", refused_file(
        "a.safetensors", "transformer", blocks__0__ffn__0__lora_A__weight=(4, 8),
        blocks__0__ffn__0__lora_B__weight=(8, 4))),
    *LORAS,
)  # fmt: skip


def table() -> str:
    """Markdown, a line for each case. Raises AssertionError where what is loaded is not what was written."""
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(f"| {case.format} | {case.writer} | {case.tries(Path(folder))} |\n")
    return HEAD + "".join(rows)


def main() -> None:
    """Put the table into the page."""
    places.put_between(PAGE, BEGIN, END, table())


if __name__ == "__main__":
    main()
