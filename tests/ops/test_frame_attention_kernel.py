"""The Triton attention kernel against the float64 oracle: interpreted on the CPU, or on the GPU where there is one."""

import math

import pytest
import torch
from torch import Tensor

from miga_engine import ops

triton = pytest.importorskip("triton", reason="Triton is for Linux only")

import triton.language as tl  # noqa: E402
from miga_engine.kernels import frame_attention  # noqa: E402
from miga_engine.kernels.frame_attention import CONFIGS, Config, launch  # noqa: E402

IS_INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16] + ([torch.float32] if IS_INTERPRETED else [])
BAND = 4096


@triton.jit
def _count_kernel(p_out, first, end):
    total = 0
    for i in range(first, end):
        total += i
    tl.store(p_out, total)


def test_loops_run_over_bounds_known_at_run_time() -> None:
    """As the interpreter of Triton 3.6 does not with numpy 2.5 before tests/conftest.py has mended it."""
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _count_kernel[(1,)](out, 3, 8)
    assert out.item() == 25


def _poisoned(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers with NaN before, behind and between the rows of tokens, which lie as slices of a projection do."""
    generator = torch.Generator().manual_seed(seed)
    *outer, num_heads, head_dim = shape
    size = num_heads * head_dim
    count = math.prod(outer) * 3 * size
    memory = torch.full((count + 2 * BAND,), torch.nan, dtype=dtype, device=DEVICE)
    view = memory[BAND : BAND + count].view(*outer, 3, size)[..., 1, :].unflatten(-1, (num_heads, head_dim))
    view.copy_(torch.randn(shape, generator=generator))
    return view


def _inputs(batch: int, rows: int, n: int, m: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(batch, n), (rows, m), (rows, m)]
    return [_poisoned(*shape, heads, head_dim, dtype=dtype, seed=i + n + m) for i, shape in enumerate(shapes)]


def _bias(*shape: int) -> Tensor:
    """Additive per key, a third of the keys hidden, NaN around it."""
    generator = torch.Generator().manual_seed(shape[1])
    memory = torch.full((shape[0], shape[1] + 2 * BAND), torch.nan, device=DEVICE)
    view = memory[:, BAND : BAND + shape[1]]
    hidden = torch.rand(shape, generator=generator) < 1 / 3
    hidden[:, -1] = False
    view.copy_(torch.randn(shape, generator=generator).masked_fill(hidden, -torch.inf))
    return view


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_rows: Tensor | None = None,
    scale: float | None = None,
    config: Config | None = None,
) -> Tensor:
    """The result, within the error budget, in memory whose surroundings stay as they were."""
    memory = torch.full((q.numel() + 2 * BAND,), torch.nan, dtype=q.dtype, device=DEVICE)
    out = memory[BAND : BAND + q.numel()].view(q.shape)
    assert launch(q, k, v, bias, key_rows, scale, out=out, config=config) is out
    assert memory[:BAND].isnan().all()
    assert memory[-BAND:].isnan().all()
    wide = None if bias is None else bias[:, None, None]
    exact = ops.frame_attention_reference(
        q.double(), k.double(), v.double(), None if wide is None else wide.double(), key_rows, scale
    )
    eager = ops.frame_attention_reference(q, k, v, wide, key_rows, scale)
    error, eager_error = (float((x.double() - exact).abs().max()) for x in (out, eager))
    assert error <= 2 * (eager_error + torch.finfo(q.dtype).eps * float(exact.abs().max()))
    return out


def _configs(head_dim: int) -> list[Config]:
    if not IS_INTERPRETED:
        return list(CONFIGS[frame_attention._arch(), head_dim])
    # the interpreter has no warps; it runs the same loads, loops and masks
    configs = [Config(64, 32, 4, 2), Config(64, 64, 8, 2, True)]
    return [*configs, Config(64, 32, 8, 3, is_overlapped=True), Config(64, 64, 8, 2, True, is_overlapped=True)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "m", "head_dim"),
    [(1, 1, 64), (1, 150, 64), (70, 17, 64), (130, 1, 128), (77, 131, 128), (64, 192, 128)],
)
def test_sizes_are_arbitrary(n: int, m: int, head_dim: int, dtype: torch.dtype) -> None:
    _check(*_inputs(2, 2, n, m, 1, head_dim, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_configuration_gives_the_same(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = _inputs(2, 2, 70, 135, 2, head_dim, dtype)
    bias = _bias(2, 135)
    for config in _configs(head_dim):
        _check(q, k, v, config=config)
        if config.use_tma or config.is_overlapped:
            with pytest.raises(ValueError, match=r"config is Config\(.*\), which takes no bias: choose another"):
                launch(q, k, v, bias, None, None, config=config)
        else:
            _check(q, k, v, bias, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 32, 33, 64, 65, 128, 193])
def test_overlapped_loops_end_anywhere_in_a_block(m: int) -> None:
    """The first and the last block of keys have a place of their own; there may be one, two or many."""
    tensors = _inputs(1, 1, 40, m, 1, 64, torch.float16)
    for config in _configs(64):
        if config.is_overlapped:
            _check(*tensors, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 3])
def test_descriptors_take_the_rows_of_windows_and_runs(num_rows: int) -> None:
    """Descriptors are of all rows of keys; what lies past a row's keys counts as nothing, whatever it holds."""
    q, k, v = _inputs(2, num_rows, 2 * 37, 200, 2, 64, torch.float16)
    for tensor in (k, v):
        tensor[:, 140:] = torch.nan
    key_rows = torch.tensor([[2, 0], [1, 2]], device=DEVICE).remainder(num_rows)
    for config in _configs(64):
        if config.use_tma:
            _check(q, k[:, :140], v[:, :140], None, key_rows, config=config)
            _check(q, k[:1, :140], v[:1, :140], config=config)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("runs", [(), (4,)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_key_rows_name_the_keys_of_windows_and_runs(
    has_bias: bool, runs: tuple[int, ...], num_rows: int, dtype: torch.dtype
) -> None:
    q, k, v = _inputs(2, num_rows, 4 * 19, 21, 2, 64, dtype)
    key_rows = torch.arange(math.prod((2, *runs)), device=DEVICE).mul(5).remainder(num_rows).view(2, *runs)
    _check(q, k, v, _bias(num_rows, 21) if has_bias else None, key_rows)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_shared_by_every_window(dtype: torch.dtype) -> None:
    q, k, v = _inputs(3, 1, 37, 50, 2, 64, dtype)
    _check(q, k, v)
    _check(q, k, v, _bias(1, 50))
    shared = [tensor.expand(3, -1, -1, -1) for tensor in (k, v)]
    assert torch.equal(launch(q, *shared, None, None, None), launch(q, k, v, None, None, None))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_text_collapses_to_one_key(dtype: torch.dtype) -> None:
    """Padding of equal keys weighs as much as one of them with the logarithm of their number for a bias."""
    num_words, num_padding = 11, 120
    q, k, v = _inputs(2, 2, 50, num_words + num_padding, 2, 64, dtype)
    for tensor in (k, v):
        tensor[:, num_words:] = tensor[:, num_words : num_words + 1].clone()
    short = slice(0, num_words + 1)
    bias = torch.zeros(1, num_words + 1, device=DEVICE)
    bias[:, -1] = math.log(num_padding)
    padded, collapsed = _check(q, k, v), _check(q, k[:, short], v[:, short], bias)
    exact = ops.frame_attention_reference(q.double(), k.double(), v.double(), None, None, None)
    eager = ops.frame_attention_reference(q, k, v, None, None, None)
    budget = float((eager - exact).abs().max()) + torch.finfo(dtype).eps * float(exact.abs().max())
    assert float((collapsed.double() - padded.double()).abs().max()) <= 2 * budget


def test_hidden_blocks_before_the_first_visible_key() -> None:
    q, k, v = _inputs(1, 1, 20, 200, 1, 64, torch.float16)
    bias = torch.full((1, 200), -torch.inf, device=DEVICE)
    bias[:, 170:] = 0.5
    out = _check(q, k, v, bias)
    visible = launch(q, k[:, 170:], v[:, 170:], None, None, None)
    torch.testing.assert_close(out, visible, rtol=0, atol=2 * torch.finfo(torch.float16).eps * float(v.abs().max()))
    assert launch(q, k, v, bias.fill_(-torch.inf), None, None).isnan().all()  # as eager softmax of nothing


def test_large_scores_do_not_overflow() -> None:
    q, k, v = _inputs(1, 1, 20, 140, 1, 64, torch.float16)
    q *= 60
    k *= 60
    _check(q, k, v)


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0, -0.25])
def test_scale_is_the_callers(scale: float) -> None:
    _check(*_inputs(1, 1, 33, 140, 1, 64, torch.float16), scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_of_any_type_and_broadcast(dtype: torch.dtype) -> None:
    q, k, v = _inputs(2, 2, 20, 40, 1, 64, dtype)
    bias = _bias(2, 40)
    _check(q, k, v, bias.to(torch.bfloat16))
    _check(q, k, v, bias.double())
    constant = launch(q, k, v, torch.ones(2, 1, device=DEVICE), None, None)
    torch.testing.assert_close(constant, launch(q, k, v, None, None, None), rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.slow
def test_queries_may_be_the_end_of_a_window() -> None:
    """The last block asks only for the frames that are written back."""
    q, k, v = _inputs(2, 2, 150, 150, 2, 64, torch.float16)
    whole = launch(q, k, v, None, None, None)
    part = _check(q[:, 97:], k, v)
    torch.testing.assert_close(part, whole[:, 97:], rtol=0, atol=torch.finfo(torch.float16).eps)


@pytest.mark.slow
def test_other_strides_and_alignments() -> None:
    heads_first = [torch.randn(1, 3, 140, 64, device=DEVICE).half().transpose(1, 2) for _ in range(3)]
    _check(*heads_first)
    memory = torch.randn(3 * 140 * 67 + 1, device=DEVICE).half()
    odd = [memory[i * 140 * 67 + 1 :][: 140 * 67].view(1, 140, 1, 67)[..., :64] for i in range(3)]
    _check(*odd)
    shared = [tensor.expand(3, -1, -1, -1) for tensor in heads_first]
    for tensors in (odd, heads_first, shared):
        with pytest.raises(ValueError, match=r"q, k or v has strides .*, which TMA does not take"):
            launch(*tensors, None, None, None, config=Config(64, 64, 4, 2, use_tma=True))


def test_real_strides_of_a_slice_of_the_real_model() -> None:
    """Some heads and tokens of a fused projection, 12 heads of 128, of 2 windows of 32,760 tokens (1.3B)."""
    num_tokens, width = 32_760, 1536
    fused = torch.empty(2, num_tokens, 3 * width, dtype=torch.bfloat16, device="meta")
    strides = fused.unflatten(2, (3, 12, 128)).select(2, 0).stride()
    assert strides == (num_tokens * 3 * width, 3 * width, 128, 1)
    memory = torch.full((40 * 3 * width,), torch.nan, dtype=torch.float16, device=DEVICE)
    q, k, v = (memory[i * width :].as_strided((1, 39, 2, 128), strides) for i in range(3))
    for i, tensor in enumerate((q, k, v)):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)))
    _check(q, k, v)


def test_nothing_to_do() -> None:
    q, k, v = _inputs(2, 2, 8, 8, 1, 64, torch.float16)
    assert launch(q[:, :0], k, v, None, None, None).shape == (2, 0, 1, 64)
    assert launch(q[:0], k[:0], v[:0], None, None, None).shape == (0, 8, 1, 64)


def test_the_op_runs_it_by_name() -> None:
    q, k, v = _inputs(2, 2, 30, 20, 2, 64, torch.float16)
    bias = _bias(2, 20)
    out = ops.frame_attention(q, k, v, bias[:, None, None], backend="triton")
    assert torch.equal(out, launch(q, k, v, bias, None, None))


def test_work_and_traffic_are_counted() -> None:
    assert frame_attention.flops(1, 32_760, 32_760, 12, 128) * 30 == pytest.approx(197.8e12, rel=1e-3)
    assert frame_attention.bytes_moved(2, 32_760, 32_760, 12, 128) == 4 * 2 * 32_760 * 1536 * 2


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_window_of_the_real_model_under_graph_capture(dtype: torch.dtype) -> None:
    q, k, v = _inputs(1, 1, 32_760, 32_760, 2, 128, dtype)
    for config in _configs(128):
        eager = launch(q, k, v, None, None, None, config=config)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = launch(q, k, v, None, None, None, config=config)
        torch.empty_like(q).fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, eager)
        _check(q[:, -512:], k, v, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("m", [12, 170])
def test_a_row_of_keys_that_is_none_becomes_the_nearest(m: int) -> None:
    q, k, v = _inputs(2, 3, 12, m, 1, 64, DTYPES[0])
    bias = _bias(3, m)
    wrong, nearest = (torch.tensor(rows, device=DEVICE) for rows in ([[-1, 3], [2**40, 1]], [[0, 2], [2, 1]]))
    assert torch.equal(launch(q, k, v, bias, wrong, None), launch(q, k, v, bias, nearest, None))
    assert torch.equal(launch(q, k, v, None, wrong, None), launch(q, k, v, None, nearest, None))
