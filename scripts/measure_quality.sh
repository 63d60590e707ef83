#!/usr/bin/env bash
# Perplexity of SmolLM2-135M at g=4, n=1024 (2.63 bits per weight), clustered and tuned, for three seeds of one recipe:
#   scripts/measure_quality.sh default|paper OUT
# Calibration: the first 16 x 512 tokens of the fixed set; 4 epochs, batch 1. Score: the first 8,192 tokens of wiki_test
# in windows of 512. Takes about an hour on two cores. Prints one line per run, and leaves every JSON in OUT.
set -euo pipefail
recipe=$1 out=$2
model=$(python -c 'from cluscomp_jax.cli.demo import find_model; print(find_model())')
data=$(python -c 'from cluscomp_jax import data; print(data.path("wiki_train").parent)')
mkdir -p "$out"
for stage in clustered tuned; do
  for seed in 1 2 3; do
    options=(--calibration "$data/wiki_train.txt.gz" --samples 16 --length 512 --starts "$data/calibration_starts.txt")
    case "$recipe-$stage" in
      *-tuned) options+=(--epochs 4) ;;
      paper-clustered) options=(--no-tuning) ;; # blind k-means reads no calibration text
      *) options+=(--no-tuning) ;;
    esac
    name="$recipe-$seed-$stage"
    cluscomp compress "$model" --recipe "$recipe" --g 4 --num-codes 1024 --seed "$seed" \
      "${options[@]}" --out "$out/$name" --json >"$out/$name.log"
    cluscomp evaluate "$out/$name" --text "$data/wiki_test.txt.gz" --tokens 8192 --context 512 --json \
      | tail -n 1 >"$out/$name.json"
    echo "$name $(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["perplexity"])' "$out/$name.json")"
  done
done
