"""frame_attention: softmax(scale·q kᵀ + bias) v per head, every query seeing every key, in one pass over the keys.

q [B,N,H,D], k, v [P,M,H,D] → [B,N,H,D], D 64 or 128; bias [P or 1,M], one number a key, −inf hides it. key_rows names
the row of k, v and bias for each window, or for each of its F runs of N/F queries; a program's queries lie in one run.
dtypes: bfloat16 or float16 in and out, products accumulated and softmax in float32 (float32 too when interpreted).

A program keeps BLOCK_M queries and walks over blocks of BLOCK_N keys with the running maximum m, sum l and result o:
    s = q kᵀ·scale + bias;  m' = max(m, max s);  p = exp(s − m');  l ← l·exp(m − m') + Σp;  o ← o·exp(m − m') + p v
in powers of two, log2(e) folded into scale. Long keys are bound by the 4·N·M·D operations a head, then by exp2; short
ones (text) by the 4 bytes a channel of q and the result. Source: FlashAttention-2 (arXiv 2307.08691).
"""

import contextvars
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_tma: bool = False
    """Load through tensor descriptors: pointers and strides must be multiples of 16 bytes, the GPU sm_90 or later."""
    is_warp_specialized: bool = False
    """Warps of their own for the loads: sm_90, with four warps, use_tma and no bias."""


# By target and head size; the first that takes the call's strides is the default. bench/aot.py compiles them all: none
# spills, as larger tiles or fewer warps do. sm_80 stands for every other NVIDIA GPU: its shared memory fits 99 KiB.
_SPECIALIZED = (Config(128, 128, 4, 2, True, True), Config(128, 64, 4, 3, True, True))
CONFIGS = {
    ("sm_80", 64): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(128, 32, 4, 3)),
    ("sm_80", 128): (Config(128, 32, 8, 3), Config(128, 64, 8, 1)),
    ("sm_90", 64): (Config(128, 128, 8, 2, True), *_SPECIALIZED, Config(128, 64, 8, 3)),
    ("sm_90", 128): (Config(128, 128, 8, 2, True), *_SPECIALIZED, Config(128, 64, 8, 3)),
    ("sm_100", 64): (Config(128, 128, 8, 3, True), Config(128, 64, 8, 3)),
    ("sm_100", 128): (Config(128, 128, 8, 2, True), Config(128, 64, 8, 2)),
    ("gfx942", 64): (Config(128, 64, 4, 2), Config(128, 32, 4, 2)),
    ("gfx942", 128): (Config(128, 64, 4, 2), Config(128, 32, 4, 2)),
}
SHORT_KEYS = 128


# fmt: off
@triton.jit
def _load_rows(
    source, start, stride, num_rows, ROWS: tl.constexpr, D: tl.constexpr, IS_TMA: tl.constexpr
):
    """Rows start … start + ROWS − 1 of a head, [ROWS,D]; zeros past num_rows."""
    if IS_TMA:
        b_rows = source.load([start, 0])
    else:
        o_n = tl.arange(0, ROWS)
        p_rows = source + tl.cast(start, tl.int64) * stride + (o_n[:, None] * stride + tl.arange(0, D)[None, :])
        b_rows = tl.load(p_rows, mask=start + o_n[:, None] < num_rows, other=0.0)
    return b_rows


@triton.jit
def _attend(
    b_out, b_sum, b_max, b_q, k, v, p_bias, start, stride_k, stride_v, stride_bias, num_keys, scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, IS_TMA: tl.constexpr, IS_TAIL: tl.constexpr,
):
    """The running result, sum and maximum after one more block of keys."""
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = _load_rows(k, start, stride_k, num_keys, BLOCK_N, D, IS_TMA)
    b_s = tl.dot(b_q, b_k.to(b_q.dtype).T)  # [BLOCK_M,BLOCK_N]
    if p_bias is not None:
        p_row = p_bias + tl.cast(start, tl.int64) * stride_bias
        b_bias = tl.load(p_row + tl.arange(0, BLOCK_N) * stride_bias, mask=o_n < num_keys, other=float("-inf"))
        b_s = b_s * scale + (b_bias.to(tl.float32) * LOG2_E)[None, :]
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_new = tl.where(b_new == float("-inf"), 0.0, b_new)  # every key so far is hidden: p = 0, not NaN
        b_p = tl.exp2(b_s - b_new[:, None])
    else:
        if IS_TAIL:
            b_s = tl.where(o_n[None, :] < num_keys, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_new[:, None])
    b_decay = tl.exp2(b_max - b_new)
    b_v = _load_rows(v, start, stride_v, num_keys, BLOCK_N, D, IS_TMA)
    b_out = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_out * b_decay[:, None])
    return b_out, b_sum * b_decay + tl.sum(b_p, 1), b_new


@triton.jit(do_not_specialize=["num_runs", "run_length", "num_keys", "num_heads"])
def _frame_attention_kernel(
    p_out, p_q, p_k, p_v, p_bias, p_key_rows,
    stride_q_b, stride_q_n, stride_q_h, stride_k_p, stride_k_m, stride_k_h, stride_v_p, stride_v_m, stride_v_h,
    stride_bias_p, stride_bias_m, num_runs, run_length, num_keys, num_heads, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_TMA: tl.constexpr, IS_WARP_SPECIALIZED: tl.constexpr, IS_INTERPRETED: tl.constexpr,
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

    i_first = i_run.to(tl.int64) * run_length
    q = p_q + i_window * stride_q_b + i_first * stride_q_n + i_head * stride_q_h
    k = p_k + i_row * stride_k_p + i_head * stride_k_h
    v = p_v + i_row * stride_v_p + i_head * stride_v_h
    if p_bias is not None:
        p_bias += i_row * stride_bias_p
    if IS_TMA:
        q = tl.make_tensor_descriptor(q, [run_length, D], [stride_q_n, 1], [BLOCK_M, D])
        k = tl.make_tensor_descriptor(k, [num_keys, D], [stride_k_m, 1], [BLOCK_N, D])
        v = tl.make_tensor_descriptor(v, [num_keys, D], [stride_v_m, 1], [BLOCK_N, D])
    DOT: tl.constexpr = tl.float32 if IS_INTERPRETED else p_q.dtype.element_ty  # interpreted bfloat16 dots are wrong
    b_q = _load_rows(q, i_tile * BLOCK_M, stride_q_n, run_length, BLOCK_M, D, IS_TMA).to(DOT)

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, D], tl.float32)
    # Masking every block costs a select per score. A tail of its own saves it where registers allow; a specialised loop
    # must stay alone, and a bias masks by itself.
    HAS_TAIL: tl.constexpr = IS_TMA and not IS_WARP_SPECIALIZED and p_bias is None
    end = num_keys // BLOCK_N * BLOCK_N if HAS_TAIL else num_keys
    for start in tl.range(0, end, BLOCK_N, warp_specialize=IS_WARP_SPECIALIZED):
        b_out, b_sum, b_max = _attend(
            b_out, b_sum, b_max, b_q, k, v, p_bias, start, stride_k_m, stride_v_m, stride_bias_m, num_keys, scale,
            BLOCK_N, D, IS_TMA, IS_TAIL=not HAS_TAIL,
        )
    if HAS_TAIL:  # noqa: SIM102
        if end < num_keys:  # only known at run time
            b_out, b_sum, b_max = _attend(
                b_out, b_sum, b_max, b_q, k, v, p_bias, end, stride_k_m, stride_v_m, stride_bias_m, num_keys, scale,
                BLOCK_N, D, IS_TMA, IS_TAIL=True,
            )
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_out = ((i_window * num_runs * run_length + i_first + o_m) * num_heads + i_head) * D
    b_out = b_out / b_sum[:, None]
    p_result = p_out + o_out[:, None] + tl.arange(0, D)[None, :]
    tl.store(p_result, b_out.to(p_out.dtype.element_ty), mask=(o_m < run_length)[:, None])
# fmt: on


def default_config(q: Tensor, k: Tensor, v: Tensor, run_length: int) -> Config:
    """The first of CONFIGS that takes these strides; short keys need no pipeline."""
    if k.shape[1] <= SHORT_KEYS:
        block_n = min(max(16, triton.next_power_of_2(k.shape[1])), 64)
        return Config(128, block_n, 8, 1) if run_length > 64 else Config(64, block_n, 4, 1)
    configs = CONFIGS[_arch(), q.shape[3]]
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
    size = tensors[0].element_size()
    return all(t.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in t.stride()[:3]) for t in tensors)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors a launch makes, from PyTorch's pool: under graph capture it belongs to the graph."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


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
    config = default_config(q, k, v, run_length) if config is None else config
    if config.use_tma and not _takes_tma(q, k, v):
        raise ValueError(f"q, k or v has strides {q.stride()}, {k.stride()} or {v.stride()}, expected 16 bytes for TMA")
    bias = None if bias is None else bias.expand(-1, k.shape[1])
    key_rows = None if key_rows is None else key_rows.contiguous()
    bias_strides = (0, 0) if bias is None else _row_strides(bias)
    strides = (*q.stride()[:3], *_row_strides(k)[:3], *_row_strides(v)[:3], *bias_strides)
    grid = (triton.cdiv(run_length, config.block_m) * num_runs * num_heads * batch,)

    def run() -> None:
        if config.use_tma:
            triton.set_allocator(_scratch)
        _frame_attention_kernel[grid](
            out, q, k, v, bias, key_rows, *strides, num_runs, run_length, k.shape[1], num_heads, scale * LOG2_E.value,
            D=head_dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, IS_TMA=config.use_tma,
            IS_WARP_SPECIALIZED=config.is_warp_specialized, IS_INTERPRETED=triton.knobs.runtime.interpret,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    contextvars.copy_context().run(run)  # the allocator is set for this launch only, whatever the program has set
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
