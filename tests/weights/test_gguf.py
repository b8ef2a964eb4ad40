"""GGUF files of the package `gguf` give the numbers that their blocks stand for; hostile ones give a sentence."""

from __future__ import annotations

import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import golden_model
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import passes_or_is_refused, quickly, refusal
from safetensors.torch import load_file
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.models import load_transformer
from miga_engine.weights.files import open_checkpoint

Kind = gguf.GGMLQuantizationType
DIT = golden_model.GOLDENS / "wan_dit" / "official"


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Kind]], **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, "wan")
    for key, value in metadata.items():
        add = {list: writer.add_array, str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}
        add.get(type(value), writer.add_uint32)(key, value)
    for key, (content, kind) in tensors.items():
        writer.add_tensor(key, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(values: Tensor, kind: Kind) -> tuple[np.ndarray, Kind]:
    return gguf.quants.quantize(values.numpy(), kind), kind


def random_blocks(kind: Kind, rows: int = 3, blocks: int = 2) -> np.ndarray:
    """Any bits, but for the scales, which are small numbers."""
    rng = np.random.default_rng(int(kind))
    size = gguf.GGML_QUANT_SIZES[kind][1]
    content = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    at = {"Q3_K": [108], "Q2_K": [80, 82], "Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(kind.name, [0])
    for start in at:
        scales = rng.uniform(-0.1, 0.1, (rows, blocks)).astype(np.float16)
        content[..., start : start + 2] = scales[..., None].view(np.uint8)
    return content.reshape(rows, -1)


def by_hand(content: np.ndarray, kind: Kind) -> np.ndarray:
    """Value by value, from the blocks' description."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    values: list[float] = []
    for block in content.reshape(-1, size):
        d = float(block[:2].view(np.float16)[0])
        if kind is Kind.Q8_0:
            values += [d * q for q in block[2:].view(np.int8).tolist()]
        elif kind is Kind.Q4_0:
            nibbles = block[2:].tolist()
            values += [d * ((q & 15) - 8) for q in nibbles] + [d * ((q >> 4) - 8) for q in nibbles]
        else:  # Q4_K
            d_min, s, bytes_ = float(block[2:4].view(np.float16)[0]), block[4:16].tolist(), block[16:].tolist()
            for g in range(8):
                if g < 4:
                    scale, low = s[g] & 63, s[g + 4] & 63
                else:
                    scale = (s[g + 4] & 15) | ((s[g - 4] >> 6) << 4)
                    low = (s[g + 4] >> 4) | ((s[g] >> 6) << 4)
                part = bytes_[32 * (g // 2) : 32 * (g // 2 + 1)]
                values += [d * scale * (q >> 4 if g % 2 else q & 15) - d_min * low for q in part]
    return np.array(values, np.float32)


def test_plain_numbers_are_mapped_in_the_shapes_of_torch(tmp_path: Path) -> None:
    values = torch.randn(2, 3, 1, 2, 5)
    path = write(tmp_path / "a.gguf", {
        "f32": (values.numpy(), Kind.F32), "f16": (values.half().numpy(), Kind.F16),
        "bf16": (values.bfloat16().view(torch.int16).numpy().view(np.uint8), Kind.BF16),
        "f64": (values.double().numpy(), Kind.F64), "i32": (values.int().numpy(), Kind.I32),
    })  # fmt: skip
    checkpoint = open_checkpoint(path)
    expected = {"f32": values, "f16": values.half(), "bf16": values.bfloat16(), "f64": values.double()}
    for key, value in (expected | {"i32": values.int()}).items():
        assert checkpoint.shapes[key] == (2, 3, 1, 2, 5)
        assert checkpoint.stored_dtype(key) == value.dtype
        assert torch.equal(checkpoint.read(key), value)
        mapped = checkpoint.read(key).untyped_storage()
        assert mapped.nbytes() == path.stat().st_size
    checkpoint.close()
    assert checkpoint.is_closed


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_numbers_are_near_those_they_were(tmp_path: Path, name: str) -> None:
    values = torch.randn(7, 96)
    checkpoint = open_checkpoint(write(tmp_path / "a.gguf", {"w": quantised(values, Kind[name])}))
    assert checkpoint.shapes == {"w": (7, 96)}
    assert checkpoint.stored_dtype("w") == torch.bits8
    read = checkpoint.read("w")
    assert read.dtype == torch.float32
    bits = int(name[1])
    assert (read - values).abs().max() < 4.5 * 2 ** (1 - bits)


NAMES = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_what_their_formulas_say(tmp_path: Path, name: str) -> None:
    kind = Kind[name]
    content = random_blocks(kind)
    checkpoint = open_checkpoint(write(tmp_path / "a.gguf", {"w": (content, kind)}))
    read = checkpoint.read("w").numpy()
    assert read.shape == checkpoint.shapes["w"] == (3, 2 * gguf.GGML_QUANT_SIZES[kind][0])
    np.testing.assert_array_equal(read, gguf.quants.dequantize(content, kind))
    if name in ("Q8_0", "Q4_0", "Q4_K"):
        np.testing.assert_allclose(read.ravel(), by_hand(content, kind), rtol=1e-5, atol=1e-5)


def test_a_tensor_is_unpacked_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miga_engine.weights.gguf._CHUNK", 150)
    values = torch.randn(8, 64)
    content, kind = quantised(values, Kind.Q8_0)
    read = open_checkpoint(write(tmp_path / "a.gguf", {"w": (content, kind)})).read("w").numpy()
    np.testing.assert_array_equal(read, gguf.quants.dequantize(content, kind))


def test_the_shape_before_a_tensor_was_reshaped_counts(tmp_path: Path) -> None:
    values = torch.randn(6, 32)
    path = write(tmp_path / "a.gguf", {
        "a": quantised(values, Kind.Q8_0), "b": (values.numpy(), Kind.F32),
    }, **{"comfy.gguf.orig_shape.a": [4, 48], "comfy.gguf.orig_shape.b": [6, 4, 2, 4]})  # fmt: skip
    checkpoint = open_checkpoint(path)
    assert checkpoint.shapes == {"a": (4, 48), "b": (6, 4, 2, 4)}
    assert (checkpoint.read("a") - values.view(4, 48)).abs().max() < 0.03
    assert torch.equal(checkpoint.read("b"), values.view(6, 4, 2, 4))


@pytest.mark.parametrize("shape", [[4, 47], [0, 192], [-4, -48], [4, 48, 1, 1, 1, 1, 1, 1, 1], ["4"], [1.5], 192])
def test_a_shape_of_another_size_is_refused(tmp_path: Path, shape: Any) -> None:
    tensors = {"a": quantised(torch.randn(6, 32), Kind.Q8_0)}
    path = write(tmp_path / "a.gguf", tensors, **{"comfy.gguf.orig_shape.a": shape})
    assert "(a of shape [6, 32] once had " in refusal(lambda: open_checkpoint(path), CheckpointError)


def test_metadata_is_what_the_file_says(tmp_path: Path) -> None:
    tokens = ["<pad>", "▁é", "", "木"]
    path = write(tmp_path / "a.gguf", {}, text="é", number=7, tokens=tokens, scores=[0.5, -2.25], flag=True, f=0.25)
    metadata = open_checkpoint(path).metadata
    expected = {"text": "é", "number": 7, "tokens": tokens, "scores": [0.5, -2.25], "flag": True, "f": 0.25}
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["general.architecture"] == "wan"
    path.write_bytes(path.read_bytes().replace("木".encode(), b"\xff\xfe\xfd"))
    assert open_checkpoint(path).metadata["tokens"][-1].encode(errors="surrogateescape") == b"\xff\xfe\xfd"


def test_a_vocabulary_of_umt5s_size_is_read_at_once(tmp_path: Path) -> None:
    n = 256_384
    tokens, scores = [f"▁token{i}" for i in range(n)], [-0.5 * i for i in range(n)]
    path = write(tmp_path / "a.gguf", {}, tokens=tokens, scores=scores, types=[1] * n)
    start = time.perf_counter()
    metadata = open_checkpoint(path).metadata
    assert time.perf_counter() - start < 5
    assert (len(metadata["tokens"]), metadata["scores"][-1], sum(metadata["types"])) == (n, -0.5 * (n - 1), n)


def test_a_wan_transformer_in_gguf_is_the_one_it_was_made_of(tmp_path: Path) -> None:
    tensors = {}
    for key, value in load_file(DIT / "diffusion_pytorch_model.safetensors").items():
        is_linear = value.ndim == 2 and value.numel() > 1024 and value.shape[1] % 32 == 0
        content = value.float()
        tensors[key] = quantised(content, Kind.Q8_0) if is_linear else (content.numpy(), Kind.F32)
    assert sum(kind is Kind.Q8_0 for _, kind in tensors.values()) > 10
    write(tmp_path / "wan.gguf", tensors)
    shutil.copy(DIT / "config.json", tmp_path)
    ours = load_transformer(tmp_path / "wan.gguf", dtype=torch.float32).state_dict()
    theirs = load_transformer(DIT, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() <= value.abs().max() / 200


def test_without_the_package_only_blocks_are_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2, 32)
    path = write(tmp_path / "a.gguf", {"a": quantised(values, Kind.Q8_0), "b": (values.numpy(), Kind.F32)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.read("b"), values)
    sentence = refusal(lambda: checkpoint.read("a"), CheckpointError)
    assert sentence.endswith('holds a in Q8_0, for which the package gguf is missing: pip install "miga_engine[gguf]"')


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def pair(key: str, kind: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def tensor(name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def head(*parts: bytes, tensors: int | None = None, pairs: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    count = len(parts) - pairs if tensors is None else tensors
    start = magic + struct.pack("<IQQ", version, count, pairs) + b"".join(parts)
    return start + b"\0" * (-len(start) % 32)


def aligned(n: int) -> bytes:
    return pair("general.alignment", 4, struct.pack("<I", n))


A = tensor("a", [4])
HEADS = {
    "another magic": head(A, magic=b"GGML"),
    "version 1": head(A, version=1),
    "big-endian": head(A, version=3 << 24),
    "2^60 tensors": head(A, tensors=2**60),
    "2^60 values": head(A, tensors=0, pairs=2**60),
    "as many tensors as are allowed": head(A, tensors=2**16),
    "a string of 2^63": head(struct.pack("<Q", 2**63) + b"a"),
    "a string of 2^40": head(struct.pack("<Q", 2**40) + b"a"),
    "an array of 2^60": head(pair("x", 9, struct.pack("<IQ", 4, 2**60)), pairs=1),
    "an array of 2^60 strings": head(pair("x", 9, struct.pack("<IQ", 8, 2**60)), pairs=1),
    "an array of arrays": head(pair("x", 9, struct.pack("<IQIQ", 9, 1, 4, 1) + bytes(8)), pairs=1),
    "a value of no type": head(pair("x", 13, bytes(8)), pairs=1),
    "a value twice": head(pair("x", 0, b"\0"), pair("x", 0, b"\0"), pairs=2),
    "alignment 0": head(aligned(0), A, pairs=1),
    "alignment 24": head(aligned(24), A, pairs=1),
    "alignment 2^31": head(aligned(2**31), A, pairs=1),
    "alignment in words": head(pair("general.alignment", 8, text("32")), A, pairs=1),
    "a thousand million dimensions": head(text("a") + struct.pack("<IQIQ", 10**9, 4, 0, 0)),
    "nine dimensions": head(tensor("a", [1] * 9)),
    "a product of 2^64": head(tensor("a", [2**32, 2**32])),
    "a product beyond": head(tensor("a", [2**63] * 8)),
    "a dimension of 0": head(tensor("a", [0, 2**62])),
    "larger than the file": head(tensor("a", [5])),
    "behind the file": head(tensor("a", [4], offset=2**63)),
    "not aligned": head(tensor("a", [1], offset=4)),
    "the same name twice": head(tensor("a", [1]), tensor("a", [1], offset=32)),
    "the same place twice": head(tensor("a", [1]), tensor("b", [1])),
    "a row of a part of a block": head(tensor("a", [16, 2], kind=8)),
    "more blocks than there are": head(tensor("a", [32, 2**20], kind=19)),
    "its end missing": head(A)[:40],
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_hostile_heads(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(HEADS[name] + bytes(16) * (name != "its end missing"))
    start = time.perf_counter()
    sentence = refusal(lambda: open_checkpoint(path), CheckpointError)
    assert time.perf_counter() - start < 1
    assert f"{path} is cut short or not a GGUF file (" in sentence
    assert sentence.endswith("): download it again")


def test_the_heads_have_teeth(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for version in (2, 3):
        path.write_bytes(head(aligned(64), A, pairs=1, version=version).ljust(128, b"\0") + bytes(16))
        assert open_checkpoint(path).shapes == {"a": (4,)}


@pytest.mark.parametrize("name", [b"a\nb", b"\x1b[31mred", b"x" * 600, b"\xff\xfe"])
def test_names_of_tensors(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(head(tensor(name, [4])) + bytes(16))
    assert "holds a tensor called " in refusal(lambda: open_checkpoint(path), CheckpointError)


@pytest.mark.parametrize(("kind", "sentence"), [(77, "a in a type of number 77, which is unknown"), (4, "number 4,")])
def test_types_that_nobody_knows(tmp_path: Path, kind: int, sentence: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(head(tensor("a", [32], kind=kind)) + bytes(64))
    assert sentence in refusal(lambda: open_checkpoint(path), CheckpointError)


@pytest.mark.parametrize("kind", [Kind.Q8_1, Kind.Q8_K])
def test_types_that_the_package_does_not_unpack(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / "a.gguf"
    values, size = gguf.GGML_QUANT_SIZES[kind]
    path.write_bytes(head(tensor("a", [values], kind=int(kind))) + bytes(size))
    sentence = refusal(lambda: open_checkpoint(path).read("a"), CheckpointError)
    assert f"holds a in {kind.name}, which the package gguf does not unpack: use a version of it in Q8_0" in sentence


def test_a_file_that_is_cut_while_it_is_open(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"a": (np.ones(4, np.float32), Kind.F32)})
    checkpoint = open_checkpoint(path)
    path.write_bytes(b"GGUF")
    assert "was cut while it was read" in refusal(lambda: checkpoint.read("a"), CheckpointError)


def numbers(code: str) -> Callable[[int], bytes]:
    return lambda n: struct.pack("<" + code, n)


ODD = st.sampled_from([0, 1, 4, 16, 31, 32, 33, 256, 2**31, 2**32 - 1]).map(numbers("I"))
LONG = st.sampled_from([0, 1, 3, 32, 4096, 2**32, 2**60, 2**63, 2**64 - 1]).map(numbers("Q"))
PARTS = st.lists(
    ODD | LONG | st.binary(max_size=9) | st.sampled_from([A, aligned(32), text("comfy.gguf.orig_shape.a")]), max_size=8
)


@given(counts=st.tuples(LONG, LONG), parts=PARTS)
@quickly
def test_any_head(tmp_path: Path, counts: tuple[bytes, bytes], parts: list[bytes]) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + b"".join([*counts, *parts]) + bytes(64))
    passes_or_is_refused(lambda: open_checkpoint(path))


@given(place=st.integers(0, 10**6), value=st.sampled_from([0, 1, 255]) | st.integers(0, 255), length=st.integers(1, 8))
@quickly
def test_any_bytes_of_a_good_file(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "good.gguf"
    if not path.exists():
        write(path, {"patch_embedding.weight": quantised(torch.randn(4, 32), Kind.Q8_0)}, scores=[1.0] * 9, name="x")
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place : place + length] = bytes([value]) * min(length, len(content) - place)
    broken = path.with_name("broken.gguf")
    broken.write_bytes(content)

    def read_all() -> None:
        checkpoint = open_checkpoint(broken)
        for key in checkpoint.shapes:
            checkpoint.read(key).clone()

    passes_or_is_refused(read_all)
