#!/usr/bin/env bash
# torchrun: the same line on every machine, with its own NODE_RANK; no ssh between them.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=gpu1 launch/torchrun.sh CONFIG.yaml [--section.key value ...]
#
# GPUS         ranks on this machine (default: gpu, one for each; on CPU give a number)
# NNODES       how many machines (default 1)
# NODE_RANK    which one this is, from 0 (default 0)
# MASTER_ADDR  name or address of machine 0 (default 127.0.0.1, right for one machine only)
# MASTER_PORT  a port that is free there (default 29500); another one for every job at a time
# IFNAME       network interface for NCCL and gloo, such as eth0 (default: they choose)
# PET_SHUTDOWN_TIMEOUT   seconds that torchrun gives the ranks to save after a signal (default 600;
#                        torch 2.11 does not know it: 30)
# PET_SIGNALS_TO_HANDLE  the signals it passes on (default: its own and SIGUSR1, which kills it else)
set -euo pipefail
: "${GPUS:=gpu}" "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}"
: "${MASTER_PORT:=29500}" "${IFNAME:=}"
: "${PET_SHUTDOWN_TIMEOUT:=600}"
: "${PET_SIGNALS_TO_HANDLE:=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"

if [ "$NNODES" -gt 1 ] && [ "$MASTER_ADDR" = 127.0.0.1 ]; then
  echo "NNODES is $NNODES and MASTER_ADDR is not set: export the name of machine 0" >&2
  exit 2
fi
if [ -n "$IFNAME" ]; then export NCCL_SOCKET_IFNAME=$IFNAME GLOO_SOCKET_IFNAME=$IFNAME; fi

export PET_SHUTDOWN_TIMEOUT PET_SIGNALS_TO_HANDLE
exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
  -m slap_ds train "$@"
