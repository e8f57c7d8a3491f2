"""k-NN gain against the precision of a supervisor's rows: numbers and figure of E1 (docs/studies/preregistered.md).

python docs/figures/dose_response.py OUT      reads the runs of launch/dose-response.sh and OUT/audit, and keeps their
                                              numbers in docs/studies/dose-response.csv and .json
python docs/figures/dose_response.py          draws docs/figures/dose_response.svg of these, and prints the tests
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies.palette import BAD, DARK, GREY, style
from rkdo_dist.studies.plots import encoded, legend_below, panels
from rkdo_dist.studies.sheets import as_csv
from rkdo_dist.studies.statistics import holm, paired

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "studies" / "dose-response.csv"
SCORE, SECOND = "knn_accuracy_backbone", "linear_accuracy_backbone"
ARMS = {  # rows in the file that supervises -> arm, precision (50 columns cannot hold a quarter: 12 and 38 of them)
    "": ("a = 0", np.nan),
    "rows-0.25": ("O(.25)", 0.24),
    "rows-0.5": ("O(.5)", 0.5),
    "rows-0.75": ("O(.75)", 0.76),
    "rows-1": ("O(1)", 1.0),
    "rows-confusable": ("O'(.5)", 0.5),
}


def keep(out: Path) -> None:
    """The scores of every complete run, and where they come from."""
    rows, codes = [], set()
    for place in sorted((out / "study" / "runs").iterdir()):
        if not place.is_dir() or RunDirectory(place).status()["status"] != "complete":
            continue
        run = RunDirectory(place).history()
        facts = json.loads((place / "environment.json").read_text(encoding="utf-8"))
        codes.add((facts["code"], facts["precision"], facts["platform"]))
        supervisor = RunDirectory(place).config().field.supervisor
        arm, precision = ARMS[Path(supervisor or "").stem]
        scores = {name: run.last[name] for name in (SCORE, SECOND, "knn_accuracy")}
        rows.append({"arm": arm, "precision": precision, "seed": run.seed, **scores})
    rows.sort(key=lambda row: (row["seed"], [arm for arm, _ in ARMS.values()].index(row["arm"])))
    KEPT.write_text(as_csv(rows), encoding="utf-8", newline="")
    audit = json.loads((out / "audit" / "audit.json").read_text(encoding="utf-8"))
    names = ("group", "view", "temperature", "k", "steps", "precision")
    real = [{k: row[k] for k in names if k in row} for row in audit["rows"]]
    found = {"environments": sorted(codes), "student": audit["student"], "best": audit["best"], "rows": real}
    KEPT.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def lines(gains: dict[str, dict[int, float]], seeds: list[int]) -> NDArray[np.float64]:
    """(seeds, 2): value at the mean precision and slope of each seed's least-squares line over the four precisions."""
    precisions = np.array([ARMS[name][1] for name in ("rows-0.25", "rows-0.5", "rows-0.75", "rows-1")])
    values = np.array([[gains[arm][s] for arm in ("O(.25)", "O(.5)", "O(.75)", "O(1)")] for s in seeds])
    centred = precisions - precisions.mean()
    return np.stack([values.mean(axis=1), values @ centred / (centred @ centred)], axis=1)


def break_even(found: NDArray[np.float64], middle: float) -> tuple[float, float, float]:
    """Where the mean line meets 0, and Fieller's 95 % interval from the seeds' lines; infinite where it has no end."""
    n = len(found)
    (level, slope), covariance = found.mean(axis=0), np.cov(found.T, ddof=1) / n
    t = stats.t.ppf(0.975, n - 1)
    a = slope**2 - t**2 * covariance[1, 1]
    b = level * slope - t**2 * covariance[0, 1]
    c = level**2 - t**2 * covariance[0, 0]
    root = b**2 - a * c
    if a <= 0 or root < 0:
        return middle - level / slope, -np.inf, np.inf
    ends = [middle - (b + sign * np.sqrt(root)) / a for sign in (1, -1)]
    return middle - level / slope, *ends


def main() -> None:
    """Keep, or draw and print."""
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    with KEPT.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    real = json.loads(KEPT.with_suffix(".json").read_text(encoding="utf-8"))
    arms = [arm for arm, _ in ARMS.values()]
    by_seed = {seed: {r["arm"] for r in rows if int(r["seed"]) == seed} for seed in {int(r["seed"]) for r in rows}}
    seeds = sorted(seed for seed, there in by_seed.items() if there == set(arms))

    def scores(name: str) -> dict[str, dict[int, float]]:
        return {arm: {int(r["seed"]): float(r[name]) for r in rows if r["arm"] == arm} for arm in arms}

    tests, gains = {}, {}
    for name in (SCORE, SECOND):
        of = scores(name)
        gains[name] = {arm: {s: of[arm][s] - of["a = 0"][s] for s in seeds} for arm in arms}
        base = [of["a = 0"][s] for s in seeds]
        tests[name] = {arm: paired([of[arm][s] for s in seeds], base) for arm in arms[1:]}
        print(f"{name}, {len(seeds)} seeds: a = 0 {np.mean(base):.4f} ± {np.std(base, ddof=1):.4f}")
        for arm, test in tests[name].items():
            print(f"  {arm:8} {test.difference:+.4f} ± {test.margin:.4f}  (sees {test.detectable:.4f})")
    middle = float(np.mean([0.24, 0.5, 0.76, 1.0]))
    found = lines(gains[SCORE], seeds)
    of = scores(SCORE)
    slope = paired(list(found[:, 1]), [0.0] * len(seeds))
    confusable = paired([of["O'(.5)"][s] for s in seeds], [of["O(.5)"][s] for s in seeds])
    p = holm([slope.t_p, confusable.t_p])
    point, low, high = break_even(found, middle)
    print(f"primary 1: slope {slope.difference:+.4f} ± {slope.margin:.4f} a unit, Holm p {p[0]:.4f}")
    print(f"primary 2: O'(.5) - O(.5) {confusable.difference:+.4f} ± {confusable.margin:.4f}, Holm p {p[1]:.4f}")
    print(f"break-even precision {point:.3f} [{low:.3f}, {high:.3f}]")

    figure, (panel,) = panels(1, 1, (7.2, 4.3))
    look, other = style(0), style(1)
    xs = np.linspace(0.15, 1.03, 50)
    panel.plot(xs, found[:, 0].mean() + slope.difference * (xs - middle), color=look.colour, lw=1.2)
    for arm, test in tests[SCORE].items():
        x = dict(ARMS.values())[arm]
        mine = {"fmt": other.marker, "color": BAD} if arm == "O'(.5)" else {"fmt": look.marker, "color": look.colour}
        words = {"O(.25)": "rows made from labels", "O'(.5)": "wrong in the classes that are confused most"}.get(arm)
        shift = 0.008 * (arm == "O'(.5)")
        panel.errorbar(x + shift, test.difference, yerr=test.margin, label=words, capsize=3, ms=6, **mine)
    panel.axhline(0, color=DARK, lw=1)
    if np.isfinite(low):
        panel.axvspan(low, min(high, 1.05), color=look.colour, alpha=0.12, lw=0)
    for words, x in (("the student's own rows", real["student"]), ("best teacher's rows", real["best"]["precision"])):
        panel.axvline(x, color=GREY, ls=":", lw=1.4)
        panel.annotate(f"{words}: {x:.2f}", (x, 0.03), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
                       ha="right", color=GREY, xytext=(-2, 0), textcoords="offset points")  # fmt: skip
    said = f"at {point:.2f} [{low:.2f}, {high:.2f}]" if point <= 1 else f"above 1 (95 %: not below {low:.2f})"
    panel.set(xlabel="precision of a row: its mass on the sample's own class", ylabel="k-NN accuracy minus SimCLR's",
              title=f"Break-even {said}", xlim=(0.08, 1.05))  # fmt: skip
    legend_below(figure)
    (HERE / "dose_response.svg").write_bytes(encoded(figure, "svg"))


if __name__ == "__main__":
    main()
