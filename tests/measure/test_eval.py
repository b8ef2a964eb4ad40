"""Measures against known truth and planted damage; the report, the command and the exports."""

import csv
import dataclasses
import json
import re
import subprocess
import zipfile
from pathlib import Path

import golden_model
import numpy as np
import places
import pytest
import torch

from bench.study import damage
from bench.tiny.text import wording
from miga_engine.cli import main
from miga_engine.errors import CheckpointError, ConfigError, DeviceError, OutputError
from miga_engine.measure import export, features, flow, measure, measure_tiny, measures, report, truth
from miga_engine.measure.catalogue import MEASURES
from miga_engine.tiny import world
from miga_engine.tiny.text import read_prompt
from miga_engine.video.outputs import open_sink
from miga_engine.video.reading import read_metadata, read_video

DOCUMENT = places.ROOT / "docs" / "measures.md"
SCENE = world.Scene("plane", "yellow", "desert", "dusk", seed=4)


def _write(path: Path, frames: np.ndarray, **metadata: object) -> Path:
    with open_sink(path, 12, frames.shape[2], frames.shape[1], metadata=metadata) as sink:
        sink.write(frames)
    return path


def _miga(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


# damage: what each measure must see (▲ rises, ▼ falls) and what must leave it alone (·) --------------------------

EXPECTED = {
    "consistency": {"still": "▲", "cut": "▼", "seams": "·"},
    "motion": {"still": "▼", "shuffle": "▲", "drift": "·", "fade": "·", "blur": "·"},
    "motion_ratio": {"drift": "·", "fade": "·", "seams": "·"},
    "frozen_share": {"freeze": "▲", "still": "▲", "noise": "·", "flicker": "·", "shuffle": "·", "cut": "·"},
    "flicker": {"flicker": "▼", "noise": "▼", "shuffle": "▼", "still": "▲", "blur": "·"},
    "warping_error": {"noise": "▲", "flicker": "▲", "cut": "▲", "shuffle": "▲", "still": "▼", "fade": "·"},
    "largest_jump": {"cut": "▲", "seams": "▲", "blur": "·", "drift": "·"},
    "seam_ratio": {"seams": "▲", "blur": "·", "still": "·"},
    "seam_p": {"seams": "▼", "blur": "·", "noise": "·", "cut": "·", "freeze": "·", "shuffle": "·"},
    "latent_consistency": {"still": "▲", "cut": "▼", "fade": "·"},
    "latent_consistency_min": {"still": "▲", "cut": "▼", "fade": "·"},
    "colour_overlap": {"drift": "▼", "fade": "▼", "cut": "▼", "freeze": "·", "seams": "·"},
    "luminance": {"flicker": "▼", "cut": "▼", "noise": "·", "fade": "·", "freeze": "·", "shuffle": "·"},
    "luminance_ratio": {"cut": "▼", "blur": "·", "noise": "·", "fade": "·", "flicker": "·", "freeze": "·"},
    "saturation": {"drift": "▼", "fade": "▼", "cut": "▼", "freeze": "·", "shuffle": "·", "seams": "·"},
    "saturation_ratio": {"drift": "▼", "fade": "▼", "cut": "▼", "flicker": "·", "freeze": "·", "still": "·"},
    "sharpness": {"blur": "▼", "noise": "▲", "fade": "·", "freeze": "·", "shuffle": "·", "seams": "·"},
    "sharpness_ratio": {"blur": "▼", "noise": "▲", "fade": "·", "flicker": "·", "freeze": "·", "seams": "·"},
    "noise": {"noise": "▲", "blur": "▼", "fade": "·", "freeze": "·", "shuffle": "·", "seams": "·"},
    "noise_ratio": {"noise": "▲", "blur": "▼", "flicker": "·", "freeze": "·", "still": "·", "seams": "·"},
    "truth_subject_consistency": {"cut": "▼", "still": "▲", "flicker": "·", "seams": "·"},
    "truth_background_consistency": {"cut": "▼", "still": "▲", "drift": "▼", "fade": "▼", "seams": "·"},
    "truth_accuracy_subject": {"cut": "▼", "freeze": "·", "still": "·", "shuffle": "·", "seams": "·", "flicker": "·"},
    "truth_accuracy_colour": {"cut": "▼", "freeze": "·", "still": "·", "shuffle": "·", "seams": "·", "flicker": "·"},
    "truth_accuracy_terrain": {"cut": "▼", "freeze": "·", "still": "·", "shuffle": "·", "seams": "·", "flicker": "·"},
    "truth_accuracy_time": {"cut": "▼", "drift": "▼", "still": "·", "shuffle": "·", "seams": "·", "flicker": "·"},
    "truth_colour_profile_distance": {"drift": "▲", "fade": "▲", "flicker": "▲", "cut": "▲", "still": "·", "blur": "·"},
    "truth_colour_drift": {"drift": "▲", "fade": "▲", "cut": "▲", "flicker": "·", "seams": "·"},
    "truth_subject_jitter": {"shuffle": "▲", "seams": "▲", "cut": "▲", "still": "▼", "drift": "·", "fade": "·"},
    "truth_scroll_speed": {"still": "▼", "blur": "·", "drift": "·", "fade": "·", "flicker": "·"},
    "truth_scroll_variation": {"freeze": "▲", "cut": "▲", "shuffle": "▲", "seams": "▲", "drift": "·", "flicker": "·"},
}


@pytest.fixture(scope="module")
def damaged() -> tuple[list[dict[str, float]], dict[str, dict[str, float]]]:
    """Figures of the clean clips, and of the first of them under each damage."""
    vae, clips = damage.load_vae(), damage.clean_clips()
    broken = {name: damage.figures(function(clips[0]), vae) for name, function in damage.DAMAGES.items()}
    return [damage.figures(clip, vae) for clip in clips], broken


@pytest.mark.parametrize("name", [n for n in MEASURES if n not in ("subject_consistency", "background_consistency")])
def test_measure_sees_the_damage_it_must_and_no_other(damaged, name):
    clean, broken = damaged
    values = [c[name] for c in clean]
    assert {"▲", "▼"} & set(EXPECTED[name].values()) or name == "motion_ratio"
    got = {what: damage.mark(name, values, broken[what][name]) for what in EXPECTED[name]}
    assert got == EXPECTED[name], (values, {what: broken[what][name] for what in EXPECTED[name]})


def test_every_damage_is_seen(damaged):
    seen = damage.marks(*damaged)
    for what in damage.DAMAGES:
        assert sum(row[what] != "·" for row in seen.values()) >= 3, what


def test_document_says_what_is_measured(damaged):
    """The text word for word; marks but for values near the border between seen and not seen."""
    clean, broken = damaged
    fresh = damage.document(clean, broken).splitlines()
    stored = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert len(fresh) == len(stored)
    names = iter(clean[0])
    for new, old in zip(fresh, stored, strict=True):
        cells = [cell.strip() for cell in old.strip("|").split("|")]
        if len(cells) != 2 + len(broken) or cells[0] in ("measure", "---"):
            assert new == old
            continue
        name = next(names)
        assert cells[0] == new.strip("|").split("|")[0].strip()
        values = [c[name] for c in clean]
        for what, cell in zip(broken, cells[2:], strict=True):
            possible = {damage.mark(name, values, broken[what][name], strictness) for strictness in (0.7, 1.0, 1.4)}
            assert cell[0] in possible, (name, what, cell, broken[what][name], values)
    assert next(names, None) is None


# formulas --------------------------------------------------------------------------------------------------------


def test_flicker_and_consistency_are_vbenchs():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 16, 20, 3), np.uint8)
    errors = [np.abs(frames[i].astype(float) - frames[i + 1]).mean() for i in range(4)]
    assert measures.temporal_flicker(frames) == pytest.approx((255 - np.mean(errors)) / 255, abs=1e-12)
    x = rng.standard_normal((6, 40)) + 0.3

    def cosine(a, b):
        return max(0.0, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))

    expected = [(cosine(x[i], x[i - 1]) + cosine(x[i], x[0])) / 2 for i in range(1, 6)]
    np.testing.assert_allclose(features.consistency_curve(x), expected, rtol=1e-12)
    assert min(cosine(x[i], x[0]) for i in range(1, 6)) >= 0


def test_noise_and_sharpness_of_known_pictures():
    rng = np.random.default_rng(1)
    grey = np.full((1, 200, 200, 3), 128.0) + 5 * rng.standard_normal((1, 200, 200, 1))
    assert measures.noise(grey.round().astype(np.uint8))[0] == pytest.approx(5, rel=0.05)
    # the Laplacian of white noise of standard deviation s has the variance 20·s²
    assert measures.sharpness(grey.round().astype(np.uint8))[0] == pytest.approx(20 * (25 + 1 / 12), rel=0.05)
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (32, 64, 3))[None]
    assert measures.noise(ramp)[0] < 1e-4
    assert measures.sharpness(ramp)[0] < 1e-6
    colours = np.zeros((1, 16, 16, 3), np.uint8)
    colours[..., 0] = 255
    assert measures.luminance(colours)[0] == pytest.approx(0.2126)
    assert measures.saturation(colours)[0] == 1


def _texture(height: int, width: int) -> torch.Tensor:
    noise = torch.rand(1, 1, height // 4, width // 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)[0, 0]


@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.5, -0.5), (-6.0, 3.0)])
def test_flow_finds_a_known_shift(shift):
    """Before and after are cut out of one picture; brightness changes in between and must not count as motion."""
    large = _texture(120, 160)
    moved = flow.warp(large[None, None], -torch.tensor(shift)[None, :, None, None].expand(1, 2, 120, 160))[0, 0]
    before, after = large[20:100, 20:140], 0.95 * moved[20:100, 20:140] + 0.03
    found = flow.lucas_kanade(before[None], after[None])[0, :, 8:-8, 8:-8]
    error = (found - torch.tensor(shift)[:, None, None]).norm(dim=0)
    assert error.median() < 0.1
    assert error.mean() < 0.2


def test_motion_does_not_depend_on_the_size_and_warping_error_leaves_hidden_pixels_out():
    small, _ = world.render(SCENE, 0, 9)
    large, _ = world.render(SCENE, 0, 9, 128, 192)
    a, b = (flow.motion_and_warping(v, "lucas-kanade")[0].mean() for v in (small, large))
    assert a == pytest.approx(b, rel=0.2)
    ground = (_texture(96, 128) * 255).byte().numpy()
    square = 255 - ground[:32, :32]
    frames = np.stack([ground] * 2)
    frames[0, 30:62, 30:62], frames[1, 30:62, 36:68] = square, square
    frames = np.repeat(frames[..., None], 3, 3)
    motion, error = flow.motion_and_warping(frames, "lucas-kanade")
    still = ((frames[0] / 255 - frames[1] / 255) ** 2).sum(-1).mean()
    assert error[0] < still / 5
    assert motion[0] * 96 / 256 == pytest.approx(6 * 32 * 32 / (96 * 128), rel=0.5)


def test_seams_are_compared_with_steps_of_the_same_kind():
    """A VAE that steps at every fourth frame hides no seam and makes none."""
    rng = np.random.default_rng(0)
    steps = 2 + 0.1 * rng.random(95)
    index = np.arange(1, 96)
    steps[index % 4 == 1] *= 2
    ratio, p = measures.seam_visibility(steps, 12, 13)
    assert ratio > 1.5
    assert p < 0.05
    ratio, p = measures.seam_visibility(steps, 12, 13, period=4)
    assert ratio == pytest.approx(1, abs=0.05)
    assert p > 0.05
    steps[(index - 13) % 12 == 0] *= 1.5
    ratio, p = measures.seam_visibility(steps, 12, 13, period=4)
    assert ratio == pytest.approx(1.5, abs=0.1)
    assert p < 0.01
    for block, offset, period in ((1, None, 1), (12, 13, 5), (200, None, 1), (12, -1, 1), (4, 1, 4)):
        with pytest.raises(ConfigError):
            measures.seam_visibility(steps, block, offset, period)


# truth of the embedded world -------------------------------------------------------------------------------------


def test_prompts_are_read_back_from_every_wording():
    rng = np.random.default_rng(0)
    for caption in world.all_captions():
        scene = truth.scenes_of(caption, 1)[0]
        assert world.caption(scene) == caption
    for _ in range(300):
        scene = world.sample_scene(rng)
        named = read_prompt(wording(scene, rng))
        assert {name: getattr(scene, name) for name in named} == named
        assert "subject" in named
    with pytest.raises(ConfigError, match="names no terrain and no time"):
        truth.scenes_of("a red kite", 1)
    with pytest.raises(ConfigError, match="names no subject and no colour and no terrain and no time"):
        truth.scenes_of("a cat", 1, np.zeros((1, 4), int))


def test_what_a_prompt_leaves_open_is_to_stay_as_it_began():
    video = np.concatenate(
        [world.render(SCENE, 0, 30)[0], world.render(dataclasses.replace(SCENE, time="night"), 30, 30)[0]]
    )
    figures = measure_tiny(video, f"a {SCENE.colour} {SCENE.subject} over {SCENE.terrain} hills")
    assert figures["accuracy_time"] == pytest.approx(0.5, abs=0.04)
    assert min(figures[f"accuracy_{name}"] for name in ("subject", "colour", "terrain")) > 0.8
    whole = measure_tiny(video[:30], world.caption(SCENE))
    assert measure_tiny(video[:30], f"a {SCENE.subject}") == whole
    # each prompt of a timeline has a beginning of its own
    assert measure_tiny(video, {0: f"a {SCENE.subject}", 30: f"the {SCENE.subject}"})["accuracy_time"] > 0.95


def test_truth_follows_the_subject_and_the_hills_and_timelines():
    video, mask = world.render(SCENE, 300, 60)
    curves = truth.truth_curves(video, world.caption(SCENE))
    weight = mask.sum((1, 2))
    centre = np.stack([(mask.sum(1) * np.arange(96)).sum(1) / weight, (mask.sum(2) * np.arange(64)).sum(1) / weight], 1)
    # the bright part of a subject is not its centre, but moves with it
    assert np.linalg.norm((curves.position - centre) - (curves.position - centre).mean(0), axis=1).max() < 1.5
    shift = 0.6 * (0.8 + 0.4 * np.random.default_rng(SCENE.seed).random(32).astype(np.float32)[17])
    assert np.median(curves.scroll) == pytest.approx(float(shift), rel=0.03)
    other = world.Scene("bird", "red", "snowy", "night", seed=9)
    both = np.concatenate([video, world.render(other, 0, 20)[0]])
    timeline = {0: world.caption(SCENE), 60: world.caption(other)}
    figures = measure_tiny(both, timeline)
    assert min(figures[f"accuracy_{name}"] for name in ("subject", "colour", "terrain", "time")) > 0.95
    assert figures["colour_profile_distance"] < 0.03
    wrong = measure_tiny(both, world.caption(SCENE))
    assert wrong["accuracy_time"] == pytest.approx(0.75, abs=0.02)
    assert wrong["colour_profile_distance"] > 3 * figures["colour_profile_distance"]
    large, _ = world.render(SCENE, 300, 12, 128, 192)
    assert measure_tiny(large, world.caption(SCENE))["accuracy_subject"] == 1


# features --------------------------------------------------------------------------------------------------------


def test_vision_transformer_is_dinos(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
                       image_size=64, patch_size=16, layer_norm_eps=1e-6)  # fmt: skip
    oracle = ViTModel(config, add_pooling_layer=False).eval()
    torch.manual_seed(0)
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model = features.VisionTransformer(128, 2, 16, 17)
    state = dict(oracle.state_dict())
    ours = {}
    for key in model.state_dict():
        ours[key] = _oracle_weight(state, key)
    model.load_state_dict(ours)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = oracle(images).last_hidden_state[:, 0]
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    torch.save(ours, tmp_path / "dino.pth")
    loaded = features.load_features(tmp_path / "dino.pth")
    frames, _ = world.render(SCENE, 0, 3)
    assert loaded(frames).shape == (3, 128)
    assert loaded.name == "DINO, dino.pth"
    result = measure(frames, subject_features=tmp_path / "dino.pth", features="descriptor", flow="lucas-kanade")
    assert 0 < result["measures"]["subject_consistency"] <= 1
    assert result["computed_by"]["subject_consistency"] == "DINO, dino.pth"


def _oracle_weight(state: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """DINO's tensor `key` of transformers' ViT, whatever that release calls its parts."""
    fixed = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    fixed |= {f"patch_embed.proj.{p}": f"embeddings.patch_embeddings.projection.{p}" for p in ("weight", "bias")}
    fixed |= {f"norm.{p}": f"layernorm.{p}" for p in ("weight", "bias")}
    if key in fixed:
        return state[fixed[key]]
    block, part = re.fullmatch(r"blocks\.(\d+)\.(.+)", key).groups()
    inside = {k.partition(f".{block}.")[2]: v for k, v in state.items() if re.search(rf"layers?\.{block}\.", k)}
    kind = part.rpartition(".")[2]
    wanted = {
        "norm1": ("layernorm_before",),
        "norm2": ("layernorm_after",),
        "attn.proj": ("attention.output.dense", "attention.o_proj"),
        "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
        "mlp.fc2": ("output.dense", "mlp.fc2"),
    }
    if part.startswith("attn.qkv"):
        names = [("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")]
        return torch.cat(
            [next(v for k, v in inside.items() if k.endswith(tuple(f"{n}.{kind}" for n in ns))) for ns in names]
        )
    return next(inside[f"{name}.{kind}"] for name in wanted[part.rpartition(".")[0]] if f"{name}.{kind}" in inside)


class _MeanColour(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_clip_is_openais(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
                              image_size=64, patch_size=32, projection_dim=24, hidden_act="quick_gelu")  # fmt: skip
    oracle = CLIPVisionModelWithProjection(config).eval()
    torch.manual_seed(1)
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = oracle.state_dict()
    inside = next(key for key in state if key.endswith("class_embedding")).removesuffix("embeddings.class_embedding")
    ours = {"proj": state["visual_projection.weight"].T.contiguous()}
    for ours_key, key in (("class_embedding", "class_embedding"), ("positional_embedding", "position_embedding.weight"),
                          ("conv1.weight", "patch_embedding.weight")):  # fmt: skip
        ours[ours_key] = state[f"{inside}embeddings.{key}"]
    for kind in ("weight", "bias"):
        ours[f"ln_pre.{kind}"] = state[f"{inside}pre_layrnorm.{kind}"]
        ours[f"ln_post.{kind}"] = state[f"{inside}post_layernorm.{kind}"]
        for i in range(2):
            new, old = f"transformer.resblocks.{i}", f"{inside}encoder.layers.{i}"
            ours[f"{new}.attn.in_proj_{kind}"] = torch.cat([state[f"{old}.self_attn.{n}_proj.{kind}"] for n in "qkv"])
            for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                         ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
                ours[f"{new}.{a}.{kind}"] = state[f"{old}.{b}.{kind}"]
    model = features.CLIPVision(128, 2, 32, 5, 24)
    model.load_state_dict(ours)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), oracle(images).image_embeds, rtol=1e-4, atol=1e-4)
    torch.save({f"visual.{key}": value.half() for key, value in ours.items()}, tmp_path / "clip.pt")
    loaded = features.load_features(tmp_path / "clip.pt")
    assert loaded.name == "CLIP, clip.pt"
    assert loaded(np.zeros((2, 70, 90, 3), np.uint8)).shape == (2, 24)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_networks_from_files(tmp_path, monkeypatch):
    torch.jit.script(_MeanColour()).save(tmp_path / "mean.pt")
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("code of the file was loaded"))
        with pytest.raises(CheckpointError, match=r"mean\.pt is TorchScript, which would run code: where you trust it"):
            features.load_features(tmp_path / "mean.pt")
        with zipfile.ZipFile(tmp_path / "mean.pt") as whole, zipfile.ZipFile(tmp_path / "bare.pt", "w") as bare:
            for name in whole.namelist():
                if "/code/" not in name:
                    bare.writestr(name, whole.read(name))
        with pytest.raises(CheckpointError, match=r"bare\.pt cannot be read as a network: .*TorchScript"):
            features.load_features(tmp_path / "bare.pt")
    (tmp_path / "other.pt").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"other\.pt cannot be read as a network"):
        features.load_features(tmp_path / "other.pt")
    torch.save({"cls_token": torch.zeros(1, 1, 64)}, tmp_path / "torn.pth")
    with pytest.raises(CheckpointError, match=r"torn\.pth cannot be read as a network"):
        features.load_features(tmp_path / "torn.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match="holds neither DINO's ViT nor CLIP: give dino"):
        features.load_features(tmp_path / "foreign.pth")
    with pytest.raises(ConfigError, match="choose auto, mobilenet or descriptor, or give a weights file"):
        features.load_features("resnet")


def test_what_is_not_installed_is_named_and_never_replaced_when_asked_for(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    monkeypatch.setattr(features, "_mobilenet_path", lambda: None)
    assert flow.flow_method("auto") == "lucas-kanade"
    assert features.load_features("auto").name == "colour and gradients, no weights"
    with pytest.raises(DeviceError, match=r"miga_engine\[eval\]"):
        flow.flow_method("dis")
    with pytest.raises(DeviceError, match=r"miga_engine\[eval\]"):
        features.load_features("mobilenet")
    with pytest.raises(ConfigError, match="choose auto, dis, lucas-kanade"):
        flow.flow_method("raft")


# report and command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A video of the embedded model's world, the same standing still, and both as folders of pictures."""
    folder = tmp_path_factory.mktemp("videos")
    frames, _ = world.render(SCENE, 100, 40)
    found = {"moving": _write(folder / "moving.mp4", frames, model="tiny", prompt=world.caption(SCENE))}
    found["still"] = _write(folder / "still.mkv", damage.DAMAGES["still"](frames), model="other", prompt="a cat")
    (folder / "pictures").mkdir()
    _write(folder / "pictures" / "%06d.png", frames[:6])
    found["pictures"] = folder / "pictures"
    return found


def test_command_prints_the_table_with_motion_beside_consistency(files, capsys):
    assert _miga("eval", files["moving"], files["still"], "--features", "descriptor", "--flow", "lucas-kanade") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["moving.mp4", "still.mkv"]
    assert "40 frames, 96×64, 12 fps" in lines[1]
    rows = {line.strip().partition("  ")[0]: line.split()[-2:] for line in lines[2:]}
    names = [line.strip() for line in lines]
    consistency = next(i for i, name in enumerate(names) if name.startswith("consistency of features"))
    assert names[consistency + 1].startswith("motion, px/frame")
    assert float(rows["consistency of features ↑"][1]) == 1
    assert float(rows["motion, px/frame"][0]) > 0.5 > float(rows["motion, px/frame"][1])
    assert rows["subject as asked, % ↑"] == ["100.0", "–"], "the truth is taken of the embedded model's video only"
    assert any(line.startswith("! still.mkv: STILL") for line in lines)
    assert any(line.startswith("! still.mkv: FROZEN") for line in lines)
    assert "Lucas-Kanade, built in" in lines[-4] + lines[-3] + lines[-5]


def test_command_writes_tables_and_a_picture(files, tmp_path, capsys):
    outputs = {suffix: tmp_path / f"table{suffix}" for suffix in (".json", ".csv")}
    quick = ["--features", "descriptor", "--flow", "lucas-kanade", "--num-frames", 20]
    seams = ["--block", 8, "--block-offset", 5, "--period", 4]
    arguments = [files["still"], "--baseline", files["moving"], *quick, *seams, "--model", "tiny"]
    with pytest.raises(AssertionError):  # 20 frames are too few latent frames for the score
        assert _miga("eval", *arguments) == 0
    assert "the consistency score needs 12" in capsys.readouterr().err
    arguments = arguments[:-2]
    assert _miga("eval", *arguments, "-o", outputs[".json"], "--picture", tmp_path / "picture.png") == 0
    table = capsys.readouterr().out
    assert table.split()[:2] == ["moving.mp4", "still.mkv"]
    assert re.search(r"motion, px/frame +[\d.]+ +0.00 \(-[\d.]+\)", table)
    assert "! still.mkv: LESS MOTION: 0.00 of the baseline's" in table
    assert _miga("eval", *arguments, "--json", "-o", outputs[".csv"]) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads(outputs[".json"].read_text())
    assert stored == printed
    assert stored["moving.mp4"]["frames"] == 20
    assert len(stored["moving.mp4"]["curves"]["motion"]) == 19
    rows = {(row["video"], row["measure"]): row for row in csv.DictReader(outputs[".csv"].open())}
    assert float(rows["moving.mp4", "motion"]["value"]) == stored["moving.mp4"]["measures"]["motion"]
    assert rows["moving.mp4", "motion"]["computed_by"] == "Lucas-Kanade, built in"
    picture = read_video(tmp_path / "picture.png")[0]
    assert picture.shape[1] == 1440
    for colour in report._COLOURS[:2]:
        assert (np.abs(picture.astype(int) - colour) <= 1).all(-1).sum() > 500, "a curve of each video"


def test_picture_draws_the_curve_where_its_values_are(tmp_path):
    frames, _ = world.render(SCENE, 0, 9)
    result = measure(frames, features="descriptor", flow="lucas-kanade")
    ramp = list(np.linspace(0, 1, 9))
    panel = report._panel(
        ("luminance", "x", 0, 1, 1),
        {"a": {**result, "curves": {"luminance": ramp}}},
        {"a": np.array([255.0, 0, 0], np.float32)},
        400,
        (),
    )
    plot = panel[report._HEAD : report._PANEL_HEIGHT - report._FOOT, report._LEFT : 400 - 14]
    for share in (0.1, 0.5, 0.9):
        column = plot[:, round(share * (plot.shape[1] - 1)), 0]
        assert 1 - column.argmax() / (len(column) - 1) == pytest.approx(share, abs=0.02)


def test_folders_are_read_in_order_and_bad_input_is_named(files, tmp_path, capsys):
    quick = ["--features", "descriptor", "--flow", "lucas-kanade"]
    assert _miga("eval", files["pictures"], "--json", *quick) == 0
    result = json.loads(capsys.readouterr().out)["pictures"]
    assert (result["frames"], result["fps"]) == (6, None)
    assert result["measures"]["frozen_share"] == 0
    (tmp_path / "empty").mkdir()
    single = _write(tmp_path / "single.mp4", world.render(SCENE, 0, 1)[0])
    for arguments, message in (
        ([tmp_path / "absent.mp4"], "cannot read"),
        ([tmp_path / "empty"], "holds no pictures"),
        ([single], "2 frames or more"),
        ([files["moving"], "--prompt", "a cat"], "names no subject"),
        ([files["moving"], "--block", "100"], "0 borders of blocks of 100"),
        ([files["moving"], "-o", tmp_path / "table.txt"], "not one of .json, .csv"),
        ([files["moving"], "--picture", tmp_path / "no" / "p.png"], "does not exist"),
        ([files["moving"], "--model", tmp_path / "absent"], "there is no model at"),
        ([files["moving"], "--num-frames", 1], "give 2 or more"),
        ([], "the following arguments are required: FILE"),
    ):
        assert _miga("eval", *arguments, *quick) == 2, arguments
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1


def test_measure_refuses_what_is_no_video():
    for frames in (np.zeros((4, 32, 32, 3)), np.zeros((4, 32, 32), np.uint8), torch.zeros(4, 32, 32, 3), None):
        with pytest.raises(ConfigError, match="uint8"):
            measure(frames)
    with pytest.raises(ConfigError, match="16×16"):
        measure(np.zeros((4, 8, 32, 3), np.uint8))
    black = measure(np.zeros((4, 32, 32, 3), np.uint8), features="descriptor", flow="lucas-kanade")
    assert json.loads(json.dumps(black)) == black
    assert black["measures"]["saturation_ratio"] == 1
    assert [flag.partition(":")[0] for flag in black["flags"]] == ["STILL", "FROZEN"]


# export ----------------------------------------------------------------------------------------------------------

SUITE = {
    "15": [
        {"prompt_gen": "a red kite / over\ngreen hills at noon", "element_extract": {"Scene Type": "hills"},
         "auto_gen_question": {"Scene Type": ["Are there hills?"]}, "prompt_gen_list_extract": []},
        {"prompt_gen": "```\na blue bird over dark hills at night\n```", "element_extract": {}, "auto_gen_question": {},
         "prompt_gen_list_extract": []},
    ]
}  # fmt: skip
SMALL = ["--height", 32, "--width", 48, "--num-inference-steps", 10, "--zigzag-width", 2, "--stage2-steps", 3,
         "--guidance-frames", 1, "--stride", 2, "--judge-step", 3]  # fmt: skip


def test_vbench_export_is_made_once_and_goes_on(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red balloon over snowy hills at dawn\n\na white plane over a desert at noon\n")
    out = tmp_path / "out"
    arguments = ["eval", "export", out, "--format", "vbench", "--prompts", prompts, "--samples", 1]
    arguments += ["--num-frames", 9, "--seed", 3, *SMALL]
    assert _miga(*arguments) == 0
    assert "2 videos, 2 of them made now" in capsys.readouterr().err
    names = [f"{line}-0.mp4" for line in prompts.read_text().splitlines() if line]
    assert sorted(p.name for p in (out / "videos").iterdir()) == sorted(names)
    video = out / "videos" / names[1]
    assert read_video(video).shape == (9, 32, 48, 3)
    assert (read_metadata(video)["prompt"], read_metadata(video)["seed"]) == (names[1][:-6], 3)
    info = json.loads((out / "full_info.json").read_text())
    assert [entry["prompt_en"] for entry in info] == [name[:-6] for name in names]
    assert {"subject_consistency", "dynamic_degree"} < set(info[0]["dimension"])
    script = (out / "run.sh").read_text()
    subprocess.run(["sh", "-n", out / "run.sh"], check=True)
    compile(script.partition("<<'PYTHON'\n")[2].partition("\nPYTHON\n")[0], "run.sh", "exec")
    video.unlink()
    before = (out / "videos" / names[0]).stat().st_mtime_ns
    assert _miga(*arguments) == 0
    assert "1 of them made now" in capsys.readouterr().err
    assert (out / "videos" / names[0]).stat().st_mtime_ns == before
    assert not list(out.glob("unfinished*"))
    assert _miga(*arguments, "--guidance-scale", 1) == 2
    assert "made with other options" in capsys.readouterr().err


def test_vbenchs_own_list_keeps_its_entries_and_prompts_must_be_file_names(tmp_path):
    entries = [
        {"prompt_en": "a cat", "dimension": ["color", "temporal_flickering"], "auxiliary_info": {"color": "red"}}
    ]
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(entries))
    clips, written = export.plan_vbench(path, 5)
    assert [clip.path for clip in clips] == [f"videos/a cat-{i}.mp4" for i in range(5)]
    assert [clip.sample for clip in clips] == list(range(5))
    assert json.loads(written["full_info.json"]) == entries
    assert "dimension_list=['temporal_flickering']" in written["run.sh"]
    for name, content, message in (
        ("slash.txt", "either/or", "without /"),
        ("long.txt", "é" * 130, "shorten it to 249 bytes"),
        ("empty.txt", "\n", "holds no prompts"),
        ("broken.json", "{", "not valid JSON"),
        ("other.json", '{"a": 1}', "prompt_en"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=message):
            export.plan_vbench(tmp_path / name, 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        export.plan_vbench(tmp_path / "absent.txt", 1)


def test_narrlv_export_has_the_names_and_keys_its_scripts_read(tmp_path):
    path = tmp_path / "prompt_suit_v4_scene_attribute_tna_1.json"
    path.write_text(json.dumps(SUITE))
    clips, written = export.plan_narrlv(tmp_path)
    folder = f"videos/{path.stem}"
    assert [clip.path for clip in clips] == [
        f"{folder}/15_0_a red kite   over gr.mp4",
        f"{folder}/15_1_a blue bird over dar.mp4",
    ]
    assert clips[1].prompt == "a blue bird over dark hills at night"
    for clip in clips:  # as NarrLV finds the questions of a video
        key, index = Path(clip.path).name.split("_")[:2]
        entry = json.loads(written[f"prompt_suit/{path.name}"])[key][int(index)]
        assert entry["auto_gen_question_1"] == entry["auto_gen_question"]
        assert entry["element_extract_1"] == entry["element_extract"]
    script = tmp_path / "run.sh"
    script.write_text(written["run.sh"])
    subprocess.run(["sh", "-n", script], check=True)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="no prompt suite of NarrLV"):
        export.plan_narrlv(path)


def test_protocol_is_the_papers_and_a_foreign_export_is_left_alone(tmp_path, tmp_path_factory):
    from miga_engine.engine import Engine

    engine = Engine.from_pretrained("tiny", "meta")
    videocrafter2 = Engine.from_pretrained(golden_model.build_videocrafter2(tmp_path_factory.mktemp("vc2")), "meta")
    assert [e.bundle.facts.protocol_frames for e in (videocrafter2, engine)] == [128, 161]
    (tmp_path / "protocol.json").write_text("{}")
    with pytest.raises(OutputError, match="made with other options"):
        export.export(engine, tmp_path, [export.Clip("videos/a-0.mp4", "a")], {})
    assert [p.name for p in tmp_path.iterdir()] == ["protocol.json"]
