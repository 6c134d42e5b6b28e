#!/usr/bin/env bash
# Several machines through OpenMPI's mpirun, which only starts the ranks: NCCL or gloo carry data.
#
#   HOSTFILE=hosts launch/openmpi.sh CONFIG.yaml [--section.key value ...]
#
# It needs OpenMPI everywhere, ssh without a password to every host, and this folder, its Python
# and run_dir under the same paths everywhere. mpi4py is not needed.
#
# HOSTFILE     lines such as `gpu1 slots=8` (default: hosts); the first host runs rank 0
# MASTER_ADDR  how the others reach the first host (default: its name in the hostfile)
# MASTER_PORT  a port that is free there (default 29500); another one for every job at a time
# IFNAME       network interface for mpirun, NCCL and gloo, such as eth0 (default: they choose)
# PASS         more variables to set on every host, by name: "HF_HOME MY_FLAG"
# MPIRUN_ARGS  more options for mpirun
set -euo pipefail
: "${HOSTFILE:=hosts}" "${MASTER_PORT:=29500}" "${IFNAME:=}" "${PASS:=}" "${MPIRUN_ARGS:=}"

found=$(python -m slap_ds.launch.environment "$HOSTFILE")
read -r ranks first _ <<<"$found"
export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT

# Cores are torch's to share out; every host is reached from here, not through another host.
options=(-n "$ranks" --hostfile "$HOSTFILE" --bind-to none --mca plm_rsh_no_tree_spawn 1)
if [ -n "$IFNAME" ]; then
  export NCCL_SOCKET_IFNAME=$IFNAME GLOO_SOCKET_IFNAME=$IFNAME
  options+=(--mca oob_tcp_if_include "$IFNAME" --mca btl_tcp_if_include "$IFNAME")
fi
# Root is usual inside containers, and mpirun refuses it unless told.
if [ "$(id -u)" = 0 ]; then options+=(--allow-run-as-root); fi
for name in MASTER_ADDR MASTER_PORT PATH LD_LIBRARY_PATH OMP_NUM_THREADS DS_ACCELERATOR \
  TORCH_EXTENSIONS_DIR SLAP_ATTEMPT SLAP_CACHE_DIR HF_HOME HF_HUB_OFFLINE PYTHONWARNINGS \
  "${!NCCL_@}" "${!GLOO_@}" $PASS; do
  if [ -n "${!name:-}" ]; then options+=(-x "$name"); fi
done

# shellcheck disable=SC2086  # MPIRUN_ARGS is a list of words
exec python -m slap_ds.launch.forward_signal USR1 mpirun "${options[@]}" $MPIRUN_ARGS \
  "$(command -v python)" -u -m slap_ds train "$@"
