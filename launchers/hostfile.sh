#!/usr/bin/env bash
# Workers on the hosts of a hostfile, over ssh: launchers/hostfile.sh RUN.yaml HOSTS [OPTION of bigtune launch …]
# A line of HOSTS is: NAME slots=N. All hosts need the same environment under the same path, and keys for ssh.
set -euo pipefail
# shellcheck source=launchers/environment.sh
source "$(dirname "$0")/environment.sh"
run=${1:?usage: launchers/hostfile.sh RUN.yaml HOSTS [OPTION …]}
hosts=${2:?usage: launchers/hostfile.sh RUN.yaml HOSTS [OPTION …]}
exec bigtune launch "$run" --hostfile "$hosts" --set launch.max_restarts=3 "${@:3}"
