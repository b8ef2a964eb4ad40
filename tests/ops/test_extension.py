"""How the C++ kernels are built and found, and that every clone of them gives the same bits."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_inputs import COMPILER, needs_cpp
from places import ROOT

from miga_engine import _extension


@needs_cpp
def test_kernels_are_built_and_registered() -> None:
    assert _extension.load(), "a C++ compiler is here: run `python setup.py build_ext --inplace`"
    assert torch._C._dispatch_has_kernel_for_dispatch_key("miga::consistency_score", "CPU")
    assert _extension.status() == f"C++ CPU kernels are loaded from {_extension.LIBRARY}."


def test_missing_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_extension, "LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(_extension, "load", _extension.load.__wrapped__)
    assert _extension.status().startswith("C++ CPU kernels were not built, because no working C++ compiler")
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert _extension.status().startswith("C++ CPU kernels do not load (")


def _setup(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path / "t"),
    ]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_broken_compiler_is_reported_and_survived(tmp_path: Path) -> None:
    run = _setup(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert run.returncode == 0, run.stderr
    assert "miga_engine: the C++ CPU kernels could not be built and are left out" in run.stderr
    assert not list(tmp_path.rglob("_C.so"))


@pytest.mark.slow
def test_demanded_kernels_must_build(tmp_path: Path) -> None:
    assert _setup(tmp_path, CC="/bin/false", CXX="/bin/false", MIGA_BUILD_EXT="1").returncode != 0
    run = _setup(tmp_path, MIGA_BUILD_EXT="yes")
    assert run.returncode != 0
    assert "MIGA_BUILD_EXT is 'yes': choose auto, 1 or 0" in run.stderr


# Every kernel on the same numbers, what it wrote (with a margin behind it) as bytes on the standard output.
CLONES_PROGRAM = """
#include <cstdio>
#include <vector>
#include "consistency_score.h"
#include "gelu.h"
#include "guidance_dots.h"
#include "norm_modulate.h"
#include "core/normal_noise.h"
#include "qk_norm_rope.h"
#include "sampler_update.h"
using namespace miga;

template <typename T> std::vector<T> numbers(int size, unsigned state) {
  std::vector<T> values(size);
  for (T& value : values) value = T(int((state = state * 1664525u + 1013904223u) >> 8) - (1 << 23)) / T(1 << 22);
  return values;
}
template <typename V> void print(const V& values) { fwrite(values.data(), sizeof(values[0]), values.size(), stdout); }

template <typename T, typename E> void tokens(int width, int heads, ElementType type) {
  auto x = numbers<T>(width + 9, 1), gate = numbers<T>(width, 2);
  auto weight = numbers<T>(width, 3), bias = numbers<T>(width, 4);
  std::vector<T> scratch(2 * width);
  std::vector<E> y(width), out(width + 9);
  auto bits = numbers<float>(width, 5);
  for (int i = 0; i < width; ++i) y[i] = narrow<E>(bits[i]);
  add_gated(x.data(), {y.data(), type}, gate.data(), width, scratch.data());
  norm_modulate(x.data(), weight.data(), bias.data(), T(1e-6), width, {out.data(), type});
  print(x);
  print(out);
  const int head_width = width / heads, pairs = head_width / 2;
  std::vector<T> cos(head_width), sin(head_width);
  expand_pairs(gate.data(), bias.data(), pairs, cos.data(), sin.data());
  for (int form = 0; form < 3; ++form) {
    const bool has_rotation = form != 2 && head_width % 2 == 0;
    norm_rotate({out.data(), type}, form == 1 ? nullptr : weight.data(), has_rotation ? cos.data() : nullptr,
                sin.data(), heads, head_width, T(1e-6), scratch.data());
    print(out);
  }
}

template <typename T> void update() {
  std::vector<T> state[4];
  for (int i = 0; i < 4; ++i) state[i] = numbers<T>(1503, 11 + i);
  auto velocity = numbers<float>(2000, 20), uncond = numbers<float>(2000, 21);
  auto row = numbers<T>(kNumCoefficients, 22);
  const NoiseState noise_state{{1, 2}, {3, 4, 5}};
  const SamplerRun<T> run{state[0].data(), state[1].data(), state[2].data(), state[3].data(),
                          {velocity.data(), ElementType::kFloat}, {uncond.data(), ElementType::kFloat},
                          {nullptr, ElementType::kFloat}, 7, &noise_state, 20};
  update_run(run, row.data(), true, T(4.5), 1500);
  for (const auto& values : state) print(values);
  const T weights[] = {T(4.5), T(0.75), T(-0.25)};
  SamplerRun<T> weighted = run;
  weighted.guidance_weights = weights;
  update_run(weighted, row.data(), true, T(0), 1500);
  for (const auto& values : state) print(values);
  T dots[3];
  guidance_dots(GuidanceRun<T>{state[0].data(), run.velocity_cond, run.velocity_uncond, 7}, weights, 1500, dots);
  print(std::vector<T>(dots, dots + 3));
}

int main() {
  for (int width : {7, 24, 192, 1536}) {
    const int heads = width == 7 ? 1 : width == 1536 ? 12 : 2;
    tokens<float, float>(width, heads, ElementType::kFloat);
    tokens<float, BFloat16>(width, heads, ElementType::kBFloat16);
    tokens<float, Half>(width, heads, ElementType::kHalf);
    tokens<double, double>(width, heads, ElementType::kDouble);
  }
  update<float>();
  update<double>();
  std::vector<float> normals(100003);
  draw_normals({{1, 2}, {3, 4, 5}}, 8, 99999, normals.data());
  print(normals);
  auto frames = numbers<float>(3 * 4 * 35, 30);
  std::vector<float> sum(4 * 35), scratch(35);
  add_mean_direction(frames.data(), 3, 4, 35, true, sum.data(), scratch.data());
  add_mean_direction(frames.data(), 3, 4, 35, false, sum.data(), scratch.data());
  print(sum);
  gelu(normals.data(), 99999);
  print(normals);
}
"""


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="no C++ compiler for x86-64 here")
def test_every_clone_gives_the_same_bits(tmp_path: Path) -> None:
    """The clones differ in their instructions only, so each is compiled as a program of its own."""
    processor = Path("/proc/cpuinfo").read_text()
    targets = ["x86-64"] + ["x86-64-v3"] * (" avx2 " in processor) + ["x86-64-v4"] * (" avx512vl " in processor)
    program = tmp_path / "clones.cpp"
    program.write_text(CLONES_PROGRAM)
    sources = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "core").glob("*.cpp")]
    flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-DMIGA_ONE_TARGET"]
    outputs = []
    for target in targets:
        binary = tmp_path / target
        command = [COMPILER, *flags, f"-march={target}", f"-I{ROOT / 'csrc'}", program, *sources, "-o", binary]
        subprocess.run(command, check=True)
        outputs.append(subprocess.run([binary], capture_output=True, check=True).stdout)
    assert len(outputs[0]) > 400_000
    assert all(output == outputs[0] for output in outputs[1:])
