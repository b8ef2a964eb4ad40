"""The tokenizer inside text encoders gives the ids of the package sentencepiece; broken ones give a sentence."""

from __future__ import annotations

import functools
import io
import math
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from refusals import passes_or_is_refused, refusal

from miga_engine.errors import CheckpointError
from miga_engine.models.tokenizing import encode
from miga_engine.models.wan.spiece import spiece_of_gguf, tokenizer_of_spiece
from miga_engine.models.wan.tokenizer import UMT5Tokenizer
from miga_engine.weights.files import open_checkpoint

LINES = [
    "a red balloon over the hills, at 3 o'clock; <b>bold</b> 100% e=mc2 (x) [y] {z}",
    "The quick brown fox jumps over the lazy dog", "красный шар над холмами летит высоко в небе",
    "红色的气球飞过山丘，天空很蓝。", "赤い風船が丘の上を飛ぶ カタカナ ガギグゲゴ",
    "빨간 풍선이 언덕 위로 날아간다 한국어",
    "un ballon rouge près de l'été à Noël, cœur naïve", "بالون أحمر فوق التلال", "लाल गुब्बारा पहाड़ियों के ऊपर",
    "κόκκινο μπαλόνι πάνω από λόφους",
]  # fmt: skip
WORDS = [word for line in LINES for word in line.split()]
EXTRA = ["▁<extra_id_0>", "<extra_id_1>", "ﬁ", "あい"]


def tokenizer_of_gguf(metadata: dict[str, Any], where: str) -> Any:
    return tokenizer_of_spiece(spiece_of_gguf(metadata, where), where)


@functools.cache
def trained(**options: Any) -> bytes:
    """A model of some hundred pieces, as umt5's but for the options."""
    rng = random.Random(0)
    corpus = LINES * 20 + [" ".join(rng.choices(WORDS, k=8)) for _ in range(1500)]
    out = io.BytesIO()
    pieces = options.pop("extra", "").split()
    settings = {
        "model_type": "unigram", "vocab_size": 470, "byte_fallback": True, "normalization_rule_name": "nmt_nfkc",
        "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2, "num_threads": 1,
        "user_defined_symbols": pieces,
    } | options  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=out, **settings)
    return out.getvalue()


def metadata_of(content: bytes, folder: Path, **changes: Any) -> dict[str, Any]:
    """The key-value pairs of a GGUF file that has the same tokenizer, read from one."""
    source = sentencepiece.SentencePieceProcessor(model_proto=content)
    kinds = []
    for i in range(len(source)):
        found = (source.IsUnknown, 2), (source.IsControl, 3), (source.IsUnused, 5), (source.IsByte, 6)
        kind = next((kind for holds, kind in found if holds(i)), 1)
        kinds.append(4 if source.IdToPiece(i) in EXTRA else kind)
    writer = gguf.GGUFWriter(folder / "a.gguf", "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([source.IdToPiece(i) for i in range(len(source))] + ["[PAD470]"])
    writer.add_token_scores([source.GetScore(i) for i in range(len(source))] + [-10000.0])
    writer.add_token_types([*kinds, 5])
    writer.add_add_space_prefix(changes.get("add_dummy_prefix", True))
    writer.add_remove_extra_whitespaces(changes.get("remove_extra_whitespaces", True))
    if charsmap := charsmap_of(content):
        writer.add_precompiled_charsmap(charsmap)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(open_checkpoint(folder / "a.gguf").metadata)


def charsmap_of(content: bytes) -> bytes:
    """The map of characters by its place: in field 3, the first whose length fits, of a model with such a map."""
    start = content.rfind(b"\x0a\x08nmt_nfkc\x12")
    if start < 0:
        return b""
    length, shift, i = 0, 0, start + 11
    while True:
        length |= (content[i] & 127) << shift
        i, shift = i + 1, shift + 7
        if content[i - 1] < 128:
            return content[i : i + length]


ODD = [
    "", " ", "   ", "a", " a", "a ", "  a  b  ", "a\tb\nc\r\nd", "\n", "\x7f", "\x00", "a\x01b", "\u3000あ", "\u200b",
    "ﬁne", "ﬁ\u0301ne", "ﬂ\u0327", "Ａ\u0301ｂｃ", "ＡＢＣ１２３！", "e\u0301te\u0301", "e\u0327\u0301",
    "x\u0301\u0302\u0303", "か\u3099", "ｶﾞ", "ま゛", "각",
    "\u1100\u1161\u11a8", "한국어", "ﷺ", "½①㍿℃Å™", "\ufeffx", "a\u00adb",
    "😀", "👨‍👩‍👧 🏳️‍🌈 ❤️", "🎈" * 50, "▁a", "a▁", "a▁▁b", "▁", "▁ ▁", "</s>", "<pad>", "<unk>", "<0x41>", "a </s> b",
    "<", "<<", "< >", "[PAD470]", "▁<extra_id_0>", "<extra_id_0>", "x<extra_id_1>y", "ああいい",
    "\ufdd0", "\uffff\U0010ffff", "a" * 5000, "wé" * 3000, "日本語" * 1000, " ".join(WORDS * 30), "  ".join(WORDS),
]  # fmt: skip
POOLS = [
    "abcdefghij XYZ 0123.,;:!?<>/&\"'()[]{}", "éèàçñüöœßøåłž", "あいうえおかがカガ\u3099\u309aﾞ゜漢字空的红色气球",
    "красныйшар", "בלוןأحمرﷺ", "लालगु\u094dब", "한국어\u1100\u1161\u11a8각", "\u0301\u0302\u0327\u0308\u3099",
    "ＡＢＣａｂｃ１！　", "ﬁﬂ½①℃㍿Å™",
    "😀🎈👨\u200d👩🏳\ufe0f❤", "\t\n\r\u00a0\u200b\u2028\ufeff\u3000", "▁<unk></s><pad><0x41>",
    "\x00\x01\x7f\u00ad", "\ufdd0\uffff\U0010ffff\ue000",
]  # fmt: skip


@functools.cache
def texts() -> list[str]:
    """Odd ones, mixed scripts, and any Unicode."""
    rng = random.Random(1)
    found = list(ODD)
    for _ in range(400):
        pools = rng.sample(POOLS, rng.randint(1, 5))
        length = rng.choice((1, 2, 3, 5, 8, 13, 30, 80))
        pools += [" ", "  "] * (rng.random() < 0.5)
        mixed = "".join(rng.choice(rng.choice(pools)) for _ in range(length))
        found.append(mixed + rng.choice(["", "", f" {rng.choice(WORDS)} {rng.choice(ODD[40:55])}"]))
    for _ in range(200):
        tops = rng.choices((0x80, 0x3000, 0x10000, 0x110000), k=rng.randint(1, 40))
        found.append("".join(chr(c) for top in tops if not 0xD800 <= (c := rng.randrange(top)) < 0xE000))
    return found


MODELS: dict[str, dict[str, Any]] = {
    "as umt5": {},
    "identity": {"normalization_rule_name": "identity"},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "without a prefix": {"add_dummy_prefix": False},
    "with all blanks": {"remove_extra_whitespaces": False},
    "with neither": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "with user-defined pieces": {"extra": " ".join(EXTRA)},
    "without bytes": {"byte_fallback": False, "vocab_size": 225},
    "pieces across blanks": {"split_by_whitespace": False},
}


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece(name: str) -> None:
    content = trained(**MODELS[name])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = tokenizer_of_spiece(content, "a.safetensors")
    assert len(texts()) > 650
    assert [text for text in texts() if encode(ours, text, 10**6) != theirs.encode(text)] == []


@pytest.mark.parametrize("name", [name for name in MODELS if name != "lower case"])
def test_ids_by_way_of_gguf(name: str, tmp_path: Path) -> None:
    content = trained(**MODELS[name])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    metadata = metadata_of(content, tmp_path, **MODELS[name])
    ours = tokenizer_of_gguf(metadata, "a.gguf")
    assert [text for text in texts() if encode(ours, text, 10**6) != theirs.encode(text)] == []
    written = spiece_of_gguf(metadata, "a.gguf")
    theirs_of_it = sentencepiece.SentencePieceProcessor(model_proto=written)
    ours_of_it = tokenizer_of_spiece(written, "spiece.model")
    for text in texts():
        assert encode(ours_of_it, text, 10**6) == theirs_of_it.encode(text) == theirs.encode(text)


def test_it_is_what_umt5s_tokenizer_wraps(caplog: pytest.LogCaptureFixture) -> None:
    content = trained()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = UMT5Tokenizer(tokenizer_of_spiece(content, "a.safetensors"), text_len=8)
    assert (ours.end_id, ours.pad_id) == (theirs.PieceToId("</s>"), theirs.PieceToId("<pad>")) == (1, 0)
    ids, mask = ours(["a red balloon over the hills and far away", "a"])
    assert ids[0].tolist() == [*theirs.encode("a red balloon over the hills and far away")[:7], 1]
    assert ids[1].tolist() == [*theirs.encode("a"), 1, 0, 0, 0, 0, 0, 0][:8]
    assert mask.sum(1).tolist() == [8, 2]
    assert "a prompt has " in caplog.text
    assert "and far away' and what follows is lost" in caplog.text  # places of tokens are known


def test_places_in_the_text_outlive_the_normalisation() -> None:
    ours = tokenizer_of_spiece(trained(), "a.safetensors")
    text = "  ﬁne\u3000 Ａ\u0301 ｶﾞ  red "
    places = ours.encode(text, add_special_tokens=False).offsets
    assert places[-1][1] == text.index("red") + 3
    assert all(0 <= start <= end <= len(text) for start, end in places)


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(name: str | bytes, score: float = -1.0, kind: int = 1) -> bytes:
    name = name.encode() if isinstance(name, str) else name
    return field(1, field(1, name) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))


GOOD = piece("<pad>", 0, 3) + piece("</s>", 0, 3) + piece("<unk>", 0, 2) + piece("▁", -2) + piece("a")
BROKEN = {
    "nothing": b"",
    "a number without an end": b"\xff" * 11,
    "a field beyond the end": varint(1 << 3 | 2) + varint(2**40) + b"a",
    "a group": GOOD + varint(1 << 3 | 3),
    "half of it": GOOD[: len(GOOD) // 2 + 3],
    "no unknown piece": piece("a"),
    "two unknown pieces": GOOD + piece("<unk2>", 0, 2),
    "a piece twice": GOOD + piece("a"),
    "an empty piece": GOOD + piece(""),
    "a piece that is no text": GOOD + piece(b"\xff\xfe"),
    "a long piece": GOOD + piece("x" * 5000),
    "many long pieces": GOOD + b"".join(piece(f"{i:0200}") for i in range(30_000)),
    "a score that is no number": GOOD + piece("b", math.nan),
    "a score without end": GOOD + piece("b", -math.inf),
    "a piece of type 9": GOOD + piece("b", -1, 9),
    "a piece of type 0": GOOD + piece("b", -1, 0),
    "a piece of type -1": GOOD + piece("b", -1, 2**64 - 1),
    "a map of characters without an end": GOOD + field(3, field(2, struct.pack("<I", 2**31) + bytes(64))),
    "a map of characters of a byte": GOOD + field(3, field(2, b"a")),
    "words that end in blanks": GOOD + field(2, b"\xc0\x01\x01"),
    "blanks in pieces": GOOD + field(3, b"\x28\x00"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_models(name: str) -> None:
    start = time.perf_counter()
    sentence = refusal(lambda: tokenizer_of_spiece(BROKEN[name], "a.safetensors"), CheckpointError)
    assert time.perf_counter() - start < 2
    assert sentence.startswith("a.safetensors holds a tokenizer that cannot be read (")
    assert sentence.endswith("): download it again")


def test_the_good_model_is_good() -> None:
    unknown = field(77, b"x") + varint(78 << 3) + varint(2**63) + varint(79 << 3 | 5) + b"1234"
    assert encode(tokenizer_of_spiece(unknown + GOOD, "a"), "aa b", 9) == [3, 4, 4, 3, 2]


@pytest.mark.parametrize(("number", "name"), [(2, "bpe"), (3, "word"), (4, "char"), (9, "?")])
def test_models_of_another_type_are_refused_by_name(number: int, name: str) -> None:
    content = GOOD + field(2, b"\x18" + varint(number))
    sentence = refusal(lambda: tokenizer_of_spiece(content, "a.safetensors"), CheckpointError)
    assert f"holds a tokenizer of type {name}, and Wan's text encoder has one of type unigram" in sentence
    sentence = refusal(lambda: tokenizer_of_gguf({"tokenizer.ggml.tokens": [], "tokenizer.ggml.model": "gpt2"}, "a"))
    assert "holds a tokenizer of type gpt2" in sentence


@pytest.mark.parametrize("changes", [
    {"tokens": []}, {"tokens": "abc"}, {"tokens": [1, 2, 3]}, {"tokens": ["a"] * 3}, {"tokens": ["a", "b", "\udcff"]},
    {"scores": [1.0]}, {"scores": ["x"] * 3}, {"scores": [10**400, 0, 0]}, {"token_type": [1, 1, 1]},
    {"token_type": None}, {"precompiled_charsmap": [1]}, {"precompiled_charsmap": "x"},
    {"unknown_token_id": 9, "token_type": [1, 1, 1]},
])  # fmt: skip
def test_broken_metadata(changes: dict[str, Any]) -> None:
    good = {"tokens": ["a", "▁", "<unk>"], "scores": [-1, -2.0, 0.0], "token_type": [1, 1, 2]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (good | changes).items()}
    for load in (tokenizer_of_gguf, spiece_of_gguf):
        sentence = refusal(lambda load=load: load(metadata, "a.gguf"), CheckpointError)
        assert "a.gguf holds a tokenizer that cannot be read (" in sentence


def test_metadata_without_types_of_its_unknown_token_name_it() -> None:
    metadata = {"tokens": ["a", "▁", "?"], "scores": [-1, -2.0, 0.0], "token_type": [1, 1, 1], "unknown_token_id": 2}
    ours = tokenizer_of_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, "a.gguf")
    assert encode(ours, "ab", 9) == [1, 0, 2]
    assert "holds no tokenizer: give the tokenizer.json" in refusal(lambda: tokenizer_of_gguf({}, "a.gguf"))


def mutations(content: bytes) -> list[Callable[[random.Random], bytes]]:
    def flip(rng: random.Random) -> bytes:
        broken = bytearray(content)
        for _ in range(rng.choice((1, 1, 3, 30))):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return bytes(broken)

    def flip_ends(rng: random.Random) -> bytes:
        """Where the pieces and the head of the map are, and its trainer."""
        broken = bytearray(content)
        for _ in range(rng.choice((1, 3))):
            broken[rng.choice((rng.randrange(7000), rng.randrange(len(broken) - 240_300, len(broken))))] ^= (
                1 << rng.randrange(8)
            )
        return bytes(broken)

    def cut(rng: random.Random) -> bytes:
        return content[: rng.randrange(len(content))]

    def drop(rng: random.Random) -> bytes:
        start = rng.randrange(len(content))
        return content[:start] + content[start + rng.choice((1, 2, 100, 10_000)) :]

    return [flip, flip_ends, cut, drop]


@pytest.mark.parametrize("number", range(4))
def test_any_mutation_gives_a_tokenizer_or_a_sentence(number: int) -> None:
    content = trained()
    break_it = mutations(content)[number]
    rng = random.Random(number)
    for _ in range(60):
        broken = break_it(rng)

        def load_and_use(broken: bytes = broken) -> None:
            backend = tokenizer_of_spiece(broken, "a.safetensors")
            for text in ODD[:50]:
                encode(backend, text, 10**6)

        start = time.perf_counter()
        passes_or_is_refused(load_and_use)
        assert time.perf_counter() - start < 5


def test_a_map_that_grows_every_character_stays_within_bounds() -> None:
    """Each of two characters is mapped to many of the other: the one after the other would never end."""
    units = [0] * 512
    units[0] = 256 << 10
    replacements, places = b"", {}
    for letter, other in ((97, 98), (98, 97)):
        places[letter] = len(replacements)
        replacements += bytes([other]) * 60 + b"\0"
    for letter in (97, 98):
        at = 256 ^ letter
        units[at] = (letter + 1 << 10) | 256 | letter
        units[at ^ (letter + 1)] = places[letter] | 1 << 31
    content = struct.pack("<I512I", 2048, *units) + replacements
    ours = tokenizer_of_spiece(GOOD + piece("b") + field(3, field(2, content)), "a.safetensors")
    assert len(encode(ours, "ab" * 100, 10**6)) == 1 + 200 * 60
