"""Figures 1 to 5 of the paper, ours beside the published numbers, PNG and SVG.

The paper prints one caption under Figures 1 and 2, "consistent percentage improvement in loss values". Figure 1 shows
that percentage at its durations. Figure 2 shows it at every epoch, from its value before training on, which is the part
that an untrained encoder has too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rkdo_dist.studies import plots, published
from rkdo_dist.studies.palette import DARK, of_objective, style
from rkdo_dist.studies.paper import NAMES, OBJECTIVES, Results
from rkdo_dist.studies.plots import band, save, seeds, whole_numbers
from rkdo_dist.studies.sheets import mean_sd

_PAPER = {"color": DARK, "fmt": "D", "markersize": 5, "capsize": 4, "linewidth": 1.2, "zorder": 5}
_STYLES = {name: of_objective(name) for name in OBJECTIVES}
_HERE = style(2)  # what belongs to neither objective


def all_figures(results: Results, folder: Path) -> list[Path]:
    """Draw the five figures into `folder`; the files written."""
    draw: list[tuple[str, Callable[[Results], Any]]] = [
        ("figure1", _improvement),
        ("figure2", _improvement_by_epoch),
        ("figure3", _early_against_late),
        ("figure4", _early_learning),
        ("figure5", _losses),
    ]
    return [path for name, figure in draw for path in save(figure(results), folder, name)]


def _panels(results: Results, title: str, ylabel: str) -> tuple[Any, list[Any]]:
    """A panel per data set, with its name, or what is missing."""
    datasets = results.request.datasets
    figure, panels = plots.panels(1, len(datasets), (max(6.5, 4.2 * len(datasets)), 4.4))
    figure.suptitle(f"{title}\n{results.request.said}; mean ± sd over seeds")
    for dataset, panel in zip(datasets, panels, strict=True):
        count = len({seed for d, _, seed in results.runs if d == dataset})
        panel.set_title(f"{published.TITLES[dataset]} ({seeds(count) if count else 'not run'})")
    panels[0].set_ylabel(ylabel)
    return figure, panels


def _bar(panel: Any, x: float, values: list[float], colour: str, label: str | None, **style: Any) -> None:
    mean, sd = mean_sd(values)
    if not math.isnan(mean):
        error = None if math.isnan(sd) else sd
        panel.bar(x, mean, 0.36, color=colour, label=label, yerr=error, capsize=4, ecolor=DARK, **style)


def _marker(panel: Any, x: float, number: published.Number | None, label: str | None) -> None:
    if number is not None:
        panel.errorbar(x, number[0], number[1], label=label, **_PAPER)


def _legend(panel: Any, above: float = 0.0) -> None:
    """A legend in the upper right corner, after room for it `above` what is drawn (a share of the height)."""
    low, high = panel.get_ylim()
    panel.set_ylim(low, high + above * (high - low))
    handles, labels = panel.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        panel.legend(once.values(), once.keys(), fontsize=8, framealpha=0.9, loc="upper right", ncols=2 if above else 1)


def _improvement(results: Results) -> Any:
    """Figure 1: how much lower RKDO's loss is, in per cent, at each duration."""
    figure, panels = _panels(results, "Figure 1: RKDO's loss below I-Con's", "lower by, % of I-Con's loss")
    epochs = results.request.epochs
    for dataset, panel in zip(results.request.datasets, panels, strict=True):
        for x, count in enumerate(epochs):
            cell = results.loss(dataset, count)
            _bar(panel, x, _lower(cell.rkdo, cell.icon), _HERE.colour, "here")
            if cell.published is not None:
                panel.plot(x, cell.published.percent, "D", color=DARK, markersize=6, label="published", zorder=5)
        _at_uniform(panel, results, dataset)
        panel.set(xticks=range(len(epochs)), xticklabels=[str(e) for e in epochs], xlabel="epochs", ylim=(0, 36))
        _legend(panel, above=0.15)
    return figure


def _at_uniform(panel: Any, results: Results, dataset: str) -> float | None:
    """A line at the difference before any training."""
    values = results.at_uniform(dataset)
    if values is None:
        return None
    before = 100 * (values[1] - values[0]) / values[1]
    panel.axhline(before, color=DARK, linestyle="--", linewidth=1.2, label=f"before training: {before:.1f} %")
    return before


def _lower(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """How much lower the first ones are, in per cent of the second ones."""
    return [100 * (y - x) / y for x, y in zip(a, b, strict=True)]


def _improvement_by_epoch(results: Results) -> Any:
    """Figure 2: the same percentage at every epoch, from before training on."""
    figure, panels = _panels(
        results, "Figure 2: RKDO's loss below I-Con's, epoch by epoch", "lower by, % of I-Con's loss"
    )
    for dataset, panel in zip(results.request.datasets, panels, strict=True):
        before = _at_uniform(panel, results, dataset)
        points = {epoch: results.loss(dataset, epoch) for epoch in range(1, results.longest(dataset) + 1)}
        lower = {epoch: _lower(cell.rkdo, cell.icon) for epoch, cell in points.items()}
        start = {} if before is None else {0: [before]}
        band(panel, {**start, **lower}, _HERE, "here")
        for count in published.EPOCHS:
            percent = published.TABLE_1[dataset, count].percent
            panel.plot(count, percent, "D", color=DARK, markersize=6, label="published", zorder=5)
        panel.set(xlabel="epoch (0: before training)", ylim=(0, 36))
        whole_numbers(panel)
        _legend(panel, above=0.15)
    return figure


def _early_against_late(results: Results) -> Any:
    """Figure 3: RKDO after 2 epochs beside I-Con after 5."""
    figure, panels = _panels(results, "Figure 3: RKDO at 2 epochs, I-Con at 5 epochs", "linear evaluation accuracy")
    for dataset, panel in zip(results.request.datasets, panels, strict=True):
        cell = results.score(dataset, 2, "linear_accuracy", later=5)
        rows = {"rkdo": published.TABLE_2[dataset, 2].rkdo, "icon": published.TABLE_2[dataset, 5].icon}
        for x, objective in enumerate(OBJECTIVES):
            _bar(panel, x, getattr(cell, objective), _STYLES[objective].colour, None)
            _marker(panel, x, rows[objective], "published")
        panel.set(xticks=(0, 1), xticklabels=("RKDO, 2 epochs", "I-Con, 5 epochs"), xlim=(-0.6, 1.6), ylim=(0, None))
        _legend(panel, above=0.12)
    return figure


def _early_learning(results: Results) -> Any:
    """Figure 4: both at 1 and 2 epochs."""
    figure, panels = _panels(results, "Figure 4: early learning, 1 and 2 epochs", "linear evaluation accuracy")
    for dataset, panel in zip(results.request.datasets, panels, strict=True):
        for x, epochs in enumerate((1, 2)):
            cell = results.score(dataset, epochs, "linear_accuracy")
            for offset, objective in ((-0.2, "rkdo"), (0.2, "icon")):
                _bar(panel, x + offset, getattr(cell, objective), _STYLES[objective].colour, NAMES[objective])
                row = published.TABLE_2[dataset, epochs]
                _marker(panel, x + offset, getattr(row, objective), "published")
        panel.set(xticks=(0, 1), xticklabels=("1 epoch", "2 epochs"), xlim=(-0.6, 1.6), ylim=(0, None))
        _legend(panel, above=0.15)
    return figure


def _losses(results: Results) -> Any:
    """Figure 5: losses over training durations, RKDO solid, I-Con dashed; dotted: before training."""
    figure, panels = _panels(results, "Figure 5: loss across training durations", "mean loss of the epoch")
    for dataset, panel in zip(results.request.datasets, panels, strict=True):
        cells = {epoch: results.loss(dataset, epoch) for epoch in range(1, results.longest(dataset) + 1)}
        for objective in OBJECTIVES:
            points = {epoch: getattr(cell, objective) for epoch, cell in cells.items()}
            band(panel, points, _STYLES[objective], f"{NAMES[objective]} here")
            for count in published.EPOCHS:
                _marker(panel, count, getattr(published.TABLE_1[dataset, count], objective), "published")
        values = results.at_uniform(dataset)
        for objective, value in zip(OBJECTIVES, values or (), strict=False):
            panel.axhline(
                value,
                color=_STYLES[objective].colour,
                linestyle=":",
                linewidth=1.2,
                label=f"{NAMES[objective]} before training",
            )
        panel.set(xlabel="epochs")
        panel.set_xticks(results.request.epochs)
        _legend(panel, above=0.25)
    return figure
