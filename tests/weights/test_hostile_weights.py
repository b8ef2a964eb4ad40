"""Weights and their tables that strangers wrote are refused with one sentence, before memory is asked for."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden_model
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import on_linux, passes_or_is_refused, quickly, refusal
from safetensors.torch import load_file, save, save_file

from miga_engine.errors import CheckpointError
from miga_engine.models import load_bundle, load_transformer, load_vae
from miga_engine.weights.files import open_checkpoint
from miga_engine.weights.untrusted import MAX_TABLE_BYTES

DIT = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return golden_model.build(tmp_path / "model")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_safetensors(path: Path, header: bytes, body: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def entry(shape: list[Any], start: Any, stop: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header",
    [
        json.dumps({"a": entry([2**32, 2**32], 0, 16)}),  # a product of 2^64
        json.dumps({"a": entry([2**62, 4], 0, 16)}),
        json.dumps({"a": entry([4], 0, 2**63)}),
        json.dumps({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}),  # overlap
        json.dumps({"a": entry([2], 0, 8), "b": entry([1], 12, 16)}),  # a hole
        json.dumps({"a": entry([-4], 0, 16)}),
        json.dumps({"a": entry([4.0], 0, 16)}),
        json.dumps({"a": entry([float("nan")], 0, 16)}),
        json.dumps({"a": entry([4], 16, 0)}),
        json.dumps({"a": entry([4], 0, 16, "X32")}),
        json.dumps({"a": entry([2], 0, 16)}),  # smaller than its bytes
        json.dumps({"a": {"dtype": "F32", "shape": [4]}}),
        json.dumps({"a": entry([4], 0, 16), "__metadata__": {"x": 3}}),
        '{"a": 1, "a": 2}',
        f'{{"a": {json.dumps(entry([4], 0, 16))}, "a": {json.dumps(entry([4], 0, 16))}}}',
        "[" * 100_000,
        "null",
        "",
        "\udcff",
    ],
)
def test_safetensors_headers(tmp_path: Path, header: str) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", header.encode("utf-8", "surrogateescape"), b"\0" * 16)
    assert re.search(
        r"a\.safetensors is cut short or not a safetensors file \(.+\): download it again$",
        refusal(lambda: open_checkpoint(path), CheckpointError),
    )


@pytest.mark.parametrize("length", [17, 2**31, 2**63, 2**64 - 1])
def test_safetensors_header_lengths(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + b" " * 14)
    assert f"(a header of {length} bytes in 24)" in refusal(lambda: open_checkpoint(path), CheckpointError)
    with path.open("r+b") as stream:
        stream.truncate(2**40)  # of which the disk holds a page
    if length == 2**31:
        assert f"(a header of {length} bytes)" in refusal(lambda: open_checkpoint(path), CheckpointError)


@on_linux
@pytest.mark.parametrize("maps", [0, 1])
def test_safetensors_larger_than_memory(tmp_path: Path, maps: int) -> None:
    """safetensors maps a file, and torch does so once more; either may be the one that finds no room."""
    import resource

    size = 2**33
    header = json.dumps({"patch_embedding.weight": entry([size], 0, size, "U8")}).encode()
    path = write_safetensors(tmp_path / "a.safetensors", header)
    os.truncate(path, 8 + len(header) + size)  # of which the disk holds a page
    held = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + maps * size + 2**31, before[1]))
    try:
        sentence = refusal(lambda: load_transformer(path), CheckpointError)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert re.search(r"cannot be mapped into memory \(.*\): make it readable, free memory, or give the", sentence)


def test_names_of_tensors(tmp_path: Path) -> None:
    for name in ("a\nb", "\x1b[31mred", "x" * 600):
        path = tmp_path / "a.safetensors"
        path.write_bytes(save({name: torch.ones(1)}))
        assert "holds a tensor called " in refusal(lambda path=path: open_checkpoint(path), CheckpointError)


def test_two_sets_of_weights_in_one_folder(folder: Path) -> None:
    shutil.copy(folder / DIT, folder / "diffusion_pytorch_model.fp16.safetensors")
    sentence = refusal(lambda: load_transformer(folder), CheckpointError)
    assert re.search(r"holds \S+ in two files, \S+ being one: keep the files of one set of weights$", sentence)


@pytest.mark.parametrize("number", ["1000000", "9" * 30, "9" * 400])
def test_layers_are_not_built_from_their_numbers_alone(folder: Path, number: str) -> None:
    for file, load, prefix in (
        (DIT, load_transformer, "blocks."),
        ("Wan2.1_VAE.safetensors", load_vae, "encoder.downsamples."),
    ):
        save_file(load_file(folder / file) | {f"{prefix}{number}.x": torch.ones(1)}, folder / file)
        assert "are numbered beyond its " in refusal(lambda load=load: load(folder), CheckpointError)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_are_floats(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / DIT)
    save_file(tensors | {"head.head.bias": tensors["head.head.bias"].to(dtype)}, folder / DIT)
    name = str(dtype).removeprefix("torch.")
    assert f"holds head.head.bias as {name}, from which no weights follow" in refusal(lambda: load_transformer(folder))


def test_config_sizes_are_compared_with_the_weights(folder: Path) -> None:
    good = (folder / "config.json").read_text()
    for name in ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "text_dim", "text_len", "in_dim", "out_dim"):
        for value in (0, -1, 10**7, 10**30, 1.5, True, "9", [1], float("inf")):
            (folder / "config.json").write_text(good)
            edit_json(folder / "config.json", **{name: value})
            sentence = refusal(lambda: load_transformer(folder), CheckpointError)
            assert f" says {name} " in sentence
    for eps in (0, -1e-6, float("nan"), "small", 2):
        (folder / "config.json").write_text(good)
        edit_json(folder / "config.json", eps=eps)
        assert " says eps " in refusal(lambda: load_transformer(folder), CheckpointError)
    # A list times a number would be a list of that length.
    (folder / "config.json").write_text(good)
    edit_json(folder / "config.json", dim=None, num_heads=[0], attention_head_dim=10**9)
    assert " says num_heads [0]" in refusal(lambda: load_transformer(folder), CheckpointError)


def test_vae_statistics_are_numbers(tmp_path: Path) -> None:
    shutil.copytree(golden_model.GOLDENS / "wan_vae" / "diffusers", tmp_path / "vae")
    for name, value in (
        ("latents_std", [0.0] * 16), ("latents_mean", [float("nan")] * 16), ("latents_mean", [10**400] * 16),
        ("latents_mean", "x"), ("latents_std", [1.0] * 3), ("latents_mean", {"a": 1}),
    ):  # fmt: skip
        changed = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}" / "vae"
        shutil.copytree(tmp_path / "vae", changed)
        edit_json(changed / "config.json", **{name: value})
        assert "do not describe a model" in refusal(lambda changed=changed: load_vae(changed), CheckpointError)


def test_networks_of_different_models(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(golden_model.GOLDENS / "umt5" / "official" / "models_t5_tiny.safetensors")
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    wide = {key: torch.zeros([48 if n == 32 else n for n in tensor.shape]) for key, tensor in tensors.items()}
    save_file(wide, folder / "models_t5.safetensors")
    sentence = refusal(lambda: load_bundle(folder).encode_prompts(["a"]), CheckpointError)
    assert re.search(
        r"do not fit together, with widths of a text of 48 \(text encoder\), \d+ \(transformer\): give", sentence
    )
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"][:3].clone()
    save_file(tensors, folder / "models_t5.safetensors")
    sentence = refusal(lambda: load_bundle(folder).encode_prompts(["a corgi"]), CheckpointError)
    assert re.search(r"gives token \d+ and the text encoder has embeddings for 3: give both of one", sentence)


@pytest.mark.parametrize("frames", [0, 10**9, "many", None, 2.5, True])
def test_miga_json(folder: Path, frames: Any) -> None:
    (folder / "miga.json").write_text(json.dumps({"window_frames": frames}))
    assert "miga.json says window_frames " in refusal(lambda: load_bundle(folder), CheckpointError)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 100_000, "\udcff", '{"a": ' + "9" * 5000 + "}", " " * (MAX_TABLE_BYTES + 1)]
)
def test_json_files(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert re.search(
        r"is (not readable JSON|larger than 8 MiB)", refusal(lambda: load_transformer(folder), CheckpointError)
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pipe.safetensors", "names pipe.safetensors, which is not in"),
        ("device.safetensors", "names device.safetensors, which is not in"),
        ("loop.safetensors", "names loop.safetensors, which is not in"),
        ("folder.safetensors", "names folder.safetensors, which is not in"),
        ("secret.safetensors", "secret.safetensors is cut short or not a safetensors file"),
        ("x" * 5000, "names xxx"),
        ("\0", r"names '\x00', which is not in"),
        ("\ud800", r"names '\ud800', which is not in"),
        ("/etc/passwd", "points outside its folder, at /etc/passwd"),
        ("..", "names .., which is not in"),
    ],
)
def test_index_entries(tmp_path: Path, name: str, sentence: str) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "secret.safetensors").symlink_to("/etc/passwd")
    index = tmp_path / f"{DIT}.index.json"
    index.write_text(json.dumps({"weight_map": {"patch_embedding.weight": name}}))
    assert sentence in refusal(lambda: load_transformer(index), CheckpointError)


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "Wan2.1_VAE.pth")
    (tmp_path / DIT).symlink_to("/dev/zero")
    assert "is not a regular file" in refusal(lambda: load_vae(tmp_path), CheckpointError)
    assert "is not a regular file" in refusal(lambda: load_transformer(tmp_path), CheckpointError)


def test_hubs_keep_weights_behind_links(folder: Path, tmp_path: Path) -> None:
    (folder / DIT).rename(tmp_path / "blob")
    (folder / DIT).symlink_to(tmp_path / "blob")
    load_transformer(folder)


@pytest.mark.slow
@given(header=st.dictionaries(
    st.text(max_size=8), st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                                      lambda inner: st.lists(inner, max_size=3) | st.fixed_dictionaries(
        {}, optional={"dtype": st.sampled_from(["F32", "BF16", "C64", "F8_E8M0", "?"]) | inner,
                      "shape": st.lists(st.integers(-1, 2**64) | inner, max_size=4) | inner,
                      "data_offsets": st.lists(st.integers(-1, 2**64) | inner, max_size=3) | inner}), max_leaves=8),
    max_size=4), body=st.binary(max_size=64))  # fmt: skip
@quickly
def test_any_safetensors_header(tmp_path: Path, header: dict[str, Any], body: bytes) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", json.dumps(header).encode(), body)
    passes_or_is_refused(lambda: load_transformer(path))


@given(config=st.dictionaries(
    st.sampled_from(["dim", "num_heads", "attention_head_dim", "num_layers", "eps", "text_len", "in_channels",
    "model_type",
                     "image_dim", "_class_name"]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(),
    max_size=2)))  # fmt: skip
@quickly
def test_any_config(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp() / "any_config"
    if not folder.exists():
        golden_model.build(folder)
    stored = json.loads((golden_model.GOLDENS / "wan_dit" / "official" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | config))
    passes_or_is_refused(lambda: load_transformer(folder))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_is_cut_while_it_is_open_is_a_sentence_and_no_signal(tmp_path: Path, suffix: str) -> None:
    """In a process of its own; of a memory map the part behind the new end is SIGBUS."""
    script = """
import os, sys
from pathlib import Path
from miga_engine.errors import CheckpointError
from miga_engine.weights.files import open_checkpoint
path = Path(sys.argv[1])
checkpoint = open_checkpoint(path)
os.truncate(path, 100_000)
try:
    for key in checkpoint.shapes:
        checkpoint.read(key).clone()
except CheckpointError as error:
    print(error)
"""
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(load_file(golden_model.GOLDENS / "wan_dit" / "official" / DIT), path)
    else:
        shutil.copy(golden_model.GOLDENS / "wan_dit" / "official" / DIT, path)
    run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "was cut while it was read: download it again" in run.stdout
