#!/usr/bin/env bash
# Installs the pinned torch as a CPU build, so that no install of ours ever pulls the registry's CUDA build.
# usage: install_torch.sh PYTHON TORCH_INDEX   (a file that pip finds locally wins over the index)
set -euo pipefail
python=$1 index=$2
version=$(sed -n 's/^torch==//p' constraints.txt)

if "$python" -m pip install --quiet --no-index --no-deps --dry-run "torch==$version" >/dev/null 2>&1; then
    # With --no-deps nothing but the local file can be chosen; what torch needs comes from the registry after it.
    "$python" -m pip install --quiet --no-index --no-deps "torch==$version"
    "$python" -m pip install --quiet -c constraints.txt "torch==$version"
else
    "$python" -m pip install --quiet --index-url "$index" "torch==$version"
fi
"$python" -c 'import torch; print("torch", torch.__version__)'
