"""Figures of a sweep: a curve with a seed band for one key, a pair of heat maps for every pair of keys."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

from rkdo_dist.studies.grid import Axis, Row, Sweep
from rkdo_dist.studies.palette import GREY, style
from rkdo_dist.studies.plots import band, panels, save, seeds
from rkdo_dist.studies.sheets import mean_sd

ATTAINED = "attained"
_TITLES = {ATTAINED: "attained share of the loss"}
_LONG = 8  # characters of a name that needs room
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
    """Mean over seeds, its standard deviation as a band, every run as a dot."""
    axis, shade = asked.axes[0], style(0).colour
    positions, numeric = _positions(axis)
    figure, axes = panels(1, len(names), (5.4 * len(names), 4.2))
    figure.suptitle(title)
    for name, panel in zip(names, axes, strict=True):
        points = {positions[row.combination[0]]: list(row.values(name).values()) for row in rows}
        for x, values in points.items():
            panel.plot([x] * len(values), values, ".", color=shade, alpha=0.5)
        if numeric:
            band(panel, points, style(0), "")
        else:  # names have no order: no line and no band from one to the next
            means, sds = zip(*(mean_sd(values) for values in points.values()), strict=True)
            errors = [0.0 if sd != sd else sd for sd in sds]
            panel.errorbar(list(points), means, errors, fmt="o", markersize=5, color=shade, capsize=4)
        panel.set(xlabel=axis.key, ylabel=_TITLES.get(name, name), title=f"mean ± sd over {_seeds(rows)}")
        if numeric and min(positions) > 0 and max(positions) > _LOG * min(positions):
            panel.set_xscale("log")
        slanted = {} if numeric or max(map(len, axis.texts)) < _LONG else {"rotation": 30, "ha": "right"}
        panel.set_xticks(positions, axis.texts, **slanted)
        panel.minorticks_off()
        if not numeric:
            panel.margins(x=0.12)
    return figure


def _seeds(rows: list[Row]) -> str:
    """How many seeds are complete, which may be fewer than were asked for."""
    counts = {len(row.runs) for row in rows if row.runs}
    return seeds(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)} seeds"


def _positions(axis: Axis) -> tuple[list[float], bool]:
    """Where values lie: numbers at themselves, everything else side by side."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values):
        return [float(value) for value in axis.values], True
    return [float(number) for number in range(len(axis.values))], False


def _maps(asked: Sweep, rows: list[Row], names: list[str], pair: tuple[int, int], title: str) -> Any:
    """A heat map per name: the first key downwards, the second across; other keys are averaged over."""
    down, across = (asked.axes[number] for number in pair)
    others = [axis.key for number, axis in enumerate(asked.axes) if number not in pair]
    height, width = 1.9 + 0.62 * len(down.values), 2.6 + 1.05 * len(across.values)
    figure, axes = panels(1, len(names), (max(4.6, width) * len(names), max(3.2, height)))
    averaged = f"; averaged over {', '.join(others)}" if others else ""
    figure.suptitle(f"{title}\nmean ± sd over {_seeds(rows)}{averaged}")
    for name, panel in zip(names, axes, strict=True):
        cells = [
            [_values(rows, pair, (i, j), name) for j in range(len(across.values))] for i in range(len(down.values))
        ]
        means = [[mean_sd(values)[0] for values in line] for line in cells]
        image = panel.imshow(means, cmap="viridis", aspect="auto")
        figure.colorbar(image, ax=panel, shrink=0.9)
        panel.set(xlabel=across.key, ylabel=down.key, title=_TITLES.get(name, name))
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
