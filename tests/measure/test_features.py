"""Features are those of the published networks, read from files as data, never replaced when asked for."""

import re
import zipfile

import numpy as np
import pytest
import torch
from measured import SCENE

from miga_engine.errors import CheckpointError, ConfigError, DeviceError
from miga_engine.measure import features, flow, measure
from miga_engine.tiny import world


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
