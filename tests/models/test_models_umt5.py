"""The UMT5 text encoder and the tokenizer against the reference implementation's output and Transformers."""

import copy
import json
import sys
from pathlib import Path

import places
import pytest
import torch
from safetensors.torch import load_file
from transformers import UMT5Config as TheirConfig
from transformers import UMT5EncoderModel

from miga_engine.errors import CheckpointError
from miga_engine.models import load_text_encoder, load_tokenizer, tokenizing
from miga_engine.models.tokenizing import clean_prompt
from miga_engine.models.wan.tokenizer import WAN_DEFAULT_NEGATIVE_PROMPT, UMT5Tokenizer
from miga_engine.models.wan.umt5 import UMT5Encoder

GOLDENS = places.GOLDENS / "umt5"
META = json.loads((GOLDENS / "meta.json").read_text(encoding="utf-8"))
TOLERANCE = 3e-5  # of the largest output


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(scope="module")
def encoder() -> UMT5Encoder:
    return load_text_encoder(GOLDENS / "official" / "models_t5_tiny.safetensors")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "io.safetensors")


def test_encoder_matches_golden(encoder: UMT5Encoder, golden: dict[str, torch.Tensor]) -> None:
    hidden = encoder(golden["ids"], golden["mask"])
    assert relative_error(hidden, golden["hidden"]) <= TOLERANCE


@pytest.mark.parametrize("length", [7, 300])  # within and beyond the largest distance with a bucket of its own
def test_encoder_agrees_with_transformers(tmp_path: Path, length: int) -> None:
    torch.manual_seed(1)
    theirs = UMT5EncoderModel(
        TheirConfig(
            vocab_size=50, d_model=24, d_kv=10, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(2, 50, (2, length))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    with torch.no_grad():
        reference = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    ours = load_text_encoder(tmp_path)(ids, mask)
    assert relative_error(ours[mask.bool()], reference[mask.bool()]) <= TOLERANCE


def test_prompts_are_cleaned_as_in_training() -> None:
    assert [clean_prompt(prompt) for prompt in META["prompts"]] == META["cleaned"]["whitespace"]
    assert clean_prompt(WAN_DEFAULT_NEGATIVE_PROMPT).startswith("色调艳丽,过曝,静态")


def test_prompts_are_read_without_ftfy_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)  # as if it were not installed
    tokenizing._unicode_repair.cache_clear()
    try:
        with caplog.at_level("WARNING", "miga_engine"):
            assert [clean_prompt(text) for text in (" a &amp;amp; b\n", "ｆｕｌｌ")] == ["a & b", "ｆｕｌｌ"]
        assert [record.name for record in caplog.records] == ["miga_engine"]
        assert caplog.text.count("the package ftfy is not installed") == 1
    finally:
        tokenizing._unicode_repair.cache_clear()


def test_tokens_match_golden(golden: dict[str, torch.Tensor]) -> None:
    tokenizer = load_tokenizer(GOLDENS, text_len=48)
    ids, mask = tokenizer(META["prompts"])
    assert torch.equal(ids, golden["tok_ids"])
    assert torch.equal(mask, golden["tok_mask"])
    assert mask.sum(dim=1).tolist() == META["lengths"]
    assert ids[-1, -1] == tokenizer.end_id  # kept on the truncated prompt


def test_short_prompts_are_padded_to_the_longest_only() -> None:
    ids, mask = load_tokenizer(GOLDENS)(["", "the quick"])
    assert ids.shape == mask.shape == (2, int(mask[1].sum()))
    assert mask[0].tolist() == [1] + [0] * (ids.shape[1] - 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype, golden: dict[str, torch.Tensor]) -> None:
    half = load_text_encoder(GOLDENS / "official" / "models_t5_tiny.safetensors", dtype=dtype)
    hidden = half(golden["ids"], golden["mask"]).float()
    valid = golden["mask"].bool()
    error = (hidden[valid] - golden["hidden"][valid]).norm() / golden["hidden"][valid].norm()
    assert error < 8 * torch.finfo(dtype).eps


def test_tokenizer_refusals(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds no tokenizer \(none of .*\): download the tokenizer\.json of google"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist: download the tokenizer\.json of the"):
        UMT5Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a readable tokenizer .*: download it again$"):
        load_tokenizer(tmp_path)
    content = json.loads((GOLDENS / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    text = json.dumps(content).replace("</s>", "<end>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"has no </s> token: use the tokenizer\.json of google/umt5-xxl$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("scale", [3e3, 3e4, 1e5])
def test_float16_stays_in_its_range_as_the_published_rule_has_it(encoder: UMT5Encoder, golden, scale: float) -> None:
    """Weights whose gated product and, but for the first, whose stream leave float16: what float32 gives, clamped."""
    wide, largest = copy.deepcopy(encoder), 0.0

    def clamp(module, inputs, output: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, float(output.abs().max()))
        return output.clamp(-64504, 64504) if output.abs().max() > 65504 else output

    for block in wide.blocks:
        block.ffn.fc1.weight.data.mul_(100)
        block.ffn.fc2.weight.data.mul_(scale / 100)
    handles = [block.register_forward_hook(clamp) for block in wide.blocks]
    expected = wide(golden["ids"], golden["mask"])
    for handle in handles:
        handle.remove()
    assert (largest > 65504) == (scale > 1e4)
    mask = golden["mask"].bool()
    half = wide.half()(golden["ids"], golden["mask"])
    assert half.isfinite().all()  # NaN without the rule
    assert torch.nn.functional.cosine_similarity(half[mask].float(), expected[mask], dim=-1).min() > 0.99
