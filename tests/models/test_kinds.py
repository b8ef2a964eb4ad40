"""Models of Wan's wide family that the engine has no use for are refused by their names, before data are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import random_wan
import torch
from places import GOLDENS
from refusals import refusal
from safetensors.torch import load_file, save_file
from torch import Tensor

from miga_engine import Engine
from miga_engine.cli import main
from miga_engine.errors import CheckpointError
from miga_engine.models import load_text_encoder, load_transformer, load_vae
from miga_engine.models.wan.kinds import kind_of
from miga_engine.tiny import WEIGHTS_DIR
from miga_engine.weights import gguf, pickle, safetensors
from miga_engine.weights.files import format_of, open_checkpoint

Tensors = dict[str, Tensor]
WAN, VAE = random_wan.transformer(), random_wan.vae()
TI2V, VAE22 = random_wan.transformer(kind="ti2v"), random_wan.vae("ti2v")
DIFFUSERS = load_file(GOLDENS / "wan_dit" / "diffusers" / "transformer" / random_wan.TRANSFORMER)
DIFFUSERS_VAE = load_file(GOLDENS / "wan_vae" / "diffusers" / random_wan.TRANSFORMER)
UMT5 = random_wan.text_encoder("hf")
T5 = {key: value for key, value in UMT5.items() if "relative_attention_bias" not in key or ".block.0." in key}
DIM = random_wan.CONFIG.dim


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys whose data were read."""
    keys: list[str] = []
    for kind in (safetensors.SafetensorsCheckpoint, pickle.PickleCheckpoint, gguf.GgufCheckpoint):

        def spy(self: object, key: str, read: Callable[..., Tensor] = kind.read) -> Tensor:
            keys.append(key)
            return read(self, key)

        monkeypatch.setattr(kind, "read", spy)
    return keys


def wan(*keys: str, in_dim: int = 16, out_dim: int = 16) -> Tensors:
    """The random transformer with more tensors, or with other channels."""
    sizes = {
        "patch_embedding.weight": torch.zeros(DIM, in_dim, 1, 2, 2),
        "head.head.weight": torch.zeros(4 * out_dim, DIM),
        "head.head.bias": torch.zeros(4 * out_dim),
    }
    return {**WAN, **(sizes if (in_dim, out_dim) != (16, 16) else {}), **{key: torch.zeros(2, DIM) for key in keys}}


def lora(prefix: str, down: str, up: str) -> Tensors:
    modules = [key.removesuffix(".weight") for key in WAN if ".self_attn.q.weight" in key]
    return {
        f"{prefix}{module}.{name}.weight": torch.zeros(shape)
        for module in modules
        for name, shape in ((down, (4, DIM)), (up, (DIM, 4)))
    }


def taew(channels: int) -> Tensors:
    return {
        "decoder.1.weight": torch.zeros(256, channels, 3, 3),
        "decoder.22.weight": torch.zeros(3, 64, 3, 3),
        "decoder.22.bias": torch.zeros(3),
        "encoder.0.weight": torch.zeros(64, 3, 3, 3),
    }


I2V_KEYS = ("img_emb.proj.0.bias", "img_emb.proj.1.weight", "blocks.0.cross_attn.k_img.weight")
IMAGE = {
    "encoder.conv_in.weight": torch.zeros(128, 3, 3, 3),
    "decoder.conv_in.weight": torch.zeros(512, 4, 3, 3),
    "decoder.mid_block.resnets.0.conv1.weight": torch.zeros(512, 512, 3, 3),
}
CLIP = {
    "visual.transformer.0.norm1.weight": torch.zeros(1280),
    "textual.token_embedding.weight": torch.zeros(8, 4),
    "log_scale": torch.zeros(()),
}
COMFY_CLIP = {
    "vision_model.embeddings.patch_embedding.weight": torch.zeros(1280, 3, 14, 14),
    "vision_model.pre_layrnorm.weight": torch.zeros(1280),
    "visual_projection.weight": torch.zeros(1024, 1280),
}

# What the sentence says, tensors, the part that they are given for.
KINDS: dict[str, tuple[str, Tensors, str]] = {
    "VACE": ("a Wan VACE model", wan("vace_patch_embedding.weight", "vace_blocks.0.ffn.0.weight", in_dim=16), ""),
    "Fun-Camera 2.1": ("a Wan Fun-Camera model", wan("control_adapter.conv.weight", *I2V_KEYS, in_dim=32), ""),
    "Fun-Camera 2.2": ("a Wan Fun-Camera model", wan("control_adapter.conv.weight", in_dim=36), ""),
    "S2V": (
        "a Wan2.2 speech-to-video model (S2V)",
        wan("casual_audio_encoder.encoder.final_linear.weight", "audio_injector.injector.0.q.weight"),
        "",
    ),
    "HuMo": ("a HuMo or other audio-driven model", wan("audio_proj.audio_proj_glob_1.layer.bias", in_dim=36), ""),
    "Animate": (
        "a Wan2.2 Animate model",
        wan("face_adapter.fuser_blocks.0.k_norm.weight", "motion_encoder.x", *I2V_KEYS, in_dim=36),
        "",
    ),
    "I2V": ("a Wan2.1 image-to-video model (I2V)", wan(*I2V_KEYS, in_dim=36), ""),
    "I2V of diffusers": (
        "a Wan2.1 image-to-video model (I2V)",
        {
            **DIFFUSERS,
            "condition_embedder.image_embedder.norm1.weight": torch.zeros(1280),
            "blocks.0.attn2.add_k_proj.weight": torch.zeros(96, 96),
        },
        "",
    ),
    "I2V of diffusers, one shard": (
        "a Wan2.1 image-to-video model (I2V)",
        {**DIFFUSERS, "blocks.0.attn2.add_k_proj.weight": torch.zeros(96, 96)},
        "",
    ),
    "FLF2V": ("a Wan2.1 first-last-frame model (FLF2V)", wan("img_emb.emb_pos", *I2V_KEYS, in_dim=36), ""),
    "FLF2V of diffusers": (
        "a Wan2.1 first-last-frame model (FLF2V)",
        {
            **DIFFUSERS,
            "condition_embedder.image_embedder.pos_embed": torch.zeros(1, 514, 1280),
            "condition_embedder.image_embedder.norm1.weight": torch.zeros(1280),
        },
        "",
    ),
    "Fun-Control 2.1": ("a Wan2.1 image-to-video model (I2V)", wan(*I2V_KEYS, in_dim=48), ""),
    "Fun-Control, reference": ("a Wan Fun-Control model", wan("ref_conv.weight", in_dim=48), ""),
    "Fun-Control, 48/16": ("a Wan Fun-Control model", wan(in_dim=48), ""),
    "SkyReels-V2-I2V": (
        "a SkyReels-V2 image-to-video model (I2V)",
        wan("fps_embedding.weight", "fps_projection.0.weight", in_dim=36),
        "",
    ),
    "36/16": ("an image-to-video model without an image encoder (Wan2.2 I2V-A14B or Wan Fun-InP)", wan(in_dim=36), ""),
    "32/16": ("a Wan2.2 Fun-Camera model", wan(in_dim=32), ""),
    "SLA": (
        "a TurboDiffusion model with sparse-linear attention (SLA)",
        wan("blocks.0.self_attn.attn_op.local_attn.proj_l.weight"),
        "",
    ),
    "VSA": ("a FastWan model with video sparse attention (VSA)", wan("blocks.0.to_gate_compress.weight"), ""),
    "TAEW2.1": ("TAEW2.1, the tiny decoder of previews", taew(16), "vae"),
    "TAEW2.2": ("the tiny decoder of another model (TAEHV)", taew(48), "vae"),
    "image VAE": ("the VAE of an image model", IMAGE, "vae"),
    "T5": ("a T5 text encoder (of Flux or Stable Diffusion 3)", T5, "text_encoder"),
    "CLIP": ("the image encoder (CLIP) of image-to-video models", CLIP, "text_encoder"),
    "CLIP of ComfyUI": ("the image encoder (CLIP) of image-to-video models", COMFY_CLIP, ""),
    "LoRA": ("a LoRA", lora("diffusion_model.", "lora_A", "lora_B"), ""),
    "LoRA of kohya": ("a LoRA", lora("lora_unet_", "lora_down", "lora_up"), ""),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose parts are good."""
    return random_wan.official(tmp_path_factory.mktemp("official") / "Wan2.1-T2V-tiny")


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def assert_refused(path: Path, name: str, part: str, model: Path, reads: list[str], capsys) -> None:
    """By everybody who could be given the file for this part; and `miga info` says what it is."""
    loads = {"": load_transformer, "vae": load_vae, "text_encoder": load_text_encoder}
    calls: list[Callable[[], object]] = [lambda: loads[part](path)]
    if part:
        calls += [lambda: Engine.from_pretrained(str(model), "cpu", **{part: str(path)})]
    else:
        calls += [
            lambda: Engine.from_pretrained(str(path), "cpu"),
            lambda: Engine.from_pretrained(str(model), "cpu", transformer=str(path)),
        ]
    for call in calls:
        sentence = refusal(call, CheckpointError)
        assert sentence.startswith(f"{path} is {name}")
        assert ", and not a " in sentence
        assert ": give " in sentence
        assert not reads
    assert main(["info", str(path)]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert rows["what it is"].strip().startswith(name)
    assert "give " in rows["how it is used"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_refused_by_its_name(tmp_path: Path, model: Path, reads: list[str], capsys, kind: str) -> None:
    name, tensors, part = KINDS[kind]
    assert_refused(saved(tmp_path / "a.safetensors", tensors), name, part, model, reads, capsys)


@pytest.mark.parametrize("kind", ["VACE", "I2V", "I2V of diffusers", "36/16", "SkyReels-V2-I2V"])
def test_a_prefix_and_another_format_change_nothing(
    tmp_path: Path, model: Path, reads: list[str], capsys, kind: str
) -> None:
    name, tensors, part = KINDS[kind]
    prefixed = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
    torch.save({"generator": prefixed}, tmp_path / "a.pt")
    assert_refused(saved(tmp_path / "a.safetensors", prefixed), name, part, model, reads, capsys)
    assert_refused(tmp_path / "a.pt", name, part, model, reads, capsys)


@pytest.mark.parametrize(
    "file",
    [
        "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "wan2.2_t2v_low_noise_14B_fp16.safetensors",
        "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors",
        "Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors",
        "Wan2.2-T2V-A14B-HighNoise.safetensors",
    ],
)
def test_one_expert_alone_is_told_by_its_name(tmp_path: Path, model: Path, reads: list[str], file: str) -> None:
    """Two of them are a model: tests/models/test_experts.py."""
    path, noise = saved(tmp_path / file, WAN), "low" if "low" in file.lower() else "high"
    calls: list[Callable[[], object]] = [
        lambda: load_transformer(path),
        lambda: Engine.from_pretrained(str(path), "cpu"),
        lambda: Engine.from_pretrained(str(model), "cpu", transformer=str(path)),
    ]
    for call in calls:
        sentence = refusal(call, CheckpointError)
        assert sentence.startswith(
            f"{path} is one of the two networks of Wan2.2 T2V-A14B, that for {noise} noise, and "
        )
        assert ": give that for " in sentence
        assert not reads


def test_a_transformer_that_is_told_the_rate_is_one(tmp_path: Path) -> None:
    kind = kind_of(open_checkpoint(saved(tmp_path / "a.safetensors", wan("fps_embedding.weight"))))
    assert kind is not None
    assert (kind.part, kind.name.partition(" text")[0]) == ("transformer", "a SkyReels-V2-DF")


@pytest.mark.parametrize(
    "file",
    ["wan2.1_t2v_1.3B_fp16", "Wan2.1-highres", "Wan2.2-lowvram", "low", "noise", "Wan2.1_low", "SkyReels-V2-DF-14B"],
)
def test_other_names_tell_of_no_expert(tmp_path: Path, file: str) -> None:
    kind = kind_of(open_checkpoint(saved(tmp_path / f"{file}.safetensors", WAN)))
    assert kind is not None
    assert kind.part == "transformer"


def test_a_good_part_in_the_place_of_another_is_refused(tmp_path: Path, model: Path, reads: list[str]) -> None:
    """It is no kind of its own: the keys that are missed are named."""
    for load, file, what in (
        (load_transformer, random_wan.VAE, "a Wan2.1 transformer"),
        (load_vae, random_wan.TEXT_ENCODER, "a Wan VAE"),
        (load_text_encoder, random_wan.TRANSFORMER, "a UMT5 text encoder"),
    ):
        sentence = refusal(lambda load=load, file=file: load(model / file), CheckpointError)
        assert f"{file} does not hold {what} (no " in sentence
    lora_file = saved(tmp_path / "lora.safetensors", KINDS["LoRA"][1])
    assert "is a LoRA, and not a Wan VAE: give it with --lora" in refusal(lambda: load_vae(lora_file))
    sentence = refusal(lambda: load_vae(model / random_wan.VAE, decoder="tae"), CheckpointError)
    assert "is a Wan2.1 VAE, and not TAEW2.1, the tiny decoder of previews: give it with --vae, and TAEW2.1" in sentence
    assert not reads


GOOD = {"wan_dit": "transformer", "wan_vae": "vae", "umt5": "text_encoder", "taew2_1": "tae",
        "rolling_forcing": "transformer"}  # fmt: skip
TINY = {random_wan.TRANSFORMER: "transformer", random_wan.VAE: "vae", random_wan.TEXT_ENCODER: "text_encoder"}
FILES = [file for folder in (GOLDENS, WEIGHTS_DIR) for file in sorted(folder.rglob("*")) if format_of(file) is not None]


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(file.parts[-3:]))
def test_good_files_are_what_they_are(file: Path, reads: list[str]) -> None:
    kind = kind_of(open_checkpoint(file))
    is_ours = file.is_relative_to(WEIGHTS_DIR)
    part = TINY.get(file.name) if is_ours else GOOD.get(file.relative_to(GOLDENS).parts[0])
    if file.name == "io.safetensors":
        part = None
    assert part == (kind.part if kind is not None else None)
    assert not reads


def test_the_parts_of_every_layout_are_what_they_are(tmp_path: Path) -> None:
    for part, tensors in (
        ("transformer", {f"model.diffusion_model.{key}": value for key, value in WAN.items()}),
        ("transformer", DIFFUSERS),
        ("transformer", random_wan.scaled_fp8(WAN)),
        ("vae", DIFFUSERS_VAE),
        ("transformer", TI2V),
        ("vae", VAE22),
        ("vae", {f"vae.{key}": value for key, value in VAE22.items()}),
        ("vae", {random_wan.diffusers_vae_name(key): value for key, value in VAE22.items()}),
        ("vae", {f"first_stage_model.{key}": value for key, value in VAE.items()}),
        ("text_encoder", UMT5),
        ("text_encoder", {f"text_encoders.umt5xxl.transformer.{key}": value for key, value in UMT5.items()}),
        ("text_encoder", random_wan.scaled_fp8(UMT5)),
        ("tae", taew(16)),
        ("lora", KINDS["LoRA"][1]),
    ):
        kind = kind_of(open_checkpoint(saved(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors", tensors)))
        assert kind is not None
        assert kind.part == part


def test_parts_of_wan22_ti2v_are_told_by_their_names_and_channels(tmp_path: Path, reads: list[str], capsys) -> None:
    for name, part, channels, tensors in (
        ("the transformer of Wan2.2 TI2V-5B", "transformer", 48, TI2V),
        ("the VAE of Wan2.2 TI2V-5B", "vae", 48, VAE22),
        ("a Wan2.1 text-to-video transformer", "transformer", 16, WAN),
        ("a Wan2.1 VAE", "vae", 16, VAE),
    ):
        file = saved(tmp_path / f"{name.replace('/', ' ')}.safetensors", tensors)
        kind = kind_of(open_checkpoint(file))
        assert kind is not None
        assert (kind.name, kind.part, kind.channels) == (name, part, channels)
        assert main(["info", str(file)]) == 0
        said = capsys.readouterr().out
        assert f" {name}\n" in said
        assert "give it " in said
    assert not reads
