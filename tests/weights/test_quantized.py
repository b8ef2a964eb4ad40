"""Weights in eight bits load as float(weight)·scale, bit for bit; without a scale, or packed, they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import random_wan
import torch
from refusals import refusal
from safetensors.torch import save_file
from torch import Tensor
from written_formats import diffusers_name

from miga_engine.errors import CheckpointError
from miga_engine.models import load_text_encoder, load_transformer
from miga_engine.models.convert import convert
from miga_engine.models.wan.layouts import official_text_encoder
from miga_engine.weights.files import open_checkpoint
from miga_engine.weights.quantized import dequantized
from miga_engine.weights.safetensors import SafetensorsCheckpoint

Tensors = dict[str, Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448, E5M2: 57344, torch.int8: 127}
TABLES = ("shared.weight", "relative_attention_bias.weight")
WAN, UMT5 = random_wan.transformer(), random_wan.text_encoder("hf")
OFFICIAL_UMT5 = random_wan.text_encoder()


class Style(NamedTuple):
    """How a program writes a layer: the weight, the name and the shape of its scale, what it says of the format."""

    dtype: torch.dtype
    scale: str
    is_of_rows: bool = False
    num_axes: int = 0
    beside: str = ""
    said: str = ""


LAYER = "blocks.0.self_attn.q"
WEIGHT = f"{LAYER}.weight"

STYLES = {
    "ComfyUI of old": Style(E4M3, "scale_weight", beside="scale_input", said="mark"),
    "ComfyUI of old, [1]": Style(E4M3, "scale_weight", num_axes=1, said="mark"),
    "ComfyUI of old, e5m2": Style(E5M2, "scale_weight", said="mark"),
    "ComfyUI, header": Style(E4M3, "weight_scale", beside="input_scale", said="header"),
    "ComfyUI, header, e5m2": Style(E5M2, "weight_scale", num_axes=1, said="header"),
    "ComfyUI, tensors": Style(E4M3, "weight_scale", beside="input_scale", said="tensors"),
    "ComfyUI, tensors, int8": Style(torch.int8, "weight_scale", said="tensors"),
    "LightX2V, fp8": Style(E4M3, "weight_scale", is_of_rows=True, num_axes=2),
    "LightX2V, int8": Style(torch.int8, "weight_scale", is_of_rows=True, num_axes=2),
    "rows, [out]": Style(E4M3, "scale_weight", is_of_rows=True, num_axes=1),
    "int8, one scale": Style(torch.int8, "weight_scale"),
}
FORMATS = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2", torch.int8: "int8_tensorwise"}


def is_linear(key: str, value: Tensor) -> bool:
    return value.ndim == 2 and key.endswith(".weight") and not key.endswith(TABLES)


def text(content: object) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def written(tensors: Mapping[str, Tensor], style: Style) -> tuple[Tensors, Tensors, dict[str, str]]:
    """What a program stores, what it stands for in float32, and the header."""
    stored, meant, layers = {}, {}, {}
    for key, value in tensors.items():
        if not is_linear(key, value):
            stored[key] = meant[key] = value
            continue
        layer = key.removesuffix(".weight")
        most = value.abs().amax(1, keepdim=True) if style.is_of_rows else value.abs().amax().view(1, 1)
        scale = most / LARGEST[style.dtype]
        low = value / scale
        stored[key] = (low.round() if style.dtype is torch.int8 else low).to(style.dtype)
        meant[key] = stored[key].float() * scale
        stored[f"{layer}.{style.scale}"] = scale.reshape([*scale.shape][: style.num_axes])
        layers[layer] = {"format": FORMATS[style.dtype], "full_precision_matrix_mult": False}
        if style.beside:
            stored[f"{layer}.{style.beside}"] = torch.tensor(0.25)
        if style.said == "tensors":
            stored[f"{layer}.comfy_quant"] = text(layers[layer])
    if style.said == "mark":
        stored["scaled_fp8"] = torch.empty(2, dtype=style.dtype)
    return stored, meant, {"_quantization_metadata": json.dumps({"layers": layers})} if style.said == "header" else {}


def saved(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def assert_equal(network: torch.nn.Module, expected: Mapping[str, Tensor]) -> None:
    state = network.state_dict()
    assert state.keys() == expected.keys()
    wrong = [key for key, value in expected.items() if not torch.equal(state[key], value.to(state[key].dtype))]
    assert not wrong


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys whose data were read, but for what a layer says of its format."""
    keys: list[str] = []
    read = SafetensorsCheckpoint.read

    def spy(self: SafetensorsCheckpoint, key: str) -> Tensor:
        keys.extend([key] if not key.endswith(".comfy_quant") else [])
        return read(self, key)

    monkeypatch.setattr(SafetensorsCheckpoint, "read", spy)
    return keys


NAMES: dict[str, Callable[[str], str]] = {
    "official": lambda key: key,
    "prefix": lambda key: f"model.diffusion_model.{key}",
    "Diffusers": diffusers_name,
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("style", STYLES)
def test_transformers_load_as_their_weights_times_their_scales(tmp_path: Path, style: str, names: str) -> None:
    stored, meant, metadata = written(WAN, STYLES[style])
    path = saved(tmp_path / "wan.safetensors", {NAMES[names](k): v for k, v in stored.items()}, metadata)
    assert_equal(load_transformer(path, dtype=torch.float32), meant)
    network = load_transformer(path)
    assert network.dtype == torch.bfloat16
    assert_equal(network, meant)


@pytest.mark.parametrize("shared", [torch.bfloat16, E4M3])
@pytest.mark.parametrize("style", STYLES)
def test_text_encoders_do_so_too_and_their_table_of_tokens_has_no_scale(
    tmp_path: Path, style: str, shared: torch.dtype
) -> None:
    tables = {key: value.to(shared) for key, value in UMT5.items() if key.endswith(TABLES)}
    stored, meant, metadata = written({**UMT5, **tables}, STYLES[style])
    path = saved(tmp_path / "umt5.safetensors", stored, metadata)
    plain = saved(tmp_path / "plain.safetensors", {key: value.float() for key, value in meant.items()})
    expected = load_text_encoder(plain).state_dict()
    assert expected.keys() == OFFICIAL_UMT5.keys()
    assert_equal(load_text_encoder(path, dtype=torch.float32), expected)
    network = load_text_encoder(path)
    assert network.state_dict()["norm.weight"].dtype == torch.bfloat16
    assert_equal(network, expected)


@pytest.mark.parametrize("num_scales", [0, 1])
@pytest.mark.parametrize("key", ["blocks.0.norm3.weight", "patch_embedding.weight", WEIGHT])
def test_weights_of_any_number_of_axes_may_have_scales(tmp_path: Path, key: str, num_scales: int) -> None:
    low = WAN[key].to(E4M3)
    scale = torch.linspace(0.5, 1.5, len(low))
    scale = scale if num_scales else scale[0]
    path = saved(tmp_path / "a.safetensors", {**WAN, key: low, key.replace(".weight", ".scale_weight"): scale})
    expected = low.float() * (scale.view(-1, *[1] * (low.ndim - 1)) if num_scales else scale)
    assert_equal(load_transformer(path, dtype=torch.float32), {**WAN, key: expected})


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("is_all", [True, False])
def test_fp8_without_scales_is_cast(tmp_path: Path, dtype: torch.dtype, is_all: bool) -> None:
    for load, tensors in ((load_transformer, WAN), (load_text_encoder, OFFICIAL_UMT5)):
        low = {key: value.to(dtype) if is_all or is_linear(key, value) else value for key, value in tensors.items()}
        path = saved(tmp_path / "a.safetensors", low)
        checkpoint = open_checkpoint(path)
        assert dequantized(checkpoint) is checkpoint
        assert_equal(load(path, dtype=torch.float32), {key: value.float() for key, value in low.items()})
        network = load(path)
        assert torch.bfloat16 in {value.dtype for value in network.state_dict().values()}
        assert_equal(network, {key: value.float() for key, value in low.items()})


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("style", ["ComfyUI of old", "ComfyUI, header", "ComfyUI, tensors", "LightX2V, int8"])
def test_converting_writes_the_floats_and_nothing_of_the_scales(tmp_path: Path, style: str, names: str) -> None:
    stored, meant, metadata = written(WAN, STYLES[style])
    path = saved(tmp_path / "wan.safetensors", {NAMES[names](k): v for k, v in stored.items()}, metadata)
    convert(path, tmp_path / "float32.safetensors", torch.float32)
    convert(path, tmp_path / "kept.safetensors")
    whole, kept = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("float32", "kept"))
    assert whole.shapes.keys() == kept.shapes.keys() == {NAMES[names](key) for key in WAN}
    assert all(torch.equal(whole.read(NAMES[names](key)), value) for key, value in meant.items())
    for key, dtype in (("blocks.0.ffn.0.weight", torch.bfloat16), ("head.head.weight", torch.float32)):
        assert torch.equal(kept.read(NAMES[names](key)), meant[key].to(dtype))
        assert kept.stored_dtype(NAMES[names](key)) is dtype


@pytest.mark.parametrize("style", ["ComfyUI of old", "ComfyUI, tensors", "LightX2V, int8"])
def test_a_weight_without_its_scale_is_refused(tmp_path: Path, reads: list[str], style: str) -> None:
    for load, tensors, layer in (
        (load_transformer, WAN, "blocks.1.cross_attn.v"),
        (load_text_encoder, UMT5, "encoder.block.1.layer.1.DenseReluDense.wo"),
    ):
        stored, _, metadata = written(tensors, STYLES[style])
        del stored[f"{layer}.{STYLES[style].scale}"]
        path = saved(tmp_path / "a.safetensors", stored, metadata)
        sentence = refusal(lambda load=load, path=path: load(path), CheckpointError)
        stored_as = str(STYLES[style].dtype).removeprefix("torch.")
        assert f"holds {layer}.weight as {stored_as} without a {layer}.scale_weight or .weight_scale" in sentence
        assert sentence.endswith("without its scale it is worth nothing: download it again")
    assert not reads


def test_a_mark_without_any_scale_is_refused(tmp_path: Path, reads: list[str]) -> None:
    low = {key: value.to(E4M3) if is_linear(key, value) else value for key, value in WAN.items()}
    path = saved(tmp_path / "a.safetensors", {**low, "scaled_fp8": torch.empty(0, dtype=E4M3)})
    assert "without its scale it is worth nothing" in refusal(lambda: load_transformer(path), CheckpointError)
    assert not reads


HALF = torch.zeros(128, 64, dtype=torch.uint8)


def packed(*drop: str, **parts: Tensor) -> Tensors:
    """The network with a layer in parts; `_` in their names stands for the dots of what they are called in files."""
    kept = {key: value for key, value in WAN.items() if key not in drop}
    return kept | {LAYER + "." + name: value for name, value in parts.items()}


PACKED = {
    "nvfp4": packed(
        weight=HALF, weight_scale=torch.ones(128, 8).to(E4M3), weight_scale_2=torch.ones(()), input_scale=torch.ones(())
    ),
    "uint8": packed(weight=HALF),
    "awq": packed(
        WEIGHT,
        qweight=torch.zeros(128, 16, dtype=torch.int32),
        qzeros=torch.zeros(1, 16, dtype=torch.int32),
        scales=torch.ones(1, 128),
    ),
    "bitsandbytes": packed(weight=HALF.view(-1, 1))
    | {f"{WEIGHT}.absmax": torch.ones(256), f"{WEIGHT}.quant_map": torch.ones(16)},
    "bitsandbytes, int8": packed(weight=torch.zeros(128, 128, dtype=torch.int8)) | {f"{LAYER}.absmax": torch.ones(128)},
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("names", NAMES)
def test_formats_that_pack_four_bits_are_refused(tmp_path: Path, reads: list[str], name: str, names: str) -> None:
    path = saved(tmp_path / "a.safetensors", {NAMES[names](key): value for key, value in PACKED[name].items()})
    sentence = refusal(lambda: load_transformer(path), CheckpointError)
    assert f"holds {NAMES[names](WEIGHT).removesuffix('weight')}" in sentence
    assert "of a format that packs values of four bits (nvfp4, awq, bitsandbytes), which is not read" in sentence
    assert sentence.endswith(": give weights in fp8 with scales, in bf16, or as GGUF")
    assert not reads


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8", "convrot_w4a4", "asym_w4a8_int8", "awq_w4a16", "x" * 900, ""])
@pytest.mark.parametrize("said", ["header", "tensors"])
def test_other_formats_are_refused_by_the_name_that_the_file_gives(
    tmp_path: Path, reads: list[str], format: str, said: str
) -> None:
    tensors = packed(weight=torch.zeros(128, 128, dtype=E4M3), weight_scale=torch.ones(()))
    content = {"format": format}
    if said == "tensors":
        tensors[f"{LAYER}.comfy_quant"] = text(content)
    metadata = {"_quantization_metadata": json.dumps({"layers": {LAYER: content}})} if said == "header" else {}
    path = saved(tmp_path / "a.safetensors", tensors, metadata)
    sentence = refusal(lambda: load_transformer(path), CheckpointError)
    assert f"holds {LAYER} in the format {format[:20]}" in sentence
    assert ", which is not read: give weights in float8_e4m3fn, float8_e5m2 or int8_tensorwise, in bf16" in sentence
    assert not reads


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (torch.ones(128, 8), r"float32 [128, 8]"),
        (torch.ones(128, 8).to(E4M3), r"float8_e4m3fn [128, 8]"),
        (torch.ones(1, 128), r"float32 [1, 128]"),
        (torch.ones(1, 1), r"float32 [1, 1]"),
        (torch.ones(128, 1, 1), r"float32 [128, 1, 1]"),
        (torch.ones(64), r"float32 [64]"),
        (torch.ones(0), r"float32 [0]"),
        (torch.ones((), dtype=torch.int32), r"int32 []"),
        (torch.ones(128, 4, dtype=torch.uint8), r"uint8 [128, 4]"),
    ],
)
def test_scales_of_blocks_and_other_shapes_are_refused(
    tmp_path: Path, reads: list[str], scale: Tensor, said: str
) -> None:
    path = saved(tmp_path / "a.safetensors", packed(weight=torch.zeros(128, 128, dtype=E4M3), weight_scale=scale))
    sentence = refusal(lambda: load_transformer(path), CheckpointError)
    assert f"holds {LAYER}.weight_scale as {said}, which is neither one scale nor one for each row of [128, 128]" in (
        sentence
    )
    assert not reads


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("is_of_rows", [True, False])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, value: float, is_of_rows: bool) -> None:
    scale = torch.ones(128, 1) if is_of_rows else torch.ones(())
    scale.view(-1)[-1] = value
    path = saved(tmp_path / "a.safetensors", packed(weight=torch.zeros(128, 128, dtype=E4M3), weight_scale=scale))
    sentence = refusal(lambda: load_transformer(path), CheckpointError)
    assert f"holds {LAYER}.weight_scale with values that are not finite: download it again" in sentence


HOSTILE: dict[str, Any] = {
    "no JSON": "format: fp8",
    "nothing": "",
    "a list": "[]",
    "null": "null",
    "a number": "1",
    "a number too long": "9" * 5000,
    "no layers": "{}",
    "a list of layers": '{"layers": ["a"]}',
    "a layer in words": '{"layers": {"a": "float8_e4m3fn"}}',
    "a layer of a list": '{"layers": {"a": [1]}}',
    "a layer without a format": '{"layers": {"a": {}}}',
    "nested deeply": "[" * 200_000,
    "nested deeply in a layer": '{"layers": {"a": {"format": ' + "[" * 200_000,
    "huge": '{"layers": {' + ", ".join(f'"{i}": 1' for i in range(100_000)) + "}}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_description_is_refused(tmp_path: Path, reads: list[str], name: str) -> None:
    path = saved(tmp_path / "a.safetensors", WAN, {"_quantization_metadata": HOSTILE[name]})
    sentence = refusal(lambda: load_transformer(path), CheckpointError)
    assert "a.safetensors does not say how its weights are quantised (" in sentence
    assert sentence.endswith("): download it again")
    assert not reads


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(2, dtype=torch.uint8),
        torch.full((8,), 255, dtype=torch.uint8),
        torch.full((2**15,), ord("["), dtype=torch.uint8),
        torch.full((2**17,), ord(" "), dtype=torch.uint8),
        torch.full((2**10, 2**10), ord(" "), dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.ones(4),
        text(["format"]),
        text({"layers": {}}),
    ],
    ids=["zeros", "no UTF-8", "nested", "long", "a matrix", "empty", "floats", "a list", "no format"],
)
def test_what_is_no_description_of_a_layer_is_refused(tmp_path: Path, reads: list[str], content: Tensor) -> None:
    tensors = packed(weight=torch.zeros(128, 128, dtype=E4M3), weight_scale=torch.ones(()), comfy_quant=content)
    path = saved(tmp_path / "a.safetensors", tensors)
    sentence = refusal(lambda: load_transformer(path), CheckpointError)
    assert "does not say how its weights are quantised (" in sentence
    assert not reads


@pytest.mark.parametrize("format", [None, 1, True, ["float8_e4m3fn"], {"a": 1}])
def test_formats_that_are_no_names_are_refused(tmp_path: Path, format: object) -> None:
    said = json.dumps({"layers": {"a\nb": {"format": format}}})
    path = saved(tmp_path / "a.safetensors", WAN, {"_quantization_metadata": said})
    assert ", which is not read" in refusal(lambda: load_transformer(path), CheckpointError)


@pytest.mark.parametrize("shape", [(2**17,), (2**9, 2**9)])
def test_of_a_long_description_not_even_that_is_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = packed(comfy_quant=torch.zeros(shape, dtype=torch.uint8))
    checkpoint = open_checkpoint(saved(tmp_path / "a.safetensors", tensors))
    checkpoint.read = None  # type: ignore[method-assign, assignment]
    assert "is no text" in refusal(lambda: dequantized(checkpoint), CheckpointError)


def test_the_vocabulary_in_a_text_encoder_is_no_weight(tmp_path: Path) -> None:
    stored, meant, _ = written(UMT5, STYLES["ComfyUI of old"])
    path = saved(tmp_path / "a.safetensors", {**stored, "spiece_model": torch.zeros(9, dtype=torch.uint8)})
    assert official_text_encoder(open_checkpoint(path)).shapes.keys() == OFFICIAL_UMT5.keys()
    assert meant.keys() == UMT5.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scale_of_floats_counts_too_and_the_file_stays_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = "blocks.0.ffn.0"
    stored = {**WAN, f"{layer}.weight": WAN[f"{layer}.weight"].to(dtype), f"{layer}.scale_weight": torch.tensor(3.0)}
    path = saved(tmp_path / "a.safetensors", stored)
    before = path.read_bytes()
    for _ in range(2):
        weight = load_transformer(path, dtype=torch.float32).state_dict()[f"{layer}.weight"]
        assert torch.equal(weight, stored[f"{layer}.weight"].float() * 3)
    assert path.read_bytes() == before


def test_a_scale_of_no_weight_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {**WAN, "blocks.0.scale_weight": torch.tensor(3.0)})
    sentence = refusal(lambda: load_transformer(path), CheckpointError)
    assert "a.safetensors holds blocks.0.scale_weight and no weight that it scales: download it again" in sentence
