#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster through xpk, in an image that holds this package and the config.
# usage: CLUSTER=NAME TPU_TYPE=v5litepod-16 IMAGE=IMAGE launch/xpk.sh WORKLOAD CONFIG --run-dir SHARED_FOLDER [...]
# xpk starts it again where a host is taken away, and the run goes on from its last checkpoint.
set -euo pipefail
: "${CLUSTER:?set CLUSTER}" "${TPU_TYPE:?set TPU_TYPE, such as v5litepod-16}" "${IMAGE:?set IMAGE}"
workload=${1:?usage: launch/xpk.sh WORKLOAD CONFIG --run-dir SHARED_FOLDER [--SETTING VALUE ...]}
shift
exec xpk workload create --cluster "$CLUSTER" --tpu-type "$TPU_TYPE" --docker-image "$IMAGE" --max-restarts 10 \
  --workload "$workload" --command "fslora train $(printf '%q ' "$@")--distributed"
