"""From prompts to the token ids of OpenCLIP: byte-pair encoding of lower-cased text, as the text tower was trained."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.models import tokenizing
from miga_engine.weights.untrusted import MAX_TABLE_BYTES, read_bounded, read_json

TEXT_LEN = 77
NUM_MERGES = 48894  # of the file's, as many as make 49408 tokens
VOCABULARY_FILES = (
    "bpe_simple_vocab_16e6.txt.gz",
    "tokenizer.json",
    "merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/merges.txt",
)
"""Where a folder holds the merges: OpenCLIP's own file or a Hugging Face CLIP tokenizer, in the order of search."""

_START, _END = "<start_of_text>", "<end_of_text>"
_END_OF_WORD = "</w>"
_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clean_prompt(text: str) -> str:
    """Clean it as for every family and lower the case."""
    return tokenizing.clean_prompt(text).lower()


class CLIPTokenizer:
    """Byte-pair encoding by `merges` (pairs of token parts, the most frequent first) to rows of `TEXT_LEN` ids."""

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        import tokenizers

        letters = _byte_letters()
        tokens = [*letters, *(letter + _END_OF_WORD for letter in letters), *map("".join, merges), _START, _END]
        self.start_id, self.end_id = len(tokens) - 2, len(tokens) - 1
        self.vocab_size = len(tokens)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        self._backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD))
        self._backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        self._backend.add_special_tokens([_START, _END])  # where a prompt spells them they count as such
        self.text_len = TEXT_LEN

    @classmethod
    def from_file(cls, path: str | Path) -> CLIPTokenizer:
        """Read one of `VOCABULARY_FILES`, or the first of them that is in the folder `path`. Raises CheckpointError."""
        file = _vocabulary_file(Path(path))
        merges = _merges_of_json(file) if file.suffix == ".json" else _merges_of_text(file)
        with tokenizing.reported(f"{file} is not a usable CLIP tokenizer"):
            return cls(merges)

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts → ids and mask, int64 [P,77]: start, text, end, zeros; what is too long is cut before its end.

        The mask is 1 everywhere, for the network was trained to see the padding.
        """
        ids = torch.zeros(len(prompts), self.text_len, dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            text_ids = tokenizing.encode(self._backend, clean_prompt(prompt), self.text_len - 2)
            tokens = [self.start_id, *text_ids, self.end_id]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, torch.ones_like(ids)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte, in the order of the vocabulary: visible bytes first, as themselves."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]


def _vocabulary_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in VOCABULARY_FILES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} holds no tokenizer (none of {', '.join(VOCABULARY_FILES)}): "
        "put bpe_simple_vocab_16e6.txt.gz of the open_clip package into it"
    )


def _merges_of_text(file: Path) -> list[tuple[str, str]]:
    """One merge a line behind a line with the version."""
    content = read_bounded(file)
    try:
        if file.suffix == ".gz":  # may unpack to a thousand times its size
            with gzip.open(io.BytesIO(content)) as stream:
                content = stream.read(MAX_TABLE_BYTES)
        lines = content.decode().splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is cut short or damaged ({error}): download it again") from error
    return _pairs(file, [line.split() for line in lines[1 : NUM_MERGES + 1]])


def _merges_of_json(file: Path) -> list[tuple[str, str]]:
    """The merges of a `tokenizer.json`, as pairs or as lines."""
    model = read_json(file).get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    merges = merges if isinstance(merges, list) else []
    return _pairs(file, [merge.split() if isinstance(merge, str) else merge for merge in merges[:NUM_MERGES]])


def _pairs(file: Path, merges: list[Any]) -> list[tuple[str, str]]:
    """The merges, each known to be a pair, some of them at the end of a word as in every CLIP vocabulary."""
    for i, merge in enumerate(merges):
        if not isinstance(merge, list) or len(merge) != 2 or not all(isinstance(part, str) for part in merge):
            raise CheckpointError(f"{file} holds a merge that is no pair of parts, number {i}: download it again")
    if not any(second.endswith(_END_OF_WORD) for _, second in merges):
        raise CheckpointError(f"{file} holds no merges of a CLIP tokenizer: use that of OpenCLIP ViT-H/14")
    return [(first, second) for first, second in merges]
