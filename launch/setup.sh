#!/usr/bin/env bash
# Makes the virtual environment .venv (or $VENV) beside this folder and installs the package in it.
# usage: launch/setup.sh [EXTRA]      EXTRA: test, cuda, tpu, tensorboard, wandb, privacy
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# Python compiles what is imported, when it is; to compile all of it takes two cores a minute.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable ".${1:+[$1]}"
