#!/usr/bin/env bash
# Shards from the embedded digits, RKDO and I-Con on two ranks, one table and one figure.
set -euo pipefail
cd "$(dirname "$0")/.."

rkdo prepare digits --out data/digits
for objective in rkdo icon; do
  rm -rf "runs/demo/$objective"
  accelerate launch --config_file configs/accelerate/local-2.yaml -m rkdo_dist \
    train "configs/digits-$objective.yaml" "run.dir=runs/demo/$objective"
done
rkdo compare runs/demo/rkdo runs/demo/icon --figure runs/demo/loss.png
