#!/usr/bin/env bash
# Llama-2-70B (or -3) on one RTX A6000 of 48 GB: plan, compress, evaluate. Stopped at any moment, the same command resumes.
#
#   scripts/compress_70b_a6000.sh MODEL OUT [BITS]
#
# MODEL  folder or hub id of the original, 16-bit safetensors
# OUT    folder of the result; needs room for it and, meanwhile, for the activations (the plan says how much)
# BITS   4, 3, 2 or 1 (default 2)
#
# Needs pip install ".[cli,cuda12]", and "[aot]" for the plan, which takes minutes and no GPU.
# FAMILY=llama3 for Llama-3; RECIPE=paper for the official recipe, which needs less memory.
set -euo pipefail

model=${1:?which model?} out=${2:?into which folder?} bits=${3:-2}
family=${FAMILY:-llama2} recipe=${RECIPE:-default}
here=$(cd "$(dirname "$0")/.." && pwd)
size=$([ "$bits" = 1 ] && echo 70b_ || true)
config=$here/configs/llama_${size}${bits}bit.toml
preset=$([ "$family" = llama3 ] && echo llama-3-70b || echo llama-2-70b)

# What `plan` counts with: JAX may take 92% of the card, the rest is the CUDA context's.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92

JAX_PLATFORMS=cpu cluscomp plan "$preset" --target a6000 --config "$config" --recipe "$recipe" \
  --memory-fraction "$XLA_PYTHON_CLIENT_MEM_FRACTION"
# A finished result is not made again: the last run may have been stopped in the evaluation.
[ -f "$out/manifest.json" ] ||
  cluscomp compress "$model" --out "$out" --config "$config" --recipe "$recipe" --calibration wikitext2
cluscomp evaluate "$out" --text wikitext2 --context 2048 --dtype bfloat16
