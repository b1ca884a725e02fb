#!/usr/bin/env bash
# Trains on all workers of a TPU VM slice, which has this checkout at ~/fslora_jax (launch/setup.sh tpu in each).
# usage: TPU=NAME ZONE=ZONE launch/tpu_pod.sh CONFIG --run-dir SHARED_FOLDER [--SETTING VALUE ...]
# SHARED_FOLDER is one that all workers see, such as a mounted bucket. Run it again to go on from the last checkpoint.
set -euo pipefail
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
command="cd ~/fslora_jax && .venv/bin/fslora train $(printf '%q ' "$@")--distributed"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all --command "$command"
