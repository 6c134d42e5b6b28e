#!/usr/bin/env bash
# The Debian packages that tests marked `nodes` need; as root.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
missing=()
for package in iproute2 openssh-server pdsh openmpi-bin mpich slurmctld slurmd slurm-client \
  numactl shellcheck; do
  if ! dpkg -s "$package" >/dev/null 2>&1; then missing+=("$package"); fi
done
if [ ${#missing[@]} = 0 ]; then exit 0; fi
# The packages would start their daemons here; the tests start their own, inside the nodes.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod +x /usr/sbin/policy-rc.d
trap 'rm -f /usr/sbin/policy-rc.d' EXIT
apt-get -q update
apt-get -q install -y --no-install-recommends "${missing[@]}"
