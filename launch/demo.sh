#!/usr/bin/env bash
# Shards from the embedded digits, RKDO and I-Con on two ranks, one table and one figure.
set -euo pipefail
cd "$(dirname "$0")/.."

rkdo prepare digits --out data/digits
for objective in rkdo icon; do
  rm -rf "runs/demo/$objective"
  accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2 -m rkdo_dist \
    train configs/digits-rkdo.yaml "field.objective=$objective" "run.dir=runs/demo/$objective"
done
rkdo compare runs/demo/rkdo runs/demo/icon --figure runs/demo/loss.png
