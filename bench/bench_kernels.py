"""Every op against eager PyTorch, torch.compile and the machine's ceilings: `make bench`, or on a GPU `bench/gpu.sh`.

Each case first holds its op against the float64 oracle, then takes turns with its rivals (measure.py) and appends rows
to bench/results/kernels_<device>.csv. The shapes are those of Wan2.1 at 480×832: a whole forward of the 1.3B network
(two branches of 21 latent frames) on a GPU, a window of 3 frames on one thread of a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import measure
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miga_engine import ops
from miga_engine.models.wan.dit import WAN_T2V_CONFIGS
from miga_engine.models.wan.dit_layers import Block, Frames, Modulation, RotaryTable, TextKeys
from miga_engine.ops import reference
from miga_engine.schedule import make_schedule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    torch.set_num_threads(1)
HALF = torch.bfloat16
BATCH, FRAMES = (2, 21) if DEVICE == "cuda" else (1, 3)
TOKENS = 1560  # of a latent frame, 30 × 52
LATENT = (16, 60, 104)
QUEUE = 308 if DEVICE == "cuda" else 28
WIDTH, HEADS = 1536, 12
NUM_TEXT = 64
EPS = 1e-6


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


def _modulation_arguments(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, y = _randn(BATCH, FRAMES, TOKENS, WIDTH), _randn(BATCH, FRAMES, TOKENS, WIDTH, dtype=dtype)
    table = _randn(BATCH * FRAMES, 6, WIDTH)
    rows = torch.arange(BATCH * FRAMES, device=DEVICE).view(BATCH, FRAMES)
    return x, y, table[:, 2], table[:, 1], table[:, 0], rows


def norm_modulate(dtype: torch.dtype) -> Case:
    x, _, _, weight, bias, rows = _modulation_arguments(dtype)
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


def residual_norm_modulate(dtype: torch.dtype) -> Case:
    x, y, gate, weight, bias, rows = _modulation_arguments(dtype)
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


def complex_rope(q: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """RMSNorm, then rotation as multiplication by complex numbers in float64: the published form."""
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(q.dtype) * weight
    pairs = torch.view_as_complex(normed.to(torch.float64).unflatten(2, (HEADS, -1, 2)))
    return torch.view_as_real(pairs * table).flatten(2).to(q.dtype)


def qk_norm_rope(dtype: torch.dtype) -> Case:
    shape = (BATCH, FRAMES * TOKENS, WIDTH)
    q, k = (_randn(*shape, dtype=dtype) for _ in range(2))
    weight = 1 + 0.1 * _randn(WIDTH)
    angles = 7 * _randn(FRAMES, 22), 7 * _randn(TOKENS, 42)
    temporal, spatial = (torch.stack([a.cos(), a.sin()], dim=1) for a in angles)
    positions = torch.arange(FRAMES, device=DEVICE).expand(BATCH, FRAMES).contiguous()
    grid = (FRAMES, TOKENS, -1)
    every = torch.cat([angles[0][:, None].expand(*grid), angles[1].expand(*grid)], dim=-1).flatten(0, 1).double()
    table = torch.polar(torch.ones_like(every), every)[:, None]  # complex128 [N,1,64]
    rest = (weight, weight, temporal, spatial, positions, HEADS, EPS)
    compiled = _compiled(lambda q, k: reference.qk_norm_rope(q, k, *rest))

    def run() -> None:
        named = {"temporal": temporal, "spatial": spatial, "positions": positions}
        ops.qk_norm_rope(q, k, weight, weight, **named, num_heads=HEADS, eps=EPS)

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


def sampler_update(dtype: torch.dtype) -> Case:
    schedule = make_schedule("unipc", 50, 8.0)
    velocities = [_randn(QUEUE, *LATENT, dtype=dtype) for _ in range(2)]
    start = [_randn(QUEUE, *LATENT) for _ in range(4)]
    steps = torch.arange(QUEUE, device=DEVICE).flip(0) * 49 // QUEUE
    indices = {"slots": torch.arange(QUEUE, device=DEVICE), "step_index": steps, "history_length": steps.clamp(max=2)}
    rows = schedule.coefficients.rows.to(DEVICE)

    def call(function: Callable[..., None], state: list[Tensor], frames: slice = slice(None)) -> None:
        named = {name: index[frames] for name, index in indices.items()}
        named |= {"coefficients": rows, "guidance_scale": 5.0}
        function(*state, *(v[frames] for v in velocities), **named)

    def loop() -> None:
        for i in range(QUEUE):
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
        f"{QUEUE}×{'×'.join(map(str, LATENT))}",
        dtype,
        lambda: call(ops.sampler_update, start),
        {"eager": lambda: call(reference.sampler_update, start), "loop": loop},
        results,
        num_bytes=start[0].numel() * (4 * 7 + 2 * dtype.itemsize),  # reads x, y, m1 and both velocities, writes four
    )


def consistency_score(dtype: torch.dtype) -> Case:
    frames, candidates = _randn(14, *LATENT, dtype=dtype), _randn(3, 7, *LATENT, dtype=dtype)
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


def linear_gelu(dtype: torch.dtype) -> Case:
    config = WAN_T2V_CONFIGS["1.3B"]
    x = _randn(BATCH, FRAMES * (TOKENS if DEVICE == "cuda" else TOKENS // 4), WIDTH, dtype=dtype)
    weight, bias = _randn(config.ffn_dim, WIDTH, dtype=dtype) / WIDTH**0.5, _randn(config.ffn_dim, dtype=dtype)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def results() -> tuple[Tensor, Tensor, Tensor]:
        part = x[:, :64]
        exact = eager(part.double(), weight.double(), bias.double())
        return ops.linear(part, weight, bias, gelu=True), eager(part, weight, bias), exact

    compiled = _compiled(eager)
    return Case(
        "linear_gelu",
        f"{_shape(x)} to {config.ffn_dim}",
        dtype,
        lambda: ops.linear(x, weight, bias, gelu=True),
        {"eager": lambda: eager(x, weight, bias), "compiled": lambda: compiled(x, weight, bias)},
        results,
        num_flops=2 * x.numel() * config.ffn_dim,
    )


def frame_attention(dtype: torch.dtype) -> Case:
    shape = (BATCH, FRAMES * TOKENS if DEVICE == "cuda" else TOKENS, HEADS, WIDTH // HEADS)
    return _attention_case("frame_attention", shape, shape[1], dtype)


def cross_attention(dtype: torch.dtype) -> Case:
    return _attention_case("cross_attention", (BATCH, FRAMES * TOKENS, HEADS, WIDTH // HEADS), NUM_TEXT + 1, dtype)


def _attention_case(name: str, shape: tuple[int, ...], num_keys: int, dtype: torch.dtype) -> Case:
    q = _randn(*shape, dtype=dtype)
    k, v = (_randn(shape[0], num_keys, *shape[2:], dtype=dtype) for _ in range(2))
    is_cross = num_keys < shape[1]
    bias = _randn(shape[0], 1, 1, num_keys) if is_cross else None
    refusals = ops.attention_backends(DEVICE, dtype, shape[3])
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

    return Case(
        name,
        f"{'×'.join(map(str, shape))}, {num_keys} keys",
        dtype,
        lambda: run("auto"),
        {"eager" if backend == "sdpa" else backend: (lambda backend=backend: run(backend)) for backend in usable},
        results,
        num_flops=4 * q.numel() * num_keys,
    )


class PublishedBlock:
    """A block of the 1.3B network with a prompt of 64 tokens: ours, and the published form in plain PyTorch."""

    def __init__(self, dtype: torch.dtype, tokens: int) -> None:
        config = WAN_T2V_CONFIGS["1.3B"]
        self.dtype, self.tokens = dtype, tokens
        with torch.device(DEVICE):
            self.block = Block(WIDTH, config.ffn_dim, HEADS, EPS, qk_norm=True, cross_attn_norm=True)
        self.block.requires_grad_(False)
        for name, parameter in self.block.named_parameters():
            if "norm" not in name and name != "modulation":
                parameter.data = parameter.data.to(dtype)
        self.x = _randn(BATCH, FRAMES, tokens, WIDTH)
        self.time = 0.1 * _randn(BATCH * FRAMES, 6, WIDTH)
        # The other rows of the text are padding, all of one key and one value.
        keys, values = (_randn(BATCH, NUM_TEXT + 1, HEADS, WIDTH // HEADS, dtype=dtype) for _ in range(2))
        padding = config.text_len - NUM_TEXT
        self.padded = [torch.cat([t[:, :-1], t[:, -1:].expand(-1, padding, -1, -1)], dim=1) for t in (keys, values)]
        bias = torch.zeros(BATCH, 1, 1, NUM_TEXT + 1, device=DEVICE)
        bias[..., -1] = math.log(padding)
        self.text = TextKeys(keys, values, bias)
        angles = 7 * _randn(FRAMES, 22), 7 * _randn(tokens, 42)
        self.rotary = RotaryTable(*(torch.stack([a.cos(), a.sin()], dim=1) for a in angles))
        rows = torch.arange(BATCH * FRAMES, device=DEVICE).view(BATCH, FRAMES)
        self.frames = Frames(rows, torch.arange(FRAMES, device=DEVICE).expand(BATCH, FRAMES).contiguous(), None)
        self.with_one = self.time + torch.tensor([0.0, 1, 0, 0, 1, 0], device=DEVICE)[:, None]
        grid = (FRAMES, tokens, -1)
        every = torch.cat([angles[0][:, None].expand(*grid), angles[1].expand(*grid)], dim=-1).flatten(0, 1).double()
        self.table = torch.polar(torch.ones_like(every), every)[:, None]
        matmuls = 2 * 6 * WIDTH**2 + 4 * WIDTH * config.ffn_dim
        num_tokens = FRAMES * tokens
        self.num_flops = BATCH * num_tokens * (matmuls + 4 * WIDTH * (num_tokens + config.text_len))

    def ours(self) -> Tensor:
        x = self.x.clone()
        modulation = self.block.table(self.with_one)
        following = Modulation(modulation[:, 1], modulation[:, 0])
        h = ops.norm_modulate(x, *following, self.frames.rows, eps=EPS, dtype=self.dtype)
        rest = (self.frames, self.text, self.rotary, ("auto", "auto"), self.dtype)
        self.block(x, h, modulation, following, *rest)
        return x

    def published(self, wide: torch.dtype = torch.float32) -> Tensor:
        """Modulation written out by token, complex rotation in float64, all 512 rows of text; `wide` for residuals."""
        block, dtype = self.block, torch.float64 if wide == torch.float64 else self.dtype

        def linear(layer: nn.Linear, x: Tensor) -> Tensor:
            return F.linear(x, layer.weight.to(dtype), layer.bias.to(dtype))

        def attend(layer: nn.Linear, *tensors: Tensor) -> Tensor:
            heads = [(t.unflatten(2, (HEADS, -1)) if t.ndim == 3 else t).transpose(1, 2).to(dtype) for t in tensors]
            return linear(layer, F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

        def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            return F.layer_norm(x, (WIDTH,), *(t if t is None else t.to(wide) for t in (weight, bias)), eps=EPS)

        x = self.x.to(wide).flatten(1, 2)
        by_token = self.time.to(wide).view(BATCH, FRAMES, 6, WIDTH).repeat_interleave(self.tokens, dim=1)  # [B,N,6,D]
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation.to(wide)[:, None] + by_token).unbind(2)
        own, cross = block.self_attn, block.cross_attn
        h = (norm(x) * (1 + scale1) + shift1).to(dtype)
        q = complex_rope(linear(own.q, h), own.norm_q.weight, self.table)
        k = complex_rope(linear(own.k, h), own.norm_k.weight, self.table)
        x = x + attend(own.o, q, k, linear(own.v, h)).to(wide) * gate1
        h = norm(x, block.norm3.weight, block.norm3.bias).to(dtype)
        q = F.rms_norm(linear(cross.q, h).to(wide), (WIDTH,), cross.norm_q.weight.to(wide), EPS)
        x = x + attend(cross.o, q, *self.padded)
        h = (norm(x) * (1 + scale2) + shift2).to(dtype)
        h = F.gelu(linear(block.ffn[0], h), approximate="tanh")
        return (x + linear(block.ffn[2], h).to(wide) * gate2).view_as(self.x)


def block(dtype: torch.dtype) -> Case:
    """The whole block; its rival does the same work on the same text."""
    case = PublishedBlock(dtype, TOKENS if DEVICE == "cuda" else TOKENS // 4)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        small = PublishedBlock(dtype, 40)
        return small.ours(), small.published(), small.published(torch.float64)

    shape = _shape(case.x)
    rivals = {"eager": case.published, "compiled": _compiled(case.published)}
    return Case("block", shape, dtype, case.ours, rivals, results, num_flops=case.num_flops)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))


CASES = [norm_modulate, residual_norm_modulate, qk_norm_rope, sampler_update, consistency_score]
CASES += [linear_gelu, frame_attention, cross_attention, block]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def bench_op(benchmark, make: Callable[[torch.dtype], Case], dtype: torch.dtype) -> None:
    if DEVICE == "cuda" and dtype == torch.float32 and "attention" in make.__name__:
        pytest.skip("attention on GPUs is for half precision")
    torch.manual_seed(0)
    with torch.inference_mode():
        case = make(dtype)
        case.check()
        work = {"num_bytes": case.num_bytes, "num_flops": case.num_flops}
        _record(benchmark, case.op, case.shape, dtype, case.contenders, **work)


def _record(benchmark, op, shape, dtype, contenders, **work: int) -> None:
    samples = measure.interleave(contenders, DEVICE)
    for row in measure.append(f"kernels_{DEVICE}", op, shape, dtype, samples, DEVICE, **work):
        ratios = "".join(f"{name} {row[key]:>6} " for name in measure.RIVALS if (key := f"x_{name}") in row)
        print(
            f"{op:24}{row['dtype']:9} {row['implementation']:14} {row['p50_ms']:>9} ms "
            f"{row['rate']:>7} {row['unit']:8} {row['of_ceiling']:>6} of ceiling; times faster than {ratios}"
        )
    benchmark.group = f"{op}, {shape}, {dtype}"
    benchmark.pedantic(contenders["op"], rounds=3)
