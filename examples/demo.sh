#!/usr/bin/env bash
# Fine-tune a small LLaMA twice with the deepspeed launcher (SLAP at 40 % pruning, then all data),
# set the two runs side by side and let the exported model answer. Usage: examples/demo.sh [RANKS]
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${1:-2}
port=$((20000 + RANDOM % 20000))
# torch 2.13 warns about names that DeepSpeed 0.19 still uses.
export PYTHONWARNINGS=ignore::FutureWarning

run() { # METHOD TITLE
  rm -rf "runs/demo-$1"
  printf '\n== %s\n' "$2"
  deepspeed --quiet --num_gpus "$ranks" --master_port $((port++)) --module slap_ds \
    train configs/demo.yaml --run_dir "runs/demo-$1" --selection.method "$1"
}

run slap "SLAP: score every candidate, train 60 % of them"
run full "all data: train every candidate"
echo
slap-ds compare runs/demo-slap runs/demo-full
slap-ds export runs/demo-slap
slap-ds generate runs/demo-slap/model "What is the capital of France?"
