"""frame_attention: softmax(scale·q kᵀ + bias) v per head, every query seeing every key, in one pass over the keys.

q [B,N,H,D], k, v [P,M,H,D] → [B,N,H,D], D 64 or 128; bias [P or 1,M], one number a key, −inf hides it. key_rows names
the row of k, v and bias for each window, or for each of its F runs of N/F queries; a program's queries lie in one run.
dtypes: bfloat16 or float16 in and out, products accumulated and softmax in float32 (float32 too when interpreted).

A program keeps BLOCK_M queries and walks over blocks of BLOCK_N keys with the running maximum m, sum l and result o:
    s = q kᵀ·scale + bias;  m' = max(m, max s);  p = exp(s − m');  l ← l·exp(m − m') + Σp;  o ← o·exp(m − m') + p v
in powers of two, log2(e) folded into scale. Long keys are bound by the 4·N·M·D operations a head, then by exp2; short
ones (text) by the 4 bytes a channel of q and the result. Source: FlashAttention-2 (arXiv 2307.08691).

On an H100, Triton 3.6, over 32,760 keys of 128: two programs a multiprocessor, whose tiles of 64×64 leave room for each
other, fill the gaps of their softmax with each other's products and reach 69 to 77 % of the rate of matrix products,
where SDPA and cuDNN reach 75 to 78 %. One program of 128×128 computes the next scores under its own exponentials, as
in FlashAttention-3 (arXiv 2407.08608), and reaches 57 to 65 %; without that 53 to 55 %. Triton's own specialised warps
gave NaN or, from launch to launch, something else.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool = False
    """Load keys and values through tensor descriptors: sm_90 or later, strides as in `_takes_tma`, no bias."""
    is_overlapped: bool = False
    """The next block's scores are computed under the exponentials of this one: of use on sm_90, no bias."""


# By target and head size; the first that takes the call is the default, the last serves a bias. bench/aot.py compiles
# them all: none spills, as larger tiles or fewer warps do. sm_80 stands for every other NVIDIA GPU: its shared memory
# fits 99 KiB. On sm_100 Triton overlaps by itself.
_SM_90 = (Config(128, 64, 8, 3, is_overlapped=True), Config(128, 64, 8, 3))
CONFIGS = {
    ("sm_80", 64): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(128, 32, 4, 3)),
    ("sm_80", 128): (Config(128, 32, 8, 3), Config(128, 64, 8, 1)),
    ("sm_90", 64): (Config(128, 128, 8, 2, True, is_overlapped=True), Config(128, 128, 8, 2, True), *_SM_90),
    ("sm_90", 128): (Config(64, 64, 4, 3, True), Config(128, 128, 8, 2, True, is_overlapped=True), *_SM_90),
    ("sm_100", 64): (Config(128, 128, 8, 3, True), Config(128, 64, 8, 3)),
    ("sm_100", 128): (Config(128, 128, 8, 2, True), Config(128, 64, 8, 2)),
    ("gfx942", 64): (Config(128, 64, 4, 2), Config(128, 32, 4, 2)),
    ("gfx942", 128): (Config(128, 64, 4, 2), Config(128, 32, 4, 2)),
}
SHORT_KEYS = 128


# fmt: off
@triton.jit
def _load_rows(rows, start, ROWS: tl.constexpr, D: tl.constexpr, USE_TMA: tl.constexpr):
    """Rows start … start + ROWS − 1 of a head, [ROWS,D]; zeros past num_rows."""
    source, i_row, i_head, stride, num_rows = rows
    if USE_TMA:  # a descriptor of the whole tensor, made by the host
        b_rows = source.load([i_row, start, i_head, 0]).reshape(ROWS, D)
    else:
        o_n = tl.arange(0, ROWS)
        p_rows = source + tl.cast(start, tl.int64) * stride + (o_n[:, None] * stride + tl.arange(0, D)[None, :])
        b_rows = tl.load(p_rows, mask=start + o_n[:, None] < num_rows, other=0.0)
    return b_rows


@triton.jit
def _scores(b_q, keys, start, BLOCK_N: tl.constexpr, D: tl.constexpr, USE_TMA: tl.constexpr):
    return tl.dot(b_q, _load_rows(keys, start, BLOCK_N, D, USE_TMA).to(b_q.dtype).T)  # [BLOCK_M,BLOCK_N]


@triton.jit
def _exponents(
    b_s, b_max, p_bias, stride_bias, start, num_keys, scale, BLOCK_N: tl.constexpr, IS_TAIL: tl.constexpr
):
    """A block's scores as powers of two, less the new maximum; and this."""
    o_n = start + tl.arange(0, BLOCK_N)
    if p_bias is not None:
        p_row = p_bias + tl.cast(start, tl.int64) * stride_bias
        b_bias = tl.load(p_row + tl.arange(0, BLOCK_N) * stride_bias, mask=o_n < num_keys, other=float("-inf"))
        b_s = b_s * scale + (b_bias.to(tl.float32) * LOG2_E)[None, :]
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_new = tl.where(b_new == float("-inf"), 0.0, b_new)  # every key so far is hidden: p = 0, not NaN
        b_x = b_s - b_new[:, None]
    else:
        if IS_TAIL:
            b_s = tl.where(o_n[None, :] < num_keys, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_x = b_s * scale - b_new[:, None]
    return b_x, b_new


@triton.jit
def _weights(b_x, b_new, b_max, b_sum):
    """Of a block's keys, what the result so far is to be multiplied by, and the new sum."""
    b_p = tl.exp2(b_x)
    b_decay = tl.exp2(b_max - b_new)
    return b_p, b_decay, b_sum * b_decay + tl.sum(b_p, 1)


@triton.jit
def _attend(
    b_out, b_sum, b_max, b_q, keys, values, p_bias, stride_bias, start, num_keys, scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, USE_TMA: tl.constexpr, IS_TAIL: tl.constexpr,
):
    """The running result, sum and maximum after one more block of keys."""
    b_s = _scores(b_q, keys, start, BLOCK_N, D, USE_TMA)
    b_x, b_new = _exponents(b_s, b_max, p_bias, stride_bias, start, num_keys, scale, BLOCK_N, IS_TAIL)
    b_p, b_decay, b_sum = _weights(b_x, b_new, b_max, b_sum)
    b_v = _load_rows(values, start, BLOCK_N, D, USE_TMA).to(b_q.dtype)
    b_out = tl.dot(b_p.to(b_q.dtype), b_v, b_out * b_decay[:, None])
    return b_out, b_sum, b_new


@triton.jit
def _attend_overlapped(
    b_out, b_sum, b_max, b_q, keys, values, num_keys, scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, USE_TMA: tl.constexpr,
):
    """Result and sum over all keys. An iteration adds the values of the block before, then starts the scores of the
    block after, which only the next iteration uses: they are in flight under the exponentials of this one."""
    DOT: tl.constexpr = b_q.dtype
    # Triton takes a factor straight from the loop's state through shared memory, a computed one from registers.
    BITS: tl.constexpr = tl.int16 if DOT.primitive_bitwidth == 16 else tl.int32
    b_bits = tl.zeros([b_q.shape[0], BLOCK_N], BITS)
    last = (num_keys - 1) // BLOCK_N * BLOCK_N
    b_s = _scores(b_q, keys, 0, BLOCK_N, D, USE_TMA)
    for start in tl.range(0, last, BLOCK_N):
        b_v = _load_rows(values, tl.maximum(start - BLOCK_N, 0), BLOCK_N, D, USE_TMA).to(DOT)
        b_out = tl.dot(b_bits.to(DOT, bitcast=True), b_v, b_out)
        # b_s may not be read once the next scores are under way: ptxas would let nothing overlap
        b_x, b_new = _exponents(b_s, b_max, None, 0, start, num_keys, scale, BLOCK_N, IS_TAIL=False)
        b_s = _scores(b_q, keys, start + BLOCK_N, BLOCK_N, D, USE_TMA)
        b_p, b_decay, b_sum = _weights(b_x, b_new, b_max, b_sum)
        b_bits = b_p.to(DOT).to(BITS, bitcast=True)
        b_out *= b_decay[:, None]
        b_max = b_new
    b_v = _load_rows(values, tl.maximum(last - BLOCK_N, 0), BLOCK_N, D, USE_TMA).to(DOT)
    b_out = tl.dot(b_bits.to(DOT, bitcast=True), b_v, b_out)
    b_x, b_new = _exponents(b_s, b_max, None, 0, last, num_keys, scale, BLOCK_N, IS_TAIL=True)
    b_p, b_decay, b_sum = _weights(b_x, b_new, b_max, b_sum)
    b_v = _load_rows(values, last, BLOCK_N, D, USE_TMA).to(DOT)
    return tl.dot(b_p.to(DOT), b_v, b_out * b_decay[:, None]), b_sum


@triton.jit(do_not_specialize=["num_rows", "num_runs", "run_length", "num_keys", "num_heads"])
def _frame_attention_kernel(
    p_out, p_q, k, v, p_bias, p_key_rows,
    stride_q_b, stride_q_n, stride_q_h, stride_k_p, stride_k_m, stride_k_h, stride_v_p, stride_v_m, stride_v_h,
    stride_bias_p, stride_bias_m, num_rows, num_runs, run_length, num_keys, num_heads, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_TMA: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr, IS_INTERPRETED: tl.constexpr,
):
    # one grid axis, tiles first: programs that run together share a head's keys in the cache
    num_tiles = tl.cdiv(run_length, BLOCK_M)
    i_tile = tl.program_id(0) % num_tiles
    i_run = tl.program_id(0) // num_tiles % num_runs
    i_head = (tl.program_id(0) // (num_tiles * num_runs) % num_heads).to(tl.int64)
    i_window = (tl.program_id(0) // (num_tiles * num_runs) // num_heads).to(tl.int64)
    i_row = i_window
    if p_key_rows is not None:
        i_row = tl.load(p_key_rows + i_window * num_runs + i_run)
        i_row = tl.minimum(tl.maximum(i_row, 0), num_rows - 1)  # never behind the keys
    if p_bias is not None:
        p_bias += i_row * stride_bias_p

    i_first = i_run.to(tl.int64) * run_length
    q = p_q + i_window * stride_q_b + i_first * stride_q_n + i_head * stride_q_h
    if not USE_TMA:
        k += i_row * stride_k_p + i_head * stride_k_h
        v += i_row * stride_v_p + i_head * stride_v_h
    i_row = tl.where(stride_k_p == 0, 0, i_row).to(tl.int32)  # one row of keys serves every window
    keys = (k, i_row, i_head.to(tl.int32), stride_k_m, num_keys)
    values = (v, i_row, i_head.to(tl.int32), stride_v_m, num_keys)
    DOT: tl.constexpr = tl.float32 if IS_INTERPRETED else p_q.dtype.element_ty  # interpreted bfloat16 dots are wrong
    queries = (q, 0, 0, stride_q_n, run_length)
    b_q = _load_rows(queries, i_tile * BLOCK_M, BLOCK_M, D, False).to(DOT)

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, D], tl.float32)
    if IS_OVERLAPPED:
        b_out, b_sum = _attend_overlapped(
            b_out, b_sum, b_max, b_q, keys, values, num_keys, scale, BLOCK_N, D, USE_TMA
        )
    else:
        # Masking every block costs a select per score. A tail of its own saves it where registers allow, and a bias
        # masks by itself.
        HAS_TAIL: tl.constexpr = USE_TMA
        end = num_keys // BLOCK_N * BLOCK_N if HAS_TAIL else num_keys
        for start in tl.range(0, end, BLOCK_N):
            b_out, b_sum, b_max = _attend(
                b_out, b_sum, b_max, b_q, keys, values, p_bias, stride_bias_m, start, num_keys, scale,
                BLOCK_N, D, USE_TMA, IS_TAIL=not HAS_TAIL,
            )
        if HAS_TAIL:  # noqa: SIM102
            if end < num_keys:  # only known at run time
                b_out, b_sum, b_max = _attend(
                    b_out, b_sum, b_max, b_q, keys, values, p_bias, stride_bias_m, end, num_keys, scale,
                    BLOCK_N, D, USE_TMA, IS_TAIL=True,
                )
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_out = ((i_window * num_runs * run_length + i_first + o_m) * num_heads + i_head) * D
    b_out = b_out / b_sum[:, None]
    p_result = p_out + o_out[:, None] + tl.arange(0, D)[None, :]
    tl.store(p_result, b_out.to(p_out.dtype.element_ty), mask=(o_m < run_length)[:, None])
# fmt: on


def default_config(q: Tensor, k: Tensor, v: Tensor, run_length: int, has_bias: bool) -> Config:
    """The first of CONFIGS that takes these strides, the last with a bias; short keys need no pipeline."""
    if k.shape[1] <= SHORT_KEYS:
        block_m, most, num_warps = (128, 64, 8) if run_length > 64 else (64, 32, 4)
        return Config(block_m, min(max(16, triton.next_power_of_2(k.shape[1])), most), num_warps, 1)
    configs = CONFIGS[_arch(), q.shape[3]]
    if has_bias:
        return configs[-1]
    return next(config for config in configs if not config.use_tma or _takes_tma(q, k, v))


def _arch() -> str:
    """The target that Triton compiles for, as CONFIGS names it."""
    if triton.knobs.runtime.interpret:
        return "sm_80"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, "sm_80")


def _takes_tma(*tensors: Tensor) -> bool:
    """Aligned to 16 bytes, no stride 0 and each a multiple of the next: what the CUDA driver documents."""
    return all(
        t.data_ptr() % 16 == 0 and 0 not in (outer, row, head) and outer % row == row % head == 0
        and head * t.element_size() % 16 == 0
        for t in tensors for outer, row, head in [t.stride()[:3]]
    )  # fmt: skip


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_rows: Tensor | None,
    scale: float | None,
    *,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """[B,N,H,D], contiguous as `out` must be; arguments as checked by `miga_engine.ops.frame_attention`."""
    batch, num_queries, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if out.numel() == 0:
        return out
    scale = head_dim**-0.5 if scale is None else scale
    if scale <= 0:  # the kernel scales the maximum of the scores, which holds for a positive scale
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    num_runs = 1 if key_rows is None else key_rows.numel() // batch
    run_length = num_queries // num_runs
    config = default_config(q, k, v, run_length, bias is not None) if config is None else config
    if config.use_tma and not _takes_tma(q, k, v):
        raise ValueError(f"q, k or v has strides {q.stride()}, {k.stride()} or {v.stride()}, which TMA does not take")
    if bias is not None and (config.use_tma or config.is_overlapped):
        raise ValueError(f"config is {config}, which takes no bias: choose another")
    bias = None if bias is None else bias.expand(-1, k.shape[1])
    key_rows = None if key_rows is None else key_rows.contiguous()
    bias_strides = (0, 0) if bias is None else _row_strides(bias)
    strides = (*q.stride()[:3], *_row_strides(k)[:3], *_row_strides(v)[:3], *bias_strides)
    grid = (triton.cdiv(run_length, config.block_m) * num_runs * num_heads * batch,)

    num_rows, num_keys = k.shape[:2]
    if config.use_tma:  # copied into the launch, so without scratch memory, and a captured graph keeps them
        block = [1, config.block_n, 1, head_dim]
        k, v = (TensorDescriptor(t, list(t.shape), list(t.stride()), block) for t in (k, v))

    _frame_attention_kernel[grid](
        out, q, k, v, bias, key_rows, *strides, num_rows, num_runs, run_length, num_keys, num_heads,
        scale * LOG2_E.value, D=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, USE_TMA=config.use_tma,
        IS_OVERLAPPED=config.is_overlapped, IS_INTERPRETED=triton.knobs.runtime.interpret,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def _row_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides, 0 along the first dimension if it has one row, which serves every window."""
    return tensor.stride() if tensor.shape[0] > 1 else (0, *tensor.stride()[1:])


def flops(B: int, N: int, M: int, H: int, D: int) -> int:
    """Operations of the two matrix products."""
    return 4 * B * N * M * H * D


def bytes_moved(B: int, N: int, M: int, H: int, D: int, element_size: int = 2) -> int:
    """q and the result once, k and v once for each window: what a cache that holds a head's keys leaves to memory."""
    return 2 * B * (N + M) * H * D * element_size
