"""qk_norm_rope and rms_norm_: their kernels against the oracle, and what they refuse."""

import numpy as np
import pytest
import torch
from op_inputs import (
    DEVICE,
    DTYPES,
    NUM_HEADS,
    OUT_OF_BOUNDS,
    Kernel,
    assert_within_budget,
    bands_are_untouched,
    each_with_the_first,
    guarded,
    in_float64,
    in_long_double,
    misnamed,
    needs_cpp,
    on_threads,
    outside,
    randn,
    small_arguments,
)

from miga_engine import ops

kernel = Kernel("qk_norm_rope")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": lambda k: k[:, :7]}, r"k has shape \(2, 7, 24\), expected \(2, 15, 24\) as q"),
        ({"k": lambda k: k.half()}, "k has dtype torch.float16, expected torch.float32 as q"),
        ({"q": lambda q: q.mT.contiguous().mT}, "q has strides .* expected a contiguous last dimension"),
        ({"norm": lambda w: w[:6]}, r"weight_q has shape \(6,\), expected \(24,\)"),
        ({"norm": lambda w: w.half()}, "weight_q has dtype torch.float16, expected float32 or float64"),
        ({"temporal": lambda t: t[..., :3]}, "temporal and spatial has pairs 5, expected 6, half of a head's channels"),
        ({"positions": lambda p: p[:, :2]}, r"q has shape \(2, 15, 24\), expected \(2, 10 = F·S, D\)"),
    ],
)
def test_refuses_what_does_not_fit(change, message) -> None:
    t = small_arguments()
    t |= {name: alter(t[name]) for name, alter in change.items()}
    tables = {name: t[name] for name in ("temporal", "spatial", "positions")}
    with pytest.raises(ValueError, match=message):
        ops.qk_norm_rope(t["q"], t["k"], t["norm"], t["norm"], **tables, num_heads=NUM_HEADS, eps=1e-6)


def _heads(num_heads, head_width, batch, num_frames, tokens_per_frame, dtype, table_dtype) -> dict:
    """Queries and keys as slices of one projection whose values (the third slice) and margins are NaN."""
    generator = torch.Generator().manual_seed(head_width)
    num_tokens, width = num_frames * tokens_per_frame, num_heads * head_width
    fused = torch.full((batch, num_tokens, 3 * width + 5), torch.nan, dtype=dtype)
    q, k = fused[..., :width], fused[..., width : 2 * width]
    for tensor in (q, k):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    time_pairs = head_width // 2 - 2 * (head_width // 6)
    angles = torch.randn(num_frames + 4, time_pairs, generator=generator, dtype=torch.float64) * 3
    places = torch.randn(tokens_per_frame, head_width // 2 - time_pairs, generator=generator, dtype=torch.float64) * 3
    tables = [torch.stack([part.cos(), part.sin()], 1).to(table_dtype) for part in (angles, places)]
    positions = torch.randint(0, num_frames + 4, (batch, num_frames), generator=generator)
    weights = torch.rand(2, width, generator=generator, dtype=torch.float64).add(0.5).to(table_dtype)
    return {
        "fused": fused, "q": q, "k": k, "weights": weights.unbind(), "temporal": tables[0], "spatial": tables[1],
        "positions": positions,
    }  # fmt: skip


def _rotate(implementation, case: dict, dtype: torch.dtype, num_heads: int, parts: str) -> list[torch.Tensor]:
    """The op on contiguous copies of q and k in `dtype`: parts names what is given, of norm and rope."""
    wide = torch.float64 if dtype == torch.float64 else None
    q, k = case["q"].to(dtype, copy=True), case["k"].to(dtype, copy=True)
    weights = [weight.to(wide) for weight in case["weights"]] if "norm" in parts else [None, None]
    tables = [case["temporal"].to(wide), case["spatial"].to(wide), case["positions"]] if "rope" in parts else [None] * 3
    implementation(q, k, *weights, *tables, num_heads, 1e-6)
    return [q, k]


CPU_HEADS = [(1, 8, 2, 3, 1), (2, 12, 2, 3, 5), (4, 48, 1, 4, 5), (12, 128, 1, 2, 3), (3, 26, 1, 2, 5)]


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parts", ["norm and rope", "rope", "norm"])
@pytest.mark.parametrize("shape", CPU_HEADS)
def test_cpp_is_within_the_error_budget(shape, parts, table_dtype, dtype) -> None:
    num_heads = shape[0]
    case = _heads(*shape, dtype, table_dtype)
    exact = _rotate(ops.qk_norm_rope_reference, case, torch.float64, num_heads, parts)
    eager = _rotate(ops.qk_norm_rope_reference, case, dtype, num_heads, parts)
    weights = case["weights"] if "norm" in parts else [None, None]
    tables = [case["temporal"], case["spatial"], case["positions"]] if "rope" in parts else [None] * 3
    given = [tensor.clone() for tensor in (*case["weights"], *case["temporal"], *case["spatial"])]
    torch.ops.miga.qk_norm_rope(case["q"], case["k"], *weights, *tables, num_heads, 1e-6)
    for result, other, truth in zip((case["q"], case["k"]), eager, exact, strict=True):
        assert_within_budget(result, other, truth)
    assert case["fused"][..., 2 * case["q"].shape[2] :].isnan().all()
    for old, new in zip(given, (*case["weights"], *case["temporal"], *case["spatial"]), strict=True):
        assert torch.equal(old, new)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [7, 24, 192, 1536])
def test_cpp_rms_norm_is_within_the_error_budget(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    q = guarded(torch.randn(2, 5, width, generator=generator).to(dtype))
    weight = guarded(torch.rand(width, generator=generator) + 0.5)
    exact, eager = q.to(torch.float64, copy=True), q.clone()
    for tensor, factor in ((exact, weight.double()), (eager, weight)):
        ops.qk_norm_rope_reference(tensor, None, factor, None, None, None, None, 1, 1e-6)
    assert ops.rms_norm_(q, weight, eps=1e-6) is q
    assert_within_budget(q, eager, exact)
    assert bands_are_untouched(q)


@needs_cpp
@pytest.mark.parametrize("shape", CPU_HEADS)
def test_cpp_in_float64_is_within_the_error_budget_of_long_double(shape: tuple[int, ...]) -> None:
    num_heads, head_width, batch, num_frames, tokens_per_frame = shape
    case = _heads(*shape, torch.float64, torch.float64)
    in_time = in_long_double(case["temporal"][case["positions"]]).repeat(tokens_per_frame, axis=1)  # [B,N,2,t]
    in_space = np.tile(in_long_double(case["spatial"]), (batch, num_frames, 1, 1))
    cos, sin = np.moveaxis(np.concatenate([in_time, in_space], axis=-1)[:, :, :, None], 2, 0)  # [B,N,1,pairs]
    eager = _rotate(ops.qk_norm_rope_reference, case, torch.float64, num_heads, "norm and rope")
    results = _rotate(torch.ops.miga.qk_norm_rope, case, torch.float64, num_heads, "norm and rope")
    for name, weight, other, result in zip("qk", case["weights"], eager, results, strict=True):
        x = in_long_double(case[name])
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * in_long_double(weight)
        pairs = x.reshape(*x.shape[:2], num_heads, head_width // 2, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        exact = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
        assert_within_budget(result, other, exact)


@needs_cpp
def test_cpp_takes_tables_in_strided_memory() -> None:
    case, strided = (_heads(2, 12, 2, 3, 5, torch.float32, torch.float32) for _ in range(2))
    for name in ("temporal", "spatial", "positions"):
        spread = torch.full((*case[name].shape, 2), -1 if name == "positions" else torch.nan, dtype=case[name].dtype)
        strided[name] = spread[..., 0].copy_(case[name])
    for each in (case, strided):
        tables = {name: each[name] for name in ("temporal", "spatial", "positions")}
        ops.qk_norm_rope(each["q"], each["k"], *each["weights"], **tables, num_heads=2, eps=1e-6)
    assert torch.equal(case["q"], strided["q"])
    assert torch.equal(case["k"], strided["k"])


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_does_not_depend_on_threads(dtype: torch.dtype) -> None:
    def rotate() -> list[torch.Tensor]:
        case = _heads(4, 48, 2, 3, 37, dtype, torch.float32)
        return _rotate(torch.ops.miga.qk_norm_rope, case, dtype, 4, "norm and rope")

    for one, two in zip(on_threads(1, rotate), on_threads(2, rotate), strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
@needs_cpp
def test_cpp_meets_its_contract() -> None:
    case = _heads(2, 12, 2, 3, 5, torch.bfloat16, torch.float32)
    q, k = case["q"].contiguous(), case["k"].contiguous()
    tables = (case["temporal"], case["spatial"], case["positions"])
    op = torch.ops.miga.qk_norm_rope.default
    torch.library.opcheck(op, (q, k, *case["weights"], *tables, 2, 1e-6))
    torch.library.opcheck(op, (q, None, case["weights"][0], None, None, None, None, 1, 1e-6))


def _rotary(num_frames: int, tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """temporal [P,2,t] of more positions than frames, spatial [S,2,d/2−t], t as Wan splits a head's pairs."""
    pairs = (half - 2 * (half // 3), 2 * (half // 3))
    angles = [randn(rows, 1, count, seed=3) * 9 for rows, count in zip((num_frames + 4, tokens), pairs, strict=True)]
    temporal, spatial = (torch.cat([angle.cos(), angle.sin()], dim=1) for angle in angles)
    return guarded(temporal), guarded(spatial)


# (B,F,S,H,d): odd sizes, head sizes that are no power of two; the last is the head layout of the 1.3B model.
HEADS = [(2, 3, 5, 2, 24), (1, 2, 7, 3, 64), (2, 1, 1, 5, 6), (1, 2, 3, 12, 128)]


def _fused_qkv(shape: tuple[int, ...], dtype: torch.dtype, fill: float = torch.nan) -> list[torch.Tensor]:
    """q and k as slices of [B,N,3,D] whose third slice holds the filling."""
    batch, num_frames, tokens, num_heads, head_dim = shape
    qkv = torch.full((batch, num_frames * tokens, 3, num_heads * head_dim), fill, dtype=dtype, device=DEVICE)
    qkv = guarded(qkv, fill)
    qkv[:, :, :2] = randn(*qkv[:, :, :2].shape)
    return [qkv[:, :, 0], qkv[:, :, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "has_weights"), each_with_the_first(HEADS, [(True,), (False,)]))
def test_triton_is_within_the_error_budget(shape, has_weights, dtype) -> None:
    batch, num_frames, tokens, num_heads, head_dim = shape
    q, k = _fused_qkv(shape, dtype)
    weights = [guarded(randn(q.shape[2], seed=i) + 1) if has_weights else None for i in range(2)]
    tables = _rotary(num_frames, tokens, head_dim // 2)
    positions = torch.randint(0, num_frames + 4, (batch, num_frames), generator=torch.Generator().manual_seed(2))
    positions = positions.to(DEVICE)
    exact, eager = [q.double(), k.double()], [q.clone(), k.clone()]
    ops.qk_norm_rope_reference(*exact, *in_float64(weights), *in_float64(tables), positions, num_heads, 1e-6)
    ops.qk_norm_rope_reference(*eager, *weights, *tables, positions, num_heads, 1e-6)
    kernel.launch(q, k, *weights, *tables, positions, num_heads, 1e-6)
    assert_within_budget(q, eager[0], exact[0])
    assert_within_budget(k, eager[1], exact[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 1536])
def test_triton_rms_norm_is_within_the_error_budget(width: int, dtype: torch.dtype) -> None:
    q, weight = guarded(randn(2, 5, width).to(dtype)), guarded(randn(width) + 1)
    exact, eager = q.double(), q.clone()
    ops.qk_norm_rope_reference(exact, None, weight.double(), None, None, None, None, 1, 1e-6)
    ops.qk_norm_rope_reference(eager, None, weight, None, None, None, None, 1, 1e-6)
    kernel.launch(q, None, weight, None, None, None, None, 1, 1e-6)
    assert_within_budget(q, eager, exact)


def test_triton_writes_only_q_and_k() -> None:
    """Also with tables and weights in float64, as the contract allows, and no frames at all."""
    shape = (2, 3, 5, 2, 24)
    q, k = _fused_qkv(shape, torch.float32, fill=1.5)
    weight = (randn(48) + 1).double()
    tables = [table.double() for table in _rotary(3, 5, 12)]
    positions = torch.arange(6, device=DEVICE).view(2, 3)
    expected = [q.clone(), k.clone()]
    ops.qk_norm_rope_reference(*expected, weight, weight, *tables, positions, 2, 1e-6)
    kernel.launch(q, k, weight, weight, *tables, positions, 2, 1e-6)
    torch.testing.assert_close([q, k], expected)
    between = outside(q.as_strided((2, 15, 2, 48), (15 * 144, 144, 48, 1)))  # q and k side by side
    assert bool((between == 1.5).all())
    kernel.launch(q[:0], k[:0], weight, weight, *tables, positions[:0], 2, 1e-6)


def test_triton_reads_no_position_beside_its_table() -> None:
    shape = (2, 3, 5, 2, 24)
    tables, weight = _rotary(3, 5, 12), guarded(randn(48))
    positions = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    results = []
    for wrong in (OUT_OF_BOUNDS, [0, 0, 6, 6]):
        q, k = _fused_qkv(shape, torch.float32)
        kernel.launch(q, k, weight, weight, *tables, misnamed(positions, wrong), 2, 1e-6)
        results.append(torch.cat([q, k]))
    assert torch.equal(*results)  # NaN would not be
