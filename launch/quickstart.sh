#!/usr/bin/env bash
# Sets everything up and trains the quickstart: FSLoRA on MiniLM and movie sentences, four minutes on two cores.
# usage: launch/quickstart.sh [--run-dir DIR] [--SETTING VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh
exec "${VENV:-.venv}/bin/fslora" train configs/quickstart.yaml "$@"
