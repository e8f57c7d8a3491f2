#!/usr/bin/env bash
# Train on N ranks of this machine: launch/local.sh N CONFIG [key=value ...]
set -euo pipefail
if [ "$#" -lt 2 ]; then
  echo "usage: $0 RANKS CONFIG [key=value ...]" >&2
  exit 2
fi
ranks=$1
shift
exec accelerate launch --multi_gpu --num_machines 1 --num_processes "$ranks" --mixed_precision no --dynamo_backend no \
  -m rkdo_dist train "$@"
