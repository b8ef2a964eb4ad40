"""Wan2.2 A14B: two networks as one transformer, found wherever people have them, and refused where one is missing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import random_wan
import torch
from refusals import refusal
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_names import diffusers_name

from miga_engine import Engine
from miga_engine.cli import main
from miga_engine.errors import CheckpointError, ConfigError
from miga_engine.memory import on_meta
from miga_engine.models import load_bundle, load_transformer
from miga_engine.models.family import Sources
from miga_engine.models.loading import file_bytes
from miga_engine.models.wan.dit import WAN_T2V_CONFIGS, WanDiT
from miga_engine.models.wan.experts import WanExperts
from miga_engine.models.wan.kinds import noise_of, stem_of
from miga_engine.runtime.session import fingerprint
from miga_engine.video.reading import read_video

HIGH, LOW = random_wan.transformer(seed=1), random_wan.transformer(seed=2)
NAMES = ("high_noise_model", "low_noise_model")
KJ = ("Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors", "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors")
COMFY = ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors")


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def config() -> dict[str, object]:
    c = random_wan.CONFIG
    return {"_class_name": "WanModel", "model_type": "t2v", "num_heads": c.num_heads, "text_len": c.text_len}


def official(folder: Path) -> Path:
    """As Wan-AI lays it out: a folder for each network, all else beside them."""
    random_wan.official(folder)
    (folder / random_wan.TRANSFORMER).unlink()
    (folder / "config.json").unlink()
    for name, tensors in zip(NAMES, (HIGH, LOW), strict=True):
        saved(folder / name / random_wan.TRANSFORMER, tensors)
        (folder / name / "config.json").write_text(json.dumps(config()))
    return folder


def diffusers(folder: Path, ratio: float = 0.875) -> Path:
    """As Diffusers has it; the VAE and the text encoder under official names, which are found too."""
    official(folder)
    for name, target in zip(NAMES, ("transformer", "transformer_2"), strict=True):
        (folder / name).rename(folder / target)
        file = folder / target / random_wan.TRANSFORMER
        saved(file, {diffusers_name(key): value for key, value in load_file(file).items()})
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": ratio}))
    return folder


def comfy(folder: Path, names: tuple[str, str] = COMFY) -> Path:
    """ComfyUI's tree."""
    random_wan.comfy(folder)
    models = folder / "models" / "diffusion_models"
    next(models.iterdir()).unlink()
    for name, tensors in zip(names, (HIGH, LOW), strict=True):
        saved(models / name, tensors)
    shutil.copy(random_wan.TOKENIZER, folder / "tokenizer.json")
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {"official": official, "diffusers": diffusers, "comfy": comfy}


def assert_both(transformer: object, high: Mapping[str, Tensor] = HIGH, low: Mapping[str, Tensor] = LOW) -> None:
    assert isinstance(transformer, WanExperts)
    for network, tensors in ((transformer.high_noise_model, high), (transformer.low_noise_model, low)):
        state = network.state_dict()
        assert state.keys() == tensors.keys()
        assert all(torch.equal(state[key], value) for key, value in tensors.items())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return official(tmp_path / "Wan2.2-T2V-A14B")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_networks_load_from_every_layout(tmp_path: Path, layout: str) -> None:
    bundle = load_bundle(LAYOUTS[layout](tmp_path / "model"))
    assert_both(bundle.transformer)
    assert bundle.transformer.boundary_timestep == 875
    assert (bundle.window_frames, bundle.facts.default_preset) == (21, "wan2.2-t2v-a14b")
    assert bundle.encode_prompts(["a corgi"]).shape[-1] == bundle.text_dim == random_wan.CONFIG.text_dim


@pytest.mark.parametrize("name", ["", *NAMES, f"{NAMES[0]}/{random_wan.TRANSFORMER}"])
def test_each_place_in_an_official_folder_leads_to_both(model: Path, name: str) -> None:
    assert_both(load_transformer(model / name))


@pytest.mark.parametrize("names", [COMFY, KJ, ("HighNoise-Wan2.2.safetensors", "LowNoise-Wan2.2.safetensors")])
def test_each_file_leads_to_its_partner_by_name(tmp_path: Path, names: tuple[str, str]) -> None:
    folder = comfy(tmp_path, names) / "models" / "diffusion_models"
    saved(folder / "wan2.2_t2v_low_noise_14B_fp8.safetensors", HIGH)
    saved(folder / "wan2.1_t2v_14B_fp16.safetensors", HIGH)
    for name in names:
        assert_both(load_transformer(folder / name))
    sentence = refusal(lambda: load_transformer(tmp_path), CheckpointError)
    assert "holds 4 text-to-video transformers (" in sentence
    assert ": name one with --transformer" in sentence


def test_a_pair_of_other_names_beside_image_to_video_is_the_only_one(tmp_path: Path) -> None:
    comfy(tmp_path, ("wan2.2_t2v_high_noise_14B_Q8.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors"))
    for noise in ("high", "low"):
        i2v = {**HIGH, "patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}
        saved(tmp_path / "models" / "diffusion_models" / f"wan2.2_i2v_{noise}_noise_14B.safetensors", i2v)
    assert_both(load_transformer(tmp_path))


def test_the_second_may_be_named(tmp_path: Path) -> None:
    parts = random_wan.official(tmp_path / "parts")
    high, low = saved(tmp_path / "1" / "a.safetensors", HIGH), saved(tmp_path / "2" / "b.safetensors", LOW)
    given = {part: str(parts) for part in ("vae", "text_encoder", "tokenizer")}
    engine = Engine.from_pretrained(str(high), "cpu", transformer_2=str(low), **given)
    assert_both(engine.bundle.transformer)
    assert engine.sources.apart()["transformer_2"] == str(low)
    assert_both(load_transformer(high, second=low))
    again = Engine.from_pretrained(device="cpu", transformer=str(high), transformer_2=str(low), **given)
    assert_both(again.bundle.transformer)
    assert_both(Engine.from_pretrained(str(parts), "cpu", transformer=str(high), transformer_2=low).bundle.transformer)


def test_networks_that_were_given_the_wrong_way_round_are_refused(tmp_path: Path) -> None:
    folder = comfy(tmp_path) / "models" / "diffusion_models"
    high, low = (folder / name for name in COMFY)
    sentence = refusal(lambda: load_transformer(low, second=high), CheckpointError)
    assert f"{low} is by its name the network for low noise: give that for high noise as the model or with " in sentence
    assert_both(load_transformer(high, second=low))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_alone_is_refused_with_what_is_missing(tmp_path: Path, layout: str, which: int) -> None:
    root = LAYOUTS[layout](tmp_path / "model")
    names = {"official": NAMES, "diffusers": ("transformer", "transformer_2"), "comfy": COMFY}[layout]
    folder = root / "models" / "diffusion_models" if layout == "comfy" else root
    other = folder / names[1 - which]
    other.unlink() if other.is_file() else shutil.rmtree(other)
    for path in (root, folder / names[which]):
        sentence = refusal(lambda path=path: load_transformer(path), CheckpointError)
        noise, missing = (("high", "low"), ("low", "high"))[which]
        assert f"{names[which]} is one of the two networks of Wan2.2 T2V-A14B, that for {noise} noise" in sentence
        assert f": give that for {missing} noise " in sentence
        assert "--transformer-2" in sentence
    low = saved(tmp_path / "elsewhere.safetensors", LOW)
    if which == 0:
        for path in (root, folder / names[0]):
            assert_both(load_transformer(path, second=low))


def test_networks_of_two_sizes_are_refused(model: Path) -> None:
    file = model / NAMES[1] / random_wan.TRANSFORMER
    saved(file, {key: value for key, value in LOW.items() if not key.startswith("blocks.1.")})
    sentence = refusal(lambda: load_transformer(model), CheckpointError)
    assert "do not fit together, with num_layers of 2 (high noise), 1 (low noise): give those of one" in sentence


@pytest.mark.parametrize("ratio", ["0.9", 1.5, True, [0.875]])
def test_a_boundary_that_is_none_is_refused(tmp_path: Path, ratio: object) -> None:
    folder = diffusers(tmp_path / "model", ratio)  # type: ignore[arg-type]
    assert "model_index.json says boundary_ratio " in refusal(lambda: load_transformer(folder), CheckpointError)


def test_the_boundary_of_a_diffusers_folder_is_its_own(tmp_path: Path) -> None:
    folder = diffusers(tmp_path / "model", 0.9)
    for place in ("", "transformer", "transformer_2"):
        assert load_transformer(folder / place).boundary_timestep == 900


# What it computes ------------------------------------------------------------------------------------------------


def pair(swap_on: str | None = None) -> WanExperts:
    networks = []
    for tensors in (HIGH, LOW):
        with torch.device("meta"):
            network = WanDiT(random_wan.CONFIG)
        network.load_state_dict(tensors, assign=True)
        networks.append(network.eval().requires_grad_(False))
    return WanExperts(networks[0], networks[1], 875.0, None if swap_on is None else torch.device(swap_on))


def call(network: torch.nn.Module, **expert: int) -> Tensor:
    """Two windows in two branches with a prompt for each frame, some frames kept, by a table of prompts."""
    torch.manual_seed(3)
    latents, timesteps, texts = torch.randn(2, 16, 5, 4, 6), torch.rand(4) * 1000, torch.randn(3, 4, 32)
    table = network.encode_context(texts[:1]).table(3, network.num_text_keys(4))
    for row in range(3):
        table.write(row, network.encode_context(texts[row : row + 1]))
    index = torch.randint(0, 3, (4, 5))
    levels = network.encode_timesteps(timesteps, 16.0), torch.randint(0, 4, (2, 5))
    return network(latents, levels, table, context_index=index, keep=torch.tensor([[0, 2], [1, 4]]), **expert)


@pytest.mark.parametrize("swap_on", [None, "cpu"])
def test_each_expert_gives_exactly_what_its_network_gives(swap_on: str | None) -> None:
    both = pair(swap_on)
    high, low = call(both.high_noise_model), call(both.low_noise_model)
    assert torch.equal(call(both), high)
    assert torch.equal(call(both, expert=1), low)
    assert torch.equal(call(both, expert=0), high)
    assert not torch.equal(high, low)


def test_plain_timesteps_and_texts_will_do_too() -> None:
    both = pair()
    latents, text = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 4, 32)
    for expert, network in enumerate((both.high_noise_model, both.low_noise_model)):
        assert torch.equal(both(latents, 500.0, text, expert=expert), network(latents, 500.0, text))


def test_a_swap_moves_weights_only_where_the_expert_changes() -> None:
    both = pair("cpu")
    latents, text = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 4, 32)
    levels = both.encode_timesteps(torch.tensor([900.0, 100.0]))
    assert both.num_moves == 2
    context = both.encode_context(text)  # begins with the one that is there
    assert both.num_moves == 3
    for expert, moves in ((0, 3), (0, 3), (1, 4), (1, 4), (0, 5)):
        both(latents, (levels, torch.tensor([[0, 1, 1]])), context, expert=expert)
        assert both.num_moves == moves
    slot = both.bring(0)
    assert slot is both.bring(1)  # in the same memory, which captured graphs go on reading
    assert both.num_moves == 6
    assert slot is not both.low_noise_model
    assert pair().bring(0) is not pair().bring(1)


def test_a_copy_that_failed_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair("cpu")
    expected = call(both, expert=1)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            both.bring(0)
    assert torch.equal(call(both, expert=1), expected)


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("swap_on", [None, "cpu"])
def test_attention_is_that_of_both(swap_on: str | None) -> None:
    both = pair(swap_on)
    both.attention = "reference"
    assert {both.attention, both.bring(0).attention, both.bring(1).attention} == {"reference"}


@pytest.mark.parametrize("swap_on", [None, "cpu"])
def test_the_networks_are_compiled_and_not_what_moves_them(swap_on: str | None) -> None:
    both = pair(swap_on)
    expected = [call(both, expert=expert) for expert in (0, 1)]
    assert both._compiled_call_impl is None
    both.compile(backend="eager")
    assert None not in (both._compiled_call_impl, both.bring(0)._compiled_call_impl, both.bring(1)._compiled_call_impl)
    moves = both.num_moves
    for expert in (0, 1, 1):
        assert (call(both, expert=expert) - expected[expert]).abs().max() <= 1e-5 * expected[expert].abs().max()
    assert both.num_moves > moves or swap_on is None


@pytest.mark.parametrize("swap_on", [None, "cpu"])
def test_the_fingerprint_is_of_both_networks(swap_on: str | None) -> None:
    both = pair(swap_on)
    before = fingerprint(both)
    assert before == fingerprint(pair())
    both.low_noise_model.head.head.bias[0] += 1
    after = fingerprint(both)
    both.low_noise_model.head.head.bias[0] -= 1
    both.high_noise_model.head.head.bias[0] += 1
    assert len({before, after, fingerprint(both)}) == 3


def test_one_at_a_time_counts_as_one_on_the_device(model: Path) -> None:
    """In the shapes that memory is reckoned from: those of a load on `meta`, and of a copy of what is loaded."""
    one, bundle = sum(tensor.nbytes for tensor in HIGH.values()), load_bundle(model)
    for experts, swap_on, count in (("resident", None, 2), ("swap", "cpu", 1)):
        shapes = load_bundle(Sources(model, experts=experts), "meta").transformer
        assert sum(p.nbytes for p in shapes.parameters()) == count * one
        copied = on_meta(dataclasses.replace(bundle, transformer=pair(swap_on))).transformer
        assert sum(p.nbytes for p in copied.parameters()) == count * one
        assert {p.device.type for p in copied.parameters()} == {"meta"}


def test_a_cpu_has_nothing_to_swap_with(model: Path) -> None:
    both = load_transformer(model, experts="swap")
    assert_both(both)
    assert (both.bring(1), both.num_moves) == (both.low_noise_model, 0)
    with pytest.raises(ConfigError, match="experts must be 'resident' or 'swap', got 'offload'"):
        load_transformer(model, experts="offload")


def test_published_size() -> None:
    with torch.device("meta"):
        both = WanExperts(WanDiT(WAN_T2V_CONFIGS["14B"]), WanDiT(WAN_T2V_CONFIGS["14B"]), 875.0)
        latents, text = torch.empty(1, 16, 21, 60, 104), torch.empty(1, 512, 4096)
        cache = both.high_noise_model.encode_timesteps(torch.empty(40))
    assert sum(p.numel() for p in both.parameters()) / 1e9 == pytest.approx(2 * 14.288, abs=1e-3)
    assert cache.projection.shape == (40, 6, 5120)
    assert latents.is_meta
    assert text.is_meta


# LoRAs, conversion, sizes, info ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "noises"),
    [
        ("high_noise_pusa.safetensors", "h"),
        ("low_noise_pusa.safetensors", "l"),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16.safetensors", "h"),
        ("Wan22_A14B_T2V_LOW_Lightning_4steps_lora_rank64_fp16.safetensors", "l"),
        ("wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217.safetensors", "l"),
        ("style.safetensors", "hl"),
    ],
)
def test_a_lora_goes_to_the_networks_that_its_name_is_for(model: Path, name: str, noises: str) -> None:
    key = "blocks.0.self_attn.q"
    down, up = torch.randn(4, 128), torch.randn(128, 4)
    lora = saved(model / name, {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up})
    changed = [
        {**tensors, f"{key}.weight": tensors[f"{key}.weight"] + 0.5 * (up @ down)} if noise in noises else tensors
        for noise, tensors in (("h", HIGH), ("l", LOW))
    ]
    bundle = load_bundle(Sources(model, loras=((lora, 0.5),)))
    for network, tensors in zip(bundle.transformer.children(), changed, strict=True):
        weight = network.state_dict()[f"{key}.weight"]
        torch.testing.assert_close(weight, tensors[f"{key}.weight"], rtol=2e-5, atol=1e-6)
    assert [path for path, _, _ in bundle.merged] == [str(lora)]


@pytest.mark.parametrize("layout", ["official", "diffusers", "comfy"])
def test_a_model_is_converted_into_the_official_folder(tmp_path: Path, layout: str, capsys) -> None:
    root = LAYOUTS[layout](tmp_path / "model")
    assert main(["convert", str(root), str(tmp_path / "converted")]) == 0
    capsys.readouterr()
    for name, tensors in zip(NAMES, (HIGH, LOW), strict=True):
        stored = load_file(tmp_path / "converted" / name / random_wan.TRANSFORMER)
        assert all(torch.equal(stored[key], value) for key, value in tensors.items())
        assert json.loads((tmp_path / "converted" / name / "config.json").read_text())["num_layers"] == 2
    bundle = load_bundle(tmp_path / "converted")
    assert_both(bundle.transformer)
    assert bundle.transformer.boundary_timestep == 875


def test_a_boundary_of_its_own_survives_a_conversion(tmp_path: Path, capsys) -> None:
    root = diffusers(tmp_path / "model", 0.9)
    assert main(["convert", str(root), str(tmp_path / "converted")]) == 0
    assert "306 tensors" in capsys.readouterr().err
    assert load_transformer(tmp_path / "converted").boundary_timestep == 900


def test_the_bytes_of_both_count(model: Path) -> None:
    sizes = [(model / name / random_wan.TRANSFORMER).stat().st_size for name in NAMES]
    assert file_bytes(model)["transformer"] == sum(sizes)


@pytest.mark.parametrize(("name", "noise"), [*zip(COMFY, ("high", "low"), strict=True)])
def test_info_says_which_network_a_file_is(tmp_path: Path, capsys, name: str, noise: str) -> None:
    assert main(["info", str(saved(tmp_path / name, HIGH))]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    what = f"by its name one of the two networks of Wan2.2 T2V-A14B, that for {noise} noise"
    assert rows["what it is"].strip() == what
    assert "--transformer-2" in rows["how it is used"]


@pytest.mark.parametrize("names", [COMFY, KJ, ("a_HighNoise-Q4.gguf", "a_LowNoise-Q4.gguf")])
def test_names_of_a_pair_have_one_stem(names: tuple[str, str]) -> None:
    assert [noise_of(name) for name in names] == ["high", "low"]
    assert stem_of(names[0]) == stem_of(names[1]) != stem_of(names[0].replace("4", "5").replace("2", "3"))


@pytest.mark.slow
def test_the_command_resumes_with_both_networks_named(model: Path, tmp_path: Path, capsys) -> None:
    high, low = ((model / name).rename(tmp_path / name) for name in NAMES)
    method = {"zigzag_width": 2, "stage2_steps": 3, "guidance_frames": 1, "stride": 2, "judge_step": 3}
    (model / "miga.json").write_text(json.dumps({"window_frames": 5}))
    engine = Engine.from_pretrained(model, "cpu", transformer=high, transformer_2=low)
    sizes = {"height": 32, "width": 48, "num_inference_steps": 8, "shift": 5.0}
    whole = engine.generate("a kite", 21, **sizes, miga=method).frames
    with engine.stream("a kite", 21, **sizes, miga=method) as stream:
        begun = next(stream).frames
        stream.save(tmp_path / "run.safetensors")
    places = ["--model", str(model), "--transformer", str(high), "--transformer-2", str(low), "--experts", "swap"]
    command = ["resume", str(tmp_path / "run.safetensors"), *places, "--output", str(tmp_path / "rest.mkv"), "--quiet"]
    assert main(command) == 0, capsys.readouterr().err
    assert torch.equal(torch.cat([begun, torch.from_numpy(read_video(tmp_path / "rest.mkv"))]), whole)
