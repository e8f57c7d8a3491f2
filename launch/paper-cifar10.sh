#!/usr/bin/env bash
# The paper's protocol on CIFAR-10, five seeds, both objectives: launch/paper-cifar10.sh SHARDS [RUNS]
# About 25 minutes on one core. Interrupted: run it again, finished runs are left alone.
set -euo pipefail
if [ "$#" -lt 1 ]; then
  echo "usage: $0 SHARDS [RUNS]" >&2
  exit 2
fi
shards=$1
runs=${2:-runs/paper}
here=$(cd "$(dirname "$0")/.." && pwd)
for seed in 42 123 456 789 101; do
  for objective in rkdo icon; do
    rkdo train "$here/configs/paper/cifar10-$objective.yaml" "data.shards=$shards" \
      "run.dir=$runs/cifar10-$objective-$seed" "run.seed=$seed" run.resume=auto
  done
done
python "$here/benchmarks/paper_table.py" "$runs"
