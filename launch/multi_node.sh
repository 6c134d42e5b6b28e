#!/usr/bin/env bash
# Several machines from one of them, through the deepspeed launcher and pdsh.
#
#   HOSTFILE=hosts launch/multi_node.sh CONFIG.yaml [--section.key value ...]
#
# It needs pdsh here, ssh without a password to every host (this one too), and this folder, its
# Python and run_dir under the same paths everywhere.
#
# HOSTFILE     lines such as `gpu1 slots=8` (default: hosts); the first host runs rank 0
# MASTER_ADDR  how the others reach the first host (default: its name in the hostfile)
# MASTER_PORT  a port that is free there (default 29500); another one for every job at a time
# IFNAME       network interface for NCCL and gloo, such as eth0 (default: they choose)
# PASS         more variables to set on every host, by name: "HF_HOME MY_FLAG"; no secrets, they
#              would stand in the process list
# SSH_LOST_S   seconds after which a host that has gone silent is given up (default 15)
set -euo pipefail
: "${HOSTFILE:=hosts}" "${MASTER_PORT:=29500}" "${IFNAME:=}" "${PASS:=}" "${SSH_LOST_S:=15}"

# deepspeed takes a hostfile it cannot find for one that says: this machine only.
found=$(python -m slap_ds.launch.environment "$HOSTFILE")
read -r ranks first others <<<"$found"
echo "$ranks ranks, rank 0 on $first" >&2

# Ranks on the other hosts would wait for a host that cannot be reached, until their time is up.
lost=$(for host in $first $others; do
  (ssh -o BatchMode=yes -o ConnectTimeout="$SSH_LOST_S" "$host" true 2>/dev/null || echo -n "$host ") &
done; wait)
if [ -n "$lost" ]; then
  echo "slap-ds: error: no ssh without a password to ${lost}of $HOSTFILE: mend that, or take them" \
    "out; slap-ds doctor --hostfile $HOSTFILE says more" >&2
  exit 1
fi

if [ -n "$IFNAME" ]; then export NCCL_SOCKET_IFNAME=$IFNAME GLOO_SOCKET_IFNAME=$IFNAME; fi

# pdsh starts a bare shell on every host; deepspeed sets there what this file names. It is open and
# has no name any more, so whatever ends the job leaves nothing behind.
file=$(mktemp)
exec 3<>"$file"
rm "$file"
export DS_ENV_FILE=/proc/self/fd/3
for name in PATH LD_LIBRARY_PATH OMP_NUM_THREADS DS_ACCELERATOR TORCH_EXTENSIONS_DIR \
  SLAP_ATTEMPT SLAP_CACHE_DIR HF_HOME HF_HUB_OFFLINE "${!NCCL_@}" "${!GLOO_@}" $PASS; do
  # deepspeed puts double quotes around what is not plain, and escapes nothing.
  # shellcheck disable=SC2001  # & means something else in bash from 5.2 on
  if [ -n "${!name:-}" ]; then sed 's/["\\$`]/\\&/g' <<<"$name=${!name}" >&3; fi
done
export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=$((SSH_LOST_S / 3)) -o ServerAliveCountMax=2"

exec python -m slap_ds.launch.forward_signal TERM \
  deepspeed --quiet --force_multi --hostfile "$HOSTFILE" --launcher pdsh \
  --master_addr "${MASTER_ADDR:-$first}" --master_port "$MASTER_PORT" \
  --module slap_ds train "$@"
