"""LoRA files merged as the formulas say, and every other file refused before the checkpoint is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import passes_or_is_refused, quickly
from safetensors.torch import save_file
from torch import Tensor

from miga_engine.errors import CheckpointError
from miga_engine.weights import lora as lora_module
from miga_engine.weights.checkpoint import Checkpoint
from miga_engine.weights.files import open_checkpoint
from miga_engine.weights.lora import Lora, MergedCheckpoint, Names, lora_fingerprint, merged

Tensors = dict[str, Tensor]
NAMES = Names(
    lambda name: name.removeprefix("transformer.").removeprefix("base_model.model."), "image".__eq__, "1 block"
)


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) * len(shape))
    return torch.randn(shape, generator=generator)


WEIGHTS = {
    "q.weight": random(6, 4),
    "q.bias": random(6),
    "square.weight": random(4, 4).bfloat16(),
    "norm.weight": random(6),
    "conv.weight": random(6, 2, 1, 2, 2),
    "block.modulation": random(1, 6, 4),
}
PAIR = {"q.lora_A.weight": random(2, 4), "q.lora_B.weight": random(6, 2)}
PRODUCT = PAIR["q.lora_B.weight"] @ PAIR["q.lora_A.weight"]


class Watched(Checkpoint):
    """The weights, of which it is known what was read and whether they were closed."""

    def __init__(self) -> None:
        super().__init__(Path("base.safetensors"))
        self.shapes = {key: tuple(value.shape) for key, value in WEIGHTS.items()}
        self.metadata = {"of": "the base"}
        self.reads: list[str] = []

    def read(self, key: str) -> Tensor:
        self.reads.append(key)
        return WEIGHTS[key]

    def stored_dtype(self, key: str) -> torch.dtype:
        return WEIGHTS[key].dtype

    def key_in_file(self, key: str) -> str:
        return f"its own {key}"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Lora]:
    def write(tensors: Tensors, strength: float = 1.0, name: str = "lora.safetensors", **metadata: Any) -> Lora:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, tmp_path / name, texts or {"format": "pt"}
        )
        return Lora(open_checkpoint(tmp_path / name), strength)

    return write


def q(*loras: Lora) -> Tensor:
    return merged(Watched(), loras, NAMES).read("q.weight")


def close(value: Tensor, expected: Tensor) -> None:
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_a_merged_checkpoint_is_the_base_but_for_what_changes(write: Callable[..., Lora]) -> None:
    base, lora = Watched(), write(PAIR)
    checkpoint = merged(base, [lora], NAMES)
    assert isinstance(checkpoint, MergedCheckpoint)
    assert not base.reads
    assert (checkpoint.path, checkpoint.shapes, checkpoint.metadata) == (base.path, base.shapes, base.metadata)
    assert checkpoint.stored_dtype("square.weight") is torch.bfloat16
    assert checkpoint.key_in_file("q.bias") == "its own q.bias"
    before = WEIGHTS["q.weight"].clone()
    close(checkpoint.read("q.weight"), before + PRODUCT)
    close(checkpoint.read("q.weight"), before + PRODUCT)
    assert all(checkpoint.read(key) is WEIGHTS[key] for key in WEIGHTS if key != "q.weight")
    assert torch.equal(WEIGHTS["q.weight"], before)
    checkpoint.close()
    assert base.is_closed
    assert lora.checkpoint.is_closed


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_product_is_taken_in_float32_of_any_float(write: Callable[..., Lora], dtype: torch.dtype) -> None:
    stored = {key: value.to(dtype) for key, value in PAIR.items()}
    down, up = (value.float() for value in stored.values())
    close(q(write(stored)), WEIGHTS["q.weight"] + up @ down)
    square = {"square.lora_A.weight": random(1, 4).to(dtype), "square.lora_B.weight": random(4, 1).to(dtype)}
    down, up = (value.float() for value in square.values())
    value = merged(Watched(), [write(square)], NAMES).read("square.weight")
    close(value, WEIGHTS["square.weight"].float() + up @ down)


@pytest.mark.parametrize("alpha", [torch.tensor(3.0), torch.tensor([3]), torch.tensor(3.0).bfloat16()])
def test_alpha_is_divided_by_the_rank_in_whatever_dtype(write: Callable[..., Lora], alpha: Tensor) -> None:
    close(q(write(PAIR | {"q.alpha": alpha}, -0.5)), WEIGHTS["q.weight"] - 0.5 * 3 / 2 * PRODUCT)


def test_several_files_act_one_after_the_other(write: Callable[..., Lora]) -> None:
    difference = {"q.diff": random(6, 4), "q.diff_b": random(6)}
    loras = [write(PAIR, 0.5), write(difference, 2.0, "b.safetensors"), write(PAIR, 1.0, "c.safetensors")]
    close(q(*loras), WEIGHTS["q.weight"] + 1.5 * PRODUCT + 2 * random(6, 4))
    close(merged(Watched(), loras, NAMES).read("q.bias"), WEIGHTS["q.bias"] + 2 * random(6))
    lengths = WEIGHTS["q.weight"].norm(dim=1, keepdim=True)
    dora = write(
        {**{key: 0 * value for key, value in PAIR.items()}, "q.dora_scale": torch.ones(6, 1)}, 1.0, "d.safetensors"
    )
    close(q(dora, loras[0]), WEIGHTS["q.weight"] / lengths + 0.5 * PRODUCT)
    after = WEIGHTS["q.weight"] + 0.5 * PRODUCT
    close(q(loras[0], dora), after / after.norm(dim=1, keepdim=True))


def test_strength_zero_is_the_base_bit_for_bit_and_still_checked(write: Callable[..., Lora]) -> None:
    assert q(write(PAIR, 0.0)) is WEIGHTS["q.weight"]
    with pytest.raises(CheckpointError, match="nothing of that name"):
        q(write({"other.diff": random(3)}, 0.0))


@pytest.mark.parametrize("ending", [".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        *(("q", shape, 0) for shape in ((6,), (6, 1))),
        *(("square", shape, 0) for shape in ((4,), (4, 1))),
        *((module, (1, 4), 1) for module in ("q", "square")),
        *(("conv", shape, 0) for shape in ((6,), (6, 1, 1, 1, 1), (1, 6, 1, 1, 1))),
        ("conv", (1, 2, 1, 1, 1), 1),
    ],
)
@pytest.mark.parametrize("strength", [1.0, 0.3, -1.0])
def test_dora_sets_the_lengths(
    write: Callable[..., Lora], ending: str, module: str, shape: tuple[int, ...], axis: int, strength: float
) -> None:
    weight = WEIGHTS[f"{module}.weight"].float()
    down, up, magnitude = random(2, *weight.shape[1:]), random(weight.shape[0], 2), random(*shape)
    tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up, f"{module}.alpha": torch.tensor(1.0)}
    value = weight + 0.5 * (up @ down.flatten(1)).view_as(weight)
    lengths = torch.linalg.vector_norm(value, dim=[i for i in range(weight.ndim) if i != axis], keepdim=True)
    expected = weight + strength * (value / lengths * magnitude.reshape(lengths.shape) - weight)
    given = write(tensors | {module + ending: magnitude}, strength)
    close(merged(Watched(), [given], NAMES).read(f"{module}.weight"), expected)


def test_peft_biases_are_scaled_like_their_pair(write: Callable[..., Lora]) -> None:
    tensors = PAIR | {"q.lora_B.bias": random(6), "q.alpha": torch.tensor(1.0)}
    close(merged(Watched(), [write(tensors, 3.0)], NAMES).read("q.bias"), WEIGHTS["q.bias"] + 1.5 * random(6))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 8, "r": 2}, 4.0),
        ({"lora_alpha": 8, "r": 2, "use_rslora": True}, 8 / math.sqrt(2)),
        ({"lora_alpha": 8, "alpha_pattern": {"q": 1}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"^q": 1, "q": 3}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"^r.q": 1, "r.q": 1, "x": 1}}, 4.0),
        ({"lora_alpha": None, "alpha_pattern": None}, 1.0),
    ],
)
def test_configurations_say_the_scale(write: Callable[..., Lora], tmp_path: Path, config: dict, scale: float) -> None:
    expected = WEIGHTS["q.weight"] + scale * PRODUCT
    prefixed = {f"transformer.{key}": value for key, value in config.items()} | {"text_encoder.lora_alpha": 99}
    file = write({f"transformer.{key}": value for key, value in PAIR.items()}, lora_adapter_metadata=prefixed)
    close(q(file), expected)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    close(q(write(PAIR)), WEIGHTS["q.weight"] + PRODUCT)
    peft = {f"base_model.model.{key}": value for key, value in PAIR.items()}
    close(q(write(peft, name="adapter_model.safetensors")), expected)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ("{", r"says lora_adapter_metadata that is no table \(.*\): download it again"),
        ("[]", r"says lora_adapter_metadata that is no table"),
        ("[" * 100_000, r"says lora_adapter_metadata that is no table"),
        ({"transformer.lora_alpha": "8"}, r"configuration of .* says lora_alpha '8', where a finite number belongs: "),
        ({"transformer.lora_alpha": math.nan}, r"says lora_alpha nan, where a finite number"),
        ({"transformer.lora_alpha": 10**400}, r"says lora_alpha 1000.*, where a finite number"),
        ({"transformer.lora_alpha": True}, r"says lora_alpha True, where a finite number"),
        ({"transformer.alpha_pattern": [1]}, r"says alpha_pattern \[1\], where a table belongs"),
        ({"transformer.alpha_pattern": {"q": None}}, r"says alpha_pattern None, where a finite number"),
        ({"transformer.alpha_pattern": {"(a+)+$": 1}}, r"says alpha_pattern for \(a\+\)\+\$, which is no plain name: "),
    ],
)
def test_configurations_that_make_no_sense_are_refused(
    write: Callable[..., Lora], metadata: object, sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        q(write(PAIR, lora_adapter_metadata=metadata))


def replaced(**changes: Tensor | None) -> Tensors:
    tensors = PAIR | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (
            replaced(q__lora_A__weight=random(2, 8)),
            r"changes q\.weight as \[6, 8\] where the model has \[6, 4\]: give a",
        ),
        (
            replaced(q__lora_B__weight=random(8, 2)),
            r"changes q\.weight as \[8, 4\] where the model has \[6, 4\]: give a",
        ),
        (
            replaced(q__lora_B__weight=random(6, 3)),
            r"lora_A\.weight \[2, 4\] and q\.lora_B\.weight \[6, 3\], which are n",
        ),
        (
            replaced(q__lora_A__weight=random(0, 4), q__lora_B__weight=random(6, 0)),
            r"which are not of one rank above 0: ",
        ),
        (replaced(q__lora_A__weight=random(2)), r"\[2\] and q\.lora_B\.weight \[6, 2\], which are not of one rank"),
        (replaced(q__lora_A__weight=None), r"holds q\.lora_B\.weight without its lora_down: download it again$"),
        (replaced(q__lora_B__weight=None), r"holds q\.lora_A\.weight without its lora_up: download it again$"),
        ({"q.alpha": torch.ones(())}, r"holds q\.alpha without its lora_down and its lora_up: download"),
        ({"q.dora_scale": torch.ones(6)}, r"holds q\.dora_scale without its lora_down and its lora_up"),
        (
            replaced(q__alpha=torch.tensor(math.nan)),
            r"holds q\.alpha as nan, where one finite number belongs: download",
        ),
        (replaced(q__alpha=torch.tensor(math.inf)), r"holds q\.alpha as inf, where one finite number"),
        (replaced(q__alpha=torch.ones(2)), r"holds q\.alpha as \[2\], where one finite number"),
        (replaced(q__dora_scale=torch.ones(5)), r"changes q\.dora_scale as \[5\] where the model has \[6, 4\]"),
        (
            replaced(q__lora_down__weight=random(2, 4)),
            r"holds both q\.lora_.*, which mean the same: give a file of one",
        ),
        (replaced(transformer__q__diff=random(6, 4), q__w_norm=random(6, 4)), r"holds both .*, which mean the same"),
        (
            replaced(q__lora_A__weight=torch.ones(2, 4).char()),
            r"lora_A\.weight as int8, from which no change follows: giv",
        ),
        ({"q.diff_b": torch.ones(6).int()}, r"holds q\.diff_b as int32, from which no change follows"),
        ({"q.diff": random(4, 6)}, r"changes q\.weight as \[4, 6\] where the model has \[6, 4\]"),
        ({"norm.diff_b": random(6)}, r"changes norm\.bias, and this model has 1 block and nothing of that name: give"),
        ({"q.diff_m": random(1, 6, 4)}, r"changes q\.modulation, and this model has 1 block and nothing of that name"),
        (
            {"norm.lora_A.weight": random(1, 1), "norm.lora_B.weight": random(6, 1)},
            r"changes norm\.weight as \[6, 1\] whe",
        ),
        (WEIGHTS, r"holds block\.modulation and no LoRA: give a LoRA file, and a whole model as the model itself$"),
        ({}, r"holds nothing and no LoRA"),
        (
            PAIR | {"q.weight": random(6, 4)},
            r"holds q\.weight \[6, 4\], which is no part of a LoRA: give a file of pairs",
        ),
        (
            PAIR | {"text_encoder.q.lora_A.weight": random(1, 4)},
            r"which changes a text encoder: give a LoRA of the tra",
        ),
        (PAIR | {"lora_te_q.lora_up.weight": random(1, 4)}, r"which changes a text encoder: give a LoRA of the transf"),
        (
            {"q.hada_w1_a": random(6, 2)},
            r"holds q\.hada_w1_a, of a LoHa: give a LoRA of pairs A and B, the only kind t",
        ),
        ({"q.lokr_w1": random(6, 2)}, r"holds q\.lokr_w1, of a LoKr: give"),
        ({"q.lokr_w2_b": random(6, 2)}, r"holds q\.lokr_w2_b, of a LoKr: give"),
        ({"q.oft_blocks": random(6, 2)}, r"holds q\.oft_blocks, of an OFT or BOFT: give"),
        ({"q.oft_diag": random(6, 2)}, r"holds q\.oft_diag, of an OFT or BOFT: give"),
        ({"q.a1.weight": random(6, 2), "q.b1.weight": random(6, 2)}, r"holds q\.a1\.weight, of a GLoRA: give"),
        (PAIR | {"q.lora_mid.weight": random(2, 2)}, r"lora_mid\.weight, of a LoCon in Tucker's form: give"),
        (PAIR | {"q.reshape_weight": random(2)}, r"of a control LoRA, which changes the network's shape: give a LoRA"),
        (PAIR | {"q.set_weight": random(6, 4)}, r"of a control LoRA, which changes the network's shape: give a LoRA"),
    ],
)
def test_other_files_are_refused_before_the_base_is_read(
    write: Callable[..., Lora], tensors: Tensors, sentence: str
) -> None:
    base, lora = Watched(), write(tensors)
    with pytest.raises(CheckpointError, match=rf"lora\.safetensors .*{sentence}"):
        merged(base, [write(PAIR, name="good.safetensors"), lora], NAMES)
    assert not base.reads


def test_a_module_that_may_be_lacking_is_left_out_with_a_warning(
    write: Callable[..., Lora], caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"image.lora_A.weight": random(1, 3), "image.lora_B.weight": random(3, 1), **PAIR}
    close(q(write(tensors)), WEIGHTS["q.weight"] + PRODUCT)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.endswith("lora.safetensors also changes image, which this model has not and does without")


def test_numbers_that_are_not_finite_are_named_when_they_are_read(write: Callable[..., Lora]) -> None:
    spoilt = PAIR["q.lora_A.weight"].clone()
    spoilt[1, 1] = math.inf
    with pytest.raises(CheckpointError, match=r"holds q\.lora_A\.weight with NaN or infinity: download it again$"):
        q(write(PAIR | {"q.lora_A.weight": spoilt}))


def test_fingerprints_differ_where_files_do(write: Callable[..., Lora]) -> None:
    changed = {key: value.clone() for key, value in PAIR.items()}
    changed["q.lora_A.weight"][0, 0] += 1
    files = [
        write(PAIR, name="a.safetensors"),
        write(changed, name="b.safetensors"),
        write({key.replace("q.", "k."): value for key, value in PAIR.items()}, name="c.safetensors"),
        write({key: value.T for key, value in PAIR.items()}, name="d.safetensors"),
        write({key: value.half() for key, value in PAIR.items()}, name="e.safetensors"),
        write({key: value.to(torch.float8_e5m2) for key, value in PAIR.items()}, name="f.safetensors"),
        write(PAIR, name="g.safetensors", lora_adapter_metadata={"lora_alpha": 2}),
        write(PAIR | {"q.alpha": torch.tensor(1)}, name="h.safetensors"),
    ]
    found = [lora_fingerprint(file.checkpoint) for file in files]
    assert len(set(found)) == len(files)
    assert all(len(bytes.fromhex(name)) == 8 for name in found)
    again = write(PAIR, 0.5, "again.safetensors", title="another")
    assert lora_fingerprint(again.checkpoint) == found[0]


ENDINGS = (
    *("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "lora_B.bias", "lora_A", "alpha"),
    *("diff", "diff_b", "diff_m", "dora_scale", "lora_magnitude_vector", "weight", "hada_w1_a", ""),
)
KEYS = st.one_of(
    st.builds(
        "{}{}.{}".format,
        st.sampled_from(["", "transformer.", "lora_te1_", "."]),
        st.sampled_from([*(key.rpartition(".")[0] for key in WEIGHTS), "image", "", "."]),
        st.sampled_from(ENDINGS),
    ),
    st.text(max_size=12),
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64])
SHAPES = st.lists(st.integers(0, 6), max_size=5)


@quickly
@given(st.dictionaries(KEYS, st.tuples(SHAPES, DTYPES), max_size=5), st.booleans())
def test_junk_is_merged_or_refused(write: Callable[..., Lora], junk: dict[str, Any], has_pair: bool) -> None:
    tensors = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in junk.items() if key != "__metadata__"}
    tensors |= PAIR if has_pair else {}

    def load() -> None:
        lora = write(tensors)
        lora_fingerprint(lora.checkpoint)
        checkpoint = merged(Watched(), [lora], NAMES)
        for key in checkpoint.shapes:
            assert checkpoint.read(key).shape == checkpoint.shapes[key]

    passes_or_is_refused(load)


@pytest.mark.parametrize("chunk", [1, 8, 2**21])
def test_copies_made_a_few_rows_at_a_time_are_the_whole_ones(write, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(lora_module, "_CHUNK", chunk)
    square = {"square.lora_A.weight": random(2, 4), "square.lora_B.weight": random(4, 2)}
    rest = {"q.diff_b": random(6), "norm.diff": random(6), "block.diff_m": random(1, 6, 4)}
    base = Watched()
    changed = merged(
        base, [write(PAIR | square | rest, 0.7), write({"q.diff": random(6, 4)}, -0.5, "b.safetensors")], NAMES
    )
    for key in changed.shapes:
        whole = changed.read(key).to(base.stored_dtype(key))
        copied = changed.copy(key, torch.device("cpu"), base.stored_dtype(key))
        torch.testing.assert_close(copied, whole, rtol=1e-6, atol=1e-6)
        assert copied.data_ptr() != WEIGHTS[key].data_ptr()
    assert torch.equal(changed.copy("conv.weight", torch.device("cpu"), torch.float32), WEIGHTS["conv.weight"])
