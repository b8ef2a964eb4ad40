"""Every op against eager PyTorch, torch.compile and the machine's ceilings: `python bench/bench_kernels.py [OP ...]`.

Each case (op_cases.py, block_case.py) first holds its op against the float64 oracle, then takes turns with its rivals
(timing.py) and appends rows to bench/results/kernels_<device>.csv. A case that fails is reported and the next one goes
on, if need be in a fresh process.

On a GPU `frame_attention` also gets a row for every tuned configuration of its kernel, and one more for the best.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import result_files
import timing
import torch
from block_case import block
from op_cases import (
    DEVICE,
    HALF,
    SIZES,
    SMALL,
    Case,
    Sizes,
    consistency_score,
    cross_attention,
    frame_attention,
    guidance_dots,
    linear_gelu,
    norm_modulate,
    qk_norm_rope,
    residual_norm_modulate,
    sampler_update,
    self_attention,
    shape_text,
)
from torch import Tensor

from miga_engine import ops

__all__ = ["CASES", "SIZES", "SMALL", "Case"]

with contextlib.suppress(ImportError):  # of tests/, which gpu.sh has on the path
    import interpreter

    interpreter.mend()

# What is least known first: rows are saved one by one, and time may run out.
CASES = [block, frame_attention, norm_modulate, residual_norm_modulate, qk_norm_rope, cross_attention, sampler_update]
CASES += [linear_gelu, guidance_dots, consistency_score]
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


@torch.inference_mode()
def sweep_configurations(configs: Sequence[Any] | None = None) -> None:
    """A row for each configuration of frame_attention, those tuned for this GPU if None, and one more for the best."""
    from miga_engine.kernels import frame_attention as kernel

    if DEVICE != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        result_files.fault(
            RuntimeError("the kernel needs a GPU"), DEVICE, op="frame_attention", implementation="triton"
        )
        return
    torch.manual_seed(0)
    q, k, v = self_attention(HALF, SIZES)
    part = slice(0, 64)
    exact = ops.frame_attention_reference(q[:, part].double(), k, v, None, None, None)
    eager = ops.frame_attention_reference(q[:, part], k, v, None, None, None)
    budget = 2 * ((eager - exact).abs().max() + torch.finfo(HALF).eps * exact.abs().max())
    contenders: dict[str, Callable[[], object]] = {}
    for config in kernel.CONFIGS[kernel._arch(), 128] if configs is None else configs:

        def run(config=config) -> Tensor:
            return kernel.launch(q, k, v, None, None, None, config=config)

        name = configuration_name(config)
        try:
            out = run()
            error = (out[:, part] - exact).abs().max()
            assert error <= budget, f"its error is {error:.2g}, the budget {budget:.2g}: not measured"
            assert torch.equal(run(), out), "a second launch gives something else: not measured"
            contenders[name] = run
        except Exception as error:
            result_files.fault(error, DEVICE, op="frame_attention", implementation=name)
    shape, flops = f"{shape_text(q)}, {k.shape[1]} keys", 4 * q.numel() * k.shape[1]
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
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join(names)} (default: all)")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), help="default: bfloat16, on a CPU both")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave the first N cases out")
    options = parser.parse_args()
    chosen = options.ops or list(names)
    if unknown := set(chosen) - set(names):
        parser.error(f"there is no op {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    dtypes = options.dtypes or (["bfloat16"] if DEVICE == "cuda" else ["bfloat16", "float32"])
    jobs = [(dtype, name) for dtype in dtypes for name in chosen]
    for i, (dtype, name) in enumerate(jobs[options.skip :], options.skip):
        if DEVICE == "cuda" and dtype == "float32" and "attention" in name:
            continue  # it is for half precision
        try:
            measure_case(names[name], getattr(torch, dtype))
            if name == "frame_attention" and dtype == "bfloat16":
                sweep_configurations()
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
