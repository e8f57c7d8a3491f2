#!/usr/bin/env bash
# "Does recursion help?": the same encoder, data, batches and number of steps under several supervisors; resumable.
#
#   launch/recursion-study.sh CONFIG OUT [options of `rkdo sweep`]
#   launch/recursion-study.sh configs/study/cifar10.yaml runs/recursion-study --seeds 1,2,3,4,5 --processes 2
#   launch/recursion-study.sh CONFIG OUT --only "InfoNCE,bank 0.5"        some of the rows below
#
# Every row of the tables is tested against the first: InfoNCE, which is what coupling 0 gives.
set -euo pipefail
config=${1:?"which configuration? e.g. configs/study/cifar10.yaml"}
out=${2:?"where to? e.g. runs/recursion-study"}
shift 2
persistent="field.objective=rkdo field.recursion=persistent"
exec rkdo sweep "$config" --out "$out" --metric knn_accuracy,linear_accuracy,linear_accuracy_backbone,yardsticks.infonce \
  --variant "InfoNCE: field.objective=infonce" \
  --variant "I-Con: field.objective=icon" \
  --variant "RKDO in-batch: field.objective=rkdo field.depth=3 field.coupling=0.5 field.cooling=0.1" \
  --variant "batch 0.5: $persistent field.columns=batch field.coupling=0.5" \
  --variant "bank 0.1: $persistent field.columns=bank field.coupling=0.1" \
  --variant "bank 0.5: $persistent field.columns=bank field.coupling=0.5" \
  --variant "bank 0.5 to 0: $persistent field.columns=bank field.coupling=0.5 field.coupling_schedule=cosine" \
  --variant "bank 0.5 late: $persistent field.columns=bank field.coupling=0.5 field.coupling_start_epoch=2" \
  "$@"
