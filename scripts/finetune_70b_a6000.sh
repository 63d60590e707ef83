#!/usr/bin/env bash
# A compressed Llama-2-70B (or -3) on one RTX A6000 of 48 GB: plan, finetune, evaluate. Stopped at any moment, the same
# command resumes.
#
#   scripts/finetune_70b_a6000.sh MODEL DATA NEW [BITS]
#
# MODEL  compressed folder, as scripts/compress_70b_a6000.sh makes it
# DATA   what it is trained on: .jsonl of conversations or texts, .txt, .npy, or a dataset's name
# NEW    folder of the result
# BITS   of MODEL: 4, 3, 2 or 1 (default 2); decides what the plan reckons with
#
# Needs pip install ".[cli,cuda12]", and "[aot]" for the plan, which takes minutes and no GPU; and host memory
# for the compressed model, of which a copy is there while it is read. FAMILY=llama3 for Llama-3; STEPS (default 1000).
set -euo pipefail

model=${1:?which compressed folder?} data=${2:?which data?} new=${3:?into which folder?} bits=${4:-2}
family=${FAMILY:-llama2} steps=${STEPS:-1000}
here=$(cd "$(dirname "$0")/.." && pwd)
size=$([ "$bits" = 1 ] && echo 70b_ || true)
config=$here/configs/llama_${size}${bits}bit.toml
settings=$here/configs/finetune/llama2_70b.toml
preset=$([ "$family" = llama3 ] && echo llama-3-70b || echo llama-2-70b)

# What `plan` counts with: JAX may take 92% of the card, the rest is the CUDA context's.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92

JAX_PLATFORMS=cpu cluscomp plan "$preset" --target a6000 --config "$config" \
  --finetune-config "$settings" --memory-fraction "$XLA_PYTHON_CLIENT_MEM_FRACTION"
# A finished result is not made again: the last run may have been stopped in the evaluation.
[ -f "$new/manifest.json" ] ||
  cluscomp finetune "$model" --data "$data" --out "$new" --config "$settings" --steps "$steps"
cluscomp evaluate "$new" --text wikitext2 --context 2048 --dtype bfloat16
