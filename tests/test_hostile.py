"""What strangers wrote: files, options and prompts that are refused with one sentence, before memory is asked for."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_model
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from miga_engine.cli import main
from miga_engine.cli.config_file import read_config
from miga_engine.cli.settings import prompt_timeline, video_options
from miga_engine.engine import Engine
from miga_engine.errors import CheckpointError, ConfigError, MigaError, OutputError, SessionError
from miga_engine.models import load_bundle, load_transformer, load_vae
from miga_engine.models.loading import load_tokenizer
from miga_engine.models.videocrafter2.tokenizer import CLIPTokenizer
from miga_engine.prompts import MAX_PROMPT_CHARS, PromptTimeline
from miga_engine.runtime.session import load_session
from miga_engine.video.outputs import open_sink
from miga_engine.video.paths import check_output
from miga_engine.video.reading import read_metadata, read_video
from miga_engine.weights.files import open_checkpoint
from miga_engine.weights.untrusted import MAX_TABLE_BYTES

ROOT = Path(__file__).parents[1]
DIT = "diffusion_pytorch_model.safetensors"
quickly = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured through Linux's /proc")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return golden_model.build(tmp_path / "model")


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine.from_pretrained("tiny", "cpu")


def refusal(load: Callable[[], object], kind: type[MigaError] = MigaError) -> str:
    """The sentence that `load` is refused with."""
    with pytest.raises(kind) as raised:
        load()
    sentence = str(raised.value)
    assert sentence.isprintable()
    assert len(sentence) < 2000
    return sentence


def passes_or_is_refused(load: Callable[[], object]) -> None:
    try:
        load()
    except MigaError as error:
        sentence = str(error)
    else:
        return
    assert sentence.isprintable()
    assert 20 <= len(sentence) <= 2000


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_safetensors(path: Path, header: bytes, body: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


# Weights -----------------------------------------------------------------------------------------------------------


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


def test_pickles_that_only_ask_for_memory(tmp_path: Path) -> None:
    """Nothing in them is forbidden to torch: a constructor of so many bytes, a view with strides of 0, packed zeros."""
    path = tmp_path / "Wan2.1_VAE.pth"
    path.write_bytes(b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.")
    assert "holds more than tensors" in refusal(lambda: load_vae(path), CheckpointError)
    torch.save({"a": torch.zeros(1).as_strided((2**40,), (0,))}, path)
    assert "names more numbers than it holds" in refusal(lambda: load_vae(path), CheckpointError)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"]0" * 10_000_000 + b"].")
        archive.writestr("a/version", "3")
    assert "is cut short or damaged (no archive of torch.save)" in refusal(lambda: load_vae(path), CheckpointError)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(MAX_TABLE_BYTES + 1))
    assert f"(a pickle of {MAX_TABLE_BYTES + 1} bytes)" in refusal(lambda: load_vae(path), CheckpointError)


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


# Tokenizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"model": 3}', b"[" * 100_000, b" " * (33 * 2**20)])
def test_tokenizer_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    sentence = refusal(lambda: load_tokenizer(tmp_path), CheckpointError)
    assert re.search(r"tokenizer\.json is (not a readable tokenizer|larger than 32 MiB)", sentence)


def test_tokenizers_that_panic(folder: Path) -> None:
    """The library's Rust code ends some lookups in a panic, which is no Exception."""
    file = folder / "google" / "umt5-xxl" / "tokenizer.json"
    content = json.loads(file.read_text())
    for model in ({"type": "Unigram", "unk_id": 10**6, "vocab": [["a", 0.0], ["</s>", 0.0]]},
                  {"type": "Unigram", "unk_id": None, "vocab": [["</s>", 0.0]]},
                  {"type": "WordPiece", "unk_token": "?", "vocab": {"</s>": 0}, "continuing_subword_prefix": "#",
                   "max_input_chars_per_word": 9}):  # fmt: skip
        file.write_text(json.dumps(content | {"model": model}))
        passes_or_is_refused(lambda: load_tokenizer(folder)(["wörds and 木"]))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (gzip.compress(b"\0" * 10**8, mtime=0), "holds no merges of a CLIP tokenizer"),  # 100 MB in 100 kB
        (gzip.compress(b"v\na b</w>\n", mtime=0)[:-5], "is cut short or damaged"),
        (gzip.compress(b"v\n\xff\xff</w>\n", mtime=0), "is cut short or damaged"),
        (b"no gzip", "is cut short or damaged"),
        (gzip.compress(b"v\na b c\n", mtime=0), "holds a merge that is no pair of parts, number 0"),
    ],
)
def test_merges(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(content)
    assert sentence in refusal(lambda: CLIPTokenizer.from_file(tmp_path), CheckpointError)


# Options and prompts -----------------------------------------------------------------------------------------------

ALIASES = "a: &a [x, x]\nb: &b [*a, *a]\nprompt: [*b, *b]"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (ALIASES, "has an alias at line 2: write the values out"),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}", "has an alias at line 2"),
        ("seed: &s [*s]", "has an alias at line 1"),
        ("[" * 50_000, "has lists in lists in lists at line 1"),
        ("#" * (2**20 + 1), "is larger than 1 MiB"),
        ("seed: " + "9" * 5000, "is not valid YAML"),
        ("seed: 2001-99-99", "is not valid YAML"),
        ("seed: !!python/object/apply:os.system [touch ran]", "is not valid YAML at line 1"),
        ("a\0b", "is not valid YAML"),
        ("\udcff", "is not valid YAML"),
        ("- a", "must be a list of 'option: value' lines, got list"),
        ("model: [a]", "gives model as ['a']: give a text"),
        ("attention: {a: b}", "gives attention as {'a': 'b'}: give one of auto, triton"),
        ("quiet: 3", "gives quiet as 3: give true or false"),
        ("method: paint", "gives method as 'paint': give 'miga' or 'fifo'"),
        ("prompt_at: 0", "must give prompt_at as a list of [frame, prompt]"),
        ("prompt_at: [[.inf, x]]", "must give prompt_at as a list of [frame, prompt]"),
        ("prompt: 3", "prompt is empty at frame 0"),
        ("prompt: a\nheight: 1000000000", "height must be at most 16384 (pixels), got 1000000000"),
        ("prompt: a\nnum_frames: 1000000000000000000", "num_frames must be at most 1000000000 (video frames)"),
        ("prompt: a\nfps: 0", "fps must be frames per second from 0.001 to 1000"),
        ("prompt: a\nfps: 1000000000", "fps must be frames per second from 0.001 to 1000"),
        ("prompt: a\nfps: [24]", "fps must be frames per second from 0.001 to 1000"),
        ("prompt: a\nnum_inference_steps: 100000000", "num_inference_steps must be at most 1000 (steps)"),
        ("prompt: a\ncandidates: 1000000000", "candidates must be at most 10000"),
        ("prompt: a\nguidance_scale: 1" + "0" * 400, "guidance_scale must be a finite number"),
        ("prompt: a\nscore_drop: .inf", "score_drop must be a number, got inf"),
        ("prompt: a\nsolver: " + "x" * 9000, "solver 'xxx"),
        (
            "prompt: {0: a, 1000000000000: b}",
            "the prompt timeline reaches frame 1000000000000: give frames up to 1000000000",
        ),
    ],
)
def test_config_files(tiny: Engine, tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))

    def read() -> None:
        options = read_config(str(path))
        tiny.resolve(prompt_timeline(options), **video_options(options))

    assert sentence in refusal(read, ConfigError)
    assert not (tmp_path / "ran").exists()
    assert not Path("ran").exists()


@given(content=st.dictionaries(
    st.sampled_from(["prompt", "prompt_at", "seed", "model", "method", "num_frames", "fps", "shift", "solver", "judge",
                     "stride", "score_drop", "self_reflection", "negative_prompt", "quiet", "zoom",
                     "prompt_blend_frames"]),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
                 lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.integers(0, 9) | st.text(max_size=2),
                 inner,
                                                                             max_size=2), max_leaves=5)))  # fmt: skip
@quickly
def test_any_config_file(tiny: Engine, tmp_path: Path, content: dict[str, Any]) -> None:
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))

    def read() -> None:
        options = read_config(str(path))
        tiny.resolve(prompt_timeline(options), **video_options(options))

    passes_or_is_refused(read)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "the prompt is empty at frame 0"),
        ("\t\n ", "the prompt is empty at frame 0"),
        ("x" * 100_000, f"the prompt at frame 0 has 100000 characters: shorten it to {MAX_PROMPT_CHARS}"),
        ("a\0b", r"the prompt at frame 0 holds '\x00', which is no character of a text: leave it out"),
        ("a\x1b[2J", r"holds '\x1b'"),
        ("a\ud800", r"holds '\ud800'"),
        (b"a", "prompt is of type bytes: give a text or a timeline {first_frame: text}"),
        ({0: "a", 3: "\ud800"}, "the prompt at frame 3 holds"),
        ({0: "a", "3": "b"}, "has the key '3': give video frame numbers from 0 on"),
        (dict.fromkeys(range(1001), "a"), "has 1001 entries: give at most 1000"),
    ],
)
def test_prompts(tiny: Engine, prompt: Any, sentence: str) -> None:
    assert sentence in refusal(lambda: tiny.resolve(prompt, num_frames=9), ConfigError)


@pytest.mark.parametrize("text", [None, 3, "a\0", "\ud800", "x" * 100_000])
def test_negative_prompts(tiny: Engine, text: Any) -> None:
    if text is None:
        assert tiny.resolve("a", num_frames=9, negative_prompt="").negative_prompt == ""
    else:
        refusal(lambda: tiny.resolve("a", num_frames=9, negative_prompt=text), ConfigError)


@given(text=st.text(st.characters(), min_size=1, max_size=60))
@quickly
def test_any_prompt(tiny: Engine, text: str) -> None:
    """What is taken can be encoded, and written into a video's metadata."""

    def encode() -> None:
        request = tiny.resolve(text, num_frames=9)
        json.dumps(request.metadata("tiny"), ensure_ascii=False).encode()
        assert tiny.bundle.encode_prompts([text]).isfinite().all()

    passes_or_is_refused(encode)


def test_a_late_prompt_costs_nothing() -> None:
    """Rows are found where prompts change, not by counting up to there."""
    timeline = PromptTimeline({0: "a", 10**9: "b"}, 8, lambda latent: 1 + 4 * (latent - 1) if latent else 0)
    assert timeline.prompt_row(0) == timeline.prompt_row(10**8) == 1
    rows = [timeline.prompt_row(10**9 // 4 + i) for i in range(4)]
    assert rows == [1, 3, 4, 2]


def test_pictures_beyond_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "16384", "--width", "16384"]
    assert main(["generate", "a", "--device", "cpu", *size, "-o", str(tmp_path / "a.mkv")]) == 2
    told = capsys.readouterr().err
    assert re.search(r"^miga: the run would need \S+ GiB of memory and this machine has \S+ GiB: make the", told)


@pytest.mark.parametrize("name", ["x" * 5000 + ".mp4", "a\0.mp4", "missing/" * 1000 + "a.mp4"])
def test_output_names(tmp_path: Path, name: str) -> None:
    assert "cannot write " in refusal(lambda: check_output(f"{tmp_path}/{name}", (".mp4",)), OutputError)
    assert "cannot write " in refusal(lambda: open_sink(f"{tmp_path}/{name}", 12, 16, 16), OutputError)


def test_model_names() -> None:
    for name in ("x" * 5000, "a\0b", "\ud800"):
        with pytest.raises(CheckpointError, match="there is no model at"):
            Engine.from_pretrained(name)


# Videos ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_is_never_a_playlist(tmp_path: Path, suffix: str) -> None:
    """FFmpeg would follow what a playlist names, on the network too, whatever the file is called."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        for text in (f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n", f"ffconcat version 1.0\nfile {url}\n"):
            path = tmp_path / f"a{suffix}"
            path.write_text(text)
            for read in (read_metadata, read_video):
                assert "cannot read " in refusal(lambda read=read, path=path: read(path))
        with pytest.raises(TimeoutError):
            server.accept()
    for name in ("concat:a.mp4|b.mp4", "http://127.0.0.1:9/a.mp4", "x" * 300 + ".mp4", f"{tmp_path}/a.txt"):
        assert "cannot read " in refusal(lambda name=name: read_metadata(name))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_info_of_a_broken_video(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"a{suffix}"
    with open_sink(path, 12, 32, 16, metadata={"prompt": "a"}) as sink:
        sink.write(torch.zeros(3, 16, 32, 3, dtype=torch.uint8))
    whole = path.read_bytes()
    for kept in (0, 10, 300, len(whole) // 2):
        path.write_bytes(whole[:kept])
        code = main(["info", str(path)])
        errors = capsys.readouterr().err
        assert (code, errors) == (0, "") or (code == 2 and errors.startswith("miga: ") and errors.count("\n") == 1)
    path.write_bytes(whole.replace(b'{"prompt": "a"}', b'{"\xff\xfe\xfdmpt": "a"}'))
    assert list(read_metadata(path).values()) == ["a"]
    path.write_bytes(whole.replace(b'{"prompt": "a"}', b"[[[[[[[[[[[[[[["))
    assert "carries no metadata of miga_engine" in refusal(lambda: read_metadata(path))


def test_info_obeys_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in a video's metadata do not reach the terminal, and pipes are not waited for."""
    path = tmp_path / "a.mkv"
    with open_sink(path, 12, 32, 16, metadata={"prompt": "\x1b[2Ja", "\x1b]0;b\a": "c\n"}) as sink:
        sink.write(torch.zeros(3, 16, 32, 3, dtype=torch.uint8))
    assert main(["info", str(path)]) == 0
    told = capsys.readouterr().out
    assert r"\x1b[2Ja" in told
    assert r"\x1b]0;b\x07" in told
    assert told.replace("\n", "").isprintable()
    os.mkfifo(tmp_path / "b.safetensors")
    for name in (tmp_path / "b.safetensors", "x" * 5000, "x" * 5000 + ".mp4"):
        assert main(["info", str(name)]) == 2
    assert "is not a regular file" in refusal(lambda: load_session(tmp_path / "b.safetensors"), SessionError)


# All of it ---------------------------------------------------------------------------------------------------------


@on_linux
class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_looked_at", [True, False])
def test_a_pickle_runs_no_code_though_nobody_had_looked_at_it(tmp_path: Path, monkeypatch, is_looked_at: bool) -> None:
    """Two defences, each of which holds alone."""
    from miga_engine.weights import pickle

    canary = tmp_path / "canary"
    torch.save({"weight": torch.ones(2), "more": _Payload(canary)}, tmp_path / "model.pth")
    if not is_looked_at:
        monkeypatch.setattr(pickle, "_check_pickle", lambda *_: None)
    with pytest.raises(CheckpointError, match="could run code"):
        open_checkpoint(tmp_path / "model.pth")
    assert not canary.exists()


def test_fuzz() -> None:
    """A share of `python tests/fuzz.py`, each target at least once."""
    program = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--count", "200", "--seed", "7"]
    run = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert run.stdout.endswith("200 cases, 0 failed\n")


@on_linux
def test_the_fuzzer_sees_faults(tmp_path: Path) -> None:
    """Loaders that crash, run code, take memory, print nonsense or fail otherwise are told apart."""
    program = textwrap.dedent("""
        import os, sys
        import fuzz
        from miga_engine.errors import MigaError

        def fail(error):
            raise error

        LOADERS = {
            "CRASH": lambda folder: os.kill(os.getpid(), 11),
            "CODE RAN": lambda folder: open(fuzz.CANARY, "w").close(),
            "TOO MUCH MEMORY": lambda folder: bytearray(fuzz.MOST_BYTES + 2**24),
            "MEMORY REFUSED": lambda folder: convert_memory_error(),
            "NO SENTENCE": lambda folder: fail(MigaError("too short")),
            "OTHER EXCEPTION": lambda folder: fail(KeyError("x")),
            "PANIC": lambda folder: fail(BaseException("x")),
        }

        def convert_memory_error():
            try:
                bytearray(2**50)
            except MemoryError as error:
                raise MigaError("there is no room for this file") from error

        def load(folder):
            path = folder / "merges.txt"
            if path.read_text() in LOADERS:
                LOADERS[path.read_text()](folder)

        def build(root):
            (root / "clip").mkdir()
            (root / "clip" / "merges.txt").write_text("good")

        order = iter(LOADERS)
        fuzz.build_pristine = build
        fuzz.TARGETS = {"x": fuzz.Target("clip", "merges.txt", lambda data, rng: next(order).encode(), load)}

        if __name__ == "__main__":
            assert fuzz.run(len(LOADERS), 0) == len(LOADERS)
    """)
    (tmp_path / "faulty.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    run = subprocess.run(
        [sys.executable, tmp_path / "faulty.py"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("case ")]
    found = [line.split("x: ")[1].split(":")[0] for line in lines]
    assert found == [
        "CRASH",
        "CODE RAN",
        "TOO MUCH MEMORY",
        "MEMORY REFUSED",
        "NO SENTENCE",
        "OTHER EXCEPTION",
        "PANIC",
    ]


def test_nothing_is_asked_of_the_network(folder: Path, tmp_path: Path) -> None:
    """A video is made where Python can open no socket, and none is tried."""
    program = textwrap.dedent("""
        import sys

        asked = []

        def watch(event, arguments):
            if event.startswith("socket."):
                asked.append((event, arguments))
                raise OSError("no network")

        sys.addaudithook(watch)
        from miga_engine.cli import main
        code = main(sys.argv[1:])
        sys.exit(f"the network was asked for: {asked}" if asked else code)
    """)
    video = tmp_path / "a.mp4"
    options = [
        "--num-frames",
        "5",
        "--num-inference-steps",
        "10",
        "--zigzag-width",
        "2",
        "--stage2-steps",
        "3",
        "--quiet",
    ]
    options += ["--guidance-frames", "1", "--stride", "2", "--judge-step", "3", "--height", "32", "--width", "48"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    run = subprocess.run(
        [sys.executable, "-c", program, "generate", "a kite", "--model", str(folder), *options, "-o", str(video)],
        capture_output=True, text=True, timeout=120, check=False, env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(read_video(video)) == 5
