"""The paper's Table 1, CIFAR-10: mean loss of an epoch beside the published number.

    python benchmarks/paper_table.py RUNS

RUNS holds run directories cifar10-<objective>-<seed>, as `launch/paper-cifar10.sh` makes them.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rkdo_dist.studies.compare import RunSummary, summarise

# Martin (2025), Table 1: mean and standard deviation over five seeds.
PUBLISHED = {
    "rkdo": {1: (1.9384, 0.0403), 2: (1.7897, 0.0445), 5: (1.6584, 0.0335), 10: (1.6200, 0.0233)},
    "icon": {1: (2.6768, 0.0369), 2: (2.5176, 0.0291), 5: (2.4000, 0.0321), 10: (2.3127, 0.0184)},
}
SCORES = ("linear_accuracy", "nmi", "ari", "neighbourhood")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    console = Console()
    losses = Table(title="CIFAR-10, loss of an epoch (11 batches)")
    for column in ("objective", "epoch", "seeds", "here", "published", "difference / published sd", "attained"):
        losses.add_column(column, justify="left" if column == "objective" else "right")
    scores = Table(title="after the last epoch: mean ± sd over seeds")
    for column in ("objective", *SCORES):
        scores.add_column(column)
    for objective, cells in PUBLISHED.items():
        runs = [summarise(path) for path in sorted(Path(sys.argv[1]).glob(f"cifar10-{objective}-*"))]
        if not runs:
            sys.exit(f"{sys.argv[1]} holds no runs cifar10-{objective}-<seed>")
        for epoch, (mean, sd) in cells.items():
            losses.add_row(*row(objective, epoch, runs, mean, sd))
        scores.add_row(objective, *(spread([run.scores[name] for run in runs]) for name in SCORES))
    console.print(losses)
    console.print(scores)


def row(objective: str, epoch: int, runs: list[RunSummary], mean: float, sd: float) -> list[str]:
    values = [run.curve[epoch - 1] for run in runs if len(run.curve) >= epoch]
    ours = statistics.fmean(values)
    attained = f"{runs[0].attained(ours):.1%}"
    published = f"{mean:.4f} ± {sd:.4f}"
    return [objective, str(epoch), str(len(values)), spread(values), published, f"{(ours - mean) / sd:+.2f}", attained]


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


if __name__ == "__main__":
    main()
