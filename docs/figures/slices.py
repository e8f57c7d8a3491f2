"""Clusters and maps of the digits under the recursion: numbers and figure of docs/studies/results.md.

python docs/figures/slices.py OUT       reads what launch/slices.sh left and keeps docs/studies/slices.csv
python docs/figures/slices.py           draws docs/figures/slices.svg of it and prints the table
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from rkdo_dist.studies.palette import style
from rkdo_dist.studies.plots import encoded, panels
from rkdo_dist.studies.sheets import as_csv, mean_sd, spread
from rkdo_dist.studies.statistics import paired

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "studies" / "slices.csv"
SCORES = {"clusters": "cluster accuracy", "map": "trustworthiness of the map"}


def keep(out: Path) -> None:
    """A row for each slice, coupling and seed."""
    rows = []
    for place in sorted(out.glob("clusters-*-*/clusters.json")):
        found, (_, coupling, seed) = json.loads(place.read_text()), place.parent.name.split("-")
        rows.append({"slice": "clusters", "coupling": float(coupling), "seed": int(seed), "loss": found["own_loss"]})
        rows[-1]["score"] = found["accuracy"]
    for place in sorted(out.glob("map-*/map.json")):
        for found in json.loads(place.read_text())["couplings"]:
            row = {"slice": "map", "coupling": found["coupling"], "seed": int(place.parent.name.split("-")[1])}
            rows.append(row | {"loss": found["own_loss"], "score": found["trustworthiness"]})
    KEPT.write_text(as_csv(rows), encoding="utf-8", newline="")


def main() -> None:
    """Keep, or draw and print."""
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    with KEPT.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, axes = panels(1, 2, (9, 3.4))
    for panel, (kind, title) in zip(axes, SCORES.items(), strict=True):
        of: dict[float, dict[str, dict[int, float]]] = {}
        for row in (row for row in rows if row["slice"] == kind):
            there = of.setdefault(float(row["coupling"]), {"loss": {}, "score": {}})
            for name in there:
                there[name][int(row["seed"])] = float(row[name])
        names = sorted(of)
        seeds = sorted(set.intersection(*(set(of[c]["score"]) for c in names)))
        print(f"{kind}, {len(seeds)} seeds")
        for number, name in enumerate(("loss", "score")):
            means = [mean_sd([of[c][name][s] for s in seeds]) for c in names]
            first = means[0][0]
            look = style(number)
            panel.errorbar(range(len(names)), [m / first for m, _ in means], yerr=[sd / first for _, sd in means],
                           label=title if number else "own loss", capsize=3, **look.curve)  # fmt: skip
        for c in names:
            values = [[of[c][name][s] for s in seeds] for name in ("loss", "score")]
            test = paired(values[1], [of[names[0]]["score"][s] for s in seeds])
            words = "" if c == names[0] else f"  {test.difference:+.4f} ± {test.margin:.4f}, p {test.t_p:.3f}"
            print(f"  {c:5g}  {spread(*mean_sd(values[0]))}  {spread(*mean_sd(values[1]))}{words}")
        panel.set_xticks(range(len(names)), [f"{c:g}" for c in names])
        panel.set(xlabel="coupling", ylabel="relative to no recursion", title=kind.capitalize())
        panel.set_ylim(bottom=-0.05)
        panel.legend(frameon=False, fontsize=8, loc="lower left")
    (HERE / "slices.svg").write_bytes(encoded(figure, "svg"))


if __name__ == "__main__":
    main()
