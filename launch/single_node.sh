#!/usr/bin/env bash
# One machine, every GPU it has, through the deepspeed launcher.
#
#   launch/single_node.sh CONFIG.yaml [--section.key value ...]
#
# GPUS         how many to use (default: all; on CPU: how many ranks)
# MASTER_PORT  a free port of this machine (default 29500); another one for every job at a time
set -euo pipefail
: "${GPUS:=-1}" "${MASTER_PORT:=29500}"

exec deepspeed --quiet --num_gpus "$GPUS" --master_port "$MASTER_PORT" --module slap_ds train "$@"
