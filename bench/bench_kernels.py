"""Every op against eager PyTorch, torch.compile and the machine's ceilings: `python bench/bench_kernels.py [OP ...]`.

Each case first holds its op against the float64 oracle, then takes turns with its rivals (timing.py) and appends rows
to bench/results/kernels_<device>.csv. The shapes are those of Wan2.1 at 480×832: a whole forward of the 1.3B network
(two branches of 21 latent frames) on a GPU, a window of 3 frames on one thread of a CPU. A case that fails is reported
and the next one goes on, if need be in a fresh process.

On a GPU `frame_attention` also gets a row for every tuned configuration of its kernel that is not warp-specialised, and
one more for the best. `specialized` is those that are, on their own, since a fault in one of them may hang the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import result_files
import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine import ops
from miga_engine.models.wan.dit import WAN_T2V_CONFIGS
from miga_engine.models.wan.dit_layers import Block, Frames, Modulation, RotaryTable, TextKeys
from miga_engine.ops import reference
from miga_engine.schedule import make_schedule

with contextlib.suppress(ImportError):  # of tests/, which gpu.sh has on the path
    import interpreter

    interpreter.mend()

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


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def _modulation_arguments(dtype: torch.dtype, sizes: Sizes) -> tuple[Tensor, ...]:
    shape = (sizes.batch, sizes.frames, sizes.tokens, sizes.width)
    x, y = _randn(*shape), _randn(*shape, dtype=dtype)
    table = _randn(sizes.batch * sizes.frames, 6, sizes.width)
    rows = torch.arange(sizes.batch * sizes.frames, device=DEVICE).view(sizes.batch, sizes.frames)
    return x, y, table[:, 2], table[:, 1], table[:, 0], rows


def norm_modulate(dtype: torch.dtype, sizes: Sizes) -> Case:
    x, _, _, weight, bias, rows = _modulation_arguments(dtype, sizes)
    arguments = (x, weight, bias, rows)
    compiled = _compiled(lambda: reference.norm_modulate(*arguments, EPS, dtype))

    def results() -> tuple[Tensor, Tensor, Tensor]:
        ours = ops.norm_modulate(*arguments, eps=EPS, dtype=dtype)
        exact = reference.norm_modulate(x.double(), weight.double(), bias.double(), rows, EPS, torch.float64)
        return ours, reference.norm_modulate(*arguments, EPS, dtype), exact

    return Case(
        "norm_modulate",
        _shape(x),
        dtype,
        lambda: ops.norm_modulate(*arguments, eps=EPS, dtype=dtype),
        {"eager": lambda: reference.norm_modulate(*arguments, EPS, dtype), "compiled": compiled},
        results,
        num_bytes=x.numel() * (4 + dtype.itemsize),
    )


def residual_norm_modulate(dtype: torch.dtype, sizes: Sizes) -> Case:
    x, y, gate, weight, bias, rows = _modulation_arguments(dtype, sizes)
    y *= 1e-3  # repeated updates of x stay small
    rest = (gate, weight, bias, rows)
    compiled = _compiled(lambda x: reference.residual_norm_modulate(x, y, *rest, EPS, dtype))

    def results() -> tuple[Tensor, Tensor, Tensor]:
        doubles = [t.double() for t in (x, y, gate, weight, bias)]
        exact = reference.residual_norm_modulate(*doubles, rows, EPS, torch.float64)
        eager = reference.residual_norm_modulate(x.clone(), y, *rest, EPS, dtype)
        return ops.residual_norm_modulate(x.clone(), y, *rest, eps=EPS, dtype=dtype), eager, exact

    return Case(
        "residual_norm_modulate",
        _shape(x),
        dtype,
        lambda: ops.residual_norm_modulate(x, y, *rest, eps=EPS, dtype=dtype),
        {
            "eager": lambda: reference.residual_norm_modulate(x, y, *rest, EPS, dtype),
            "compiled": lambda: compiled(x),
        },
        results,
        num_bytes=x.numel() * (8 + 2 * dtype.itemsize),
    )


def _rotation(frames: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random angles: cosines and sines in time [F,2,22] and of a frame's tokens [S,2,42], and complex128 [F·S,1,64]."""
    angles = 7 * _randn(frames, 22), 7 * _randn(tokens, 42)
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
    q, k = (_randn(*shape, dtype=dtype) for _ in range(2))
    weight = 1 + 0.1 * _randn(sizes.width)
    temporal, spatial, table = _rotation(sizes.frames, sizes.tokens)
    positions = torch.arange(sizes.frames, device=DEVICE).expand(sizes.batch, sizes.frames).contiguous()
    rest = (weight, weight, temporal, spatial, positions, sizes.heads, EPS)
    compiled = _compiled(lambda q, k: reference.qk_norm_rope(q, k, *rest))

    def run() -> None:
        named = {"temporal": temporal, "spatial": spatial, "positions": positions}
        ops.qk_norm_rope(q, k, weight, weight, **named, num_heads=sizes.heads, eps=EPS)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        start = _randn(*shape, dtype=dtype)
        ours, theirs, exact = start.clone(), start.clone(), start.double()
        torch.ops.miga.qk_norm_rope(ours, None, *rest)
        reference.qk_norm_rope(theirs, None, *rest)
        reference.qk_norm_rope(exact, None, *rest)
        return ours, theirs, exact

    return Case(
        "qk_norm_rope",
        _shape(q),
        dtype,
        run,
        {
            "eager": lambda: (complex_rope(q, weight, table), complex_rope(k, weight, table)),
            "eager float32": lambda: reference.qk_norm_rope(q, k, *rest),
            "compiled": lambda: compiled(q, k),
        },
        results,
        num_bytes=4 * q.numel() * dtype.itemsize,
    )


def sampler_update(dtype: torch.dtype, sizes: Sizes) -> Case:
    schedule = make_schedule("unipc", 50, 8.0)
    queue, latent = sizes.queue, sizes.latent
    velocities = [_randn(queue, *latent, dtype=dtype) for _ in range(2)]
    start = [_randn(queue, *latent) for _ in range(4)]
    steps = torch.arange(queue, device=DEVICE).flip(0) * 49 // queue
    indices = {"slots": torch.arange(queue, device=DEVICE), "step_index": steps, "history_length": steps.clamp(max=2)}
    rows = schedule.coefficients.rows.to(DEVICE)

    def call(function: Callable[..., None], state: list[Tensor], frames: slice = slice(None)) -> None:
        named = {name: index[frames] for name, index in indices.items()}
        named |= {"coefficients": rows, "guidance_scale": 5.0}
        function(*state, *(v[frames] for v in velocities), **named)

    def loop() -> None:
        for i in range(queue):
            call(reference.sampler_update, start, slice(i, i + 1))

    def results() -> tuple[Tensor, Tensor, Tensor]:
        outcomes = []
        for function, kind in (
            (ops.sampler_update, torch.float32),
            (reference.sampler_update, torch.float32),
            (reference.sampler_update, torch.float64),
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
        {"eager": lambda: call(reference.sampler_update, start), "loop": loop},
        results,
        num_bytes=start[0].numel() * (4 * 7 + 2 * dtype.itemsize),  # reads x, y, m1 and both velocities, writes four
    )


def consistency_score(dtype: torch.dtype, sizes: Sizes) -> Case:
    frames, candidates = _randn(14, *sizes.latent, dtype=dtype), _randn(3, 7, *sizes.latent, dtype=dtype)
    compiled = _compiled(reference.consistency_score)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        exact = reference.consistency_score(frames.double(), candidates.double())
        return ops.consistency_score(frames, candidates), reference.consistency_score(frames, candidates), exact

    return Case(
        "consistency_score",
        "14 and 3×7 frames",
        dtype,
        lambda: ops.consistency_score(frames, candidates),
        {
            "eager": lambda: reference.consistency_score(frames, candidates),
            "compiled": lambda: compiled(frames, candidates, "mean"),
        },
        results,
        num_bytes=(frames.numel() + candidates.numel()) * dtype.itemsize,
    )


def linear_gelu(dtype: torch.dtype, sizes: Sizes) -> Case:
    width, ffn_dim = sizes.width, sizes.ffn_dim
    x = _randn(sizes.batch, sizes.frames * sizes.block_tokens, width, dtype=dtype)
    weight, bias = _randn(ffn_dim, width, dtype=dtype) / width**0.5, _randn(ffn_dim, dtype=dtype)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def results() -> tuple[Tensor, Tensor, Tensor]:
        part = x[:, :64]
        exact = eager(part.double(), weight.double(), bias.double())
        return ops.linear(part, weight, bias, gelu=True), eager(part, weight, bias), exact

    compiled = _compiled(eager)
    return Case(
        "linear_gelu",
        f"{_shape(x)} to {ffn_dim}",
        dtype,
        lambda: ops.linear(x, weight, bias, gelu=True),
        {"eager": lambda: eager(x, weight, bias), "compiled": lambda: compiled(x, weight, bias)},
        results,
        num_flops=2 * x.numel() * ffn_dim,
    )


def frame_attention(dtype: torch.dtype, sizes: Sizes) -> Case:
    q, k, v = _self_attention(dtype, sizes)
    return _attention_case("frame_attention", q, k, v, None)


def cross_attention(dtype: torch.dtype, sizes: Sizes) -> Case:
    shape, num_keys = (sizes.batch, sizes.frames * sizes.tokens, sizes.heads, 128), sizes.num_text + 1
    q = _randn(*shape, dtype=dtype)
    k, v = (_randn(sizes.batch, num_keys, *shape[2:], dtype=dtype) for _ in range(2))
    return _attention_case("cross_attention", q, k, v, _randn(sizes.batch, 1, 1, num_keys))


def _self_attention(dtype: torch.dtype, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_randn(sizes.batch, sizes.attention_tokens, sizes.heads, 128, dtype=dtype) for _ in range(3))
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
        exact = reference.frame_attention(q[:, part].double(), k, v, bias, None, None)
        eager = reference.frame_attention(q[:, part], k, v, bias, None, None)
        return run("auto")[:, part], eager, exact

    # A few keys are read once: then q and the result bound it.
    num_bytes = 2 * (q.numel() + k.numel()) * q.element_size() if is_cross else 0
    return Case(
        name,
        f"{_shape(q)}, {k.shape[1]} keys",
        q.dtype,
        lambda: run("auto"),
        {"eager" if backend == "sdpa" else backend: (lambda backend=backend: run(backend)) for backend in usable},
        results,
        num_bytes=num_bytes,
        num_flops=0 if is_cross else 4 * q.numel() * k.shape[1],
    )


class PublishedBlock:
    """A block of the 1.3B network with a prompt of 64 tokens: ours, and the published form in plain PyTorch."""

    def __init__(self, dtype: torch.dtype, sizes: Sizes, tokens: int) -> None:
        batch, frames, width, heads = sizes.batch, sizes.frames, sizes.width, sizes.heads
        self.dtype, self.sizes, self.tokens = dtype, sizes, tokens
        with torch.device(DEVICE):
            self.block = Block(width, sizes.ffn_dim, heads, EPS, qk_norm=True, cross_attn_norm=True)
        self.block.requires_grad_(False)
        for name, parameter in self.block.named_parameters():
            if "norm" not in name and name != "modulation":
                parameter.data = parameter.data.to(dtype)
        self.x = _randn(batch, frames, tokens, width)
        self.time = 0.1 * _randn(batch * frames, 6, width)
        # The other rows of the text are padding, all of one key and one value.
        keys, values = (_randn(batch, sizes.num_text + 1, heads, 128, dtype=dtype) for _ in range(2))
        padding = sizes.text_len - sizes.num_text
        self.padded = [torch.cat([t[:, :-1], t[:, -1:].expand(-1, padding, -1, -1)], dim=1) for t in (keys, values)]
        bias = torch.zeros(batch, 1, 1, sizes.num_text + 1, device=DEVICE)
        bias[..., -1] = math.log(padding)
        self.text = TextKeys(keys, values, bias)
        temporal, spatial, self.table = _rotation(frames, tokens)
        self.rotary = RotaryTable(temporal, spatial)
        rows = torch.arange(batch * frames, device=DEVICE).view(batch, frames)
        self.frames = Frames(rows, torch.arange(frames, device=DEVICE).expand(batch, frames).contiguous())
        self.with_one = self.time + torch.tensor([0.0, 1, 0, 0, 1, 0], device=DEVICE)[:, None]
        matmuls = 2 * 6 * width**2 + 4 * width * sizes.ffn_dim
        num_tokens = frames * tokens
        self.num_flops = batch * num_tokens * (matmuls + 4 * width * (num_tokens + sizes.text_len))

    def ours(self) -> Tensor:
        """As `WanDiT.forward` runs a block, whose successor has the same modulation."""
        block, frames = self.block, self.frames
        x, table = self.x.clone(), block.table(self.with_one)
        norm = Modulation(table[:, 1], table[:, 0])
        h = ops.norm_modulate(x, *norm, frames.rows, eps=EPS, dtype=self.dtype)
        y = block.self_attn(h, frames, self.rotary, "auto")
        h = block.after_self_attention(x, y, table, frames)
        block.finish(x, h, table, norm, frames, self.text, None, "auto", self.dtype)
        return x

    def published(self, wide: torch.dtype = torch.float32) -> Tensor:
        """Modulation written out by token, complex rotation in float64, all 512 rows of text; `wide` for residuals."""
        block, dtype = self.block, torch.float64 if wide == torch.float64 else self.dtype
        sizes, width = self.sizes, self.sizes.width

        def linear(layer: nn.Linear, x: Tensor) -> Tensor:
            return F.linear(x, layer.weight.to(dtype), layer.bias.to(dtype))

        def attend(layer: nn.Linear, *tensors: Tensor) -> Tensor:
            heads = [
                (t.unflatten(2, (sizes.heads, -1)) if t.ndim == 3 else t).transpose(1, 2).to(dtype) for t in tensors
            ]
            return linear(layer, F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

        def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            return F.layer_norm(x, (width,), *(t if t is None else t.to(wide) for t in (weight, bias)), eps=EPS)

        x = self.x.to(wide).flatten(1, 2)
        by_frame = self.time.to(wide).view(sizes.batch, sizes.frames, 6, width)
        by_token = by_frame.repeat_interleave(self.tokens, dim=1)  # [B,N,6,D]
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation.to(wide)[:, None] + by_token).unbind(2)
        own, cross = block.self_attn, block.cross_attn
        h = (norm(x) * (1 + scale1) + shift1).to(dtype)
        q = complex_rope(linear(own.q, h), own.norm_q.weight, self.table)
        k = complex_rope(linear(own.k, h), own.norm_k.weight, self.table)
        x = x + attend(own.o, q, k, linear(own.v, h)).to(wide) * gate1
        h = norm(x, block.norm3.weight, block.norm3.bias).to(dtype)
        q = F.rms_norm(linear(cross.q, h).to(wide), (width,), cross.norm_q.weight.to(wide), EPS)
        x = x + attend(cross.o, q, *self.padded)
        h = (norm(x) * (1 + scale2) + shift2).to(dtype)
        h = F.gelu(linear(block.ffn[0], h), approximate="tanh")
        return (x + linear(block.ffn[2], h).to(wide) * gate2).view_as(self.x)


def block(dtype: torch.dtype, sizes: Sizes) -> Case:
    """The whole block; its rival does the same work on the same text."""
    case = PublishedBlock(dtype, sizes, sizes.block_tokens)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        small = PublishedBlock(dtype, sizes, min(40, sizes.block_tokens))
        return small.ours(), small.published(), small.published(torch.float64)

    return Case(
        "block",
        _shape(case.x),
        dtype,
        case.ours,
        {"eager": case.published, "compiled": _compiled(case.published)},
        results,
        num_flops=case.num_flops,
    )


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))


# What is least known first: rows are saved one by one, and time may run out.
CASES = [block, frame_attention, norm_modulate, residual_norm_modulate, qk_norm_rope, cross_attention, sampler_update]
CASES += [linear_gelu, consistency_score]
DTYPES = [HALF, torch.float32]


def measure_case(make: Callable[[torch.dtype, Sizes], Case], dtype: torch.dtype) -> Case:
    """The case, held against the oracle and timed; AssertionError where it leaves its error budget."""
    torch.manual_seed(0)
    with torch.inference_mode():
        case = make(dtype, SIZES)
        case.check()
        work = {"num_bytes": case.num_bytes, "num_flops": case.num_flops}
        timing.compare(f"kernels_{DEVICE}", case.op, case.shape, dtype, case.contenders, DEVICE, **work)
    return case


def sweep_configurations(*, specialized: bool) -> None:
    """A row for each tuned configuration of frame_attention on this GPU, and one more for the best."""
    from miga_engine.kernels import frame_attention as kernel

    if DEVICE != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        result_files.fault(
            RuntimeError("the kernel needs a GPU"), DEVICE, op="frame_attention", implementation="triton"
        )
        return
    torch.manual_seed(0)
    q, k, v = _self_attention(HALF, SIZES)
    part = slice(0, 64)
    exact = reference.frame_attention(q[:, part].double(), k, v, None, None, None)
    eager = reference.frame_attention(q[:, part], k, v, None, None, None)
    budget = 2 * ((eager - exact).abs().max() + torch.finfo(HALF).eps * exact.abs().max())
    contenders: dict[str, Callable[[], object]] = {}
    for config in kernel.CONFIGS[kernel._arch(), 128]:
        if config.is_warp_specialized != specialized:
            continue

        def run(config=config) -> Tensor:
            return kernel.launch(q, k, v, None, None, None, config=config)

        name = configuration_name(config)
        try:
            error = (run()[:, part] - exact).abs().max()
            assert error <= budget, f"its error is {error:.2g}, the budget {budget:.2g}: not measured"
            contenders[name] = run
        except Exception as error:
            result_files.fault(error, DEVICE, op="frame_attention", implementation=name)
    shape, flops = f"{_shape(q)}, {k.shape[1]} keys", 4 * q.numel() * k.shape[1]
    samples = timing.compare(f"kernels_{DEVICE}", "frame_attention", shape, HALF, contenders, DEVICE, num_flops=flops)
    if samples:
        best = min(samples, key=lambda name: timing.best(samples[name], DEVICE))
        notes = {best: f"best of {len(samples)} configurations"}
        chosen = {best: samples[best]}
        for row in timing.append(
            f"kernels_{DEVICE}", "frame_attention", shape, HALF, chosen, DEVICE, num_flops=flops, notes=notes
        ):
            print(timing.line(row), flush=True)


def configuration_name(config: NamedTuple) -> str:
    """Of a `kernels.frame_attention.Config`: the tile, every other number by its name, then what is switched on."""
    fields = config._asdict()
    tile = f"{fields.pop('block_m')}×{fields.pop('block_n')}"
    numbers = [f"{name} {value}" for name, value in fields.items() if not isinstance(value, bool)]
    return ", ".join([f"triton {tile}", *numbers, *(name for name, value in fields.items() if value is True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def bench_op(benchmark, make: Callable[[torch.dtype, Sizes], Case], dtype: torch.dtype) -> None:
    if DEVICE == "cuda" and dtype == torch.float32 and "attention" in make.__name__:
        pytest.skip("attention on GPUs is for half precision")
    case = measure_case(make, dtype)
    benchmark.group = f"{case.op}, {case.shape}, {dtype}"
    with torch.inference_mode():
        benchmark.pedantic(case.run, rounds=3)


def main() -> None:
    names = {make.__name__: make for make in CASES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join(names)} (default: all), or specialized")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), help="default: bfloat16, on a CPU both")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave the first N cases out")
    options = parser.parse_args()
    chosen = options.ops or list(names)
    if unknown := set(chosen) - {*names, "specialized"}:
        parser.error(f"there is no op {', '.join(sorted(unknown))}: choose from {', '.join(names)}, specialized")
    dtypes = options.dtypes or (["bfloat16"] if DEVICE == "cuda" else ["bfloat16", "float32"])
    jobs = [(dtype, name) for dtype in dtypes for name in chosen]
    for i, (dtype, name) in enumerate(jobs[options.skip :], options.skip):
        if DEVICE == "cuda" and dtype == "float32" and "attention" in name:
            continue  # it is for half precision
        try:
            if name == "specialized":
                sweep_configurations(specialized=True)
                continue
            measure_case(names[name], getattr(torch, dtype))
            if name == "frame_attention" and dtype == "bfloat16":
                sweep_configurations(specialized=False)
        except Exception as error:
            with contextlib.suppress(type(error)):
                result_files.fault(error, DEVICE, op=name, dtype=dtype)
            if result_files.is_fatal(error):  # in this process the GPU does not recover: the next cases get another
                os.execv(sys.executable, [sys.executable, *sys.argv, "--skip", str(i + 1)])
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
    sys.exit(result_files.exit_status())
