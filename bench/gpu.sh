#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes, from a source checkout, without a network: builds the
# C++ kernels in place where it can, runs the kernels' tests on the device, benches kernels and engine, and draws. Uses the python3 it finds
# (PYTHON=... for another), whose torch and Triton may be other versions than the lock file's.
#   bench/gpu.sh [FOLDER]    results also go to FOLDER (rows are appended to bench/results/ in any case)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
results=bench/results
mkdir -p "$results"
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0

step() { # name seconds command...   (cut to what is left of ten minutes)
  local name=$1 limit=$2 left=$((595 - SECONDS))
  shift 2
  if [ "$left" -lt 10 ]; then
    echo "== $name left out: the ten minutes are over"
    status=1
    return
  fi
  limit=$((limit < left ? limit : left))
  echo "== $name"
  timeout "$limit" "$@" || { echo "== $name failed ($?)"; status=1; }
}

"$python" - <<'PY' || exit 1
import sys
try:
    import torch
except ImportError:
    sys.exit("torch is not installed for this python3: set PYTHON to one that has it")
if not torch.cuda.is_available():
    sys.exit("no GPU is visible to torch: bench/gpu.sh is for a machine with one")
try:
    import triton
except ImportError:
    sys.exit("triton is not installed: the kernels need it")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, "python", sys.version.split()[0])
PY
step "C++ kernels" 90 "$python" setup.py --quiet build_ext --inplace
step "tests of the kernels on the GPU" 150 "$python" -m pytest -q -p no:cacheprovider \
  tests/test_kernels.py tests/test_kernels_attention.py tests/test_attention.py tests/test_op_contracts.py
step "benchmarks of the kernels" 180 "$python" -m pytest -q -s -p no:cacheprovider bench/bench_kernels.py \
  -o python_files='bench_*.py' -o python_functions='bench_*' --benchmark-disable
step "network at published widths" 80 "$python" bench/bench_forward.py --repeats 7
step "iterations at Wan2.1 1.3B" 80 "$python" bench/bench_engine.py iteration --dtypes bfloat16 --steps 8 --iterations 2
step "the same, captured" 80 "$python" bench/bench_engine.py iteration --dtypes bfloat16 --steps 8 --iterations 2 --capture
step "embedded model" 60 "$python" bench/bench_engine.py generate import --dtypes bfloat16
step "reading weights" 30 "$python" bench/bench_load.py
step "memory over length" 60 "$python" bench/bench_memory.py --latents 2000
step "picture of the kernels" 20 "$python" bench/plot.py "$results/kernels_cuda.csv"
step "picture of the engine" 20 "$python" bench/plot.py engine "$results/engine_cuda.png"
if [ $# -gt 0 ]; then
  mkdir -p "$1" && cp "$results"/*_cuda.* "$1"/
fi
exit $status
