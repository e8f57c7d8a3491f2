#!/usr/bin/env bash
# Can an encoder's own rows help once it is trained? Experiment E2 of docs/studies/preregistered.md. Resumable: the same
# command goes on.
#
#   launch/late-branch.sh DOSE OUT [options of `rkdo sweep`]
#
# DOSE is the OUT of launch/dose-response.sh, which made the shards and chose the temperature. The settings of a smaller
# rehearsal: SEEDS, EXTRA (settings of every run), TRUNK and EPOCHS (of trunk and branches). PRECISION as there.
set -euo pipefail
dose=${1:?"where is the OUT of launch/dose-response.sh?"}
out=${2:?"where to? e.g. runs/late"}
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
rkdo=${RKDO:-rkdo}
config=$here/configs/study/dose.yaml
read -ra extra <<<"${EXTRA:-}"
export OMP_NUM_THREADS=1 ACCELERATE_MIXED_PRECISION=${PRECISION:-bf16}
tau=$(cat "$dose/temperature.txt")
common=(--set "data.shards=${DATA:-$dose/data/small}" --set "field.temperature=$tau" "${extra[@]/#/--set=}")
snapshot="field.objective=snapshot field.relation_weight=0.3 field.neighbours=20 field.snapshot_every=2"
for seed in ${SEEDS:-1 2 3 4 5 6}; do # all arms of a seed before the next
  so_far="${so_far:+$so_far,}$seed"
  $rkdo sweep "$config" --out "$out/trunk" --seeds "$so_far" --metric loss --variant "trunk: field.objective=simclr" \
    "${common[@]}" --set "train.epochs=${TRUNK:-30}" --set evaluate.at_end=false "$@"
  $rkdo sweep "$config" --out "$out/study" --seeds "$so_far" --metric knn_accuracy_backbone,linear_accuracy_backbone,knn_accuracy \
    "${common[@]}" --set "train.epochs=${EPOCHS:-10}" --set "run.branch=$out/trunk/runs/variant=trunk,seed={seed}" \
    --variant "static: field.objective=simclr" \
    --variant "snapshot: $snapshot" \
    --variant "snapshot, geometric memory: $snapshot field.relation_momentum=0.5 field.relation_mean=geometric" \
    --variant "SCE: field.objective=sce field.temperature=0.1" "$@"
done
