#!/usr/bin/env bash
# Makes the virtual environment .venv (or $VENV) beside this folder and installs the package in it.
# usage: launch/setup.sh [EXTRA]      EXTRA: test, cuda, tpu, tensorboard, wandb, privacy
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable ".${1:+[$1]}"
# On all cores, where pip takes one; some packages have files that are no Python.
"$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || true
