"""Several runs side by side: one table and one figure, read from run directories.

The objectives are different functions, so their raw values do not compare: each row shows the value at a uniform
learned distribution (an encoder that knows nothing), its ideal value, and how much of the way between them the run has
come.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from rkdo_dist.config import Config
from rkdo_dist.rundir import SCORE_TITLES, YARDSTICK_TITLES, RunDirectory, RunError


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        loss: mean over the last epoch's steps.
        at_uniform: the objective's value at a uniform learned distribution.
        at_ideal: its value at the ideal simplex.
        curve: mean loss of each epoch.
        scores: the last evaluation, empty if there is none.
        pairs_per_second: median over steps.
    """

    name: str
    config: Config
    loss: float
    at_uniform: float
    at_ideal: float
    curve: list[float]
    scores: dict[str, Any]
    pairs_per_second: float

    def attained(self, loss: float) -> float:
        """The share of the way from the value at uniform to the ideal one that `loss` has come."""
        return (self.at_uniform - loss) / (self.at_uniform - self.at_ideal)


def summarise(directory: Path) -> RunSummary:
    """Read one run directory.

    Raises:
        RunError: if it is no run, or has no steps yet.
    """
    run = RunDirectory(directory)
    config = run.config()
    epochs: dict[int, list[float]] = {}
    speeds, uniform, ideal = [], float("nan"), float("nan")
    for record in run.steps():
        if record["loss"] is None:  # a skipped step
            continue
        epochs.setdefault(record["epoch"], []).append(record["loss"])
        speeds.append(record["pairs_per_second"])
        uniform, ideal = record["loss_at_uniform"], record["loss_at_ideal"]
    if not epochs:
        raise RunError(f"{directory} has no steps in metrics.jsonl yet")
    curve = [statistics.fmean(losses) for _, losses in sorted(epochs.items())]
    return RunSummary(
        name=f"{config.field.objective} ({directory})",
        config=config,
        loss=curve[-1],
        at_uniform=uniform,
        at_ideal=ideal,
        curve=curve,
        scores=run.last_evaluation() or {},
        pairs_per_second=statistics.median(speeds),
    )


def comparison_table(directories: list[Path]) -> Table:
    """A column per run: the loss beside its value at uniform, the scores of the last evaluation, the speed."""
    runs = [summarise(directory) for directory in directories]
    table = Table(
        title="Runs side by side",
        caption="Losses of different objectives are different functions: compare the scores, "
        "and each loss with its own value at uniform.",
    )
    table.add_column("")
    for run in runs:
        table.add_column(run.name.replace(" (", "\n("), justify="right")
    table.add_row("loss, mean of the last epoch", *(f"{run.loss:.4f}" for run in runs))
    table.add_row("  at uniform (knows nothing)", *(f"{run.at_uniform:.4f}" for run in runs))
    table.add_row("  at the ideal simplex", *(f"{run.at_ideal:.4f}" for run in runs))
    table.add_row("  share of the way attained", *(f"{run.attained(run.loss):.1%}" for run in runs), end_section=True)
    for name, title in SCORE_TITLES.items():
        table.add_row(title, *(_number(run.scores.get(name)) for run in runs))
    table.add_section()
    for name, title in YARDSTICK_TITLES.items():
        table.add_row(title, *(_number(run.scores.get("yardsticks", {}).get(name)) for run in runs))
    table.add_section()
    table.add_row("protocol", *(str(run.scores.get("protocol", "-")) for run in runs))
    table.add_row("pairs/s, median step", *(f"{run.pairs_per_second:.0f}" for run in runs))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def loss_figure(directories: list[Path], path: Path) -> None:
    """Save loss curves: each objective's own value (left), and the share attained of the way to the ideal (right).

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
        share.plot(epochs, [run.attained(value) for value in run.curve], marker="o", color=colour, label=run.name)
    own.set(
        xlabel="epoch",
        ylabel="mean loss of the epoch",
        title="Each objective's own value (dotted: at uniform)",
    )
    share.set(xlabel="epoch", ylabel="share", title="Share attained of the way from uniform to the ideal simplex")
    for axes in (own, share):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    share.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
