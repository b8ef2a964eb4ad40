"""Tokenizers that strangers wrote are refused with one sentence, before memory is asked for."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import golden_model
import pytest
from refusals import passes_or_is_refused, refusal

from miga_engine.errors import CheckpointError
from miga_engine.models.loading import load_tokenizer
from miga_engine.models.videocrafter2.tokenizer import CLIPTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return golden_model.build(tmp_path / "model")


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
