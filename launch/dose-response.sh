#!/usr/bin/env bash
# How right must a supervisor be? Experiment E1 of docs/studies/preregistered.md, from a folder or tar of CIFAR-10's images
# (train/CLASS/*, test/CLASS/*) to its tables. Resumable: the same command goes on.
#
#   launch/dose-response.sh IMAGES OUT [options of `rkdo sweep`, e.g. --processes 2]
#
# The settings of a smaller rehearsal: SEEDS, EXTRA (settings of every run), TRAIN and TUNE (how many shards), SHARD (images
# in one). PRECISION=bf16, as in the kept results, computes the encoder in bfloat16.
set -euo pipefail
images=${1:?"where are the images? a folder or a tar"}
out=${2:?"where to? e.g. runs/dose"}
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
rkdo=${RKDO:-rkdo} python=${PYTHON:-python}
config=$here/configs/study/dose.yaml
read -ra extra <<<"${EXTRA:-}"
set_extra=("${extra[@]/#/--set=}")
export OMP_NUM_THREADS=1 ACCELERATE_MIXED_PRECISION=${PRECISION:-bf16}
mkdir -p "$out"

# Shards: the first five train, the next five are held out for the temperature.
$rkdo prepare imagefolder --root "$images" --out "$out/data/all" --shard-size "${SHARD:-1000}"
for name in small tune; do
  [ ! -f "$out/data/$name/index.json" ] || continue
  mkdir -p "$out/data/$name"
  cp "$out"/data/all/train-0000[0-$((${TRAIN:-5} - 1))].tar "$out/data/$name/"
  if [ $name = small ]; then
    cp "$out"/data/all/test-*.tar "$out/data/$name/"
  else
    for k in $(seq 0 $((${TUNE:-5} - 1))); do
      cp "$out/data/all/train-$(printf %05d $((k + ${TRAIN:-5}))).tar" "$out/data/$name/test-$(printf %05d "$k").tar"
    done
  fi
  $rkdo index "$out/data/$name"
done

# The temperature, on held-out training images.
$rkdo sweep "$config" --out "$out/temperature" --seeds 0 --metric knn_accuracy_backbone --vary field.temperature=0.1,0.2,0.5 \
  --set "data.shards=$out/data/tune" "${set_extra[@]}" "$@"
tau=$($python - "$out/temperature/table.csv" <<'END'
import csv, sys
rows = list(csv.DictReader(open(sys.argv[1])))
print(max(rows, key=lambda row: float(row["knn_accuracy_backbone"]))["field.temperature"])
END
)
echo "$tau" | tee "$out/temperature.txt"
[ -f "$out/base.npz" ] || $rkdo embed "$out/temperature/runs/field.temperature=$tau,seed=0" "$out/data/small" --split train --out "$out/base.npz"

# Rows of a stated precision.
for p in 0.25 0.5 0.75 1; do
  [ -f "$out/rows-$p.npz" ] || $python "$here/examples/oracle_rows.py" "$out/base.npz" "$out/rows-$p.npz" --precision $p
done
[ -f "$out/rows-confusable.npz" ] ||
  $python "$here/examples/oracle_rows.py" "$out/base.npz" "$out/rows-confusable.npz" --precision 0.5 --confusable

rows="field.delivery=sampled field.supervisor=$out/rows"
for seed in ${SEEDS:-1 2 3 4}; do # all arms of a seed before the next
  so_far="${so_far:+$so_far,}$seed"
  $rkdo sweep "$config" --out "$out/study" --seeds "$so_far" --metric knn_accuracy_backbone,linear_accuracy_backbone,knn_accuracy \
    --set "data.shards=$out/data/small" --set "field.temperature=$tau" "${set_extra[@]}" \
    --variant "SimCLR: field.objective=simclr" \
    --variant "O(.25): $rows-0.25.npz" --variant "O(.5): $rows-0.5.npz" --variant "O(.75): $rows-0.75.npz" \
    --variant "O(1): $rows-1.npz" --variant "O'(.5): $rows-confusable.npz" "$@"
done
