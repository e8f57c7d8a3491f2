"""Made-up figures of every kind, and what every figure must be: nothing cut, covered or told by colour alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colors

from rkdo_dist import config as configuration
from rkdo_dist.studies import field_figure, grid, palette, paper, published
from rkdo_dist.studies.palette import COLOURS
from rkdo_dist.studies.paper import Request, Results
from rkdo_dist.studies.report import pictures
from rkdo_dist.studies.report.groups import read_groups
from rkdo_dist.studies.runner import Planned
from tests.reports import fake_run, scores_of
from tests.runs import made_up

SMALLEST = 8  # points of any text
SCORES = {"linear_accuracy": 0.25, "nmi": 0.12, "ari": 0.05, "neighbourhood": 0.18}


def reproduction(out: Path, seeds: int) -> Results:
    """Made-up runs on CIFAR-10; STL-10 is not run."""
    asked = Request(("cifar10", "stl10"), "paper", published.SEEDS[:seeds], (1, 2), out)
    for number, seed in enumerate(asked.seeds):
        for objective, start in (("rkdo", 1.95), ("icon", 2.68)):
            config = paper.paper_config(asked, "cifar10", objective, seed, "shards")
            scores = {key: value + 0.003 * number for key, value in SCORES.items()}
            losses = [start + 0.01 * number, start - 0.1]
            made_up(config, losses, lambda _, s=scores: s)  # type: ignore[misc]
    return Results(asked)


def swept(out: Path, seeds: tuple[int, ...], *axes: grid.Axis) -> tuple[grid.Sweep, list[grid.Row]]:
    """A sweep whose scores differ by noise."""
    base = configuration.from_tree({"train": {"epochs": 1, "batches_per_epoch": 4}})
    wanted = grid.Sweep(base, axes, seeds, out, "nmi")
    planned = []
    for combination in wanted.combinations():
        for seed in seeds:
            config = wanted.config(combination, seed)
            planned.append(Planned(config, 4))
            score = {"nmi": 0.8134 + 0.0028 * combination[0] + 0.001 * seed}
            made_up(config, [1.8], lambda _, s=score: s, steps_per_epoch=4)  # type: ignore[misc]
    return wanted, grid.results(wanted, planned)


def compared(out: Path, seeds: int) -> list[Any]:
    """Groups of a report: three objectives, one evaluation, accuracies that differ by noise."""
    paths = []
    for n, (name, start) in enumerate((("rkdo", 1.9), ("icon", 2.7), ("infonce", 4.0))):
        for seed in range(seeds):
            judged = {6: scores_of(0.8134 + 0.0014 * n + 0.001 * seed)}
            paths.append(fake_run(out / f"{name}-{seed}", name, seed, [start, start - 0.2], judged))
    return read_groups(paths)[0]


def evolution() -> field_figure.Evolution:
    """Rows that are the identity at first, then move, then stay."""
    draw = np.random.default_rng(0)
    shown = {k: field_figure.Picture(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8), k % 3) for k in range(30)}
    rows = []
    for own in (3,):
        first = {"sample": own, "positive": 1.0, "nearest": [(own, 1.0)]}
        later = {"sample": own, "positive": 0.9, "nearest": [(own, 0.9), *((k, 0.0123) for k in (6, 7, 8, 9, 10, 12))]}
        rows.append([first, later, later])
    curves = {key: ([1, 2, 3], [1.0, 0.9, 0.8]) for key in (*field_figure.CURVES, "row_entropy")}
    return field_figure.Evolution([4, 8, 12], rows, shown, curves)


def seen() -> pictures.Seen:
    draw = np.random.default_rng(0)
    u, v = (torch.nn.functional.normalize(torch.from_numpy(draw.normal(size=(16, 8))), dim=1) for _ in range(2))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    images, labels = np.zeros((40, 3, 8, 8), np.uint8), np.arange(40) % 10
    return pictures.Seen(1, images, labels, draw.normal(size=(40, 8)), u, v, names)


def audited() -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"group": "view", "view": view, "temperature": tau, "precision": 0.5 - tau, "error": 0.01, "rows": 1.0}
        for view in ("plain", "weak", "strong")
        for tau in (0.02, 0.05, 0.1)
    ]
    rows += [{**rows[0], "group": "neighbours", "k": k} for k in (1, 20)]
    rows += [{**rows[-1], "group": "memory", "view": "strong", "mean": "arithmetic", "visits": 4}]
    return {"rows": rows, "step": 6, "best": rows[0], "base": 0.1, "temperature": 0.05}


def texts(figure: Any) -> list[Any]:
    """Texts that are shown."""
    parts = [figure, *getattr(figure, "subfigs", [])]
    parts += [one for part in parts[1:] for one in part.subfigs]
    found = [one._suptitle for one in parts if one._suptitle is not None]
    found += [text for one in parts for legend in one.legends for text in legend.get_texts()]
    for panel in figure.axes:
        found += panel.texts
        if panel.axison:
            found += [panel.title, panel._left_title, panel.xaxis.label, panel.yaxis.label]
            found += [*ticks(panel.xaxis), *ticks(panel.yaxis), panel.xaxis.offsetText, panel.yaxis.offsetText]
            found += panel.get_legend().get_texts() if panel.get_legend() is not None else []
    return [one for one in found if one.get_visible() and one.get_text().strip()]


def ticks(axis: Any) -> list[Any]:
    """Labels of the ticks inside the view."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    found = [t for t in axis.get_major_ticks() if low - slack <= t.get_loc() <= high + slack and t.label1.get_visible()]
    return [tick.label1 for tick in found if tick.label1.get_text()]


def crowded(figure: Any) -> list[str]:
    """Ticks of one axis that lie over each other."""
    found = []
    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            boxes = [(one.get_text(), one.get_window_extent()) for one in ticks(axis)]
            found += [f"{a} over {b}" for (a, x), (b, y) in itertools.combinations(boxes, 2) if _overlap(x, y)]
    return found


def _overlap(a: Any, b: Any, slack: float = 0.5) -> bool:
    return min(a.x1, b.x1) - max(a.x0, b.x0) > slack and min(a.y1, b.y1) - max(a.y0, b.y0) > slack


def cut(figure: Any) -> list[str]:
    """Texts that leave the figure."""
    whole = figure.get_window_extent().padded(1)
    boxes = [(one.get_text(), one.get_window_extent()) for one in texts(figure)]
    return [t for t, b in boxes if b.x0 < whole.x0 or b.y0 < whole.y0 or b.x1 > whole.x1 or b.y1 > whole.y1]


def covered(figure: Any) -> list[str]:
    """Panels that a legend lies over."""
    legends = [*figure.legends, *(one.get_legend() for one in figure.axes if one.get_legend() is not None)]
    legends += [one for part in getattr(figure, "subfigs", []) for one in part.legends]
    return [p.get_title("left") for p in figure.axes for one in legends if _overlap(p.bbox, one.get_window_extent())]


def strange(figure: Any) -> list[str]:
    """Colours of lines, points, bars and bands that are not of the palette."""
    known = {colors.to_hex(c) for c in (*COLOURS, palette.DARK, palette.GREY, "white", "black")}
    used = [one.get_color() for panel in figure.axes for one in panel.lines]
    used += [one.get_facecolor() for panel in figure.axes for one in panel.patches]
    for panel in figure.axes:
        if not panel.images and not hasattr(panel, "_colorbar"):  # not those of a map of numbers
            used += [c for one in panel.collections for c in (*one.get_facecolor(), *one.get_edgecolor())]
    return sorted({colors.to_hex(one) for one in used} - known)


def alike(figure: Any) -> list[str]:
    """Lines of a panel that only their colour tells apart."""
    found = []
    for panel in figure.axes:
        named = [one for one in panel.lines if not one.get_label().startswith("_")]
        for a, b in itertools.combinations(named, 2):
            if _look(a) == _look(b):
                found.append(f"{a.get_label()}, {b.get_label()}")
    return found


def _look(line: Any) -> tuple[Any, ...]:
    hollow = line.get_markerfacecolor() == "white" or line.get_fillstyle() == "none"
    return line.get_marker(), str(line._dash_pattern), hollow
