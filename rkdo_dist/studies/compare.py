"""Several runs side by side: one table and one figure, read from run directories.

The objectives are different functions, so their raw values do not compare: each row shows the value at a uniform
learned distribution (an encoder that knows nothing) and how far below it the run has come.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from rkdo_dist.config import Config
from rkdo_dist.rundir import RunDirectory, RunError

_SCORES = {
    "linear_accuracy": "linear acc. (embedding)",
    "linear_accuracy_backbone": "linear acc. (backbone)",
    "nmi": "NMI",
    "ari": "ARI",
    "neighbourhood": "neighbourhood",
}


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        loss: mean over the last epoch's steps.
        at_uniform: the objective's value at a uniform learned distribution.
        curve: mean loss of each epoch.
        scores: the last evaluation, empty if there is none.
        pairs_per_second: median over steps.
    """

    name: str
    config: Config
    loss: float
    at_uniform: float
    curve: list[float]
    scores: dict[str, Any]
    pairs_per_second: float


def summarise(directory: Path) -> RunSummary:
    """Read one run directory.

    Raises:
        RunError: if it is no run, or has no steps yet.
    """
    run = RunDirectory(directory)
    config = run.config()
    epochs: dict[int, list[float]] = {}
    speeds, uniform = [], float("nan")
    for record in run.steps():
        if record["loss"] is None:  # a skipped step
            continue
        epochs.setdefault(record["epoch"], []).append(record["loss"])
        speeds.append(record["pairs_per_second"])
        uniform = record["loss_at_uniform"]
    if not epochs:
        raise RunError(f"{directory} has no steps in metrics.jsonl yet")
    curve = [statistics.fmean(losses) for _, losses in sorted(epochs.items())]
    return RunSummary(
        name=f"{config.field.objective} ({directory})",
        config=config,
        loss=curve[-1],
        at_uniform=uniform,
        curve=curve,
        scores=run.last_evaluation() or {},
        pairs_per_second=statistics.median(speeds),
    )


def comparison_table(directories: list[Path]) -> Table:
    """A row per run: the loss beside its value at uniform, the scores of the last evaluation, the speed."""
    table = Table(title="Runs side by side", caption=(
        "Losses of different objectives are different functions: compare the scores, and each loss with its own "
        "value at uniform."))  # fmt: skip
    table.add_column("run")
    for column in ("loss", "at uniform", "below it", *_SCORES.values(), "pairs/s"):
        table.add_column(column, justify="right")
    for run in map(summarise, directories):
        scores = [_number(run.scores.get(name)) for name in _SCORES]
        below = f"{1 - run.loss / run.at_uniform:.1%}"
        table.add_row(
            run.name,
            f"{run.loss:.4f}",
            f"{run.at_uniform:.4f}",
            below,
            *scores,
            f"{run.pairs_per_second:.0f}",
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def loss_figure(directories: list[Path], path: Path) -> None:
    """Save loss curves: each objective's own value (left), and as a share of its value at uniform (right).

    Raises:
        ValueError: for a file name whose ending matplotlib does not know.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (own, share) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for number, run in enumerate(map(summarise, directories)):
        epochs = range(1, len(run.curve) + 1)
        colour = f"C{number}"
        own.plot(epochs, run.curve, marker="o", color=colour, label=run.name)
        own.axhline(run.at_uniform, color=colour, linestyle=":", linewidth=1)
        share.plot(epochs, [value / run.at_uniform for value in run.curve], marker="o", color=colour, label=run.name)
    own.set(
        xlabel="epoch",
        ylabel="mean loss of the epoch",
        title="Each objective's own value (dotted: at uniform)",
    )
    share.set(xlabel="epoch", ylabel="loss / loss at uniform", title="As a share of the value at uniform")
    for axes in (own, share):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    share.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
