#!/usr/bin/env bash
# Sets everything up and passes the checks: format, lint, types, import direction, tests, examples, a real run.
# usage: launch/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh test
bin=$PWD/${VENV:-.venv}/bin
# The report's page is tested in a browser, where there is one or it can be had.
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y --no-install-recommends chromium; } \
    >/dev/null 2>&1 || echo "no Chromium: the tests of the page in a browser are skipped"
fi
say() { printf '\n== %s\n' "$*"; }

say format and lint
"$bin/ruff" format --check .
"$bin/ruff" check .
say types
"$bin/basedpyright" --pythonpath "$bin/python"
say import direction
"$bin/lint-imports"

say a real run, from text to an adapter
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
"$bin/fslora" train configs/quickstart.yaml --run-dir "$run/run" --federation.num-rounds 2 \
  --federation.local-steps 1 --data.test-examples 64 --evaluate-every 1
"$bin/fslora" eval "$run/run"
"$bin/fslora" export "$run/run" --out "$run/client" --client 3

say tests and examples
# Files in their order: the slow ones are spread over it, while xdist would leave those with few tests for the end.
"$bin/pytest" -n auto --dist loadfile --no-loadscope-reorder --durations 20 --doctest-modules fslora_jax tests
