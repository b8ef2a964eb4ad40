"""The parts of a model are found where people have them: in makers' folders, in ComfyUI's tree, or each apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import golden_model
import pytest
import random_wan
import torch
from refusals import refusal
from runs_code import RunsCode
from safetensors.torch import load_file, save_file
from torch import Tensor

from miga_engine import Engine
from miga_engine.errors import CheckpointError
from miga_engine.models import load_text_encoder, load_tokenizer, load_transformer, load_vae
from miga_engine.models.wan.spiece import spiece_of_gguf
from miga_engine.weights.safetensors import SafetensorsCheckpoint

WAN = random_wan.transformer()
TOKENIZER = str(random_wan.TOKENIZER)
DIT = "wan2.1_t2v_1.3B_fp16.safetensors"


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def i2v(path: Path) -> Path:
    return saved(path, {**WAN, "img_emb.proj.0.bias": torch.zeros(8)})


def spiece() -> bytes:
    """A vocabulary of letters."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    pieces = ["<pad>", "</s>", "<unk>", *letters]
    return spiece_of_gguf(
        {
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": [0.0] * 3 + [-float(i) for i in range(len(letters))],
            "tokenizer.ggml.token_type": [3, 3, 2] + [1] * len(letters),
        },
        "a test",
    )


def with_vocabulary(path: Path) -> Path:
    """A text encoder's file as ComfyUI has it, with its tokenizer inside."""
    vocabulary = torch.tensor(list(spiece()), dtype=torch.uint8)
    return saved(path, {**random_wan.text_encoder("hf"), "spiece_model": vocabulary})


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    """A ComfyUI folder, of which a text encoder holds the tokenizer."""
    folder = random_wan.comfy(tmp_path / "ComfyUI")
    with_vocabulary(folder / "models" / "text_encoders" / "umt5_xxl_fp16.safetensors")
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_wan.official(tmp_path_factory.mktemp("official") / "Wan2.1-T2V-tiny")


def starts(path: Path | None, **parts: object) -> Engine:
    """An engine with all parts, whose weights are those of the random Wan."""
    given = {name: str(part) for name, part in parts.items()}
    engine = Engine.from_pretrained(*([str(path)] if path else []), device="cpu", **given)
    for key, value in engine.bundle.transformer.state_dict().items():
        torch.testing.assert_close(value, WAN[key], rtol=2e-3, atol=1e-4)
    assert torch.equal(engine.bundle.vae.state_dict()["conv2.weight"], random_wan.vae()["conv2.weight"])
    assert engine.bundle.encode_prompts(["a corgi"]).shape[-1] == random_wan.CONFIG.text_dim
    return engine


@pytest.mark.parametrize(
    "place",
    ["", "models", "models/diffusion_models", f"models/diffusion_models/{DIT}"],
    ids=["ComfyUI", "models", "folder", "file"],
)
def test_a_comfyui_tree_starts_from_each_of_its_places(comfy: Path, place: str) -> None:
    engine = starts(comfy / place)
    assert engine.bundle.tokenizer(["ab"])[0].tolist() == [[3, 4, 5, 1]]


@pytest.mark.slow
def test_a_comfyui_tree_makes_the_video_of_the_official_folder(comfy: Path, official: Path) -> None:
    first, second = (
        Engine.from_pretrained(str(path), "cpu", preset="wan2.1-4step", tokenizer=TOKENIZER)
        .generate("a corgi", num_frames=9, height=16, width=32)
        .frames
        for path in (official, comfy)
    )
    assert first.shape == (9, 16, 32, 3)
    assert (first.int() - second.int()).abs().float().mean() < 2  # of weights in float16


def test_folders_within_comfyui_s_are_looked_into(comfy: Path) -> None:
    models = comfy / "models"
    for part in ("diffusion_models", "text_encoders", "vae"):
        (file,) = (models / part).iterdir()
        (models / part / "Wan" / "2.1").mkdir(parents=True)
        file.rename(models / part / "Wan" / "2.1" / file.name)
    for place in (comfy, models, models / "diffusion_models" / "Wan" / "2.1" / DIT):
        starts(place)


def test_older_names_of_comfyui_s_folders_are_known(comfy: Path) -> None:
    models = comfy / "models"
    (models / "diffusion_models").rename(models / "unet")
    (models / "text_encoders").rename(models / "clip")
    for place in (comfy, models, models / "unet" / DIT):
        starts(place)


def test_both_names_of_a_folder_count(comfy: Path) -> None:
    models = comfy / "models"
    for old, new in (("unet", "diffusion_models"), ("clip", "text_encoders")):
        (models / old).mkdir()
        for file in (models / new).iterdir():
            file.rename(models / old / file.name)
    starts(comfy)


def test_a_flat_folder_of_comfyui_s_names_starts(comfy: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (comfy / "models").rglob("*.safetensors"):
        file.rename(flat / file.name)
    for place in (flat, flat / DIT):
        starts(place)


@pytest.mark.parametrize("place", ["", "models"])
def test_of_several_text_encoders_and_vaes_the_largest_counts(comfy: Path, place: str) -> None:
    models = comfy / "models"
    hf, vae = random_wan.text_encoder("hf"), random_wan.vae()
    saved(models / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", random_wan.scaled_fp8(hf))
    saved(models / "text_encoders" / "aumt5_bf16.safetensors", {key: value.bfloat16() for key, value in hf.items()})
    saved(models / "vae" / "Wan2_1_VAE_bf16.safetensors", {key: value.bfloat16() for key, value in vae.items()})
    saved(models / "vae" / "zvae.safetensors", {key: value.half() for key, value in vae.items()})
    engine = starts(comfy / place)
    assert torch.equal(engine.bundle.text_encoder.state_dict()["token_embedding.weight"], hf["shared.weight"])


@pytest.mark.parametrize("place", ["", "models"])
def test_vaes_and_text_encoders_of_other_models_beside_are_passed_over(comfy: Path, place: str) -> None:
    models = comfy / "models"
    image = {"decoder.conv_in.weight": torch.zeros(512, 16, 3, 3), "encoder.conv_in.weight": torch.zeros(128, 3, 3, 3)}
    saved(models / "vae" / "ae.safetensors", {**image, "x": torch.zeros(10**6)})
    t5 = {k: v for k, v in random_wan.text_encoder("hf").items() if "attention_bias" not in k or "block.0" in k}
    saved(models / "text_encoders" / "t5xxl_fp16.safetensors", {**t5, "x": torch.zeros(10**6)})
    saved(models / "text_encoders" / "clip_l.safetensors", {"text_model.embeddings.weight": torch.zeros(77, 768)})
    starts(comfy / place)


@pytest.mark.parametrize("place", ["", "models"])
@pytest.mark.parametrize("names", [("wan_2.1_vae", "wan2.2_vae"), ("Wan2_1_fp32", "Wan2_2_fp32")])
def test_of_two_vaes_the_one_for_the_transformers_latents_counts(comfy: Path, place: str, names: tuple) -> None:
    """Whichever is larger, and wherever the transformer lies."""
    dit, vae = comfy / "models" / "diffusion_models", comfy / "models" / "vae"
    next(vae.iterdir()).rename(vae / f"{names[0]}.safetensors")
    saved(vae / f"{names[1]}.safetensors", random_wan.vae("ti2v"))
    ti2v = saved(comfy / "wan2.2_ti2v_5B_fp16.safetensors", random_wan.transformer(kind="ti2v"))
    assert starts(comfy / place).bundle.latent_channels == 16
    named = Engine.from_pretrained(str(comfy / place), "cpu", transformer=str(ti2v))
    next(dit.iterdir()).unlink()
    inside = Engine.from_pretrained(str(ti2v.rename(dit / ti2v.name)), "cpu")
    assert named.bundle.latent_channels == inside.bundle.latent_channels == 48


@pytest.mark.parametrize("place", ["", "models"])
def test_a_name_alone_does_not_make_a_vae_of_another_model_ours(comfy: Path, place: str) -> None:
    """Where ours is called something else."""
    vae = comfy / "models" / "vae"
    next(vae.iterdir()).rename(vae / "Wan2_1_fp32.safetensors")
    saved(vae / "sdxl_vae.safetensors", {"decoder.conv_in.weight": torch.zeros(512, 4, 3, 3)})
    starts(comfy / place)


def test_of_several_transformers_one_is_to_be_named(comfy: Path) -> None:
    folder = comfy / "models" / "diffusion_models"
    other = saved(folder / "wan2.1_t2v_14B_fp8.safetensors", WAN)
    i2v(folder / "wan2.1_i2v_480p_14B.safetensors")
    sentence = refusal(lambda: Engine.from_pretrained(str(comfy), "cpu"), CheckpointError)
    assert f"holds 2 text-to-video transformers ({DIT}, {other.name}): name one with --transformer" in sentence
    starts(comfy, transformer=other)
    starts(folder / DIT)


def spoil(path: Path) -> None:
    """Files that are often there, and some that cannot be read."""
    path.joinpath("put_diffusion_model_files_here").touch()
    path.joinpath("readme.md").write_text("x")
    path.joinpath("empty.safetensors").touch()
    path.joinpath("cut.safetensors").write_bytes(b"\xff" * 100)
    path.joinpath("page.safetensors").write_text("<!DOCTYPE html><html></html>")
    path.joinpath("lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    path.joinpath("cut.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)
    path.joinpath("loop.safetensors").symlink_to("loop.safetensors")
    path.joinpath("gone.safetensors").symlink_to("/nowhere/at/all.safetensors")
    path.joinpath("folder.safetensors").mkdir()
    torch.save(RunsCode(str(path / "ran")), path / "code.pt")
    saved(path / "other.safetensors", {"a.weight": torch.zeros(2, 2)})
    saved(path / "lora.safetensors", {f"blocks.0.ffn.0.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"})


def test_unrelated_and_damaged_files_beside_do_no_harm(comfy: Path) -> None:
    models = comfy / "models"
    for part in ("diffusion_models", "text_encoders", "vae"):
        spoil(models / part)
    for place in (comfy, models, models / "diffusion_models", models / "diffusion_models" / DIT):
        starts(place)
    assert not list(comfy.rglob("ran"))


def test_unrelated_and_damaged_files_in_a_flat_folder_do_no_harm(comfy: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (comfy / "models").rglob("*.safetensors"):
        file.rename(flat / file.name)
    spoil(flat)
    starts(flat)
    starts(flat / DIT)


def test_a_tree_without_a_transformer_of_use_names_what_is_there(comfy: Path) -> None:
    folder = comfy / "models" / "diffusion_models"
    (folder / DIT).unlink()
    file = i2v(folder / "wan2.1_i2v_480p_14B_fp16.safetensors")
    sentence = refusal(lambda: Engine.from_pretrained(str(comfy), "cpu"), CheckpointError)
    assert f"holds no transformer weights ({file.name} is a Wan2.1 image-to-video model (I2V)): give " in sentence
    shutil.rmtree(folder)
    folder.mkdir()
    sentence = refusal(lambda: Engine.from_pretrained(str(comfy), "cpu"), CheckpointError)
    assert "holds no transformer weights (none of " in sentence


@pytest.fixture
def diffusers(tmp_path: Path) -> Path:
    """A Diffusers folder of the goldens."""
    return golden_model.build_diffusers(tmp_path / "Wan2.1-T2V-tiny-Diffusers")


def test_makers_folders_start_as_before_whatever_lies_beside(official: Path, diffusers: Path, tmp_path: Path) -> None:
    copy = tmp_path / "official"
    shutil.copytree(official, copy)
    spoil(copy)
    spoil(diffusers / "vae")
    for path in (official, copy, copy / random_wan.TRANSFORMER):
        starts(path)
    engine = Engine.from_pretrained(str(diffusers), "cpu")
    assert engine.bundle.encode_prompts(["a corgi"]).shape[-1] == 32
    for load, part in ((load_transformer, "transformer"), (load_vae, "vae"), (load_text_encoder, "text_encoder")):
        assert load(diffusers).state_dict().keys() == load(diffusers / part).state_dict().keys()


def shards(folder: Path, stem: str = "model", number: int = 3) -> Path:
    """The transformer in several files; → their index."""
    names, weight_map = sorted(WAN), {}
    for i in range(number):
        file = saved(
            folder / f"{stem}-{i + 1:05}-of-{number:05}.safetensors", {name: WAN[name] for name in names[i::number]}
        )
        weight_map |= dict.fromkeys(names[i::number], file.name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_shards_of_every_name_load_with_and_without_their_index(official: Path, tmp_path: Path, stem: str) -> None:
    index = shards(tmp_path / "SkyReels", stem)
    rest = {"vae": official, "text_encoder": official, "tokenizer": official}
    for place in (index.parent, index):
        starts(place, **rest)
        starts(official, transformer=place)
    index.unlink()
    starts(index.parent, **rest)
    starts(official, transformer=index.parent)
    next(file for file in index.parent.iterdir() if "head.modulation" in load_file(file)).unlink()
    sentence = refusal(lambda: load_transformer(index.parent), CheckpointError)
    assert "SkyReels lacks " in sentence
    assert ": give the complete weights" in sentence


def test_a_single_model_safetensors_is_a_transformer_where_its_keys_are(official: Path, tmp_path: Path) -> None:
    saved(tmp_path / "SkyReels" / "model.safetensors", WAN)
    starts(tmp_path / "SkyReels", vae=official, text_encoder=official, tokenizer=official)
    saved(tmp_path / "text" / "model.safetensors", random_wan.text_encoder("hf"))
    assert "holds no transformer weights" in refusal(lambda: load_transformer(tmp_path / "text"), CheckpointError)


def apart(folder: Path) -> dict[str, Path]:
    """Every part alone in a folder of its own, under a name that says nothing."""
    return {
        "transformer": saved(folder / "1" / "a.safetensors", WAN),
        "vae": saved(folder / "2" / "b.sft", random_wan.vae()),
        "text_encoder": saved(folder / "3" / "c.safetensors", random_wan.text_encoder("hf")),
        "tokenizer": Path(shutil.copy(TOKENIZER, folder / "3" / "d.json")),
    }


def test_each_part_may_lie_apart(official: Path, tmp_path: Path) -> None:
    parts = apart(tmp_path)
    starts(None, **parts)
    starts(parts["transformer"], **{name: path for name, path in parts.items() if name != "transformer"})
    for name in parts:
        broken = tmp_path / f"without {name}"
        shutil.copytree(official, broken)
        shutil.rmtree(broken / "google") if name == "tokenizer" else (
            broken / {"transformer": random_wan.TRANSFORMER, "vae": random_wan.VAE}.get(name, random_wan.TEXT_ENCODER)
        ).unlink()
        starts(broken, **{name: parts[name]})
        starts(broken, **{name: official})
    (tmp_path / "spiece.model").write_bytes(spiece())
    engine = starts(None, **{**parts, "tokenizer": tmp_path / "spiece.model"})
    assert engine.bundle.tokenizer(["b"])[0].tolist() == [[3, 5, 1]]
    with_vocabulary(tmp_path / "with.safetensors")
    for text in ({"tokenizer": tmp_path / "with.safetensors"}, {"text_encoder": tmp_path / "with.safetensors"}):
        given = {**parts, **text}
        if "text_encoder" in text:
            del given["tokenizer"]
        assert starts(None, **given).bundle.tokenizer(["b"])[0].tolist() == [[3, 5, 1]]


def test_a_part_that_is_named_counts_and_not_the_one_of_the_folder(official: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other.safetensors", random_wan.transformer(seed=1))
    engine = Engine.from_pretrained(str(official), "cpu", transformer=str(other))
    assert torch.equal(
        engine.bundle.transformer.state_dict()["head.head.bias"], random_wan.transformer(seed=1)["head.head.bias"]
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_missing_part_is_said_with_its_flag_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(SafetensorsCheckpoint, "read", None)
    parts = apart(tmp_path)
    del parts[part]
    given = {name: str(path) for name, path in parts.items()}
    sentence = refusal(lambda: Engine.from_pretrained(device="cpu", **given), CheckpointError)
    assert f"holds no {part.replace('_', ' ')}" in sentence.replace("VAE", "vae")
    assert f"--{part.replace('_', '-')}" in sentence


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_part_that_a_tree_lacks_is_said_with_its_flag(comfy: Path, part: str) -> None:
    models = comfy / "models"
    if part == "tokenizer":
        saved(models / "text_encoders" / "umt5_xxl_fp16.safetensors", random_wan.text_encoder("hf"))
    else:
        shutil.rmtree(models / {"vae": "vae", "text_encoder": "text_encoders"}[part])
    sentence = refusal(lambda: Engine.from_pretrained(str(comfy), "cpu"), CheckpointError)
    assert f"--{part.replace('_', '-')}" in sentence
    if part == "tokenizer":
        starts(comfy, tokenizer=TOKENIZER)


LOADS: dict[str, Callable[[str], object]] = {
    "model": lambda path: Engine.from_pretrained(path, "cpu"),
    **{
        part: lambda path, part=part: Engine.from_pretrained("tiny", "cpu", **{part: path})
        for part in ("transformer", "vae", "text_encoder", "tokenizer")
    },
    "load_transformer": load_transformer,
    "load_vae": load_vae,
    "load_text_encoder": load_text_encoder,
    "load_tokenizer": load_tokenizer,
}


@pytest.mark.parametrize("name", LOADS)
def test_paths_that_lead_nowhere_are_refused(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "no" / "where.safetensors")
    sentence = refusal(lambda: LOADS[name](path), CheckpointError)
    assert path in sentence
    assert ": give " in sentence or ": download " in sentence
