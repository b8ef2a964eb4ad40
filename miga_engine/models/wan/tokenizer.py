"""From prompts to the token ids of UMT5, with the cleaning Wan2.1 was trained with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from miga_engine.errors import CheckpointError, ConfigError
from miga_engine.models.protocols import Tokenizer
from miga_engine.models.tokenizing import clean_prompt, encode, reported
from miga_engine.models.wan.layouts import vocabulary
from miga_engine.models.wan.spiece import spiece_of_gguf, tokenizer_of_spiece
from miga_engine.weights.files import format_of, open_checkpoint
from miga_engine.weights.untrusted import read_bounded, refuse_spoilt, short

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES = 32 * 2**20  # twice that of google/umt5-xxl

# The negative prompt of the Wan2.1 release, part of how its checkpoints are meant to be sampled.
WAN_DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def spiece_in(path: Path) -> bytes:
    """A SentencePiece model: the file itself, or what lies in that of a text encoder. Raises CheckpointError."""
    if format_of(path) is None:
        return read_bounded(path, MAX_TOKENIZER_BYTES)
    checkpoint = open_checkpoint(path)
    if "tokenizer.ggml.tokens" in checkpoint.metadata:
        return spiece_of_gguf(checkpoint.metadata, str(path))
    content = vocabulary(checkpoint)
    if content is None:
        raise CheckpointError(f"{path} holds no tokenizer: give a tokenizer.json or a spiece.model")
    return content


def tokenizer_of(given: Any, text_len: int) -> Tokenizer:
    """A tokenizer that is in memory, or a file or folder; one of `tokenizers` or transformers is copied, not changed.

    Raises CheckpointError where it is none.
    """
    import tokenizers

    if isinstance(given, str | os.PathLike):
        return UMT5Tokenizer.from_file(Path(given), text_len)
    backend = getattr(given, "backend_tokenizer", given)
    if isinstance(backend, tokenizers.Tokenizer):
        return UMT5Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), text_len)
    if hasattr(given, "sp_model"):
        content = given.sp_model.serialized_model_proto()
        return UMT5Tokenizer(tokenizer_of_spiece(content, "the tokenizer that was given"), text_len)
    if given is None or not callable(given):
        raise CheckpointError(
            f"the tokenizer is of type {type(given).__name__}: give that of the text encoder, of tokenizers or "
            "transformers, or a tokenizer.json"
        )
    return cast("Tokenizer", given)


def without_texts(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The tokenizer of a model without a text encoder. Raises ConfigError."""
    raise ConfigError(
        f"there is no text encoder, and no embedding of the prompt {short(prompts[0])!r} was given: give it to "
        "`Engine.hold_embedding`, or load the model with a text encoder"
    )


class UMT5Tokenizer:
    """Wraps a `tokenizer.json`; every prompt ends in </s>, also one cut to `text_len` tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, text_len: int = 512) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.text_len = text_len
        end_id = backend.token_to_id("</s>")
        if end_id is None:
            raise CheckpointError("the tokenizer has no </s> token: use the tokenizer.json of google/umt5-xxl")
        self.end_id: int = end_id
        self.pad_id: int = backend.token_to_id("<pad>") or 0

    @classmethod
    def from_file(cls, path: Path, text_len: int = 512) -> UMT5Tokenizer:
        """Of a `tokenizer.json`, a SentencePiece model, or a text encoder's file that holds one. CheckpointError."""
        if path.suffix != ".model" and format_of(path) is None:
            return cls.from_folder(path, text_len)
        return cls(tokenizer_of_spiece(spiece_in(path), str(path)), text_len)

    @classmethod
    def from_folder(cls, path: str | Path, text_len: int = 512) -> UMT5Tokenizer:
        """Read `tokenizer.json` in the folder `path`, or that file itself. Raises CheckpointError."""
        import tokenizers

        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist: download the tokenizer.json of the model's tokenizer folder")
        if file.stat().st_size:
            refuse_spoilt(file)
        content = read_bounded(file, MAX_TOKENIZER_BYTES)
        with reported(f"{file} is not a readable tokenizer"):
            backend = tokenizers.Tokenizer.from_buffer(content)
        return cls(backend, text_len)

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts → ids and mask, int64 [P,T], padded to the longest; T <= text_len."""
        rows = []
        for prompt in prompts:
            text_ids = encode(self._backend, clean_prompt(prompt), self.text_len - 1)
            rows.append([*text_ids, self.end_id])
        length = max(map(len, rows), default=0)
        ids = torch.tensor([row + [self.pad_id] * (length - len(row)) for row in rows], dtype=torch.int64)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], dtype=torch.int64)
        return ids, mask
