"""A case for each op: its arguments at the shapes of Wan2.1 at 480×832, its rivals, and the float64 result.

A whole forward of the 1.3B network (two branches of 21 latent frames) on a GPU, a window of 3 frames on one thread of a
CPU. `block_case.py` has the case of a whole block, bench_kernels.py runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import result_files
import torch
import torch.nn.functional as F
from torch import Tensor

from miga_engine import ops
from miga_engine.models.wan.dit import WAN_T2V_CONFIGS
from miga_engine.schedule import make_schedule

DEVICE = result_files.DEVICE
if DEVICE == "cpu":
    torch.set_num_threads(1)
HALF = torch.bfloat16
EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Of the cases; heads have 128 channels, whose rotation is shared out as Wan2.1 does."""

    batch: int
    frames: int
    tokens: int  # of a latent frame
    latent: tuple[int, int, int]
    queue: int
    heads: int
    ffn_dim: int
    num_text: int
    text_len: int
    block_tokens: int  # of a latent frame in whole blocks and the feed-forward, which take long
    attention_tokens: int  # of a window in self-attention alone

    @property
    def width(self) -> int:
        return 128 * self.heads


_WAN = {"tokens": 1560, "latent": (16, 60, 104), "heads": 12, "num_text": 64}  # 30 × 52 tokens a frame
_WAN |= {"ffn_dim": WAN_T2V_CONFIGS["1.3B"].ffn_dim, "text_len": WAN_T2V_CONFIGS["1.3B"].text_len}
ON_GPU = Sizes(**_WAN, batch=2, frames=21, queue=308, block_tokens=1560, attention_tokens=21 * 1560)
ON_CPU = Sizes(**_WAN, batch=1, frames=3, queue=28, block_tokens=390, attention_tokens=1560)
SMALL = Sizes(
    batch=2, frames=3, tokens=6, latent=(4, 4, 6), queue=12, heads=2, ffn_dim=64, num_text=5, text_len=16,
    block_tokens=6, attention_tokens=72,
)  # fmt: skip
SIZES = SMALL if result_files.IS_SMALL else ON_GPU if DEVICE == "cuda" else ON_CPU


@dataclass
class Case:
    """One op at one shape. `run` is the op, `exact` the float64 result of the same arguments, `eager` the budget's."""

    op: str
    shape: str
    dtype: torch.dtype
    run: Callable[[], object]
    rivals: dict[str, Callable[[], object]]
    results: Callable[[], tuple[Tensor, Tensor, Tensor]]
    """(ours, eager, float64) of fresh arguments, for the correctness gate."""
    num_bytes: int = 0
    num_flops: int = 0
    contenders: dict[str, Callable[[], object]] = field(init=False)

    def __post_init__(self) -> None:
        self.contenders = {"op": self.run, **self.rivals}

    def check(self) -> None:
        """The rule of the tests: an error of at most twice eager's and the dtype's rounding."""
        ours, eager, exact = (tensor.double() for tensor in self.results())
        budget = 2 * ((eager - exact).abs().max() + torch.finfo(self.dtype).eps * exact.abs().max())
        assert (ours - exact).abs().max() <= budget, f"{self.op} leaves its error budget: nothing is measured"


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def compile_whole(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def shape_text(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def _modulation_arguments(dtype: torch.dtype, sizes: Sizes) -> tuple[Tensor, ...]:
    shape = (sizes.batch, sizes.frames, sizes.tokens, sizes.width)
    x, y = randn(*shape), randn(*shape, dtype=dtype)
    table = randn(sizes.batch * sizes.frames, 6, sizes.width)
    rows = torch.arange(sizes.batch * sizes.frames, device=DEVICE).view(sizes.batch, sizes.frames)
    return x, y, table[:, 2], table[:, 1], table[:, 0], rows


def norm_modulate(dtype: torch.dtype, sizes: Sizes) -> Case:
    x, _, _, weight, bias, rows = _modulation_arguments(dtype, sizes)
    arguments = (x, weight, bias, rows)
    compiled = compile_whole(lambda: ops.norm_modulate_reference(*arguments, EPS, dtype))

    def results() -> tuple[Tensor, Tensor, Tensor]:
        ours = ops.norm_modulate(*arguments, eps=EPS, dtype=dtype)
        exact = ops.norm_modulate_reference(x.double(), weight.double(), bias.double(), rows, EPS, torch.float64)
        return ours, ops.norm_modulate_reference(*arguments, EPS, dtype), exact

    return Case(
        "norm_modulate",
        shape_text(x),
        dtype,
        lambda: ops.norm_modulate(*arguments, eps=EPS, dtype=dtype),
        {"eager": lambda: ops.norm_modulate_reference(*arguments, EPS, dtype), "compiled": compiled},
        results,
        num_bytes=x.numel() * (4 + dtype.itemsize),
    )


def residual_norm_modulate(dtype: torch.dtype, sizes: Sizes) -> Case:
    x, y, gate, weight, bias, rows = _modulation_arguments(dtype, sizes)
    y *= 1e-3  # repeated updates of x stay small
    rest = (gate, weight, bias, rows)
    compiled = compile_whole(lambda x: ops.residual_norm_modulate_reference(x, y, *rest, EPS, dtype))

    def results() -> tuple[Tensor, Tensor, Tensor]:
        doubles = [t.double() for t in (x, y, gate, weight, bias)]
        exact = ops.residual_norm_modulate_reference(*doubles, rows, EPS, torch.float64)
        eager = ops.residual_norm_modulate_reference(x.clone(), y, *rest, EPS, dtype)
        return ops.residual_norm_modulate(x.clone(), y, *rest, eps=EPS, dtype=dtype), eager, exact

    return Case(
        "residual_norm_modulate",
        shape_text(x),
        dtype,
        lambda: ops.residual_norm_modulate(x, y, *rest, eps=EPS, dtype=dtype),
        {
            "eager": lambda: ops.residual_norm_modulate_reference(x, y, *rest, EPS, dtype),
            "compiled": lambda: compiled(x),
        },
        results,
        num_bytes=x.numel() * (8 + 2 * dtype.itemsize),
    )


def rotation(frames: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random angles: cosines and sines in time [F,2,22] and of a frame's tokens [S,2,42], and complex128 [F·S,1,64]."""
    angles = 7 * randn(frames, 22), 7 * randn(tokens, 42)
    temporal, spatial = (torch.stack([a.cos(), a.sin()], dim=1) for a in angles)
    grid = (frames, tokens, -1)
    every = torch.cat([angles[0][:, None].expand(*grid), angles[1].expand(*grid)], dim=-1).flatten(0, 1).double()
    return temporal, spatial, torch.polar(torch.ones_like(every), every)[:, None]


def complex_rope(q: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """RMSNorm, then rotation as multiplication by complex numbers in float64: the published form."""
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(q.dtype) * weight
    pairs = torch.view_as_complex(normed.to(torch.float64).unflatten(2, (q.shape[2] // 128, -1, 2)))
    return torch.view_as_real(pairs * table).flatten(2).to(q.dtype)


def qk_norm_rope(dtype: torch.dtype, sizes: Sizes) -> Case:
    shape = (sizes.batch, sizes.frames * sizes.tokens, sizes.width)
    q, k = (randn(*shape, dtype=dtype) for _ in range(2))
    weight = 1 + 0.1 * randn(sizes.width)
    temporal, spatial, table = rotation(sizes.frames, sizes.tokens)
    positions = torch.arange(sizes.frames, device=DEVICE).expand(sizes.batch, sizes.frames).contiguous()
    rest = (weight, weight, temporal, spatial, positions, sizes.heads, EPS)
    compiled = compile_whole(lambda q, k: ops.qk_norm_rope_reference(q, k, *rest))

    def run() -> None:
        named = {"temporal": temporal, "spatial": spatial, "positions": positions}
        ops.qk_norm_rope(q, k, weight, weight, **named, num_heads=sizes.heads, eps=EPS)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        start = randn(*shape, dtype=dtype)
        ours, theirs, exact = start.clone(), start.clone(), start.double()
        torch.ops.miga.qk_norm_rope(ours, None, *rest)
        ops.qk_norm_rope_reference(theirs, None, *rest)
        ops.qk_norm_rope_reference(exact, None, *rest)
        return ours, theirs, exact

    return Case(
        "qk_norm_rope",
        shape_text(q),
        dtype,
        run,
        {
            "eager": lambda: (complex_rope(q, weight, table), complex_rope(k, weight, table)),
            "eager float32": lambda: ops.qk_norm_rope_reference(q, k, *rest),
            "compiled": lambda: compiled(q, k),
        },
        results,
        num_bytes=4 * q.numel() * dtype.itemsize,
    )


def sampler_update(dtype: torch.dtype, sizes: Sizes) -> Case:
    schedule = make_schedule("unipc", 50, 8.0)
    queue, latent = sizes.queue, sizes.latent
    velocities = [randn(queue, *latent, dtype=dtype) for _ in range(2)]
    start = [randn(queue, *latent) for _ in range(4)]
    steps = torch.arange(queue, device=DEVICE).flip(0) * 49 // queue
    indices = {"slots": torch.arange(queue, device=DEVICE), "step_index": steps, "history_length": steps.clamp(max=2)}
    rows = schedule.coefficients.rows.to(DEVICE)

    def call(function: Callable[..., None], state: list[Tensor], frames: slice = slice(None)) -> None:
        named = {name: index[frames] for name, index in indices.items()}
        named |= {"coefficients": rows, "guidance_scale": 5.0}
        function(*state, *(v[frames] for v in velocities), **named)

    def loop() -> None:
        for i in range(queue):
            call(ops.sampler_update_reference, start, slice(i, i + 1))

    def results() -> tuple[Tensor, Tensor, Tensor]:
        outcomes = []
        for function, kind in (
            (ops.sampler_update, torch.float32),
            (ops.sampler_update_reference, torch.float32),
            (ops.sampler_update_reference, torch.float64),
        ):
            state = [s.to(kind, copy=True) for s in start]
            call(function, state)
            outcomes.append(torch.stack(state[:3]))
        return outcomes[0], outcomes[1], outcomes[2]

    return Case(
        "sampler_update",
        f"{queue}×{'×'.join(map(str, latent))}",
        dtype,
        lambda: call(ops.sampler_update, start),
        {"eager": lambda: call(ops.sampler_update_reference, start), "loop": loop},
        results,
        num_bytes=start[0].numel() * (4 * 7 + 2 * dtype.itemsize),  # reads x, y, m1 and both velocities, writes four
    )


def guidance_dots(dtype: torch.dtype, sizes: Sizes) -> Case:
    queue, latent = sizes.queue, sizes.latent
    arguments = [randn(queue, *latent, dtype=kind) for kind in (torch.float32, dtype, dtype)]
    named = {"slots": torch.arange(queue, device=DEVICE), "direction": randn(queue, 3)}
    compiled = compile_whole(ops.guidance_dots_reference)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        exact = ops.guidance_dots_reference(arguments[0].double(), *arguments[1:], **named)
        return ops.guidance_dots(*arguments, **named), ops.guidance_dots_reference(*arguments, **named), exact

    return Case(
        "guidance_dots",
        f"{queue}×{'×'.join(map(str, latent))}",
        dtype,
        lambda: ops.guidance_dots(*arguments, **named),
        {
            "eager": lambda: ops.guidance_dots_reference(*arguments, **named),
            "compiled": lambda: compiled(*arguments, **named),
        },
        results,
        num_bytes=arguments[0].numel() * (4 + 2 * dtype.itemsize),
    )


def consistency_score(dtype: torch.dtype, sizes: Sizes) -> Case:
    frames, candidates = randn(14, *sizes.latent, dtype=dtype), randn(3, 7, *sizes.latent, dtype=dtype)
    compiled = compile_whole(ops.consistency_score_reference)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        exact = ops.consistency_score_reference(frames.double(), candidates.double())
        return ops.consistency_score(frames, candidates), ops.consistency_score_reference(frames, candidates), exact

    return Case(
        "consistency_score",
        "14 and 3×7 frames",
        dtype,
        lambda: ops.consistency_score(frames, candidates),
        {
            "eager": lambda: ops.consistency_score_reference(frames, candidates),
            "compiled": lambda: compiled(frames, candidates, "mean"),
        },
        results,
        num_bytes=(frames.numel() + candidates.numel()) * dtype.itemsize,
    )


def linear_gelu(dtype: torch.dtype, sizes: Sizes) -> Case:
    width, ffn_dim = sizes.width, sizes.ffn_dim
    x = randn(sizes.batch, sizes.frames * sizes.block_tokens, width, dtype=dtype)
    weight, bias = randn(ffn_dim, width, dtype=dtype) / width**0.5, randn(ffn_dim, dtype=dtype)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def results() -> tuple[Tensor, Tensor, Tensor]:
        part = x[:, :64]
        exact = eager(part.double(), weight.double(), bias.double())
        return ops.linear(part, weight, bias, gelu=True), eager(part, weight, bias), exact

    compiled = compile_whole(eager)
    return Case(
        "linear_gelu",
        f"{shape_text(x)} to {ffn_dim}",
        dtype,
        lambda: ops.linear(x, weight, bias, gelu=True),
        {"eager": lambda: eager(x, weight, bias), "compiled": lambda: compiled(x, weight, bias)},
        results,
        num_flops=2 * x.numel() * ffn_dim,
    )


def frame_attention(dtype: torch.dtype, sizes: Sizes) -> Case:
    q, k, v = self_attention(dtype, sizes)
    return _attention_case("frame_attention", q, k, v, None)


def cross_attention(dtype: torch.dtype, sizes: Sizes) -> Case:
    shape, num_keys = (sizes.batch, sizes.frames * sizes.tokens, sizes.heads, 128), sizes.num_text + 1
    q = randn(*shape, dtype=dtype)
    k, v = (randn(sizes.batch, num_keys, *shape[2:], dtype=dtype) for _ in range(2))
    return _attention_case("cross_attention", q, k, v, randn(sizes.batch, 1, 1, num_keys))


def self_attention(dtype: torch.dtype, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (randn(sizes.batch, sizes.attention_tokens, sizes.heads, 128, dtype=dtype) for _ in range(3))
    return q, k, v


def _attention_case(name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Case:
    is_cross = bias is not None
    refusals = ops.attention_backends(DEVICE, q.dtype, q.shape[3])
    usable = [b for b, reason in refusals.items() if reason is None and b != "reference"]
    if is_cross:
        usable = [b for b in usable if b not in ops.SELF_ATTENTION_ONLY]

    def run(backend: str) -> Tensor:
        return ops.frame_attention(q, k, v, bias, backend=backend)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        part = slice(0, 256)
        exact = ops.frame_attention_reference(q[:, part].double(), k, v, bias, None, None)
        eager = ops.frame_attention_reference(q[:, part], k, v, bias, None, None)
        return run("auto")[:, part], eager, exact

    # A few keys are read once: then q and the result bound it.
    num_bytes = 2 * (q.numel() + k.numel()) * q.element_size() if is_cross else 0
    return Case(
        name,
        f"{shape_text(q)}, {k.shape[1]} keys",
        q.dtype,
        lambda: run("auto"),
        {"eager" if backend == "sdpa" else backend: (lambda backend=backend: run(backend)) for backend in usable},
        results,
        num_bytes=num_bytes,
        num_flops=0 if is_cross else 4 * q.numel() * k.shape[1],
    )
