"""norm_modulate and residual_norm_modulate: their kernels against the oracle, and what they refuse."""

import numpy as np
import pytest
import torch
from op_inputs import (
    DEVICE,
    DTYPES,
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

kernel = Kernel("norm_modulate")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x[0]}, r"x has shape \(3, 5, 24\), expected \[B,F,S,D\]"),
        ({"x": lambda x: x.half()}, "x has dtype torch.float16, expected float32 or float64"),
        ({"x": lambda x: x.transpose(0, 1)}, "x has strides .* expected a contiguous tensor"),
        ({"rows": lambda rows: None}, r"rows has value None, expected \[B,F\], for weight has 4 rows"),
        ({"rows": lambda rows: rows.T}, r"rows has shape \(3, 2\), expected \(2, 3\), \[B,F\] of x"),
        ({"rows": lambda rows: rows.int()}, "rows has dtype torch.int32, expected int64"),
        ({"weight": lambda w: w[:, :7]}, r"weight has shape \(4, 7\), expected \[R,D\]"),
        ({"weight": lambda w: w.double()}, "weight has dtype torch.float64, expected torch.float32 as x"),
        ({"bias": lambda b: None}, "bias has value None, expected one with weight"),
    ],
)
def test_norm_modulate_refuses(change, message) -> None:
    t = small_arguments()
    t |= {name: alter(t[name]) for name, alter in change.items()}
    with pytest.raises(ValueError, match=message):
        ops.norm_modulate(t["x"], t["weight"], t["bias"], t["rows"], eps=1e-6, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": lambda y: y[:, :2]}, r"y has shape \(2, 2, 5, 24\), expected \(2, 3, 5, 24\) as x"),
        ({"y": lambda y: y.long()}, "y has dtype torch.int64, expected a floating point type"),
        ({"gate": lambda g: g.bfloat16()}, "gate has dtype torch.bfloat16, expected torch.float32 as x"),
        ({"gate": lambda g: g.T.contiguous().T}, "gate has strides .* expected a contiguous last dimension"),
    ],
)
def test_residual_norm_modulate_refuses(change, message) -> None:
    t = small_arguments()
    t |= {name: alter(t[name]) for name, alter in change.items()}
    before = t["x"].clone()
    with pytest.raises(ValueError, match=message):
        ops.residual_norm_modulate(
            t["x"], t["y"], t["gate"], t["weight"], t["bias"], t["rows"], eps=1e-6, dtype=torch.float32
        )
    assert torch.equal(t["x"], before)


def test_a_norm_without_a_weight_is_a_cast() -> None:
    t = small_arguments()
    out = ops.residual_norm_modulate(t["x"].clone(), t["y"], None, None, None, None, eps=1e-6, dtype=torch.bfloat16)
    assert torch.equal(out, (t["x"] + t["y"]).bfloat16())


# Tables of R rows of a block's [R,6,D], and whether frames are indexed: one row serves every frame in any case.
CPU_TABLES = {"many": (5, True), "one": (1, False), "one_indexed": (1, True)}


def _cpu_arguments(shape: tuple[int, ...], dtype: torch.dtype, table: str, seed: int = 0) -> tuple:
    """x, gate, weight, bias, rows; memory that no kernel may read is NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, has_rows = CPU_TABLES[table]
    x = guarded((torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype))
    tables = torch.full((num_rows, 6, shape[3]), torch.nan, dtype=dtype)
    for index in (0, 2, 5):
        tables[:, index] = torch.randn(num_rows, shape[3], generator=generator) + 1
    rows = torch.randint(0, num_rows + 3 * (table == "one_indexed"), shape[:2], generator=generator)
    return x, tables[:, 0], tables[:, 2], tables[:, 5], rows if has_rows else None


CPU_SHAPES = [(1, 2, 1, 7), (2, 3, 5, 24), (1, 4, 5, 192), (2, 2, 3, 1536), (1, 3, 5, 77)]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("table", CPU_TABLES)
@pytest.mark.parametrize("shape", CPU_SHAPES)
def test_cpp_norm_modulate_is_within_the_error_budget(shape, table, state, dtype) -> None:
    x, _, weight, bias, rows = _cpu_arguments(shape, state, table)
    before = x.clone()
    exact = ops.norm_modulate_reference(x.double(), weight.double(), bias.double(), rows, 1e-6, torch.float64)
    eager = ops.norm_modulate_reference(x, weight, bias, rows, 1e-6, dtype)
    result = ops.norm_modulate(x, weight, bias, rows, eps=1e-6, dtype=dtype)
    assert_within_budget(result, eager, exact)
    assert torch.equal(x, before)
    assert result.is_contiguous()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("table", [*CPU_TABLES, "no_gate", "no_norm"])
@pytest.mark.parametrize("shape", CPU_SHAPES)
def test_cpp_residual_norm_modulate_is_within_the_error_budget(shape, table, state, dtype) -> None:
    x, gate, weight, bias, rows = _cpu_arguments(shape, state, table if table in CPU_TABLES else "many", seed=1)
    gate = None if table == "no_gate" else gate
    weight, bias = (None, None) if table == "no_norm" else (weight, bias)
    y = guarded(torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    exact_x, eager_x = x.to(torch.float64, copy=True), x.clone()
    tables = [None if part is None else part.double() for part in (gate, weight, bias)]
    exact = ops.residual_norm_modulate_reference(exact_x, y.double(), *tables, rows, 1e-6, torch.float64)
    eager = ops.residual_norm_modulate_reference(eager_x, y, gate, weight, bias, rows, 1e-6, dtype)
    result = ops.residual_norm_modulate(x, y, gate, weight, bias, rows, eps=1e-6, dtype=dtype)
    assert_within_budget(x, eager_x, exact_x)
    assert_within_budget(result, eager, exact)
    assert bands_are_untouched(x)
    assert bands_are_untouched(y)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpp_reads_and_rounds_16_bit_types_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 2, 4, -1)
    x = torch.zeros(every.shape)
    ops.residual_norm_modulate(x, every, None, None, None, eps=0.0, dtype=torch.float32)
    torch.testing.assert_close(x, every.float(), rtol=0, atol=0, equal_nan=True)
    # Each value, the middles between neighbours and the floats beside those: both roundings, all ties, overflow.
    bits = every.float().view(torch.int32).flatten()
    half_step = 1 << (15 if dtype == torch.bfloat16 else 12)
    near = torch.stack([bits + offset for offset in (0, 1, -1, half_step - 1, half_step, half_step + 1)])
    subnormal = torch.arange(-4096, 4096).mul(2.0**-26)
    values = torch.cat([near.flatten().view(torch.float32), subnormal]).reshape(1, 1, 8, -1)
    rounded = ops.norm_modulate(values, None, None, eps=0.0, dtype=dtype)
    torch.testing.assert_close(rounded, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rounded.signbit()[values.isfinite()], values.signbit()[values.isfinite()])


@needs_cpp
def test_cpp_of_nothing_and_of_large_means() -> None:
    for shape in ((1, 0, 3, 8), (0, 2, 3, 8), (1, 2, 0, 8)):
        x, _, weight, bias, rows = _cpu_arguments(shape, torch.float32, "many")
        assert ops.norm_modulate(x, weight, bias, rows, eps=1e-6, dtype=torch.bfloat16).shape == shape
    x, _, weight, bias, rows = _cpu_arguments((1, 2, 3, 1536), torch.float32, "many")
    x += 1000  # statistics in two passes: no cancellation
    exact = ops.norm_modulate_reference(x.double(), weight.double(), bias.double(), rows, 1e-6, torch.float64)
    eager = ops.norm_modulate_reference(x, weight, bias, rows, 1e-6, torch.float32)
    assert_within_budget(ops.norm_modulate(x, weight, bias, rows, eps=1e-6, dtype=torch.float32), eager, exact)


@needs_cpp
@pytest.mark.parametrize("shape", CPU_SHAPES)
def test_cpp_in_float64_is_within_the_error_budget_of_long_double(shape: tuple[int, ...]) -> None:
    x, gate, weight, bias, rows = _cpu_arguments(shape, torch.float64, "many", seed=1)
    y = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gates, weights, biases = (in_long_double(table[rows])[:, :, None] for table in (gate, weight, bias))
    exact_x = in_long_double(x) + gates * in_long_double(y)
    centered = exact_x - exact_x.mean(-1, keepdims=True)
    exact = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * weights + biases
    eager_x = x.clone()
    eager = ops.residual_norm_modulate_reference(eager_x, y, gate, weight, bias, rows, 1e-6, torch.float64)
    result = ops.residual_norm_modulate(x, y, gate, weight, bias, rows, eps=1e-6, dtype=torch.float64)
    assert_within_budget(x, eager_x, exact_x)
    assert_within_budget(result, eager, exact)
    assert torch.equal(result, ops.norm_modulate(x, weight, bias, rows, eps=1e-6, dtype=torch.float64))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_does_not_depend_on_threads(dtype: torch.dtype) -> None:
    x, gate, weight, bias, rows = _cpu_arguments((2, 3, 37, 192), torch.float32, "many")
    y = torch.randn(x.shape).to(dtype)

    def modulate() -> list[torch.Tensor]:
        state = x.clone()
        out = torch.ops.miga.residual_norm_modulate(state, y, gate, weight, bias, rows, 1e-6, dtype)
        return [state, out, torch.ops.miga.norm_modulate(x, weight, bias, rows, 1e-6, dtype)]

    for one, two in zip(on_threads(1, modulate), on_threads(2, modulate), strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
@needs_cpp
def test_cpp_meets_its_contract() -> None:
    x, gate, weight, bias, rows = _cpu_arguments((2, 3, 5, 24), torch.float32, "many")
    y = torch.randn(x.shape).bfloat16()
    miga = torch.ops.miga
    gate, weight, bias = (table.contiguous() for table in (gate, weight, bias))
    for table in ((weight, bias, rows), (None, None, None)):
        torch.library.opcheck(miga.norm_modulate.default, (x.clone(), *table, 1e-6, torch.bfloat16))
        arguments = (x.clone(), y, gate if rows is table[2] else None, *table, 1e-6, torch.float32)
        torch.library.opcheck(miga.residual_norm_modulate.default, arguments)


@pytest.fixture
def guarded_empty_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are allocated as NaN between bands of 1.5."""

    def empty_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return guarded(torch.full(tensor.shape, torch.nan, dtype=dtype, device=DEVICE), fill=1.5)

    monkeypatch.setattr(torch, "empty_like", empty_like)


def _tables(x_shape: tuple[int, ...], num_rows: int, with_rows: bool) -> tuple[list, torch.Tensor | None]:
    """Weight, bias and gate as columns of a table [R,6,D] whose other columns are NaN, and the row of each frame."""
    batch, num_frames, _, width = x_shape
    table = guarded(torch.full((num_rows, 6, width), torch.nan, device=DEVICE))
    table[:, 1:4] = randn(num_rows, 3, width, seed=5)
    table[:, 1] += 1
    rows = torch.randint(0, num_rows, (batch, num_frames), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    if num_rows == 1:
        rows += 7  # a table of one row serves every frame whatever rows says
    return [table[:, 1], table[:, 2], table[:, 3]], rows if with_rows else None


# The last has the width and the strides of the 1.3B model; 17 tokens are one more than a program takes. Each width is a
# kernel of its own to compile, and each set of tables: every width takes the first set, one of them every set.
SHAPES = [(2, 3, 5, 7), (1, 2, 1, 24), (1, 3, 17, 192), (1, 2, 5, 1536)]


@pytest.mark.slow
@pytest.mark.usefixtures("guarded_empty_like")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_rows", "with_rows"), each_with_the_first(SHAPES, [(5, True), (1, True), (1, False)])
)
def test_triton_norm_modulate_is_within_the_error_budget(shape, num_rows, with_rows, dtype) -> None:
    x = guarded(randn(*shape) + 10)
    (weight, bias, _), rows = _tables(shape, num_rows, with_rows)
    exact = ops.norm_modulate_reference(*in_float64([x, weight, bias, rows]), 1e-6, torch.float64)
    eager = ops.norm_modulate_reference(x, weight, bias, rows, 1e-6, dtype)
    before = x.clone()
    out = kernel.launch(x, weight, bias, rows, 1e-6, dtype)
    assert_within_budget(out, eager, exact)
    assert bool((outside(out) == 1.5).all())
    assert torch.equal(x, before)


@pytest.mark.slow
@pytest.mark.usefixtures("guarded_empty_like")
@pytest.mark.parametrize(("dtype", "y_dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(
    ("shape", "num_rows", "has_gate", "has_norm"),
    each_with_the_first(SHAPES, [(5, True, True), (1, True, False), (5, False, True)]),
)
def test_triton_residual_norm_modulate_is_within_the_error_budget(
    shape, num_rows, has_gate, has_norm, dtype, y_dtype
) -> None:
    x = guarded(randn(*shape) + 10)
    y = guarded(randn(*shape, seed=1).to(y_dtype))
    (weight, bias, gate), rows = _tables(shape, num_rows, with_rows=True)
    gate = gate if has_gate else None
    weight, bias = (weight, bias) if has_norm else (None, None)
    exact_x, eager_x = x.double(), x.clone()
    tables = [y, gate, weight, bias, rows]
    exact = ops.residual_norm_modulate_reference(exact_x, *in_float64(tables), 1e-6, torch.float64)
    eager = ops.residual_norm_modulate_reference(eager_x, *tables, 1e-6, dtype)
    out = kernel.launch_residual(x, *tables, 1e-6, dtype)
    assert_within_budget(out, eager, exact)
    assert_within_budget(x, eager_x, exact_x)
    assert bool((outside(out) == 1.5).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_without_weights_is_a_cast(dtype: torch.dtype) -> None:
    x = guarded(randn(1, 2, 3, 7))
    out = kernel.launch(x, None, None, None, 1e-6, dtype)
    assert out.data_ptr() != x.data_ptr()
    assert_within_budget(out, x.to(dtype), x.double())
    assert kernel.launch(x[:, :0], None, None, None, 1e-6, dtype).shape == (1, 0, 3, 7)


def test_triton_takes_a_strided_y_and_writes_only_x() -> None:
    x = guarded(randn(2, 3, 5, 7), fill=1.5)
    y = randn(2, 5, 3, 7, seed=1).transpose(1, 2)
    expected = x + y
    kernel.launch_residual(x, y, None, None, None, None, 1e-6, torch.float32)
    assert torch.equal(x, expected)
    assert bool((outside(x) == 1.5).all())


def test_triton_reads_no_row_beside_its_tables() -> None:
    x, y = guarded(randn(2, 3, 5, 7)), guarded(randn(2, 3, 5, 7, seed=1))
    gate, weight, bias = (guarded(randn(4, 7, seed=2 + i)) for i in range(3))
    rows = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    nearest = misnamed(rows, [0, 0, 3, 3])
    out = kernel.launch_residual(x.clone(), y, gate, weight, bias, misnamed(rows, OUT_OF_BOUNDS), 1e-6, torch.float32)
    assert torch.equal(out, kernel.launch_residual(x.clone(), y, gate, weight, bias, nearest, 1e-6, torch.float32))
