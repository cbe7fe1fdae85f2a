#!/usr/bin/env bash
# Create .venv and install bigtune into it: tools/install.sh [EXTRA,…]
#
# Without an NVIDIA GPU a CPU build of torch is taken: from the indexes that pip is set up with, if they have
# one, else through uv, which knows where torch's CPU builds are. With a GPU the default (CUDA) build is.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
venv=.venv
stop() {
  echo "install: $*" >&2
  exit 1
}

# What must be on the system, before anything is downloaded.
python=
for candidate in ${PYTHON:-} python3 python3.12 python3.13 python3.11; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || stop "Python 3.11, 3.12 or 3.13 is needed: apt-get install python3 python3-venv"
"$python" -c 'import ensurepip, venv' 2>/dev/null || stop "Python's venv module is needed: apt-get install python3-venv"

# Nothing to do if this very pyproject.toml is installed with these extras.
stamp=$venv/installed-${extras//,/-}
if [ -x $venv/bin/bigtune ] && cmp -s pyproject.toml "$stamp"; then
  exit 0
fi
[ -x $venv/bin/python ] || "$python" -m venv $venv
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)

range=$(sed -n 's/^ *"\(torch>=[^"]*\)",$/\1/p' pyproject.toml)
cpu_version=2.13.0
if ! $venv/bin/python -c 'import torch' 2>/dev/null; then
  if [ -e /dev/nvidiactl ]; then
    echo "install: torch for this GPU"
    "${pip[@]}" "$range"
  else
    echo "install: torch for the CPU"
    if ! "${pip[@]}" "torch==$cpu_version+cpu" 2>/dev/null; then
      "${pip[@]}" uv
      VIRTUAL_ENV=$PWD/$venv $venv/bin/uv pip install --quiet --torch-backend cpu "$range" ||
        stop "no CPU build of torch for $("$python" --version) could be had; install one into $venv, then run this again"
    fi
  fi
fi
echo "install: bigtune${extras:+ with $extras}"
"${pip[@]}" --editable ".${extras:+[$extras]}"
cp pyproject.toml "$stamp"
