#!/usr/bin/env bash
# Several machines through MPICH's or Intel MPI's mpiexec (hydra), which only starts the ranks.
#
#   HOSTFILE=hosts launch/mpich.sh CONFIG.yaml [--section.key value ...]
#
# It needs MPICH or Intel MPI everywhere, ssh without a password to every host, and this folder, its
# Python and run_dir under the same paths everywhere. mpi4py is not needed.
#
# HOSTFILE     lines such as `gpu1 slots=8` (default: hosts); the first host runs rank 0
# MASTER_ADDR  how the others reach the first host (default: its name in the hostfile)
# MASTER_PORT  a port that is free there (default 29500); another one for every job at a time
# IFNAME       network interface for mpiexec, NCCL and gloo, such as eth0 (default: they choose)
# PASS         more variables to set on every host, by name: "HF_HOME MY_FLAG"
# MPIEXEC      the launcher (default mpiexec; mpiexec.hydra where OpenMPI's mpiexec is installed too)
set -euo pipefail
: "${HOSTFILE:=hosts}" "${MASTER_PORT:=29500}" "${IFNAME:=}" "${PASS:=}" "${MPIEXEC:=mpiexec}"

found=$(python -m slap_ds.launch.environment "$HOSTFILE")
read -r ranks first _ <<<"$found"
export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT

# hydra writes `gpu1:8` where deepspeed and OpenMPI write `gpu1 slots=8`.
# The file is open and has no name any more, so whatever ends the job leaves nothing behind.
machines=$(mktemp)
exec 3<>"$machines"
rm "$machines"
sed -nE 's/^([^#[:space:]]+)[[:space:]]+slots=([0-9]+).*/\1:\2/p' "$HOSTFILE" >&3
options=(-n "$ranks" -f /proc/self/fd/3)
if [ -n "$IFNAME" ]; then
  export NCCL_SOCKET_IFNAME=$IFNAME GLOO_SOCKET_IFNAME=$IFNAME
  options+=(-iface "$IFNAME")
fi
for name in MASTER_ADDR MASTER_PORT PATH LD_LIBRARY_PATH OMP_NUM_THREADS DS_ACCELERATOR \
  TORCH_EXTENSIONS_DIR SLAP_ATTEMPT SLAP_CACHE_DIR HF_HOME HF_HUB_OFFLINE PYTHONWARNINGS \
  "${!NCCL_@}" "${!GLOO_@}" $PASS; do
  if [ -n "${!name:-}" ]; then options+=(-genv "$name" "${!name}"); fi
done

exec python -m slap_ds.launch.forward_signal USR1 "$MPIEXEC" "${options[@]}" \
  "$(command -v python)" -u -m slap_ds train "$@"
