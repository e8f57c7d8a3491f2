"""Figures of a sweep: a curve with a seed band for one key, a pair of heat maps for every pair of keys."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from rkdo_dist.rundir import COMMON_METRIC_TITLES, SCORE_TITLES
from rkdo_dist.studies import plots
from rkdo_dist.studies.grid import Axis, Row, Sweep
from rkdo_dist.studies.palette import FIELD, GREY, style
from rkdo_dist.studies.plots import over, save
from rkdo_dist.studies.sheets import mean_sd

ATTAINED = "attained"
TITLES = {
    "loss": "loss (nats)",
    ATTAINED: "attained share of the loss",
    **SCORE_TITLES,
    **{f"yardsticks.{name}": title for name, title in COMMON_METRIC_TITLES.items()},
}
_TICKS = 14  # that an axis has room for
_LOG = 20  # a positive axis that spans more than this is logarithmic


def figures(asked: Sweep, rows: list[Row], folder: Path, title: str) -> list[Path]:
    """Draw what the number of keys asks for; the PNG files written (an SVG is beside each)."""
    names = list(dict.fromkeys((asked.metric, ATTAINED)))
    if len(asked.axes) == 1:
        return save(_curve(asked, rows, names, title), folder, asked.axes[0].key)[:1]
    paths = []
    for first, second in itertools.combinations(range(len(asked.axes)), 2):
        name = f"{asked.axes[first].key}-{asked.axes[second].key}"
        paths += save(_maps(asked, rows, names, (first, second), title), folder, name)[:1]
    return paths


def _curve(asked: Sweep, rows: list[Row], names: list[str], title: str) -> Any:
    """Mean over seeds, its standard deviation as a band or a bar, every run as a dot."""
    axis = asked.axes[0]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values)
    height = 4.4 if numeric else 2.0 + 0.34 * len(axis.texts)
    figure, axes = plots.panels(1, len(names), (5.4 * len(names), height), sharey=not numeric)
    plots.title(figure, title, over(_seeds(rows)))
    for name, panel in zip(names, axes, strict=True):
        found = [list(row.values(name).values()) for row in sorted(rows, key=lambda row: row.combination)]
        (_along if numeric else _beside)(panel, axis, found)
        (panel.set_ylabel if numeric else panel.set_xlabel)(TITLES.get(name, name))
    return figure


def _along(panel: Any, axis: Axis, found: list[list[float]]) -> None:
    """Numbers: a line from one to the next, at their own places where these lie far enough apart to be read."""
    places, said = [float(value) for value in axis.values], axis.key
    if min(places) > 0 and max(places) > _LOG * min(places):
        panel.set_xscale("log")
    scaled = sorted(math.log(x) if panel.get_xscale() == "log" else x for x in places)
    if len(places) > 1 and min(b - a for a, b in itertools.pairwise(scaled)) < (scaled[-1] - scaled[0]) / _TICKS:
        panel.set_xscale("linear")
        places, said = [float(sorted(places).index(x)) for x in places], f"{axis.key} (not to scale)"
    for x, values in zip(places, found, strict=True):
        panel.plot([x] * len(values), values, ".", color=style(0).colour, alpha=0.5)
    plots.band(panel, dict(zip(places, found, strict=True)), style(0), "")
    panel.set_xticks(places, axis.texts)
    panel.minorticks_off()
    panel.set_xlabel(said)
    plots.calm(panel)


def _beside(panel: Any, axis: Axis, found: list[list[float]]) -> None:
    """Names, which have no order: one below the other."""
    for y, values in enumerate(found):
        mean, sd = mean_sd(values)
        panel.plot(values, [y] * len(values), ".", color=style(0).colour, alpha=0.5)
        panel.errorbar(mean, y, xerr=None if sd != sd else sd, fmt="o", markersize=6, color=style(0).colour, capsize=4)
    panel.set_yticks(range(len(axis.texts)), axis.texts)
    panel.set_ylim(len(axis.texts) - 0.5, -0.5)
    panel.set_ylabel(axis.key if panel.get_subplotspec().is_first_col() else "")
    plots.calm(panel, along="x")


def _seeds(rows: list[Row]) -> list[int]:
    """How many seeds are complete, which may be fewer than were asked for."""
    return sorted({len(row.runs) for row in rows if row.runs})


def _maps(asked: Sweep, rows: list[Row], names: list[str], pair: tuple[int, int], title: str) -> Any:
    """A heat map per name: the first key downwards, the second across; other keys are averaged over."""
    down, across = (asked.axes[number] for number in pair)
    others = [axis.key for number, axis in enumerate(asked.axes) if number not in pair]
    height, width = 1.9 + 0.62 * len(down.values), 2.6 + 1.05 * len(across.values)
    figure, axes = plots.panels(1, len(names), (max(4.6, width) * len(names), max(3.2, height)))
    averaged = f"; averaged over {', '.join(others)}" if others else ""
    plots.title(figure, title, over(_seeds(rows)) + averaged)
    for name, panel in zip(names, axes, strict=True):
        cells = [
            [_values(rows, pair, (i, j), name) for j in range(len(across.values))] for i in range(len(down.values))
        ]
        means = [[mean_sd(values)[0] for values in line] for line in cells]
        known = [mean for line in means for mean in line if mean == mean]
        low, high = plots.widened(min(known), max(known)) if known else (0, 1)
        image = panel.imshow(means, cmap=FIELD, aspect="auto", vmin=low, vmax=high)
        figure.colorbar(image, ax=panel, shrink=0.9)
        panel.set(xlabel=across.key, ylabel=down.key, title=TITLES.get(name, name))
        panel.set_xticks(range(len(across.values)), across.texts)
        panel.set_yticks(range(len(down.values)), down.texts)
        panel.grid(False)
        for i, line in enumerate(cells):
            for j, values in enumerate(line):
                _write_in(panel, image, (j, i), values)
    return figure


def _values(rows: list[Row], pair: tuple[int, int], place: tuple[int, int], name: str) -> list[float]:
    """A value per seed: its mean over the combinations that meet in this cell."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row.combination[pair[0]], row.combination[pair[1]]) == place:
            for seed, value in row.values(name).items():
                found.setdefault(seed, []).append(value)
    return [statistics.fmean(values) for values in found.values()]


def _write_in(panel: Any, image: Any, place: tuple[int, int], values: list[float]) -> None:
    """The number in its cell, in a colour that can be read on it."""
    mean, sd = mean_sd(values)
    if mean != mean:
        panel.text(*place, "-", ha="center", va="center", color=GREY)
        return
    bright = sum(image.cmap(image.norm(mean))[:3]) > 1.5
    text = f"{mean:.3f}" if sd != sd else f"{mean:.3f}\n± {sd:.3f}"
    panel.text(*place, text, ha="center", va="center", fontsize=9, color="black" if bright else "white")
