"""Wan2.2 TI2V-5B as a model: its transformer against Diffusers, its folders, and a video of it in small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import golden_model
import pytest
import random_wan
import torch
from diffusers import WanTransformer3DModel
from places import GOLDENS
from refusals import refusal
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_names import diffusers_name

from miga_engine import Engine
from miga_engine.cli import main
from miga_engine.errors import CheckpointError, ConfigError
from miga_engine.models import load_transformer
from miga_engine.models.wan.dit import WAN22_TI2V_5B, WanDiT

TOLERANCE = 3e-5  # of the largest output
OPTIONS = {"height": 32, "width": 64, "num_inference_steps": 8, "seed": 3, "miga": golden_model.MIGA}
NUM_FRAMES = 45


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_wan.official(tmp_path_factory.mktemp("model") / "Wan2.2-TI2V-tiny", "ti2v")
    (folder / "miga.json").write_text(json.dumps({"window_frames": 5}))
    return folder


@pytest.fixture(scope="module")
def engine(official: Path) -> Engine:
    return Engine.from_pretrained(str(official), "cpu")


@pytest.fixture(scope="module")
def whole(engine: Engine) -> Tensor:
    return engine.generate("a red balloon", NUM_FRAMES, **OPTIONS).frames


def theirs(device: str = "meta", **sizes: int) -> WanTransformer3DModel:
    """What diffusers builds of a transformer with 48 channels."""
    with torch.device(device):
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), in_channels=48, out_channels=48, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", **sizes,
        ).eval()  # fmt: skip


def test_the_transformer_agrees_with_diffusers_at_a_timestep_a_token() -> None:
    """As the pipeline of this model gives them: every token its own, here the same for those of a frame."""
    config, weights = random_wan.TI2V_CONFIG, random_wan.transformer(kind="ti2v")
    reference = theirs(
        "cpu", num_attention_heads=config.num_heads, attention_head_dim=config.head_dim, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
    )  # fmt: skip
    reference.load_state_dict({diffusers_name(key): value for key, value in weights.items()}, strict=True)
    ours = WanDiT(config).requires_grad_(False)
    ours.load_state_dict(weights)
    torch.manual_seed(5)
    latents, context = torch.randn(2, 48, 4, 4, 6), torch.randn(2, 16, config.text_dim)
    # The first frame clean, as a given picture is, the others at one level; and frames of a queue.
    timesteps = torch.tensor([[0.0, 700.0, 700.0, 700.0], [12.0, 400.0, 401.0, 999.0]])
    with torch.no_grad():
        tokens = timesteps.repeat_interleave(2 * 3, dim=1)
        expected = reference(latents, timestep=tokens, encoder_hidden_states=context).sample
    out = ours(latents, timesteps, context)
    assert ((out - expected).abs().max() / expected.abs().max()).item() <= TOLERANCE


def test_the_transformers_published_sizes() -> None:
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in WanDiT(WAN22_TI2V_5B).state_dict().items()}
    reference = theirs(
        num_attention_heads=24, attention_head_dim=128, text_dim=4096, freq_dim=256, ffn_dim=14336, num_layers=30
    )
    expected = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    assert {diffusers_name(key): shape for key, shape in ours.items()} == expected
    assert sum(torch.Size(shape).numel() for shape in ours.values()) / 1e9 == pytest.approx(5.0, abs=5e-3)


@pytest.mark.parametrize("layout", ["official", "diffusers", "wrapped"])
def test_both_layouts_hold_the_same_model(tmp_path: Path, official: Path, layout: str) -> None:
    folder = official
    if layout == "diffusers":
        folder = random_wan.diffusers_ti2v(tmp_path / "Wan2.2-TI2V-tiny-Diffusers")
    elif layout == "wrapped":
        folder = Path(shutil.copytree(official, tmp_path / "model"))
        torch.save({"state_dict": random_wan.vae("ti2v")}, folder / "Wan2.2_VAE.pth")
        (folder / random_wan.TI2V_VAE).unlink()
    bundle = Engine.from_pretrained(str(folder), "cpu").bundle
    facts = (bundle.latent_channels, bundle.spatial_factor, bundle.frame_ratio, bundle.size_multiple)
    assert facts == (48, 16, 4, 32)
    assert bundle.transformer.config == random_wan.TI2V_CONFIG
    for network, expected in (
        (bundle.transformer, random_wan.transformer(kind="ti2v")),
        (bundle.vae, random_wan.vae("ti2v")),
    ):
        state = network.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert bundle.encode_prompts(["a corgi"]).shape[-1] == bundle.text_dim


def test_a_single_file_needs_no_config(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{key}": value for key, value in random_wan.transformer(kind="ti2v").items()}
    save_file(tensors, tmp_path / "wan2.2_ti2v_5B_fp16.safetensors")
    config = load_transformer(tmp_path / "wan2.2_ti2v_5B_fp16.safetensors").config
    assert (config.in_dim, config.out_dim, config.num_heads) == (48, 48, 1)


def test_a_model_with_the_other_models_vae_is_refused_with_the_one_to_give(tmp_path: Path, official: Path) -> None:
    wan21 = random_wan.official(tmp_path / "Wan2.1-T2V-tiny")
    for folder, other, name in (
        (
            official,
            wan21 / random_wan.VAE,
            "of 48 channels and the VAE has 16: give the VAE of Wan2.2 (Wan2.2_VAE.pth)",
        ),
        (wan21, official / random_wan.TI2V_VAE, "of 16 channels and the VAE has 48: give the VAE of Wan2.1 (Wan2.1_VA"),
    ):
        sentence = refusal(lambda f=folder, o=other: Engine.from_pretrained(str(f), "cpu", vae=str(o)), CheckpointError)
        assert name in sentence
        assert sentence.endswith(" with --vae")
    # Where only the wrong one lies beside it.
    shutil.move(wan21 / random_wan.VAE, tmp_path)
    shutil.copy(official / random_wan.TI2V_VAE, wan21)
    assert "give the VAE of Wan2.1" in refusal(lambda: Engine.from_pretrained(str(wan21), "cpu"), CheckpointError)
    # Of two beside it the right one is found.
    shutil.move(tmp_path / random_wan.VAE, wan21)
    assert Engine.from_pretrained(str(wan21), "cpu").bundle.latent_channels == 16


def test_there_is_no_tiny_decoder_of_its_latents(official: Path) -> None:
    for parts in ({}, {"vae": str(GOLDENS / "taew2_1" / "taew2_1.safetensors")}):
        sentence = refusal(lambda p=parts: Engine.from_pretrained(str(official), "cpu", decoder="tae", **p))
        assert "is the transformer of Wan2.2 TI2V-5B, whose latents the decoder 'tae' does not decode" in sentence
        assert sentence.endswith(": load the model with decoder 'vae'")


def test_its_sizes_are_multiples_of_32(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="multiple of 32"):
        engine.generate("a red balloon", 5, **{**OPTIONS, "width": 48})


def test_streamed_equals_whole_bit_for_bit(engine: Engine, whole: Tensor) -> None:
    assert whole.shape == (NUM_FRAMES, 32, 64, 3)
    assert whole.float().std() > 10
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS) as stream:
        chunks = [chunk.frames for chunk in stream]
    assert len(chunks) > 3
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("cut", [1, 3])
def test_saved_and_resumed_bit_for_bit(engine: Engine, whole: Tensor, tmp_path: Path, cut: int) -> None:
    session = tmp_path / "run.safetensors"
    with engine.stream("a red balloon", NUM_FRAMES, **OPTIONS) as stream:
        for _ in range(cut):
            next(stream)
        stream.save(session)
        done = stream.num_frames_out
    assert 0 < done < NUM_FRAMES
    rest = torch.cat([chunk.frames for chunk in engine.resume(session)])
    assert torch.equal(rest, whole[done:])


def test_another_layout_makes_the_same_video(whole: Tensor, tmp_path: Path) -> None:
    folder = random_wan.diffusers_ti2v(tmp_path / "Diffusers")
    (folder / "miga.json").write_text(json.dumps({"window_frames": 5}))
    frames = Engine.from_pretrained(str(folder), "cpu").generate("a red balloon", NUM_FRAMES, **OPTIONS).frames
    assert torch.equal(frames, whole)


def test_a_conversion_is_the_official_folder(official: Path, tmp_path: Path) -> None:
    source, out = random_wan.diffusers_ti2v(tmp_path / "Diffusers"), tmp_path / "out"
    assert main(["convert", str(source), str(out)]) == 0
    for file in (random_wan.TRANSFORMER, random_wan.TI2V_VAE, random_wan.TEXT_ENCODER):
        ours, expected = load_file(out / file), load_file(official / file)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], value) for key, value in expected.items())
    assert json.loads((out / "config.json").read_text()) == json.loads((official / "config.json").read_text())
    assert not list(out.glob("Wan2.1*"))
    assert Engine.from_pretrained(str(out), "cpu").bundle.latent_channels == 48


def test_its_memory_is_estimated(official: Path, engine: Engine) -> None:
    options = {**OPTIONS, "num_frames": NUM_FRAMES, "device": "cpu"}
    options.pop("seed")
    estimate = Engine.estimate(str(official), **options)
    vae = engine.bundle.vae
    assert estimate.resident["VAE weights"] == sum(t.nbytes for t in [*vae.parameters(), *vae.buffers()])
    decoder = vae.stream_decoder()
    decoder.push(torch.zeros(1, 48, 2, 2, 4))
    assert estimate.resident["decoder feature cache"] == sum(tensor.nbytes for tensor in decoder.state().values())


def test_a_file_of_a_causal_training_loads_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {f"model.{key}": value for key, value in random_wan.transformer().items()}
    torch.save({"generator": tensors, "generator_ema": tensors}, tmp_path / "a.pt")
    load_transformer(tmp_path / "a.pt", "meta")
    assert not caplog.messages
    load_transformer(tmp_path / "a.pt")
    assert [message.partition(", as CausVid")[0] for message in caplog.messages] == [
        f"{tmp_path}/a.pt holds a generator"
    ]
    caplog.clear()
    torch.save(tensors, tmp_path / "b.pt")
    load_transformer(tmp_path / "b.pt")
    assert not caplog.messages
