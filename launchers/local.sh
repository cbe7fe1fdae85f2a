#!/usr/bin/env bash
# Workers on this host through DeepSpeed's own command: launchers/local.sh RUN.yaml [RANKS] [--set KEY=VALUE …]
# The same as `bigtune train RUN.yaml --ranks RANKS`, for those who start everything with `deepspeed`.
set -euo pipefail
# shellcheck source=launchers/environment.sh
source "$(dirname "$0")/environment.sh"
run=${1:?usage: launchers/local.sh RUN.yaml [RANKS] [--set KEY=VALUE …]}
ranks=${2:-2}
exec deepspeed --num_accelerators "$ranks" --module bigtune.train "$run" "${@:3}"
