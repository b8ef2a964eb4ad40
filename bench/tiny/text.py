"""The wordings that the embedded model is trained on, and its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from miga_engine.files import write_whole
from miga_engine.tiny import world
from miga_engine.tiny.text import COLOUR_WORDS, SUBJECT_WORDS, TERRAIN_WORDS, TIME_WORDS

_VERBS = ("", "", "flying", "floating", "drifting", "soaring", "gliding")
_OVER = ("over", "over", "above", "across")
_FRONTS = ("", "", "", "a video of", "a picture of")
_SPARE_WORDS = ["the", "an", "sky", "in", "with", "and", "sun", "moon", "day", "light", "landscape"]


def wording(scene: world.Scene, rng: np.random.Generator) -> str:
    """A caption in other words: synonyms, verbs, at times an attribute left out."""

    def pick(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    colour = pick(COLOUR_WORDS.get(scene.colour, (scene.colour,)))
    parts = [pick(_FRONTS), pick(("a", "a", "the", "one")), colour if rng.random() > 0.04 else ""]
    parts += [pick(SUBJECT_WORDS[scene.subject]), pick(_VERBS)]
    place = f"{pick(_OVER)} {pick(TERRAIN_WORDS[scene.terrain])}" if rng.random() > 0.04 else ""
    when = pick(TIME_WORDS[scene.time]) if rng.random() > 0.04 else ""
    parts += [place, when] if rng.random() > 0.15 else [",", when, place]
    return " ".join(p for p in parts if p)


def rich_wording(scene: world.Scene, rng: np.random.Generator) -> str:
    """A caption of the rich world: every factor is named with probability 1/2 on its own, in 3 of 10 in other words."""
    named = {name for name in world.FACTORS if rng.random() < 0.5}
    words = world.rich_caption(scene, named)
    if rng.random() < 0.3:
        for name, table in (("subject", SUBJECT_WORDS), ("colour", COLOUR_WORDS), ("time", TIME_WORDS)):
            value = getattr(scene, name)
            if name in named and value in table:
                said = f"at {value}" if name == "time" else value
                other = table[value][int(rng.integers(len(table[value])))]
                words = f" {words} ".replace(f" {said} ", f" {other} ", 1).strip()
    return words


def build_tokenizer(rich: bool = False) -> Tokenizer:
    """A word-level tokenizer over every word of the wordings; other words become <unk>, `</s>` ends each text."""
    groups = [SUBJECT_WORDS, COLOUR_WORDS, TERRAIN_WORDS, TIME_WORDS]
    phrases = [w for g in groups for ws in g.values() for w in ws]
    phrases += [*world.all_captions(), *_VERBS, *_OVER, *_FRONTS, *_SPARE_WORDS, "one", ", ."]
    if rich:
        phrases += [*world.PATTERNS, *world.SIDES, *world.PACES, *world.COVERS, "thing bare land trees houses river"]
        phrases += ["clear clouds birds under behind flight sun on"]
    words = sorted({w for phrase in phrases for w in re.findall(r"\w+|[^\w\s]", phrase)})
    vocab = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def save_tokenizer(folder: Path, rich: bool) -> None:
    """Writes `google/umt5-xxl/tokenizer.json` and its configuration below `folder`."""
    place = folder / "google" / "umt5-xxl"
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / "tokenizer.json", build_tokenizer(rich).to_str(pretty=True))
    write_whole(
        place / "tokenizer_config.json",
        '{\n  "eos_token": "</s>",\n  "pad_token": "<pad>",\n  "unk_token": "<unk>",\n'
        '  "tokenizer_class": "PreTrainedTokenizerFast"\n}\n',
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """What `save_tokenizer` wrote."""
    return Tokenizer.from_file(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B,length]`, `</s>` kept where a text is cut."""
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length)
    for row, prompt in enumerate(prompts):
        tokens = tokenizer.encode(prompt).ids
        tokens = [*tokens[: length - 1], 1] if len(tokens) > length else tokens
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1.0
    return ids, mask
