"""The gate on what the Triton kernels compile to for GPUs that are not here; what is compiled: bench/aot.py."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytest.importorskip("triton", reason="Triton is for Linux only")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # of a block
MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
SPILLS_ALLOWED: dict[tuple[str, str], str] = {}  # (case, target) → why
# Bytes that a thread of a memory-bound kernel may load in accesses below 128 bits, on NVIDIA GPUs: its frame's index
# and scalars, and rows of small tables whose length (22, 42) is no multiple of 128 bits. No stream fits in these.
NARROW_LOADS = {
    "norm_modulate": 20,
    "residual_norm_modulate": 20,
    "norm 1.3B": 0,
    "qk_norm_rope": 72,
    "rms_norm": 0,
    "sampler_update guided": 72,
    "sampler_update noise": 96,
    "sampler_update weighted": 84,
}


def _python(*arguments: str | Path, cache: Path) -> str:
    """Output of a fresh process in which Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "bench"), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Compiled once for all processes of the tests."""
    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "aot.json"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            shared.write_text(_python(ROOT / "bench" / "aot.py", "--json", cache=tmp_path_factory.mktemp("triton")))
    return json.loads(shared.read_text())


def _where(code: dict) -> str:
    return f"{code['kernel']} of {code['case']} on {code['target']}"


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_target(codes: list[dict]) -> None:
    files = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    for target in TARGETS:
        kernels = {code["kernel"].removesuffix("_kernel") for code in codes if code["target"] == target}
        assert files <= kernels, target


@pytest.mark.slow
def test_nothing_spills(codes: list[dict]) -> None:
    spills = {_where(code): code["spilled"] for code in codes if (code["case"], code["target"]) not in SPILLS_ALLOWED}
    assert not {where: size for where, size in spills.items() if size}


@pytest.mark.slow
def test_shared_memory_fits(codes: list[dict]) -> None:
    assert not [_where(code) for code in codes if code["shared"] > SHARED_LIMIT[code["target"]]]


@pytest.mark.slow
def test_attention_uses_the_matrix_units(codes: list[dict]) -> None:
    found = {_where(code): (code["matrix"], MATRIX[code["target"]]) for code in codes if "attention" in code["case"]}
    assert len(found) > 40
    assert not {where: got for where, (got, wanted) in found.items() if got != wanted}


@pytest.mark.slow
def test_exponentials_run_under_products_on_sm_90(codes: list[dict]) -> None:
    """A wgmma is waited for by all its warps. The overlapped form does every exponential of its loop before that, where
    the plain one has nothing in flight, and leaves it to another program to fill; each waits once for two products."""
    loops = {}
    for code in codes:
        if code["target"] == "sm_90" and " self d" in code["case"]:
            loops[code["case"]] = code["full_waits"], code["partial_waits"], code["overlap"]
    assert {loop for case, loop in loops.items() if case.endswith(" overlapped")} == {(1, 0, 1.0)}
    assert {loop for case, loop in loops.items() if not case.endswith(" overlapped")} == {(1, 0, 0.0)}
    for head_dim, named in ((64, "128x128 w8 s2 tma overlapped"), (128, "64x64 w4 s3 tma")):
        default = next(case for case in loops if f" d{head_dim} " in case)  # the first of CONFIGS
        assert default.endswith(named)


@pytest.mark.slow
def test_two_programs_of_the_default_share_a_multiprocessor_of_sm_90(codes: list[dict]) -> None:
    """By registers and by shared memory, of which each block takes 1 KiB more: what its rate on an H100 rests on."""
    default = next(c for c in codes if c["target"] == "sm_90" and " self d128 64x64 w4 s3 tma" in c["case"])
    assert 2 * 32 * default["num_warps"] * default["registers"] <= 65_536
    assert 2 * (default["shared"] + 1024) <= 228 * 1024


@pytest.mark.slow
def test_no_product_is_serialised(codes: list[dict]) -> None:
    """Where other instructions touch its registers too early, ptxas waits for every wgmma at once, and says so."""
    assert not [_where(code) for code in codes if code["is_serialized"]]


@pytest.mark.slow
def test_streams_are_read_and_written_in_128_bits(codes: list[dict]) -> None:
    checked = set()
    for code in codes:
        for prefix, allowed in NARROW_LOADS.items():
            if code["case"].startswith(prefix) and code["target"].startswith("sm_"):
                checked.add(prefix)
                assert code["narrow_stores"] == 0, _where(code)
                assert code["narrow_loads"] <= allowed, _where(code)
    assert checked == set(NARROW_LOADS)


@pytest.mark.slow
def test_the_gate_sees_spills_and_narrow_accesses(tmp_path: Path) -> None:
    """128 rows of attention on four warps spill; rows of 190 numbers cannot be read 128 bits at a time."""
    script = """
import dataclasses, json, aot
from miga_engine.kernels.frame_attention import Config
aot.WIDTHS["odd"] = (190, 3, 7, 24)
bad = (
    lambda: aot.attention(12, 128, 32_760, False, Config(128, 128, 4, 2, use_tma=True)),
    lambda: aot.norm("odd", True, True),
)
print(json.dumps([dataclasses.asdict(code) for call in bad for code in aot.compile_case("bad", "sm_90", call)]))
"""
    attention, norm = json.loads(_python("-c", script, cache=tmp_path))
    assert attention["spilled"] > 0
    assert norm["narrow_stores"] > 0
    assert norm["narrow_loads"] > NARROW_LOADS["residual_norm_modulate"]


@pytest.mark.slow
def test_the_gate_sees_serialised_products(tmp_path: Path) -> None:
    """Scores read while the next ones are under way have to be copied out of a product in flight."""
    source = (ROOT / "kernels" / "frame_attention.py").read_text()
    scores = "_scores(b_q, keys, start + BLOCK_N, BLOCK_N, D, USE_TMA)\n"
    exponents = "        b_x, b_new = _exponents(b_s, b_max, None, 0, start"
    assert source.count(scores) == source.count(exponents) == 1
    source = source.replace(f"b_s = {scores}", "b_s = b_next\n")
    (tmp_path / "too_early.py").write_text(source.replace(exponents, f"        b_next = {scores}{exponents}"))
    script = f"""
import dataclasses, json, sys, aot
sys.path.insert(0, {str(tmp_path)!r})
import too_early
aot._kernels = lambda name: too_early
call = lambda: aot.attention(12, 128, 32_760, False, too_early.CONFIGS["sm_90", 128][1])
print(json.dumps([dataclasses.asdict(code) for code in aot.compile_case("bad", "sm_90", call)]))
"""
    (code,) = json.loads(_python("-c", script, cache=tmp_path / "cache"))
    assert code["is_serialized"]
    assert code["overlap"] == 1.0  # what Triton asked for


def test_waits_are_counted_in_the_innermost_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import aot

    product, wait, exponential = "wgmma.mma_async;\nwgmma.commit_group;", "wgmma.wait_group.sync.aligned", "ex2.approx;"
    loop = f"$L__BB0_1:\n{wait} 0;\n{exponential}\n{product}\n{product}\n{wait} 1;\n{exponential}\n@%p1 bra $L__BB0_1;"
    assert aot._overlap(f"{wait} 0;\n{loop}\n{product}\n{exponential}") == (1, 1, 0.5)
    outer = f"$L__BB0_0:\n{loop}\n{wait} 0;\n@%p2 bra $L__BB0_0;"
    assert aot._overlap(outer) == (1, 1, 0.5)
    assert aot._overlap(f"$L__BB0_1:\n{exponential}\nbra.uni $L__BB0_1;") == (0, 0, 0.0)


@pytest.mark.slow
def test_the_table_is_readable(codes: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import aot

    head, line, *rows = aot.table([aot.Code(**code) for code in codes]).splitlines()
    assert head.split()[:4] == ["target", "case", "kernel", "warps"]
    assert set(line) == {"-"}
    assert len(rows) == len(codes)
    assert {row.index(code["kernel"]) for row, code in zip(rows, codes, strict=True)} == {head.index("kernel")}
