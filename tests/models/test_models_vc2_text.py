"""VideoCrafter2's text encoder and tokenizer against what OpenCLIP computes."""

import dataclasses
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import places
import pytest
import torch
from safetensors.torch import load_file

from miga_engine.errors import CheckpointError
from miga_engine.models.videocrafter2 import layouts
from miga_engine.models.videocrafter2.clip_text import CLIPTextConfig, CLIPTextEncoder
from miga_engine.models.videocrafter2.tokenizer import NUM_MERGES, CLIPTokenizer, clean_prompt
from miga_engine.weights.files import open_checkpoint
from miga_engine.weights.load import load_module

GOLDENS = places.GOLDENS / "openclip_text"
META = json.loads((GOLDENS / "meta.json").read_text(encoding="utf-8"))
TOLERANCE = 3e-5  # of the largest output

# Of OpenCLIP's 48,894 merges those that the prompts here meet: rank and the two parts.
MERGES = """
0 i n, 3 r e, 7 in g</w>, 9 o n, 10 s t, 11 o r, 12 e n, 13 o n</w>, 14 a l, 15 a t, 17 i t, 18 i n</w>,
20 r o, 26 e d</w>, 31 i l, 34 a c, 37 l o, 38 a n</w>, 43 t i, 48 h a, 50 o l, 60 l a, 64 e n</w>, 75 a s,
76 s p, 78 t s</w>, 88 t e, 92 p p, 110 c o, 115 a u, 120 s s</w>, 127 d o, 129 w or, 142 d e</w>, 152 l u,
154 q u, 165 h i, 172 o f, 177 g re, 184 it y</w>, 190 a f, 201 ' t</w>, 202 m i, 216 â Ģ, 228 ti on</w>,
236 ! !</w>, 245 w n</w>, 272 ha pp, 278 g h</w>, 292 ac e</w>, 295 st r, 335 d on</w>, 337 s h</w>, 339 c or,
382 as e</w>, 433 en d, 509 f f, 514 il y</w>, 534 t ro, 562 at ing</w>, 663 s ol, 888 hi gh</w>,
1182 al ity</w>, 1389 gre en</w>, 1417 do g</w>, 1433 f lo, 1493 âĢ Ķ</w>, 1544 te x, 1556 c ase</w>,
1626 sp ace</w>, 1646 ro ss</w>, 1975 sol u, 1988 ac ross</w>, 2141 wor d</w>, 2515 qu ality</w>, 2698 mi x,
2705 co de</w>, 2959 c af, 3186 f lu, 3653 str on, 3654 Ã ©</w>, 3966 g i</w>, 4063 solu tion</w>,
5268 m l</w>, 6010 Ã ¼, 6268 mix ed</w>, 7283 ff y</w>, 7470 a stron, 9465 re solution</w>, 10512 la wn</w>,
10611 h t, 11831 au t</w>, 12107 flo ating</w>, 14792 caf Ã©</w>, 15751 lu sh</w>, 16542 flu ffy</w>,
16804 happ ily</w>, 17657 tex t, 17719 ht ml</w>, 17864 astron aut</w>, 30808 cor gi</w>, 35177 Ã ¯,"""


def merges() -> list[str]:
    """As many lines as OpenCLIP has, the ones above at their places, between them pairs that no prompt here meets."""
    letters = [chr(i) for i in range(0xAE, 0x144) if chr(i) not in "ÃâĢĶ©¼¯"]
    pairs = itertools.product(letters, letters)
    ends = itertools.product(letters, [letter + "</w>" for letter in letters])
    triples = itertools.product(map("".join, itertools.product(letters, letters)), letters)
    fillers = (" ".join(pair) for pair in itertools.chain(pairs, ends, triples))
    known = dict(entry.strip().split(" ", 1) for entry in MERGES.split(",") if entry.strip())
    return [known.get(str(rank)) or next(fillers) for rank in range(NUM_MERGES)]


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "io.safetensors")


@pytest.fixture(scope="module")
def encoder() -> CLIPTextEncoder:
    text = layouts.text_encoder(open_checkpoint(GOLDENS / "text.safetensors"))
    config = dataclasses.replace(layouts.text_encoder_config(text), num_heads=4)  # narrower than the published ones
    assert config == CLIPTextConfig(vocab_size=300, dim=64, dim_ffn=256, num_heads=4, num_layers=3, text_len=24)
    return load_module(lambda: CLIPTextEncoder(config), text, device=None, dtype=torch.float32)


def write_text(folder: Path, lines: list[str]) -> Path:
    file = folder / "bpe_simple_vocab_16e6.txt.gz"
    text = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *lines, "more than", "are used"]) + "\n"
    file.write_bytes(gzip.compress(text.encode(), compresslevel=1))
    return file


def write_merges(folder: Path, lines: list[str]) -> Path:
    file = folder / "merges.txt"
    file.write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    return file


def write_json_lines(folder: Path, lines: list[str]) -> Path:
    file = folder / "tokenizer" / "tokenizer.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"model": {"type": "BPE", "merges": lines}}))
    return file


def write_json_pairs(folder: Path, lines: list[str]) -> Path:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({"model": {"type": "BPE", "merges": [line.split() for line in lines]}}))
    return file


def test_encoder_matches_golden(encoder: CLIPTextEncoder, golden: dict[str, torch.Tensor]) -> None:
    assert relative_error(encoder(golden["ids"], torch.ones_like(golden["ids"])), golden["penultimate"]) <= TOLERANCE
    assert relative_error(golden["last"], golden["penultimate"]) > 0.01  # the other choice would be seen


def test_no_token_sees_a_later_one(encoder: CLIPTextEncoder, golden: dict[str, torch.Tensor]) -> None:
    ids = golden["ids"].clone()
    ids[:, 10] = (ids[:, 10] + 1) % 300
    before, after = encoder(golden["ids"]), encoder(ids)
    assert torch.equal(before[:, :10], after[:, :10])
    assert ((before - after)[:, 10:].abs().amax(dim=-1) > 0).all()


@pytest.mark.slow
def test_sizes_of_the_published_model() -> None:
    with torch.device("meta"):
        encoder = CLIPTextEncoder()
        last_block = CLIPTextEncoder(CLIPTextConfig(num_layers=1)).transformer
        assert encoder(torch.zeros(2, 77, dtype=torch.int64)).shape == (2, 77, 1024)
    num_used = sum(p.numel() for p in encoder.parameters())
    assert num_used == 340_387_840
    in_file = num_used + sum(p.numel() for p in last_block.parameters()) + 1024 * 1024 + 1  # projection, logit_scale
    assert in_file == 354_032_641


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_text, write_merges, write_json_lines, write_json_pairs])
def test_token_ids_match_openclip(
    tmp_path: Path, golden: dict[str, torch.Tensor], write: Callable[[Path, list[str]], Path]
) -> None:
    file = write(tmp_path, merges())
    tokenizer = CLIPTokenizer.from_file(tmp_path)
    assert tokenizer.vocab_size == 49408
    ids, mask = tokenizer(META["prompts"])
    assert torch.equal(ids, golden["clip_bpe_tokens"])
    assert torch.equal(mask, torch.ones_like(ids))
    assert torch.equal(
        CLIPTokenizer.from_file(file)(["a corgi"])[0][0, :4], torch.tensor([49406, 320, 30808 + 512, 49407])
    )


def test_apostrophes_and_control_tokens() -> None:
    tokenizer = CLIPTokenizer([(a, b) for a, b in (line.split() for line in merges())])
    assert tokenizer(["Don't"])[0][0, :4].tolist() == [49406, 847, 713, 49407]
    assert tokenizer(["a <END_OF_TEXT> a"])[0][0, :5].tolist() == [49406, 320, 49407, 320, 49407]
    ids, mask = tokenizer([])
    assert ids.shape == mask.shape == (0, 77)


def test_prompts_are_cleaned_as_in_training() -> None:
    assert clean_prompt(META["prompts"][3]) == "mixed case & html <b> café — ünïcode 123,456!!"
    assert clean_prompt("It&amp;apos;s\u3000 “Quoted”\n") == 'it\'s "quoted"'
    assert clean_prompt("\ud800") == "\ufffd"


def test_small_vocabularies(tmp_path: Path) -> None:
    write_merges(tmp_path, ["a b</w>", "c d"])
    tokenizer = CLIPTokenizer.from_file(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id) == (516, 514, 515)
    assert tokenizer(["ab cde"])[0][0, :5].tolist() == [514, 512, 513, ord("e") - 33 + 256, 515]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "merges.txt",
            b"#version: 0.2\n\xc4\xa0 t\ni n\n",
            r"holds no merges of a CLIP tokenizer: use that of OpenCLIP",
        ),
        ("merges.txt", b"", r"holds no merges of a CLIP tokenizer: use that of OpenCLIP"),
        ("merges.txt", b"#version: 0.2\na b</w> c\n", r"holds a merge that is no pair of parts, number 0: download"),
        ("merges.txt", b"#version: 0.2\nxyz b</w>\n", r"is not a usable CLIP tokenizer \(.*\): download it again$"),
        ("merges.txt", b"\xff\xfe", r"is cut short or damaged \(.*\): download it again$"),
        ("bpe_simple_vocab_16e6.txt.gz", b"<html>", r"is cut short or damaged \(.*\): download it again$"),
        (
            "bpe_simple_vocab_16e6.txt.gz",
            gzip.compress(b"version\n" + b"a b</w>\n" * 99, mtime=0)[:-20],
            r"is cut short or damaged \(.*\): download it again$",
        ),
        ("tokenizer.json", b'{"model": {"type": "Unigram"}}', r"holds no merges of a CLIP tokenizer: use that of"),
        (
            "tokenizer.json",
            b'{"model": {"merges": [["a", 3], 4]}}',
            r"holds a merge that is no pair of parts, number 0",
        ),
        ("tokenizer.json", b'{"model": ', r"is not readable JSON \(.*\): download it again$"),
    ],
)
def test_unusable_vocabularies(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} {message}") as raised:
        CLIPTokenizer.from_file(tmp_path)
    assert "\n" not in str(raised.value)


def test_missing_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"holds no tokenizer \(none of bpe_simple_vocab_16e6\.txt\.gz, tokenizer\.json, merges\.txt, .*\): put",
    ):
        CLIPTokenizer.from_file(tmp_path)
