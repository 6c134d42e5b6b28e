#!/usr/bin/env bash
# Fine-tune the small base model of the package with the deepspeed launcher: SLAP at 40 % pruning,
# then a random 60 % and all data, each once for as many steps and once for as many FLOPs.
# Usage: examples/demo.sh [RANKS [STEPS]]
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${1:-2}
steps=${2:-$(sed -n 's/^steps: //p' configs/demo.yaml)}
port=$((20000 + RANDOM % 20000))
rm -rf runs/demo

run() { # FOLDER METHOD STEPS TITLE
  printf '\n== %s, %s steps\n' "$4" "$3"
  deepspeed --quiet --num_gpus "$ranks" --master_port $((port++)) --module slap_ds \
    train configs/demo.yaml --run_dir "runs/demo/$1" --selection.method "$2" --steps "$3"
}
equal() { python examples/equal_cost.py runs/demo/slap "$1"; }

run slap slap "$steps" "SLAP: score every candidate, train 60 %"
run equal-cost/random random "$(equal random)" "a random 60 %, as many FLOPs"
run equal-cost/all full "$(equal full)" "all data, as many FLOPs"
run equal-steps/random random "$steps" "a random 60 %, as many steps"
run equal-steps/all full "$steps" "all data, as many steps"
echo
slap-ds compare runs/demo/{slap,equal-cost/random,equal-cost/all}
slap-ds compare runs/demo/{slap,equal-steps/random,equal-steps/all}
slap-ds export runs/demo/slap
slap-ds generate runs/demo/slap/model "How much is 7 times 8?" "Name the continent of Peru." \
  "Name the capital of Peru."
