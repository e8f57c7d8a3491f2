"""Branches of one trunk against the static one: numbers of E2 (docs/studies/preregistered.md).

python docs/figures/late_branch.py OUT    reads the runs of launch/late-branch.sh, keeps docs/studies/late-branch.csv
python docs/figures/late_branch.py        prints the tests of the seeds whose arms are all complete
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np

from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies.sheets import as_csv
from rkdo_dist.studies.statistics import holm, paired

KEPT = Path(__file__).resolve().parent.parent / "studies" / "late-branch.csv"
ARMS = ("static", "snapshot", "snapshot, geometric memory", "SCE")
SCORES = ("knn_accuracy_backbone", "linear_accuracy_backbone")


def arm_of(place: Path) -> str:
    """By the settings of a run."""
    f = RunDirectory(place).config().field
    return {"simclr": ARMS[0], "sce": ARMS[3]}.get(f.objective) or ARMS[1 + (f.relation_mean == "geometric")]


def keep(out: Path) -> None:
    """The scores of every complete branch, and the precision of its rows in the first and the last epoch."""
    rows = []
    for place in sorted((out / "study" / "runs").iterdir()):
        if not (place / "status.json").is_file() or RunDirectory(place).status()["status"] != "complete":
            continue
        run = RunDirectory(place).history()
        row = {"arm": arm_of(place), "seed": run.seed, **{name: run.last[name] for name in SCORES}}
        for name, epoch in (("first", run.epochs[0]), ("last", run.epochs[-1])):
            row[f"precision_{name}"] = epoch.means.get("relation_precision", "")
        row["code"] = json.loads((place / "environment.json").read_text(encoding="utf-8"))["code"]
        rows.append(row)
    rows.sort(key=lambda row: (row["seed"], ARMS.index(row["arm"])))
    KEPT.write_text(as_csv(rows), encoding="utf-8", newline="")


def main() -> None:
    """Keep, and print."""
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    with KEPT.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    by_seed = {int(r["seed"]): {one["arm"]: one for one in rows if one["seed"] == r["seed"]} for r in rows}
    seeds = sorted(seed for seed, there in by_seed.items() if set(there) == set(ARMS))
    print(f"{len(seeds)} seeds: {seeds}")
    for score in SCORES:
        of = {arm: [float(by_seed[s][arm][score]) for s in seeds] for arm in ARMS}
        tests = [paired(of[arm], of["static"]) for arm in ARMS[1:]]
        print(f"{score}: static {np.mean(of['static']):.4f} ± {np.std(of['static'], ddof=1):.4f}")
        for arm, test, p in zip(ARMS[1:], tests, holm([t.t_p for t in tests]), strict=True):
            right = [[float(by_seed[s][arm][f"precision_{when}"]) for s in seeds] for when in ("first", "last")]
            print(f"  {arm}: {test.difference:+.4f} ± {test.margin:.4f}, Holm p {p:.4f}, sees {test.detectable:.4f}; "
                  f"precision {np.mean(right[0]):.3f} to {np.mean(right[1]):.3f}")  # fmt: skip
        memory = paired(of[ARMS[2]], of[ARMS[1]])
        print(f"  geometric minus memoryless: {memory.difference:+.4f} ± {memory.margin:.4f}, p {memory.t_p:.3f}")


if __name__ == "__main__":
    main()
