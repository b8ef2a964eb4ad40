"""Every layout loads to the same networks, and every broken one is refused with a sentence that says what to do."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import golden_model
import places
import pytest
import torch
from places import GOLDENS
from safetensors.torch import load_file, save_file

from miga_engine.errors import CheckpointError
from miga_engine.models import load_bundle, load_text_encoder, load_tokenizer, load_transformer, load_vae
from miga_engine.models.convert import convert
from miga_engine.models.wan.tokenizer import WAN_DEFAULT_NEGATIVE_PROMPT

DIT_FILE = GOLDENS / "wan_dit" / "official" / "diffusion_pytorch_model.safetensors"
VAE_FILE = GOLDENS / "wan_vae" / "official" / "Wan2.1_VAE.safetensors"
T5_FILE = GOLDENS / "umt5" / "official" / "models_t5_tiny.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """An official Wan2.1 folder: the VAE and the text encoder in torch's own format."""
    root = tmp_path / "Wan2.1-T2V-tiny"
    (root / "google" / "umt5-xxl").mkdir(parents=True)
    for file in (DIT_FILE, DIT_FILE.parent / "config.json"):
        shutil.copy(file, root)
    torch.save(load_file(VAE_FILE), root / "Wan2.1_VAE.pth")
    torch.save(load_file(T5_FILE), root / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copy(GOLDENS / "umt5" / "tokenizer" / "tokenizer.json", root / "google" / "umt5-xxl")
    return root


@pytest.fixture
def diffusers(tmp_path: Path) -> Path:
    """The same model as a Diffusers folder."""
    root = golden_model.build_diffusers(tmp_path / "Wan2.1-T2V-tiny-Diffusers")
    edit_json(root / "transformer" / "config.json", text_len=16)
    return root


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(path: Path, edit: Callable[[Tensors], None], source: Path = DIT_FILE) -> None:
    tensors = load_file(source)
    edit(tensors)
    save_file(tensors, path)


def shard(root: Path, num_shards: int = 3) -> Path:
    """Replace the transformer file by shards with an index."""
    single = root / "diffusion_pytorch_model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(num_shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{num_shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::num_shards]}, root / file)
        weight_map |= dict.fromkeys(names[i::num_shards], file)
    index = root / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_official_and_diffusers_folders_hold_the_same_model(official: Path, diffusers: Path) -> None:
    ours, theirs = load_bundle(official), load_bundle(diffusers)
    assert ours.transformer.config == theirs.transformer.config
    assert ours.text_encoder.config == theirs.text_encoder.config
    assert ours.vae.config.statistics() == theirs.vae.config.statistics()
    for name in ("transformer", "vae", "text_encoder"):
        assert same_weights(getattr(ours, name), getattr(theirs, name))
    prompts = ["a corgi", "the quick brown fox"]
    assert torch.equal(ours.encode_prompts(prompts), theirs.encode_prompts(prompts))


@pytest.mark.slow
def test_networks_load_by_root_component_folder_and_file(official: Path, diffusers: Path) -> None:
    for load, name, file in (
        (load_transformer, "transformer", DIT_FILE),
        (load_vae, "vae", VAE_FILE),
        (load_text_encoder, "text_encoder", T5_FILE),
    ):
        reference = load(official)
        assert not any(p.requires_grad for p in reference.parameters())
        assert not reference.training
        for path in (diffusers, diffusers / name, next((diffusers / name).glob("*.safetensors")), file, str(file)):
            assert same_weights(load(path), reference)


def test_shards_load_with_and_without_their_index(official: Path) -> None:
    reference = load_transformer(official)
    index = shard(official)
    assert same_weights(load_transformer(official), reference)
    assert same_weights(load_transformer(index), reference)
    index.unlink()
    assert same_weights(load_transformer(official), reference)


def test_single_file_needs_no_config(tmp_path: Path) -> None:
    from miga_engine.models.wan.dit import WanDiT, WanDiTConfig

    torch.manual_seed(0)
    model = WanDiT(WanDiTConfig(256, 96, 32, 2, 1, 24, 512, 16, 16))
    prefixed = {"model.diffusion_model." + key: value for key, value in model.state_dict().items()}
    save_file(prefixed, tmp_path / "wan.safetensors")
    loaded = load_transformer(tmp_path / "wan.safetensors")
    assert loaded.config == model.config
    assert same_weights(loaded, model)
    bundle_refusal = r"holds no text encoder weights \(none of .*\): give an official or Diffusers Wan2\.1 folder"
    with pytest.raises(CheckpointError, match=bundle_refusal):
        load_bundle(tmp_path / "wan.safetensors")


@pytest.mark.slow
def test_dtype_is_cast_on_arrival(official: Path) -> None:
    transformer = load_transformer(official, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in transformer.state_dict().items()}
    assert all((dtypes[name] == torch.float32) == transformer.keeps_fp32(name) for name in dtypes)
    assert load_vae(official).dtype == torch.float32
    edit_tensors(official / DIT_FILE.name, lambda t: t.update({k: v.half() for k, v in t.items()}))
    assert load_transformer(official).dtype == torch.float16
    bundle = load_bundle(official, dtype=torch.bfloat16)
    assert bundle.dtype == torch.bfloat16
    assert bundle.encode_prompts(["a"]).dtype == torch.bfloat16
    assert bundle.vae.dtype == torch.float32


@pytest.mark.slow
def test_bundle_states_the_facts_of_the_model(official: Path) -> None:
    bundle = load_bundle(official)
    assert (bundle.latent_channels, bundle.spatial_factor, bundle.frame_ratio, bundle.size_multiple) == (16, 8, 4, 16)
    assert (bundle.prediction_type, bundle.window_frames, bundle.extra) == ("velocity", 21, {})
    assert bundle.default_negative_prompt == WAN_DEFAULT_NEGATIVE_PROMPT
    assert [bundle.num_video_frames(n) for n in (1, 2, 21)] == [1, 5, 81]
    assert [bundle.num_latent_frames(n) for n in (1, 2, 5, 6, 81)] == [1, 2, 2, 3, 21]
    assert [bundle.first_video_frame(n) for n in (0, 1, 2)] == [0, 1, 5]
    (official / "miga.json").write_text(json.dumps({"window_frames": 13, "default_negative_prompt": "", "fps": 12}))
    bundle = load_bundle(official)
    assert (bundle.window_frames, bundle.default_negative_prompt, bundle.extra["fps"]) == (13, "", 12)


def test_prompts_are_encoded_alone_and_padded_with_zeros(official: Path) -> None:
    bundle = load_bundle(official)
    golden = load_file(GOLDENS / "umt5" / "io.safetensors")
    embedded = bundle.encode_prompts(["", "A fluffy  Corgi\tdog\n trots   happily."])
    assert embedded.shape == (2, 15, 32)
    assert (embedded[0, 1:] == 0).all()
    assert torch.equal(embedded[0, :1], bundle.encode_prompts([""])[0])
    torch.testing.assert_close(embedded[1], golden["prompt_context_0"], rtol=0, atol=1e-5)
    bundle.release_text_encoder()
    assert torch.equal(bundle.encode_prompts([""])[0], embedded[0, :1])


def test_weights_are_off_the_file(official: Path) -> None:
    file = official / DIT_FILE.name
    transformer = load_transformer(official)
    before = transformer.patch_embedding.weight.clone()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(transformer.patch_embedding.weight, before)


@pytest.mark.slow
def test_import_needs_torch_only() -> None:
    code = (
        "import sys, miga_engine.models\n"
        "heavy = {'diffusers', 'transformers', 'tokenizers', 'ftfy', 'safetensors', 'einops'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=places.ROOT)


def pop(key: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        del tensors[key]

    return edit


def put(key: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (pop("blocks.1.ffn.0.bias"), r"lacks blocks\.1\.ffn\.0\.bias \[192\]: give the complete weights"),
        (
            pop("patch_embedding.weight"),
            r"does not hold a Wan2\.1 transformer \(no patch_embedding\.weight in it\): give",
        ),
        (pop("head.head.weight"), r"lacks head\.head\.weight, from which the model's size is read: give the complete"),
        (
            put("img_emb.proj", 3, 4),
            r"is a Wan2\.1 image-to-video model \(I2V\), and not a Wan2\.1 text-to-video transformer: give a Wan2",
        ),
        (
            put("blocks.0.self_attn.q.weight", 96, 48),
            r"holds blocks\.0\.self_attn\.q\.weight as \[96, 48\] where the model has \[96, 96\]: give weights",
        ),
        (
            put("patch_embedding.weight", 96, 64),
            r"holds patch_embedding\.weight as \[96, 64\] where the model has 5 dimensions: give weights of a Wan",
        ),
        (
            lambda t: t.update({k: v.to(torch.float64) for k, v in t.items()}),
            r"stores float64, in which it cannot run: choose a dtype like bfloat16$",
        ),
    ],
)
def test_wrong_tensors(official: Path, edit: Callable[[Tensors], None], message: str) -> None:
    edit_tensors(official / DIT_FILE.name, edit)
    with pytest.raises(CheckpointError, match=rf"diffusion_pytorch_model\.safetensors {message}") as raised:
        load_transformer(official)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "i2v"}, r"belongs to a i2v model: give a Wan2\.1 text-to-video model$"),
        ({"num_layers": 3}, r"lacks blocks\.2\.modulation \[1, 6, 96\] and \d+ more: give the complete weights"),
        ({"ffn_dim": 256}, r"holds blocks\.0\.ffn\.0\.weight as \[192, 96\] where the model has \[256, 96\]"),
        ({"num_heads": 5}, r"do not describe a model \(a width of 96 does not split into 5 heads"),
        ({"num_heads": 0}, r"says num_heads 0, where its weights allow whole numbers from 1 to \d+: give weights and"),
        ({"dim": "wide"}, r"config\.json .* says dim 'wide', where its weights allow whole numbers from 1 to"),
        ({"_class_name": "Other"}, r"does not tell its number of heads and its width of 96 .*: put its config\.json"),
    ],
)
def test_config_that_does_not_fit(official: Path, changes: dict[str, object], message: str) -> None:
    edit_json(official / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_transformer(official)


def test_diffusers_files_are_blamed_by_their_own_keys(diffusers: Path) -> None:
    file = next((diffusers / "transformer").glob("*.safetensors"))
    edit_tensors(file, put("blocks.0.attn1.to_out.0.weight", 96, 48), source=file)
    with pytest.raises(
        CheckpointError, match=r"holds blocks\.0\.attn1\.to_out\.0\.weight as \[96, 48\] where the model"
    ):
        load_transformer(diffusers)


def test_unreadable_json(official: Path) -> None:
    (official / "config.json").write_text('{"dim": ')
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON \(.*\): download it again$"):
        load_transformer(official)
    (official / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json holds no JSON object: download it again$"):
        load_transformer(official)


@pytest.mark.parametrize("kept", [4, 1000, 500_000])
def test_cut_files(official: Path, kept: int) -> None:
    for name, load in ((DIT_FILE.name, load_transformer), ("Wan2.1_VAE.pth", load_vae)):
        file = official / name
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(CheckpointError, match=rf"{name} is cut short.*: download it again$") as raised:
            load(official)
        assert "\n" not in str(raised.value)


def test_missing_and_wrong_places(official: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist: give a model folder or a weights file$"):
        load_bundle(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for load, what in ((load_transformer, "transformer"), (load_vae, "vae"), (load_text_encoder, "text encoder")):
        with pytest.raises(
            CheckpointError, match=rf"empty holds no {what} weights \(none of .*\): give an official or"
        ):
            load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"does not hold a Wan VAE \(no decoder\.conv1\.weight or .*\): give"):
        load_vae(DIT_FILE)
    with pytest.raises(CheckpointError, match=r"does not hold a UMT5 text encoder \(no token_embedding\.weight or"):
        load_text_encoder(VAE_FILE)
    (official / "weights.npz").touch()
    with pytest.raises(CheckpointError, match=r"weights\.npz is no known weights file: give a \.safetensors, "):
        load_transformer(official / "weights.npz")


def test_pickles_of_other_things(tmp_path: Path) -> None:
    file = tmp_path / "Wan2.1_VAE.pth"
    torch.save({"state_dict": load_file(VAE_FILE)}, file)
    assert same_weights(load_vae(file), load_vae(VAE_FILE))
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match=r"is not a table of named tensors: give the model's weights file$"):
        load_vae(file)


def test_indexes_stay_in_their_folder(official: Path) -> None:
    index = shard(official)
    good = json.loads(index.read_text())["weight_map"]
    for name in ("../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors"):
        index.write_text(json.dumps({"weight_map": good | {"head.head.bias": name}}))
        with pytest.raises(CheckpointError, match=r"index\.json points outside its folder, at .*: use an index that"):
            load_transformer(official)
    index.write_text(json.dumps({"weight_map": good | {"head.head.bias": "absent.safetensors"}}))
    with pytest.raises(
        CheckpointError, match=r"index\.json names absent\.safetensors, which is not in .*: download the"
    ):
        load_transformer(official)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json names no files in a weight_map: download it again$"):
        load_transformer(official)


@pytest.mark.slow
@pytest.mark.parametrize("component", ["DIT", "VAE", "tokenizer"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is (empty|not a readable tokenizer .*): download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is only Git LFS's pointer"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page, and not the file"),
    ],
)
def test_downloads_that_went_wrong_are_named_as_such(
    official: Path, component: str, content: bytes, sentence: str
) -> None:
    names = {"DIT": DIT_FILE.name, "VAE": "Wan2.1_VAE.pth", "tokenizer": "google/umt5-xxl/tokenizer.json"}
    (official / names[component]).write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_bundle(official).tokenizer  # noqa: B018
    assert names[component] in str(caught.value)


def test_a_description_of_two_networks_with_one_there_is_refused(diffusers: Path) -> None:
    (diffusers / "model_index.json").write_text('{"boundary_ratio": 0.875}')
    for load in (load_transformer, load_bundle):
        with pytest.raises(CheckpointError, match=r"one of the two networks of Wan2\.2 T2V-A14B, that for high noise"):
            load(diffusers)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_converting_keeps_what_is_used_in_float32(official: Path, diffusers: Path, tmp_path: Path, prefix: str) -> None:
    """By the network's own rule, under whatever keys; of the VAE everything."""
    source = tmp_path / "source.safetensors"
    save_file({prefix + key: value for key, value in load_file(DIT_FILE).items()}, source)
    files = [source, diffusers / "transformer" / "diffusion_pytorch_model.safetensors"]
    expected = load_transformer(official, dtype=torch.bfloat16).state_dict()
    for file in files:
        out = tmp_path / "out" / file.name
        out.parent.mkdir(exist_ok=True)
        convert(file, out, torch.bfloat16)
        if file is not source:
            shutil.copy(file.parent / "config.json", out.parent)
        loaded = load_transformer(out, dtype=torch.bfloat16).state_dict() if file is not source else load_file(out)
        for key, value in expected.items():
            assert torch.equal(loaded[(prefix if file is source else "") + key], value), key
    convert(VAE_FILE, tmp_path / "vae.safetensors", torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "vae.safetensors").values())


def test_a_prompt_that_is_cut_is_said_with_the_words(official: Path, caplog) -> None:
    tokenizer = load_tokenizer(official, text_len=8)
    ids, _ = tokenizer(["a red balloon over snowy hills at dawn and a kite"])
    assert ids.shape == (1, 8)
    assert "tokens and the text encoder reads 7: it is cut behind" in caplog.text
    caplog.clear()
    tokenizer(["a"])
    assert not caplog.text
