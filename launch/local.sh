#!/usr/bin/env bash
# Train on N ranks of this machine: launch/local.sh N CONFIG [key=value ...]
#   ACCELERATE_CONFIG   strategy; default: configs/accelerate/ddp.yaml, or single.yaml for one rank
#   PRECISION           of the encoder: no (default), bf16, fp16
#   PORT                of the rendezvous; default: one that is free
set -euo pipefail
if [ "$#" -lt 2 ]; then
  echo "usage: $0 RANKS CONFIG [key=value ...]" >&2
  exit 2
fi
ranks=$1
shift
strategy=ddp
[ "$ranks" != 1 ] || strategy=single
here=$(cd "$(dirname "$0")/.." && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# On CPUs gloo's remarks; NCCL's warnings are worth reading.
command -v nvidia-smi >/dev/null || export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
exec accelerate launch --config_file "${ACCELERATE_CONFIG:-$here/configs/accelerate/$strategy.yaml}" \
  ${PRECISION:+--mixed_precision "$PRECISION"} --num_processes "$ranks" --main_process_port "${PORT:-0}" -m rkdo_dist train "$@"
