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
from rkdo_dist.studies.palette import DARK, Style, of_objective, style
from rkdo_dist.studies.paper import NAMES, OBJECTIVES, Results
from rkdo_dist.studies.plots import band, legend_below, over, save, seeds, whole_numbers
from rkdo_dist.studies.sheets import mean_sd

_STYLES = {name: of_objective(name) for name in OBJECTIVES}
_HERE = style(2)  # what belongs to neither objective
_BESIDE = 0.1  # of what is compared with it


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
    """A panel per data set, with its name and number of seeds."""
    datasets = results.request.datasets
    figure, panels = plots.panels(1, len(datasets), (max(6.5, 4.2 * len(datasets)), 4.8), sharey=True)
    counts = [len({seed for d, _, seed in results.runs if d == dataset}) for dataset in datasets]
    plots.title(figure, title, f"{results.request.said}; {over([n for n in counts if n] or [1])}")
    for dataset, count, panel in zip(datasets, counts, panels, strict=True):
        panel.set_title(f"{results.title(dataset)} ({seeds(count) if count else 'not run'})")
    panels[0].set_ylabel(ylabel)
    return figure, panels


def _ours(panel: Any, x: float, values: list[float], look: Style, label: str) -> None:
    """Mean and, of several seeds, standard deviation; a word where there is nothing."""
    mean, sd = mean_sd(values)
    if math.isnan(mean):
        panel.text(x, 0.02, "not run", ha="center", rotation=90, color=DARK, transform=panel.get_xaxis_transform())
    else:
        error = None if math.isnan(sd) else sd
        panel.errorbar(x, mean, error, **look.points, linestyle="none", markersize=7, capsize=4, label=label)


def _published(panel: Any, x: float, number: tuple[float, float | None] | None, look: Style, label: str) -> None:
    """The paper's mean and standard deviation, hollow."""
    if number is not None:
        hollow = {**look.points, "markerfacecolor": "white", "linestyle": "none", "markersize": 7, "capsize": 4}
        panel.errorbar(x, *number, **hollow, label=label)


def _lower(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """How much lower the first ones are, in per cent of the second ones."""
    return [100 * (y - x) / y for x, y in zip(a, b, strict=True)]


def _before(results: Results, dataset: str) -> float | None:
    """That difference before any training."""
    values = results.at_uniform(dataset)
    return None if values is None else _lower(values[:1], values[1:])[0]


def _improvement(results: Results) -> Any:
    """Figure 1: how much lower RKDO's loss is, in per cent, at each duration."""
    figure, panels = _panels(results, "Figure 1: RKDO's loss below I-Con's", "lower by (% of I-Con's loss)")
    epochs = results.request.epochs
    for dataset, panel in zip(results.request.datasets, panels, strict=True):
        for x, count in enumerate(epochs):
            cell = results.loss(dataset, count)
            _ours(panel, x - _BESIDE, _lower(cell.rkdo, cell.icon), _HERE, "here")
            if cell.published is not None:
                _published(panel, x + _BESIDE, (cell.published.percent, None), _HERE, "published")
        before = _before(results, dataset)
        if before is not None:
            panel.axhline(before, color=DARK, linestyle="--", linewidth=1.2, label="before any training")
        panel.set(xticks=range(len(epochs)), xticklabels=[str(e) for e in epochs], xlabel="epochs", ylim=(0, 36))
        panel.set_xlim(-0.6, len(epochs) - 0.4)
    legend_below(figure)
    return figure


def _improvement_by_epoch(results: Results) -> Any:
    """Figure 2: the same percentage at every epoch, from before training on."""
    figure, panels = _panels(
        results, "Figure 2: RKDO's loss below I-Con's, epoch by epoch", "lower by (% of I-Con's loss)"
    )
    for dataset, panel in zip(results.request.datasets, panels, strict=True):
        before = _before(results, dataset)
        points = {epoch: results.loss(dataset, epoch) for epoch in range(1, results.longest(dataset) + 1)}
        lower = {epoch: _lower(cell.rkdo, cell.icon) for epoch, cell in points.items()}
        band(panel, {**({} if before is None else {0: [before]}), **lower}, _HERE, "here")
        if before is not None:
            panel.axhline(before, color=DARK, linestyle="--", linewidth=1.2, label="before any training")
        for count in published.EPOCHS:
            row = results.theirs(dataset, published.TABLE_1[dataset, count])
            if row is not None:
                _published(panel, count, (row.percent, None), _HERE, "published")
        panel.set(xlabel="epoch (0: before training)", ylim=(0, 36))
        whole_numbers(panel)
    legend_below(figure)
    return figure


def _early_against_late(results: Results) -> Any:
    """Figure 3: RKDO after 2 epochs beside I-Con after 5."""
    figure, panels = _panels(results, "Figure 3: RKDO at 2 epochs, I-Con at 5 epochs", "linear evaluation accuracy")
    for dataset, panel in zip(results.request.datasets, panels, strict=True):
        cell = results.score(dataset, 2, "linear_accuracy", later=5)
        for x, (objective, epochs) in enumerate((("rkdo", 2), ("icon", 5))):
            row = results.theirs(dataset, published.TABLE_2[dataset, epochs])
            _pair(panel, x, getattr(cell, objective), row, objective)
        panel.set(xticks=(0, 1), xticklabels=("RKDO, 2 epochs", "I-Con, 5 epochs"), xlim=(-0.6, 1.6))
    panels[0].set_ylim(bottom=0)
    legend_below(figure)
    return figure


def _early_learning(results: Results) -> Any:
    """Figure 4: both at 1 and 2 epochs."""
    figure, panels = _panels(results, "Figure 4: early learning, 1 and 2 epochs", "linear evaluation accuracy")
    for dataset, panel in zip(results.request.datasets, panels, strict=True):
        for x, epochs in enumerate((1, 2)):
            cell = results.score(dataset, epochs, "linear_accuracy")
            for offset, objective in ((-0.2, "rkdo"), (0.2, "icon")):
                _pair(panel, x + offset, getattr(cell, objective), cell.published, objective)
        panel.set(xticks=(0, 1), xticklabels=("1 epoch", "2 epochs"), xlim=(-0.6, 1.6))
    panels[0].set_ylim(bottom=0)
    legend_below(figure)
    return figure


def _pair(panel: Any, x: float, values: list[float], row: published.Row | None, objective: str) -> None:
    """Ours, and the paper's on its right."""
    look, name = _STYLES[objective], NAMES[objective]
    _ours(panel, x - _BESIDE / 2, values, look, f"{name} here")
    _published(panel, x + _BESIDE / 2, None if row is None else getattr(row, objective), look, f"{name} published")


def _losses(results: Results) -> Any:
    """Figure 5: losses over training durations, from before training on."""
    figure, panels = _panels(results, "Figure 5: loss across training durations", "mean loss of the epoch (nats)")
    for dataset, panel in zip(results.request.datasets, panels, strict=True):
        cells = {epoch: results.loss(dataset, epoch) for epoch in range(1, results.longest(dataset) + 1)}
        before = results.at_uniform(dataset) or (None, None)
        for objective, start in zip(OBJECTIVES, before, strict=True):
            points = {epoch: getattr(cell, objective) for epoch, cell in cells.items()}
            points |= {} if start is None else {0: [start]}
            band(panel, points, _STYLES[objective], f"{NAMES[objective]} here")
            for count in published.EPOCHS:
                row = results.theirs(dataset, published.TABLE_1[dataset, count])
                number = None if row is None else getattr(row, objective)
                _published(panel, count, number, _STYLES[objective], f"{NAMES[objective]} published")
        panel.set(xlabel="epoch (0: before training)")
        whole_numbers(panel)
    legend_below(figure)
    return figure
