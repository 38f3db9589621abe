#!/usr/bin/env bash
# Environments of the clients that tests/clients/real drives: client_environments.sh PYTHON FOLDER NODE
# Those of Python see the packages of PYTHON's environment behind their own, so that torch is not installed a second time.
# NODE is a folder with node and npm.
set -euo pipefail
python=$1 folder=$2 node=$3
here=$(cd "$(dirname "$0")/../tests/clients/real" && pwd)
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
make_one() {
    local name=$1; shift
    [ -e "$folder/$name/.made" ] && return
    "$python" -m venv "$folder/$name"
    "$folder/$name/bin/python" - "$site" <<'PY'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_paths()["purelib"], "behind.pth").write_text(sys.argv[1] + "\n")
PY
    "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    touch "$folder/$name/.made"
}
make_one sdks 'anthropic>=1,<3' 'litellm>=1.80,<2'
make_one lm-eval 'lm_eval[api]>=0.4.9,<0.5'
make_one langgraph 'langchain>=1,<2' 'langchain-openai>=1,<2' 'langgraph>=1,<2'
make_one inspect 'inspect-ai>=0.3.100,<0.4'
make_one proxy 'litellm[proxy]>=1.80,<2'
if [ ! -e "$folder/node/.made" ]; then
    mkdir -p "$folder/node"
    cp "$here"/node/package.json "$here"/node/package-lock.json "$folder/node"
    # Node looks for packages in the folders above a script, so the scripts are seen from here.
    ln -sfn "$here/drivers" "$folder/node/drivers"
    (cd "$folder/node" && PATH="$node:$PATH" npm ci --no-fund --no-audit --loglevel error)
    touch "$folder/node/.made"
fi
