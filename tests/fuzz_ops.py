"""Wrong calls of every op: `python tests/fuzz_ops.py --count 3000 --seed 0`.

A valid call of an op has one to three of its arguments spoilt (dtype, shape, strides, device, size 0, None, an index
out of bounds) and must then give a result or raise one of `REFUSALS` with a sentence, on the public function and on the
registered op alike. Every tensor lies between bands of memory that nobody may write. A signal ends this process, which
says before each call what it is about to do where `--verbose` is given.
"""

from __future__ import annotations

import argparse
import random
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miga_engine import ops
from miga_engine.errors import ConfigError, DeviceError
from miga_engine.noise import FrameNoise
from miga_engine.schedule import make_schedule

REFUSALS = (ValueError, TypeError, ConfigError, DeviceError, RuntimeError, IndexError)
BAND = 512
B, F, S, D, HEADS = 2, 3, 4, 16, 2
INDICES = (-1, -2, -(2**31), -(2**62), 2**31, 2**62, 3, 4, 5, 6, 7, 8, 99, 10_000)

_bands: list[tuple[Tensor, Tensor]] = []


def guarded(tensor: Tensor) -> Tensor:
    """The same values between two bands of memory."""
    memory = torch.full((tensor.numel() + 2 * BAND,), 77, dtype=tensor.dtype)
    view = memory[BAND : BAND + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    _bands.append((memory, view))
    return view


def are_bands_whole() -> bool:
    marks = [(memory, torch.full((), 77).to(memory.dtype)) for memory, _ in _bands]
    return all(bool((memory[:BAND] == mark).all() and (memory[-BAND:] == mark).all()) for memory, mark in marks)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return guarded(torch.randn(shape).to(dtype))


def index(*shape: int, end: int) -> Tensor:
    return guarded(torch.randint(0, end, shape))


def calls() -> dict[str, tuple[Callable[..., Any], list[Any], dict[str, Any]]]:
    """Valid calls, by name; `miga.*` are the registered ops."""
    table = draw(6, 3 * D)
    x, y, rows = draw(B, F, S, D), draw(B, F, S, D, dtype=torch.bfloat16), index(B, F, end=6)
    weight, bias, gate = table.split(D, 1)
    modulated = {"eps": 1e-6, "dtype": torch.float32}
    q, k = draw(B, F * S, D), draw(B, F * S, D)
    norms = draw(D), draw(D)
    rotary = {"temporal": draw(9, 2, 2), "spatial": draw(S, 2, 2), "positions": index(B, F, end=9)}
    heads = [draw(B, F * S, HEADS, D // HEADS) for _ in range(3)]
    keys = [draw(4, 80, HEADS, D // HEADS) for _ in range(2)]
    keyed = {"key_rows": index(B, F, end=4)}
    states, frames = [draw(5, 2, 3, 4) for _ in range(4)], [draw(3, 2, 3, 4) for _ in range(2)]
    pass_ = {
        "slots": guarded(torch.tensor([3, -1, 0])),
        "coefficients": guarded(make_schedule("ddim", 6, 1.0).coefficients.rows),
        "step_index": index(3, end=6),
        "history_length": index(3, end=3),
        "guidance_scale": 3.0,
        "guidance_weights": draw(3, 3),
    }
    projected = {"slots": pass_["slots"], "direction": draw(3, 3)}
    counters = index(3, 3, end=1000)
    miga = torch.ops.miga
    return {
        "norm_modulate": (ops.norm_modulate, [x, weight, bias, rows], modulated),
        "residual_norm_modulate": (ops.residual_norm_modulate, [x, y, gate, weight, bias, rows], modulated),
        "qk_norm_rope": (ops.qk_norm_rope, [q, k, *norms], {**rotary, "num_heads": HEADS, "eps": 1e-6}),
        "rms_norm_": (ops.rms_norm_, [q, norms[0]], {"eps": 1e-6}),
        "frame_attention": (ops.frame_attention, [*heads, draw(B, 1, 1, F * S)], {"backend": "auto"}),
        "frame_attention keyed": (ops.frame_attention, [heads[0], *keys, draw(4, 1, 1, 80), 0.5], keyed),
        "frame_attention reference": (
            ops.frame_attention,
            [heads[0], *keys, draw(4, 1, 1, 80), None],
            {**keyed, "backend": "reference"},
        ),
        "linear": (ops.linear, [q, draw(10, D), draw(10)], {"gelu": True}),
        "conv2d": (ops.conv2d, [draw(2, 3, 6, 6), draw(4, 3, 3, 3), draw(4)], {"stride": (1, 1), "padding": (1, 1)}),
        "sampler_update": (ops.sampler_update, [*states, *frames], {**pass_, "noise": FrameNoise(7, counters)}),
        "guidance_dots": (ops.guidance_dots, [states[0], *frames], projected),
        "consistency_score": (ops.consistency_score, [draw(4, 2, 3, 5), draw(3, 2, 2, 3, 5), "mean"], {}),
        "miga.norm_modulate": (miga.norm_modulate, [x, weight, bias, rows, 1e-6, torch.float32], {}),
        "miga.residual_norm_modulate": (
            miga.residual_norm_modulate,
            [x, y, gate, weight, bias, rows, 1e-6, torch.float32],
            {},
        ),
        "miga.qk_norm_rope": (miga.qk_norm_rope, [q, k, *norms, *rotary.values(), HEADS, 1e-6], {}),
        "miga.frame_attention": (
            miga.frame_attention,
            [heads[0], *keys, draw(4, 1, 1, 80), keyed["key_rows"], None, "auto"],
            {},
        ),
        "miga.gelu_": (miga.gelu_, [x], {}),
        "miga.sampler_update": (
            miga.sampler_update,
            [*states, *frames],
            {**pass_, "noise": None, "noise_counters": counters, "noise_seed": 7},
        ),
        "miga.guidance_dots": (miga.guidance_dots, [states[0], *frames], projected),
        "miga.consistency_score": (miga.consistency_score, [draw(4, 2, 3, 5), draw(3, 2, 2, 3, 5), "all"], {}),
    }


def spoilt_tensor(tensor: Tensor, pick: random.Random) -> Any:
    if tensor.dtype == torch.int64 and pick.random() < 0.6:
        wrong = tensor.clone()
        wrong.view(-1)[pick.randrange(wrong.numel())] = pick.choice(INDICES)
        return guarded(wrong)
    dim = pick.randrange(tensor.ndim)
    choices: list[Callable[[], Any]] = [
        lambda: None,
        lambda: tensor.tolist(),
        lambda: pick.choice([1, "x", -1.5]),
        lambda: guarded(tensor.to(pick.choice([torch.float16, torch.float64, torch.int32, torch.int64, torch.bool]))),
        lambda: tensor.to(pick.choice([torch.complex64, torch.float8_e4m3fn, torch.uint8])),
        lambda: tensor[0],
        lambda: tensor[None],
        lambda: tensor.flatten(),
        lambda: tensor.narrow(dim, 0, 0),
        lambda: tensor.narrow(dim, 0, max(1, tensor.shape[dim] - 1)),
        lambda: tensor.narrow(dim, 0, 1),
        lambda: torch.cat([tensor, tensor], dim),
        lambda: tensor.transpose(dim, pick.randrange(tensor.ndim)),
        lambda: tensor.transpose(dim, -1).contiguous().transpose(dim, -1),
        lambda: tensor.narrow(dim, 0, 1).expand(tensor.shape),
        lambda: tensor.flip(dim),
        lambda: tensor.to("meta"),
        lambda: tensor.to_sparse(),
        lambda: torch.empty(0, dtype=tensor.dtype),
        lambda: torch.tensor(1).to(tensor.dtype),
        lambda: tensor.clone().requires_grad_(tensor.is_floating_point()),
        lambda: tensor.as_strided(tensor.shape, [1] * tensor.ndim),
    ]
    return pick.choice(choices)()


def spoilt(value: Any, pick: random.Random) -> Any:
    if isinstance(value, Tensor):
        return spoilt_tensor(value, pick)
    if isinstance(value, FrameNoise):
        seeds = [7, -1, 2**63, 2**64, None, "x", 1.5]
        counters = spoilt_tensor(value.counters, pick)
        return pick.choice([FrameNoise(value.seed, counters), FrameNoise(pick.choice(seeds), value.counters), counters])
    odd = [
        None,
        0,
        -1,
        3,
        2**40,
        2**70,
        1.5,
        float("nan"),
        float("inf"),
        "x",
        "all",
        "sdpa",
        "onednn",
        "triton",
        (0, 0),
    ]
    return pick.choice([*odd, (2, 2), (-1, -1), (9, 9), True, torch.int32, torch.float16, torch.float64, [], "same"])


def attempt(name: str, seed: int, *, verbose: bool) -> str | None:
    """What is wrong with the outcome of one spoilt call, or None."""
    pick = random.Random(f"{name} {seed}")
    torch.manual_seed(seed)
    _bands.clear()
    call, args, kwargs = calls()[name]
    spoils = []
    for place in pick.sample(
        [*range(len(args)), *kwargs], pick.choice([1, 1, 1, 2, 3]) % (len(args) + len(kwargs)) or 1
    ):
        value = spoilt(args[place] if isinstance(place, int) else kwargs[place], pick)
        if isinstance(place, int):
            args[place] = value
        else:
            kwargs[place] = value
        spoils.append(f"{place}: {_short(value)}")
    if verbose:
        print(name, seed, "; ".join(spoils), flush=True)
    try:
        call(*args, **kwargs)
    except REFUSALS as error:
        if not str(error).strip():
            return f"{name} {seed} ({'; '.join(spoils)}): {type(error).__name__} without a sentence"
    except Exception as error:
        if name.startswith("miga.") and isinstance(error, AttributeError):  # None, which torch takes for any tensor
            return None
        return f"{name} {seed} ({'; '.join(spoils)}): {traceback.format_exc(limit=-2)}"
    if not are_bands_whole():
        return f"{name} {seed} ({'; '.join(spoils)}): wrote beside its tensors"
    return None


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        is_shown = value.dtype == torch.int64 and value.layout == torch.strided and not value.is_meta
        values = f" {value.flatten().tolist()[:6]}" if is_shown else ""
        return f"{value.dtype} {tuple(value.shape)} {value.layout} {value.device}{values}"
    return repr(value)[:60]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000, help="calls of each op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", nargs="*", help="beginnings of names")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = [name for name in calls() if name.startswith(tuple(options.ops or [""]))]
    faults = []
    for name in names:
        for seed in range(options.seed, options.seed + options.count):
            if fault := attempt(name, seed, verbose=options.verbose):
                faults.append(fault)
                print(fault, flush=True)
    print(f"{len(names)} ops, {options.count} calls each: {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
