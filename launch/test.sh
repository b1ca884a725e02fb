#!/usr/bin/env bash
# Sets everything up and passes the checks: format, lint, types, import direction, tests, examples, a real run.
# usage: launch/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/${VENV:-.venv}/bin
say() { printf '\n== %s\n' "$*"; }

# A browser for the report's page and a SLURM for its scripts, where there are any or they can be had.
debian_packages() {
  command -v chromium && PATH=$PATH:/usr/sbin command -v slurmctld && return
  [ "$(id -u)" = 0 ] && command -v apt-get && timeout 300 apt-get update || return
  for packages in chromium "munge slurmctld slurmd slurm-client"; do
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -y --no-install-recommends $packages || missing=yes
  done
  [ -z "${missing:-}" ]
}
static_checks() {
  say format and lint
  "$bin/ruff" format --check .
  "$bin/ruff" check .
  say types
  "$bin/basedpyright" --pythonpath "$bin/python"
  say import direction
  "$bin/lint-imports"
}
work=$(mktemp -d)
trap 'rm -rf "$work"; kill $(jobs -p) 2>/dev/null || true' EXIT

debian_packages >/dev/null 2>&1 &
packages=$!
launch/setup.sh test
wait "$packages" || echo "no Chromium or no SLURM: the tests that need them are skipped"

# The checks that use one core go on beside the run.
static_checks >"$work/checks" 2>&1 &
checks=$!
say a real run, from text to an adapter
"$bin/fslora" train configs/quickstart.yaml --run-dir "$work/run" --federation.num-rounds 2 \
  --federation.local-steps 1 --data.test-examples 64 --evaluate-every 1
"$bin/fslora" eval "$work/run"
"$bin/fslora" export "$work/run" --out "$work/client" --client 3
wait "$checks" && passed=yes || passed=no
cat "$work/checks"
[ "$passed" = yes ]

say tests and examples
# Files in their order: the slow ones are spread over it, while xdist would leave those with few tests for the end.
"$bin/pytest" -n auto --dist loadfile --no-loadscope-reorder --durations 20 --doctest-modules fslora_jax tests
