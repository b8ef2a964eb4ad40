"""What every Triton kernel compiles to, on a machine without a GPU: `python bench/aot.py [CASE ...] [--json]`.

Each case calls a kernel's own `launch` with tensors that have shapes and strides and no memory, those of the real
models. In place of a launch, Triton specialises and compiles the kernel for each GPU, and its code is measured:
registers, spilled bytes, shared memory of a block, the matrix instructions, the share of the bytes a thread
moves to or from global memory in accesses of 128 bits, and on sm_90, where products run beside the other
instructions, how the innermost loops wait for them. tests/ops/test_aot.py asserts what has to hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from miga_engine.schedule import NUM_COEFFICIENTS, NUM_HISTORY_LENGTHS

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
MATRIX_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "mfma": "v_mfma"}
_AMD_ACCESS_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True)
class Code:
    """One kernel, as compiled for one case and target; sizes in bytes."""

    case: str
    kernel: str
    target: str
    num_warps: int
    registers: int
    spilled: int
    shared: int
    matrix: str
    """Kind of matrix instructions, empty if there is none."""
    wide: float
    """Of the bytes that a thread's global loads and stores move, the share of accesses of 128 bits or by TMA."""
    narrow_loads: int
    narrow_stores: int
    """Bytes that a thread loads or stores otherwise, each instruction counted once."""
    full_waits: int
    partial_waits: int
    """Instructions in the loops over products (wgmma) that wait for all in flight, or for all but some."""
    overlap: float
    """Of the exponentials in these loops, the share computed with a product in flight."""
    is_serialized: bool
    """ptxas says that it lets no product (wgmma) run beside other instructions."""


# A window of Wan2.1 at 480×832: two guidance branches, 21 latent frames of 1,560 tokens.
B, F, S = 2, 21, 1560
LATENT = (16, 60, 104)
WIDTHS = {"1.3B": (1536, 12, F, S), "14B": (5120, 40, F, S), "tiny": (192, 3, 7, 24)}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_bf16 = functools.partial(_empty, dtype=torch.bfloat16)
_int64 = functools.partial(_empty, dtype=torch.int64)


def _kernels(name: str) -> Any:
    return importlib.import_module(f"miga_engine.kernels.{name}")


def attention(heads: int, head_dim: int, m: int, has_bias: bool, config: Any, n: int = F * S) -> None:
    fused = _bf16(B, n, 3, heads, head_dim)
    k, v = (fused[:, :, 1], fused[:, :, 2]) if m == n else (_bf16(B, m, heads, head_dim) for _ in range(2))
    bias, key_rows = (_empty(B, m), _int64(B, 21)) if has_bias else (None, None)
    _kernels("frame_attention").launch(fused[:, :, 0], k, v, bias, key_rows, None, config=config)


def norm(model: str, has_rows: bool, has_residual: bool) -> None:
    width, _, frames, tokens = WIDTHS[model]
    x, y = _empty(B, frames, tokens, width), _bf16(B, frames, tokens, width)
    gate, weight, bias = _empty(B * frames if has_rows else 1, 6, width).unbind(1)[:3]
    rows = _int64(B, frames) if has_rows else None
    kernels = _kernels("norm_modulate")
    if has_residual:
        kernels.launch_residual(x, y, gate, weight, bias, rows, 1e-6, torch.bfloat16)
    else:
        kernels.launch(x, weight, bias, rows, 1e-6, torch.bfloat16)


def _qk_norm_rope(model: str, has_rope: bool) -> None:
    width, heads, frames, tokens = WIDTHS[model]
    q, k = _bf16(B, frames * tokens, 3 * width).split(width, dim=2)[:2]
    pairs = width // heads // 2
    in_space = 2 * (pairs // 3)
    tables = (_empty(1024, 2, pairs - in_space), _empty(tokens, 2, in_space), _int64(B, frames))
    launch = _kernels("qk_norm_rope").launch
    if has_rope:
        launch(q, k, _empty(width), _empty(width), *tables, heads, 1e-6)
    else:
        launch(_bf16(B, frames * tokens, width), None, _empty(width), None, None, None, None, 1, 1e-6)


def _sampler(num_velocities: int, has_noise: bool, has_weights: bool = False) -> None:
    num_frames = 31 * 7
    state = [_empty(308, *LATENT) for _ in range(4)]
    velocities = [_bf16(num_frames, *LATENT) for _ in range(num_velocities)] + [None]
    index = _int64(num_frames)
    _kernels("sampler_update").launch(
        *state,
        *velocities[:2],
        slots=index,
        coefficients=_empty(54, NUM_HISTORY_LENGTHS, NUM_COEFFICIENTS),
        step_index=index,
        history_length=index,
        guidance_scale=5.0,
        guidance_weights=_empty(num_frames, 3) if has_weights else None,
        noise_counters=_int64(num_frames, 3) if has_noise else None,
        noise_seed=7,
    )


def _dots() -> None:
    num_frames = 31 * 7
    velocities = [_empty(num_frames, *LATENT) for _ in range(2)]
    slots, direction = _int64(num_frames), _empty(num_frames, 3)
    _kernels("guidance_dots").launch(_empty(308, *LATENT), *velocities, slots=slots, direction=direction)


def _score(channels: str) -> None:
    _kernels("consistency_score").launch(_empty(7, *LATENT), _empty(4, 7, *LATENT), channels)


# What memory bandwidth bounds: the gate asks for 128-bit accesses.
MEMORY_BOUND = {
    **{f"norm_modulate {model}": functools.partial(norm, model, True, False) for model in WIDTHS},
    **{f"residual_norm_modulate {model}": functools.partial(norm, model, True, True) for model in WIDTHS},
    "norm 1.3B": functools.partial(norm, "1.3B", False, False),
    **{f"qk_norm_rope {model}": functools.partial(_qk_norm_rope, model, True) for model in WIDTHS},
    "rms_norm 1.3B": functools.partial(_qk_norm_rope, "1.3B", False),
    "sampler_update guided": functools.partial(_sampler, 2, False),
    "sampler_update noise": functools.partial(_sampler, 1, True),
    "sampler_update weighted": functools.partial(_sampler, 2, False, True),
}
OTHERS = {
    "guidance_dots": _dots,
    **{f"consistency_score {channels}": functools.partial(_score, channels) for channels in ("mean", "all")},
}


def attention_cases(target: str) -> dict[str, Callable[[], None]]:
    """Every configuration of the target over a whole window's keys; biased text and its short forms by default."""
    cases: dict[str, Callable[[], None]] = {}
    for head_dim, heads in ((128, 12), (64, 3)):
        for config in _kernels("frame_attention").CONFIGS[target, head_dim]:
            kind = "tma" if config.use_tma else "ptr"
            kind += " overlapped" if config.is_overlapped else ""
            tiles = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages} {kind}"
            cases[f"self d{head_dim} {tiles}"] = functools.partial(attention, heads, head_dim, F * S, False, config)
        for m in (12, 64, 512):
            cases[f"text d{head_dim} M={m}"] = functools.partial(attention, heads, head_dim, m, True, None)
        cases[f"text d{head_dim} M=64, 24 queries a run"] = functools.partial(
            attention, heads, head_dim, 64, True, None, n=F * 24
        )
    return {f"attention {name}": case for name, case in cases.items()}


def cases(target: str) -> dict[str, Callable[[], None]]:
    return {**attention_cases(target), **MEMORY_BOUND, **OTHERS}


@contextmanager
def compiling_for(target: str) -> Iterator[list[Any]]:
    """Launches compile for the target and end there; the compiled kernels gather in the list."""
    import triton
    from triton.backends.compiler import GPUTarget

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: compiling needs it unset before Triton is imported")
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget(*TARGETS[target]),
        get_current_device=lambda: target,  # Triton keys its compiled kernels by device
        get_current_stream=lambda device: 0,
    )
    compiled = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        with redirect_stdout(io.StringIO()) as said:
            compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        if said.getvalue():  # nothing where this process has compiled it already
            _said[compiled[-1].hash] = said.getvalue()
        return compiled[-1]

    triton.runtime.driver.set_active(driver)
    with (
        mock.patch.object(triton.JITFunction, "run", compile_only),
        mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True),
        mock.patch.object(triton.knobs.compilation, "always_compile", True),  # what lies on the disk says nothing
    ):
        yield compiled


_said: dict[str, str] = {}
"""By a kernel's hash: what ptxas said of it when Triton ran it."""


def compile_case(case: str, target: str, call: Callable[[], None] | None = None) -> list[Code]:
    """The case's kernels, each once."""
    with compiling_for(target) as compiled:
        (call or cases(target)[case])()
    return [_measured(case, kernel, target) for kernel in {kernel.hash: kernel for kernel in compiled}.values()]


def _measured(case: str, kernel: Any, target: str) -> Code:
    is_amd = TARGETS[target][0] == "hip"
    text = kernel.asm["amdgcn" if is_amd else "ptx"]
    registers, spilled, is_serialized = _amd_registers(text) if is_amd else _ptxas_registers(_said[kernel.hash])
    full_waits, partial_waits, overlap = _overlap(text)
    accesses = list(_amd_accesses(text) if is_amd else _nvidia_accesses(text))
    total = sum(size for _, size in accesses)
    narrow = {kind: sum(size for k, size in accesses if k == kind and size < 16) for kind in ("load", "store")}
    return Code(
        case,
        kernel.metadata.name.strip("_"),
        target,
        num_warps=kernel.metadata.num_warps,
        registers=registers,
        spilled=spilled,
        shared=kernel.metadata.shared,
        matrix=next((kind for kind, word in MATRIX_INSTRUCTIONS.items() if word in text), ""),
        wide=1 - sum(narrow.values()) / total,
        narrow_loads=narrow["load"],
        narrow_stores=narrow["store"],
        full_waits=full_waits,
        partial_waits=partial_waits,
        overlap=overlap,
        is_serialized=is_serialized,
    )


def _ptxas_registers(said: str) -> tuple[int, int, bool]:
    """Registers of a thread, bytes of local memory, and whether products are serialised: the word of Triton's ptxas."""
    stack, stores = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said).groups())
    is_serialized = "wgmma.mma_async instructions are serialized" in said
    return int(re.search(r"Used (\d+) registers", said)[1]), max(stack, stores), is_serialized


def _amd_registers(assembly: str) -> tuple[int, int, bool]:
    """Vector registers of a thread and bytes of private memory."""
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    count, spilled, private = (int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in names)
    return count, max(4 * spilled, private), False


def _overlap(ptx: str) -> tuple[int, int, float]:
    """Full and partial waits in the innermost loops over wgmma, and the share of exponentials that run under one."""
    waits, under, exponentials = {True: 0, False: 0}, 0, 0
    for loop in _innermost_loops(ptx):
        if not any("wgmma.mma_async" in line for line in loop):
            continue
        pending = 0
        for is_counted in (False, True):  # the first iteration finds what an earlier one left in flight
            for line in loop:
                if "wgmma.commit_group" in line:
                    pending += 1
                elif wait := re.search(r"wgmma\.wait_group\S* (\d+)", line):
                    pending = min(pending, int(wait[1]))
                    waits[wait[1] == "0"] += is_counted
                elif "ex2.approx" in line:
                    exponentials += is_counted
                    under += is_counted and pending > 0
    return waits[True], waits[False], under / exponentials if exponentials else 0.0


def _innermost_loops(ptx: str) -> Iterator[list[str]]:
    """Lines from a label to the branch back to it, where these hold no other loop."""
    labels: dict[str, int] = {}
    lines, start = ptx.splitlines(), 0
    for i, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = i
            continue
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if branch and labels.get(branch[1], -1) >= start:
            yield lines[labels[branch[1]] : i]
            start = i


def _nvidia_accesses(ptx: str) -> Iterator[tuple[str, int]]:
    for line in ptx.splitlines():
        if access := re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", line):
            yield "load" if access[1] == "ld" else "store", int(access[2] or 1) * int(access[3]) // 8
        elif access := re.search(r"cp\.async\.c[ag]\.shared\.global\b.*?\], (0x\w+|\d+)", line):
            yield "load", int(access[1], 0)
        elif "cp.async.bulk.tensor" in line:
            yield "load", 128  # as wide as the swizzled rows of its box


def _amd_accesses(assembly: str) -> Iterator[tuple[str, int]]:
    pattern = r"\b(?:global|buffer)_(load|store)_(?:[us])?(byte|short|dword(?:x\d)?)"
    for kind, width in re.findall(pattern, assembly):
        yield kind, _AMD_ACCESS_BYTES[width]


def _compile_job(job: tuple[str, str]) -> list[Code]:
    return compile_case(*job)


def compile_all(names: list[str] | None = None, num_processes: int = 2) -> list[Code]:
    """All cases whose name begins with one of `names`, for all targets."""
    known = {target: [case for case in cases(target) if case.startswith(tuple(names or ("",)))] for target in TARGETS}
    jobs = [(case, target) for target in TARGETS for case in known[target]]
    if not jobs:
        raise ValueError(f"cases are {names}: choose beginnings of {', '.join(cases('sm_90'))}")
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        return [code for codes in pool.imap(_compile_job, jobs) for code in codes]


def table(codes: list[Code]) -> str:
    """Plain text, a line a kernel; waits are full + partial."""
    head = ("target", "case", "kernel", "warps", "registers", "spilled B", "shared B", "matrix", "128-bit", "narrow B")
    head += ("waits", "overlap")
    lines = [
        (
            c.target,
            c.case,
            c.kernel,
            c.num_warps,
            c.registers,
            c.spilled,
            c.shared,
            c.matrix or "-",
            f"{c.wide:.0%}",
            f"{c.narrow_loads}+{c.narrow_stores}",
            f"{c.full_waits}+{c.partial_waits}" if c.matrix == "wgmma" else "-",
            "serialised" if c.is_serialized else f"{c.overlap:.0%}" if c.matrix == "wgmma" else "-",
        )
        for c in codes
    ]
    rows = [tuple(map(str, line)) for line in (head, *lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_text = [column in ("target", "case", "kernel", "matrix") for column in head]
    aligned = [
        "  ".join(v.ljust(w) if left else v.rjust(w) for v, w, left in zip(row, widths, is_text, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([aligned[0], "-" * max(map(len, aligned)), *aligned[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="beginnings of case names; all if none is given")
    parser.add_argument("--json", action="store_true", help="a list of records instead of the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        codes = compile_all(arguments.cases)
    print(json.dumps([dataclasses.asdict(code) for code in codes]) if arguments.json else table(codes))


if __name__ == "__main__":
    main()
