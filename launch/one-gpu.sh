#!/usr/bin/env bash
# Does a relation pay with a real encoder? Two experiments for one GPU, about half an hour each on an H100 (not run so far).
#
#   launch/one-gpu.sh E3 OUT [options of `rkdo sweep`]      in chunks: the same command goes on until it says "done"
#
#   E3  at equal seconds: SimCLR for 45 epochs against SimCLR whose second view is, from epoch 15 on, with probability 0.3
#       one of the sample's mutual neighbours in the encoder's own snapshots (44 epochs, a snapshot every five)
#   E4  the literature's form, 45 epochs: MoCo (SCE with weight 0), SCE from the first epoch, SCE from epoch 18
#
# DATA: the shards (data/cifar10). MINUTES of a chunk (9): then every run has finished its step and saved it, exit code 75.
# SEEDS (1 2 3; other three for a second half hour), TAU (0.2; choose it on held-out training images), PRECISION (bf16),
# START3, START4, QUEUE, EPOCHS and EXTRA (settings of every run) for a rehearsal. Labels are used for scores alone.
set -euo pipefail
which=${1:?"which experiment? E3 or E4"}
out=${2:?"where to? e.g. runs/one-gpu"}
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
read -ra rkdo <<<"${RKDO:-rkdo}" # more than one word in a rehearsal
read -ra extra <<<"${EXTRA:-}"
epochs=${EPOCHS:-45}
case $which in
  E3) arms=(--variant "SimCLR: field.temperature=${TAU:-0.2}"
    --variant "snapshot: field.objective=snapshot field.temperature=${TAU:-0.2} field.relation_weight=0.3 field.neighbours=20 field.snapshot_every=5 field.relation_start_epoch=${START3:-15} train.epochs=$((epochs - 1))") ;;
  E4) sce="field.objective=sce field.temperature=0.1 field.queue=${QUEUE:-4096}"
    arms=(--variant "MoCo: $sce field.relation_weight=0" --variant "SCE: $sce"
      --variant "SCE late: $sce field.relation_start_epoch=${START4:-18}") ;;
  *) echo "which experiment? E3 or E4, not $which" >&2; exit 2 ;;
esac
export OMP_NUM_THREADS=1 ACCELERATE_MIXED_PRECISION=${PRECISION:-bf16}
for seed in ${SEEDS:-1 2 3}; do
  so_far="${so_far:+$so_far,}$seed"
  code=0
  began=${began:-$SECONDS}
  left=$((${MINUTES:-9} * 60 - SECONDS + began))
  [ "$left" -gt 30 ] || { echo "not done: the same command goes on"; exit 75; }
  timeout --signal=TERM --kill-after=60 "$left" "${rkdo[@]}" sweep "$here/configs/study/cifar10-gpu.yaml" --out "$out/$which" \
    --seeds "$so_far" --metric knn_accuracy_backbone,linear_accuracy_backbone,knn_accuracy \
    --set "data.shards=${DATA:-data/cifar10}" --set "train.epochs=$epochs" "${extra[@]/#/--set=}" "${arms[@]}" "$@" || code=$?
  case $code in
    0) ;;
    75 | 124) echo "not done: the same command goes on"; exit 75 ;;
    *) exit "$code" ;;
  esac
done
echo "done: $out/$which"
