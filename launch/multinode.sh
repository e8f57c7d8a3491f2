#!/usr/bin/env bash
# The launcher of one node; run it on every node, with NODE counting from 0:
#   launch/multinode.sh NODES NODE ADDRESS RANKS CONFIG [key=value ...]
# ADDRESS is node 0 as the others see it, RANKS the processes of each node.
#   ACCELERATE_CONFIG   strategy; default: configs/accelerate/ddp.yaml
#   PRECISION           of the encoder: no (default), bf16, fp16
#   PORT                of the rendezvous on node 0; default 29500
# SIGTERM and SIGUSR1 are passed on to the ranks as SIGUSR1: they finish the step, save and end with 75.
set -euo pipefail
if [ "$#" -lt 5 ]; then
  echo "usage: $0 NODES NODE ADDRESS RANKS CONFIG [key=value ...]" >&2
  exit 2
fi
nodes=$1 node=$2 address=$3 ranks=$4
shift 4
here=$(cd "$(dirname "$0")/.." && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# On CPUs gloo's remarks; NCCL's warnings are worth reading.
command -v nvidia-smi >/dev/null || export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # schedulers set them per node; the launcher sets them per rank

# The launcher itself would end at SIGUSR1, and give its ranks 30 s after SIGTERM, which a large checkpoint may exceed.
(
  trap '' USR1
  exec accelerate launch --config_file "${ACCELERATE_CONFIG:-$here/configs/accelerate/ddp.yaml}" \
    ${PRECISION:+--mixed_precision "$PRECISION"} --num_machines "$nodes" --machine_rank "$node" --num_processes "$((nodes * ranks))" \
    --main_process_ip "$address" --main_process_port "${PORT:-29500}" -m rkdo_dist train "$@"
) &
launcher=$!

# shellcheck disable=SC2329 # the trap calls it
stop_ranks() {
  python - "$launcher" <<'PYTHON' || true
import signal, sys
import psutil
for child in psutil.Process(int(sys.argv[1])).children():
    if "rkdo_dist" in child.cmdline():
        child.send_signal(signal.SIGUSR1)
PYTHON
}
trap stop_ranks USR1 TERM

code=0
while kill -0 "$launcher" 2>/dev/null; do # a trapped signal ends `wait`, not the launcher
  code=0
  wait "$launcher" || code=$?
done
exit "$code"
