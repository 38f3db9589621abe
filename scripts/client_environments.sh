#!/usr/bin/env bash
# Environments of the clients that tests/clients/real drives: client_environments.sh PYTHON FOLDER
# Each sees the packages of PYTHON's environment behind its own, so that torch is not installed a second time.
set -euo pipefail
python=$1 folder=$2
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
