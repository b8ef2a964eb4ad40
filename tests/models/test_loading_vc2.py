"""VideoCrafter2's model.ckpt loads strictly, as released and converted; every broken one is refused by a sentence."""

import json
import pickle
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from places import GOLDENS
from runs_code import RunsCode
from safetensors.torch import load_file, save_file
from test_models_vc2_text import merges, write_merges

from miga_engine.cli import main
from miga_engine.errors import CheckpointError
from miga_engine.models import loading
from miga_engine.models.videocrafter2.family import load_text_encoder, load_tokenizer, load_unet, load_vae, recognises
from miga_engine.models.videocrafter2.layouts import SCHEDULE_TABLES

PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.model.")
LOADERS = (load_unet, load_vae, load_text_encoder)
PUBLIC = (loading.load_transformer, loading.load_vae, loading.load_text_encoder)
Tensors = dict[str, torch.Tensor]


def schedule_tables() -> Tensors:
    """As latent diffusion registers them, from the linear schedule of VideoCrafter2."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = 1 - betas
    bars = np.cumprod(alphas)
    previous = np.append(1.0, bars[:-1])
    variance = betas * (1 - previous) / (1 - bars)
    tables = {
        "betas": betas,
        "alphas_cumprod": bars,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(bars),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bars),
        "log_one_minus_alphas_cumprod": np.log(1 - bars),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / bars),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bars - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - bars),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(alphas) / (1 - bars),
        "scale_arr": np.append(np.linspace(1.0, 0.7, 400), np.full(1000, 0.7)),
    }
    return {name: torch.tensor(table, dtype=torch.float32) for name, table in tables.items()}


@pytest.fixture(scope="module")
def released() -> Tensors:
    """The content of a model.ckpt made of the goldens' tiny networks."""
    networks = [load_file(GOLDENS / "vc2" / f"{name}.safetensors") for name in ("unet", "vae")]
    return schedule_tables() | networks[0] | networks[1] | load_file(GOLDENS / "openclip_text" / "text.safetensors")


@pytest.fixture(scope="module")
def ckpt(released: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ckpt(tmp_path_factory.mktemp("VideoCrafter2"), released)


def write_ckpt(folder: Path, tensors: Tensors) -> Path:
    file = folder / "model.ckpt"
    torch.save({"state_dict": tensors}, file)
    return file


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.mark.slow
def test_networks_load_by_file_and_folder(ckpt: Path, released: Tensors) -> None:
    for load, public, prefix in zip(LOADERS, PUBLIC, PREFIXES, strict=True):
        module = load(ckpt)
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
        assert all(torch.equal(value, released[prefix + key]) for key, value in module.state_dict().items())
        assert same_weights(load(ckpt.parent), module)
        assert same_weights(public(str(ckpt.parent)), module)
    assert load_text_encoder(ckpt).config.num_layers == 3  # the last of four is not used
    assert load_vae(ckpt).decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_single_networks_load_from_their_file() -> None:
    assert load_unet(GOLDENS / "vc2" / "unet.safetensors").config.model_channels == 32
    assert load_vae(GOLDENS / "vc2" / "vae.safetensors").config.dim == 32
    assert load_text_encoder(GOLDENS / "openclip_text" / "text.safetensors").config.vocab_size == 300


def test_a_model_is_told_by_its_keys(ckpt: Path, tmp_path: Path) -> None:
    assert recognises(ckpt)
    assert recognises(ckpt.parent)
    assert recognises(GOLDENS / "vc2" / "unet.safetensors")
    assert not recognises(GOLDENS / "vc2" / "vae.safetensors")
    assert not recognises(GOLDENS / "wan_dit" / "official")
    assert not recognises(GOLDENS / "vc2" / "meta.json")
    assert not recognises(tmp_path)
    assert not recognises(tmp_path / "nowhere")
    wan = load_file(GOLDENS / "wan_dit" / "official" / "diffusion_pytorch_model.safetensors")
    save_file({"model.diffusion_model." + key: value for key, value in wan.items()}, tmp_path / "wan.safetensors")
    assert not recognises(tmp_path)


@pytest.mark.slow
def test_dtypes(ckpt: Path, released: Tensors, tmp_path: Path) -> None:
    unet = load_unet(ckpt, dtype=torch.bfloat16)
    assert all((p.dtype == torch.float32) == unet.keeps_fp32(name) for name, p in unet.state_dict().items())
    assert load_text_encoder(ckpt, dtype=torch.float16).ln_final.weight.dtype == torch.float16
    assert {load(ckpt, "meta").dtype for load in (load_unet, load_vae)} == {torch.float32}
    halves = write_ckpt(tmp_path, {key: value.half() for key, value in released.items()})
    assert load_unet(halves).dtype == torch.float16
    assert load_text_encoder(halves).ln_final.weight.dtype == torch.float16
    assert load_vae(halves).dtype == torch.float32


def test_the_keys_are_those_of_the_release(released: Tensors) -> None:
    others = json.loads((GOLDENS / "vc2" / "other_ckpt_keys.json").read_text())
    assert others == {name: list(released[name].shape) for name in SCHEDULE_TABLES}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULE_TABLES)
def test_another_noise_schedule_is_refused(released: Tensors, tmp_path: Path, name: str) -> None:
    tables = {key: released[key] for key in SCHEDULE_TABLES}
    table = released[name].clone()
    table[500] += 3e-6 + 3e-6 * table[500].abs()
    file = write_ckpt(tmp_path, tables | {name: table})
    message = rf"model\.ckpt was trained with another noise schedule \({name}\[500\] is .*, the sampler's is .*\): give"
    with pytest.raises(CheckpointError, match=message):
        load_unet(file)
    table[500] = float("nan")
    with pytest.raises(CheckpointError, match=rf"{name}\[500\] is nan"):
        load_unet(write_ckpt(tmp_path, tables | {name: table}))
    with pytest.raises(
        CheckpointError, match=rf"holds {name} as \[3\] where VideoCrafter2 has \[1[04]00\]: give the mod"
    ):
        load_unet(write_ckpt(tmp_path, tables | {name: torch.zeros(3)}))


def edited(tensors: Tensors, **changes: torch.Tensor | None) -> Tensors:
    return {key: value for key, value in (tensors | changes).items() if value is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("load", "key", "value", "message"),
    [
        (
            load_vae,
            "model_ema.decay",
            torch.zeros(()),
            r"holds model_ema\.decay \[\], which VideoCrafter2 has no place",
        ),
        (
            load_unet,
            "betas2",
            torch.zeros(1),
            r"holds betas2 \[1\], which VideoCrafter2 has no place for: give its mod",
        ),
        (
            load_vae,
            "first_stage_model.loss.logvar",
            torch.zeros(1),
            r"holds first_stage_model\.loss\.logvar \[1\], which this model has no place for: give",
        ),
        (
            load_text_encoder,
            "cond_stage_model.model.visual.proj",
            torch.zeros(1),
            r"holds cond_stage_model\.model\.visual\.proj \[1\], which this model has no place for: give",
        ),
        (
            load_vae,
            "first_stage_model.quant_conv.bias",
            None,
            r"lacks quant_conv\.bias \[8\]: give the complete weights",
        ),
        (load_vae, "first_stage_model.encoder.conv_in.weight", None, r"lacks encoder\.conv_in\.weight, from which the"),
        (
            load_vae,
            "first_stage_model.encoder.conv_in.weight",
            torch.zeros(48, 3, 3, 3),
            r"holds first_stage_model\.encoder\.conv_in\.weight as \[48, 3, 3, 3\], where the model has a multiple of",
        ),
        (
            load_text_encoder,
            "cond_stage_model.model.ln_final.weight",
            torch.zeros(()),
            r"holds cond_stage_model\.model\.ln_final\.weight as \[\], where the model has a multiple of 64 fir",
        ),
        (
            load_text_encoder,
            "cond_stage_model.model.positional_embedding",
            torch.zeros(24, 32),
            r"positional_embedding as \[24, 32\] where the model has \[24, 64\]: give",
        ),
        (load_unet, "model.diffusion_model.out.2.bias", None, r"lacks out\.2\.bias \[4\]: give the complete weights"),
        (
            load_unet,
            "model.diffusion_model.input_blocks.0.0.weight",
            torch.zeros(32, 4, 3, 3, dtype=torch.float64),
            r"stores float64, in which it cannot run: choose a dtype like bfloat16$",
        ),
    ],
)
def test_wrong_tensors(
    released: Tensors,
    tmp_path: Path,
    load: Callable[[Path], object],
    key: str,
    value: torch.Tensor | None,
    message: str,
) -> None:
    file = write_ckpt(tmp_path, edited(released, **{key: value}))
    with pytest.raises(CheckpointError, match=message) as raised:
        load(file)
    assert "\n" not in str(raised.value)
    assert "config.json" not in str(raised.value)  # it has none


def test_missing_networks_and_wrong_places(ckpt: Path, tmp_path: Path) -> None:
    vae = GOLDENS / "vc2" / "vae.safetensors"
    with pytest.raises(
        CheckpointError, match=r"does not hold a VideoCrafter2 UNet \(no model\.diffusion_model\.\* in it"
    ):
        load_unet(vae)
    with pytest.raises(
        CheckpointError, match=r"does not hold a VideoCrafter2 text encoder .*: give the complete model"
    ):
        load_text_encoder(vae)
    with pytest.raises(
        CheckpointError, match=r"nowhere does not exist: give VideoCrafter2's model\.ckpt or its folder$"
    ):
        load_vae(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"does not hold one VideoCrafter2 model but no \.safetensors or \.ckpt file"
    ):
        load_vae(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(GOLDENS / "vc2" / "unet.safetensors", tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"one VideoCrafter2 model but a\.safetensors, b\.safetensors: give the file"
    ):
        load_unet(tmp_path)
    (tmp_path / "weights.npz").touch()
    with pytest.raises(CheckpointError, match=r"weights\.npz is no known weights file: give a \.safetensors, "):
        load_unet(tmp_path / "weights.npz")


@pytest.mark.parametrize("kept", [4, 1000, 500_000])
def test_cut_files(ckpt: Path, tmp_path: Path, kept: int) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(ckpt.read_bytes()[:kept])
    for load in (*LOADERS, recognises):
        with pytest.raises(CheckpointError, match=r"model\.ckpt is cut short.*: download it again$"):
            load(file)


@pytest.mark.parametrize("is_archive", [True, False])
def test_code_in_a_ckpt_is_refused_and_not_run(
    tmp_path: Path, is_archive: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    file, marker = tmp_path / "model.ckpt", tmp_path / "ran"
    content = {"state_dict": {"betas": RunsCode(str(marker))}}
    if is_archive:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    for load in (*LOADERS, recognises):
        for path in (file, tmp_path):
            with pytest.raises(CheckpointError, match=r"model\.ckpt holds more than tensors, which could run code"):
                load(path)
    assert convert(file, tmp_path / "out.safetensors") == 2
    assert "holds more than tensors, which could run code" in capsys.readouterr().err
    assert not marker.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_ckpts_of_other_things(tmp_path: Path) -> None:
    for content in ({"state_dict": {1: torch.zeros(1)}}, {"state_dict": {"betas": 1}}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "model.ckpt")
        for load in (*LOADERS, recognises):
            with pytest.raises(CheckpointError, match=r"model\.ckpt is not a table of named tensors: give the model's"):
                load(tmp_path / "model.ckpt")


@pytest.mark.slow
def test_tokenizer_beside_the_model(ckpt: Path, tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"holds no tokenizer \(none of bpe_simple_vocab_16e6\.txt\.gz, "):
            load_tokenizer(tmp_path / name)
    file = write_merges(tmp_path, merges())
    assert load_tokenizer(file).vocab_size == load_tokenizer(tmp_path).vocab_size == 49408
    shutil.copy(ckpt, tmp_path)
    for path in (tmp_path, tmp_path / "model.ckpt"):
        with pytest.raises(
            CheckpointError, match=r"has 49408 tokens and the text encoder embeddings for 300: use the tok"
        ):
            load_tokenizer(path)


def test_tokenizer_that_fits(released: Tensors, tmp_path: Path) -> None:
    table = torch.zeros(516, 64)
    file = write_ckpt(tmp_path, released | {"cond_stage_model.model.token_embedding.weight": table})
    write_merges(tmp_path, ["a b</w>", "c d"])
    assert load_tokenizer(tmp_path).vocab_size == load_tokenizer(file).vocab_size == 516


@pytest.mark.slow
def test_converted_model_is_the_same(
    ckpt: Path, released: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.safetensors"
    assert convert(ckpt, out) == 0
    assert f"{out}: {len(released)} tensors, " in capsys.readouterr().err
    converted = load_file(out)
    assert converted.keys() == released.keys()
    assert all(torch.equal(converted[key], value) for key, value in released.items())
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(ckpt.stat().st_mode)
    assert list(tmp_path.iterdir()) == [out]
    for load in LOADERS:
        assert same_weights(load(out), load(ckpt))
    assert recognises(tmp_path)
    shutil.copy(GOLDENS / "vc2" / "unet.safetensors", out)  # another beside it, which is preferred
    shutil.copy(ckpt, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold a VideoCrafter2 VAE"):
        load_vae(tmp_path)


@pytest.mark.slow
def test_converted_to_bfloat16(ckpt: Path, released: Tensors, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert convert(ckpt, out, "--dtype", "bfloat16") == 0
    converted = load_file(out)
    for key, value in released.items():
        assert torch.equal(converted[key], value.to(converted[key].dtype)), key
    cast = {key for key, value in converted.items() if value.dtype == torch.bfloat16}
    assert {key for key in released if key.startswith(PREFIXES[2])} <= cast
    assert not any(key.startswith(PREFIXES[1]) or key in SCHEDULE_TABLES for key in cast)
    assert load_unet(out).dtype == load_text_encoder(out).ln_final.weight.dtype == torch.bfloat16
    assert same_weights(load_unet(out), load_unet(ckpt, dtype=torch.bfloat16))
    assert same_weights(load_text_encoder(out), load_text_encoder(ckpt, dtype=torch.bfloat16))
    assert same_weights(load_vae(out), load_vae(ckpt))


def test_convert_writes_shared_and_strided_tensors_apart(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": table, "b": table, "c": table.t(), "d": table[1:], "e": torch.zeros(0), "f": torch.tensor([3])}
    torch.save(tensors, tmp_path / "shared.ckpt")
    assert convert(tmp_path / "shared.ckpt", tmp_path / "out.safetensors", "--dtype", "float16") == 0
    converted = load_file(tmp_path / "out.safetensors")
    for key, value in tensors.items():
        assert torch.equal(converted[key], value.half() if value.is_floating_point() else value), key


@pytest.mark.slow
def test_convert_refuses_what_it_cannot_write(
    ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"precious")
    attempts = [
        ((ckpt, out), "it exists already"),
        ((ckpt, tmp_path / "model.ckpt"), "the suffix '.ckpt' is not one of .safetensors"),
        ((ckpt, tmp_path / "no" / "x.safetensors"), "does not exist"),
        ((tmp_path / "nowhere.ckpt", tmp_path / "x.safetensors"), "nowhere.ckpt is not a file: give a weights file"),
        ((tmp_path, tmp_path / "x.safetensors"), "is not a file: give a weights file such as model.ckpt"),
        ((GOLDENS / "vc2" / "meta.json", tmp_path / "x.safetensors"), "is no known weights file"),
    ]
    for arguments, message in attempts:
        assert convert(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    def disk_full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", disk_full)
        assert convert(ckpt, out, "-y") == 2
    assert "model.safetensors: No space left on device; free space or choose another folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"precious"
    killed = tmp_path / ".model.1f2e3d4c.part.safetensors"  # what a kill within the writing leaves is in nobody's way
    killed.mkdir()
    (killed / ".tmpNMKkng").write_bytes(b"half")
    assert convert(ckpt, out, "-y") == 0
    assert {*tmp_path.iterdir()} == {out, killed}
    assert recognises(out)
