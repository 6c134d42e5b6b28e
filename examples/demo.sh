#!/usr/bin/env bash
# Fine-tune a small LLaMA twice with the deepspeed launcher (SLAP at 40 % pruning, then all data),
# set the two runs side by side and let the exported model answer. Usage: examples/demo.sh [RANKS]
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${1:-2}
port=$((20000 + RANDOM % 20000))

run() { # NAME METHOD
  rm -rf "runs/demo-$1"
  echo "== training: $2"
  deepspeed --num_gpus "$ranks" --master_port $((port++)) --module slap_ds train configs/demo.yaml \
    --run_dir "runs/demo-$1" --selection.method "$1" 2>&1 | grep --line-buffered -v '\[INFO\]\|WARNING'
}

run slap "SLAP, 40 % of the candidates pruned"
run full "all data"
slap-ds compare runs/demo-slap runs/demo-full
slap-ds export runs/demo-slap
slap-ds generate runs/demo-slap/model "What is the capital of France?"
