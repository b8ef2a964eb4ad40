#!/usr/bin/env bash
# What needs a GPU, in commands of which a quarter of an hour holds two, from a source checkout and without a network:
#   bench/gpu.sh first      do kernels, graphs and streams run, and are they right? (bench/first_minutes.py)
#   bench/gpu.sh second     kernels, the 1.3B network and a whole video against their rivals; memory; the VAE
#   bench/gpu.sh third      what kernels are tuned by (bench/tuning.py), and all of their tests
#   bench/gpu.sh COMMAND --plan     the stages and the seconds each may take at most, and runs nothing
# Every stage is a process of its own with a limit, and saves its rows as it makes them: one that fails, hangs or is
# killed costs the others nothing. `python bench/result_files.py FOLDER` then appends the rows of that folder to
# bench/results. Of the environment:
#   PYTHON        the interpreter, with its torch and Triton (python3)
#   OUT           the folder of the results, at most 8 files (out/gpu-<command>-<time>)
#   WHEELS        a folder of wheels to use beside what is installed (bench/wheels): ftfy, wcwidth; diffusers,
#                 importlib_metadata, requests, certifi, charset_normalizer, idna, urllib3. Nothing fails without them
#   MIGA_COMMIT   the commit, where there is no git
#   SMALL=1       small sizes, and a CPU will do: to find slips before a GPU's minutes are spent on them
set -uo pipefail
set -m # each stage a group of its own, which an interrupt reaches
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command=${1:-}
python=${PYTHON:-python3}
kill_after=5  # seconds from the interrupt to the kill

# name, seconds, arguments of the interpreter
first_stages=(
  "environment 12 bench/first_minutes.py env"
  "ops 28 bench/first_minutes.py ceilings ops"
  "attention 28 bench/first_minutes.py attention"
  "tiny 42 bench/first_minutes.py tiny"
  "whole 85 bench/first_minutes.py whole"
  "tests 45 bench/first_minutes.py tests"
)
second_stages=(
  "kernels 130 bench/bench_kernels.py --dtypes bfloat16"
  "forward 100 bench/bench_forward.py 1.3B --dtypes bfloat16 --repeats 5"
  "generate 55 bench/bench_engine.py generate --dtypes bfloat16 --runs 2 --no-peaks"
  "memory 30 bench/bench_memory.py --latents 1200"
  "vae 20 bench/first_minutes.py vae"
)
third_stages=(
  "configurations 75 bench/tuning.py attention"
  "bandwidth 55 bench/tuning.py memory"
  "profile 40 bench/tuning.py forward"
  "tests 75 bench/first_minutes.py tests"
)
if [ "${SMALL:-}" = 1 ]; then
  second_stages[2]+=" --frames 21"
  second_stages[3]="memory 30 bench/bench_memory.py --latents 60"
fi

case $command in
  first) stages=("${first_stages[@]}") ;;
  second) stages=("${second_stages[@]}") ;;
  third) stages=("${third_stages[@]}") ;;
  *) echo "usage: bench/gpu.sh first|second|third [--plan]" >&2; exit 2 ;;
esac

if [ "${2:-}" = --plan ]; then
  for stage in "wheels 10" "${stages[@]}"; do
    read -r name limit _ <<<"$stage"
    echo "$name $limit+$kill_after"
  done
  exit 0
fi

export OUT=${OUT:-out/gpu-$command-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
log=$OUT/$command.log rows=$OUT/$command.jsonl
scratch=$(mktemp -d)
installed=${TMPDIR:-/tmp}/miga-wheels-$(id -u)  # stays for the command that follows on the same machine
export MIGA_RESULTS=$OUT PYTHONUNBUFFERED=1
export MIGA_NEEDS_GPU=1
export PYTHONPATH="$PWD:$PWD/bench:$PWD/tests:$installed${PYTHONPATH:+:$PYTHONPATH}"
building= stage_id= status=0

say() { # a row of this command, printed and saved
  echo "$1" | tee -a "$rows"
}

finish() { # however the command ends: at most 8 files of at most 16 MiB, all rows among them
  trap - EXIT INT TERM HUP
  [ -z "$stage_id" ] || kill -KILL -- "-$stage_id" 2>/dev/null
  if [ -n "$building" ]; then
    kill -KILL -- "-$building" 2>/dev/null
    wait "$building" 2>/dev/null
    cat "$scratch/build.log" >>"$log" 2>/dev/null
  fi
  if [ "$(find "$OUT" -type f | wc -l)" -gt 8 ] || [ -n "$(find "$OUT" -type f -size +15M)" ]; then
    tar -czf "$scratch/all.tar.gz" -C "$OUT" . && find "$OUT" -mindepth 1 -delete &&
      mv "$scratch/all.tar.gz" "$OUT/$command.tar.gz"
  fi
  rm -rf "$scratch"
  echo "== results in $OUT: $(cd "$OUT" && echo *)"
  exit "$status"
}
trap 'finish' EXIT
trap 'status=130; finish' INT TERM HUP

stage() { # name seconds command...
  local name=$1 limit=$2 start=$SECONDS before code
  shift 2
  before=$(wc -c <"$log")
  # Into a file, not a pipe, which a process that outlives its stage would hold open. In the background, so that this
  # shell answers a signal at once.
  timeout -k "$kill_after" --signal=INT "$limit" "$@" >>"$log" 2>&1 &
  stage_id=$!
  wait "$stage_id"
  code=$?
  stage_id=
  tail -c "+$((before + 1))" "$log" | cut -c -240 | tail -n 12
  say "{\"stage\": \"$name\", \"status\": $code, \"seconds\": $((SECONDS - start)), \"limit\": $limit}"
  return "$code"
}

build() { # the C++ kernels, beside everything else; moved into place whole
  set +m # all of it in one group
  timeout --foreground 200 "$python" setup.py --quiet build_ext --build-lib "$scratch/lib" \
    --build-temp "$scratch/temp" >"$scratch/build.log" 2>&1
  local code=$?
  [ "$code" -ne 0 ] || [ -e miga_engine/_C.so ] || find "$scratch/lib" -name '_C*.so' -exec mv {} miga_engine/ \;
  say "{\"stage\": \"C++ kernels\", \"status\": $code, \"seconds\": $SECONDS}"
}

install_wheels() { # into a folder of their own, so that nothing installed is touched
  local wheels=${WHEELS:-bench/wheels}
  compgen -G "$wheels/*.whl" >/dev/null || return 0
  [ ! -d "$installed" ] || return 0
  stage wheels 10 "$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile \
    --target "$scratch/wheels" "$wheels"/*.whl && mv "$scratch/wheels" "$installed"
}

: >>"$log"
if [ "${SMALL:-}" = 1 ] && [ ! -e /dev/nvidiactl ]; then
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
  export TRITON_INTERPRET=0 # whatever device files the tests look for
fi
install_wheels || status=1
if [ "$command" = first ]; then
  build &
  building=$!
fi
for entry in "${stages[@]}"; do
  read -r -a words <<<"$entry"
  stage "${words[0]}" "${words[1]}" "$python" "${words[@]:2}"
  code=$?
  [ "$code" -eq 0 ] || status=1
  [ "$code" -ne 3 ] || { status=3; break; } # no GPU: bench/result_files.py has said so
done
