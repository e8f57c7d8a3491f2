#!/usr/bin/env bash
# Clusters and maps of scikit-learn's digits with and without the recursion, five seeds: the loss falls, does the score rise?
#
#   launch/slices.sh OUT        then docs/figures/slices.py OUT keeps the numbers and draws the figure
#
# A seed decides heads, batches and draws of the clusters; of the maps, which 450 digits are shown. SEEDS, STEPS, SAMPLES and
# ITERATIONS are for a smaller rehearsal.
set -euo pipefail
out=${1:?"where to? e.g. runs/slices"}
rkdo=${RKDO:-rkdo} python=${PYTHON:-python}
export OMP_NUM_THREADS=1
mkdir -p "$out"
read -ra seeds <<<"${SEEDS:-0 1 2 3 4}"
$python - "$out" "${SAMPLES:-450}" "${seeds[@]}" <<'END'
import sys
import numpy as np
from sklearn.datasets import load_digits
out, samples, seeds = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
digits = load_digits()
np.savez(f"{out}/digits.npz", features=digits.data, labels=digits.target)
for seed in seeds:
    chosen = np.sort(np.random.Generator(np.random.PCG64(int(seed))).permutation(len(digits.data))[:samples])
    np.savez(f"{out}/digits-{seed}.npz", features=digits.data[chosen], labels=digits.target[chosen])
END
for seed in "${seeds[@]}"; do
  for coupling in 0 0.1 0.3 0.5; do
    [ -f "$out/clusters-$coupling-$seed/clusters.json" ] ||
      $rkdo cluster "$out/digits.npz" --clusters 10 --seed "$seed" --coupling $coupling --steps "${STEPS:-600}" \
        --out "$out/clusters-$coupling-$seed"
  done
  [ -f "$out/map-$seed/map.json" ] ||
    $rkdo map "$out/digits-$seed.npz" --couplings 0,0.001,0.01,0.1 --iterations "${ITERATIONS:-750}" --out "$out/map-$seed"
done
