# shellcheck shell=bash
# What every launcher here sets first; edit it once for your cluster. Others source it.

# The environment that has bigtune: a virtual environment, or `module load …` and `conda activate …`.
venv=${BIGTUNE_VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}
if [ -f "$venv/bin/activate" ]; then
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
fi

# Nothing is fetched while a job runs.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export TOKENIZERS_PARALLELISM=false

# Network: bigtune finds the interface that reaches the other hosts. Name another here if you know better.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
