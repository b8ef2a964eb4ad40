#!/usr/bin/env bash
# The whole recipe in one go, for an accelerator: `bench/tiny/train.sh WORK`; VAE 3 minutes, DiT 5, reader 1. The rich world
# at 96×160: VAE from the shipped weights, latents, a fresh DiT, the reader, weights in WORK/out. `SMALL=1` proves it on a CPU
# in about two minutes. Of it an H100 has run the VAE for 18 seconds (29 steps, compiling included) and the latents (50 ms a
# clip); the DiT was still compiling after 50 seconds there, so here it is not compiled.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${1:?give the folder that the steps leave their states in}
python=${PYTHON:-python}
if [ "${SMALL:-}" ]; then
    compile= device=cpu vae=0.15 clips=4 per_part=2 dit=0.15 reader=0.05 batch=2 vae_batch=1 shape="--height 48 --width 80 --dim 128 --ffn-dim 256 --layers 2"
else
    compile=--compile device=${DEVICE:-cuda} vae=3 clips=3000 per_part=250 dit=5 reader=1 batch=64 vae_batch=4 shape="--height 96 --width 160 --dim 256 --ffn-dim 1024 --layers 8"
fi
step() { echo "== $*"; "$python" -m bench.tiny.train "$@" --work "$work" --device "$device"; }
# shellcheck disable=SC2086
step vae --rich $shape $compile --minutes "$vae" --batch "$vae_batch"
step cache --clips "$clips" --per-part "$per_part"
step dit --fresh --minutes "$dit" --batch "$batch"
step reader --minutes "$reader"
step export --folder "$work/out"
