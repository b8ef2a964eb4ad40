"""SkyReels-V2's transformer, which may be told the video's rate, against Diffusers; and by what it is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import random_wan
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel
from oracle import collect, toy_run
from refusals import refusal
from safetensors.torch import save_file

from miga_engine.errors import CheckpointError
from miga_engine.models import load_bundle, load_transformer
from miga_engine.models.convert import convert, convert_model
from miga_engine.models.family import Sources
from miga_engine.models.wan.dit import WAN_T2V_CONFIGS, WanDiT, WanDiTConfig
from miga_engine.presets import PRESETS
from miga_engine.runtime.denoise import Window
from miga_engine.runtime.layout import QueueWindow, RunLayout
from miga_engine.runtime.stages import STAGE1

TOLERANCE = 3e-5  # of the largest output
TIMESTEPS = torch.tensor([[999.0, 500.0, 3.0], [20.0, 20.0, 700.0]])


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


def reference(inject_sample_info: bool) -> SkyReelsV2Transformer3DModel:
    """Of random weights; those of the rate, which begin as zeros, among them."""
    torch.manual_seed(5)
    theirs = SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16, text_dim=32, freq_dim=32,
        ffn_dim=64, num_layers=2, inject_sample_info=inject_sample_info,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return theirs


def official_names(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    """The same weights as SkyReels' own code names them, in a `model.safetensors` beside its config.json."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    sizes = {"dim": 48, "num_heads": 2, "num_layers": 2, "text_len": 512, "inject_sample_info": True}
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v", **sizes}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("inject_sample_info", [False, True])
def test_agrees_with_diffusers_at_every_rate(tmp_path: Path, inject_sample_info: bool) -> None:
    theirs = reference(inject_sample_info)
    theirs.save_pretrained(tmp_path / "diffusers")
    ours = load_transformer(tmp_path / "diffusers")
    assert ours.config.inject_sample_info is inject_sample_info
    latents, context = torch.randn(2, 16, 3, 6, 4), torch.randn(2, 512, 32)
    rows = torch.arange(6).view(2, 3)
    outputs = []
    for fps, row in ((16.0, 0), (24.0, 1), (None, 1)):
        with torch.no_grad():
            each = [  # theirs adds the rates of several windows to the wrong rows
                theirs(latents[i : i + 1], timestep=TIMESTEPS[i : i + 1], encoder_hidden_states=context[i : i + 1],
                       enable_diffusion_forcing=True, fps=[row]).sample
                for i in range(2)
            ]  # fmt: skip
            shared = theirs(latents, timestep=TIMESTEPS[:, 0], encoder_hidden_states=context, fps=[row] * 2).sample
        outputs.append(ours(latents, (ours.encode_timesteps(TIMESTEPS.flatten(), fps), rows), context))
        assert relative_error(outputs[-1], torch.cat(each)) <= TOLERANCE
        of_one = ours.encode_timesteps(TIMESTEPS[:, 0], fps), torch.tensor([[0] * 3, [1] * 3])
        assert relative_error(ours(latents, of_one, context), shared) <= TOLERANCE
    assert torch.equal(outputs[1], outputs[2])
    assert torch.equal(outputs[0], outputs[1]) is not inject_sample_info
    assert not inject_sample_info or relative_error(outputs[0], outputs[1]) > 1e-2


def test_both_layouts_hold_the_same_network(tmp_path: Path) -> None:
    theirs = reference(inject_sample_info=True)
    theirs.save_pretrained(tmp_path / "diffusers")
    ours = load_transformer(tmp_path / "diffusers").state_dict()
    again = load_transformer(official_names(ours, tmp_path / "official")).state_dict()
    assert {"fps_embedding.weight", "fps_projection.0.weight", "fps_projection.2.bias"} <= again.keys()
    assert all(torch.equal(again[key], value) for key, value in ours.items())


def test_what_the_rate_goes_through_stays_in_float32(tmp_path: Path) -> None:
    reference(inject_sample_info=True).save_pretrained(tmp_path / "diffusers")
    network = load_transformer(tmp_path / "diffusers", dtype=torch.bfloat16)
    assert network.dtype == torch.bfloat16
    assert network.fps_embedding.weight.dtype == network.fps_projection[2].weight.dtype == torch.float32
    folder, stored = tmp_path / "converted", next((tmp_path / "diffusers").glob("*.safetensors"))
    folder.mkdir()
    convert(stored, folder / "model.safetensors", torch.bfloat16)
    (folder / "config.json").write_bytes((tmp_path / "diffusers" / "config.json").read_bytes())
    converted = load_transformer(folder).state_dict()
    assert all(torch.equal(converted[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(("size", "has_rate", "billions"), [("1.3B", True, 1.436), ("14B", False, 14.288)])
def test_published_sizes(size: str, has_rate: bool, billions: float) -> None:
    """Those of Wan2.1, and of 1.3B two linear layers more."""
    config = WAN_T2V_CONFIGS[size]
    told = WanDiTConfig(**{**vars(config), "inject_sample_info": has_rate})
    with torch.device("meta"):
        network = WanDiT(told)
        theirs = SkyReelsV2Transformer3DModel(
            num_attention_heads=config.num_heads, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
            inject_sample_info=has_rate,
        )  # fmt: skip
    counts = [sum(p.numel() for p in module.parameters()) for module in (network, theirs)]
    assert counts[0] == counts[1]
    assert counts[0] / 1e9 == pytest.approx(billions, abs=5e-4)


def model(folder: Path, **config: object) -> Path:
    random_wan.official(folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    return folder


@pytest.mark.parametrize(
    ("name", "said", "window"),
    [
        ("model", {"inject_sample_info": False}, 25),
        ("model", {"_class_name": "SkyReelsV2Transformer3DModel"}, 25),
        ("SkyReels-V2-DF-14B-540P", {}, 25),
        ("SkyReels-V2-DF-14B-720P", {}, 31),
        ("models--Skywork--SkyReels-V2-DF-14B-720P/snapshots/0123", {"inject_sample_info": False}, 31),
    ],
)
def test_a_model_is_told_by_its_config_or_its_name(tmp_path: Path, name: str, said: dict, window: int) -> None:
    bundle = load_bundle(model(tmp_path / name, **said))
    assert bundle.window_frames == window
    assert bundle.facts.default_preset == "skyreels-v2-df"


def test_nothing_of_it_makes_wan2_1_another_model(tmp_path: Path) -> None:
    bundle = load_bundle(model(tmp_path / "a folder of SkyReels" / "Wan2.1-T2V-1.3B-720P"))
    assert (bundle.window_frames, bundle.facts.default_preset) == (21, "wan2.1")
    assert bundle.transformer.boundary_timestep is None


def test_a_window_that_a_name_told_is_written_down(tmp_path: Path) -> None:
    root = model(tmp_path / "SkyReels-V2-DF-14B-720P")
    (root / "miga.json").write_text(json.dumps({"default_negative_prompt": "rain"}))
    convert_model(Sources(root), tmp_path / "converted")
    bundle = load_bundle(tmp_path / "converted")
    assert (bundle.window_frames, bundle.facts.default_preset) == (31, "skyreels-v2-df")
    assert bundle.default_negative_prompt == "rain"


@pytest.mark.parametrize("said", [{}, {"inject_sample_info": False}])
def test_a_converted_model_is_told_as_it_was(tmp_path: Path, said: dict) -> None:
    convert_model(Sources(model(tmp_path / "model", **said)), tmp_path / "converted")
    preset = "skyreels-v2-df" if said else "wan2.1"
    assert load_bundle(tmp_path / "converted").facts.default_preset == preset
    assert ("inject_sample_info" in json.loads((tmp_path / "converted" / "config.json").read_text())) is bool(said)


@pytest.mark.parametrize("stem", ["SkyReels-V2-I2V-14B", "a"])
@pytest.mark.parametrize("keys", [(), ("img_emb.proj.0.bias",)])
def test_image_to_video_is_refused_by_name(tmp_path: Path, stem: str, keys: tuple[str, ...]) -> None:
    rate = ("fps_embedding.weight",) if stem == "a" else ()
    tensors = {**random_wan.transformer(), "patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}
    tensors |= {key: torch.zeros(2, 128) for key in (*keys, *rate)}
    save_file(tensors, tmp_path / f"{stem}.safetensors")
    sentence = refusal(lambda: load_transformer(tmp_path / f"{stem}.safetensors"), CheckpointError)
    assert "is a SkyReels-V2 image-to-video model (I2V), and not a " in sentence


@pytest.mark.slow
def test_the_queue_of_the_preset_has_the_steps_of_the_asynchronous_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once six blocks are on their way, each pass finds frames at the steps at which an iteration of Diffusers does."""
    _, counted, is_updated, _ = SkyReelsV2DiffusionForcingPipeline.generate_timestep_matrix(
        None, 120, torch.arange(30, 0, -1), 120, ar_step=5, causal_block_size=5
    )
    rows = [(row[mask] - 1).tolist() for row, mask in zip(counted, is_updated, strict=True)]  # they count from 1
    theirs = [row for row in rows if len(row) == 30]
    theirs = theirs[next(i for i, row in enumerate(theirs) if row[-1] == 0) :]

    preset, seen = PRESETS["skyreels-v2-df"], []
    config = dataclasses.replace(preset.miga, self_reflection=False)
    run = toy_run(config, 100, steps=preset.sampling.num_inference_steps, window=25)
    queue_windows = run.references.windows

    def watched(cuts: list[QueueWindow], layout: RunLayout) -> list[Window]:
        if run.stage == STAGE1:
            seen.append(run.store.step_index[run.store.slots(range(run.head, run.tail))].tolist())
        return queue_windows(cuts, layout)

    monkeypatch.setattr(run.references, "windows", watched)
    collect(run)
    assert min(len(theirs), len(seen)) > 60
    assert all(ours == iteration for ours, iteration in zip(seen, theirs, strict=False))
