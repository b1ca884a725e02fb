#!/usr/bin/env bash
# Trains with several processes of this machine that run as one; a crash of any of them ends all.
# usage: launch/several.sh N CONFIG --run-dir DIR [--SETTING VALUE ...]
# Run it again to go on from the last checkpoint. SIGTERM and Ctrl-C let the round end and save it, and the script ends after
# its processes, with code 143. FSLORA and PORT may be set.
set -euo pipefail
count=${1:?usage: launch/several.sh N CONFIG --run-dir DIR [--SETTING VALUE ...]}
shift
[[ $count =~ ^[1-9][0-9]*$ ]] || { echo "several.sh: N: found '$count', expected a number of processes" >&2; exit 2; }
fslora=${FSLORA:-$(dirname "$0")/../.venv/bin/fslora}
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-9876} JAX_NUM_PROCESSES=$count
started=()
trap 'kill "${started[@]}" 2>/dev/null || true' EXIT
leave() {
  kill -TERM "${started[@]}" 2>/dev/null || true
  wait
  exit 143
}
trap leave TERM INT
for ((number = 0; number < count; number++)); do
  JAX_PROCESS_ID=$number "$fslora" train "$@" --distributed &
  started+=($!)
done
for ((number = 0; number < count; number++)); do
  wait -n || { # the first that fails ends the script, and with it the others
    code=$?
    [ "$code" = 2 ] || echo "several.sh: a process ended with code $code; the same command goes on from the last checkpoint" >&2
    exit "$code"
  }
done
