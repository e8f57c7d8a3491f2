"""Curves of groups of runs: the mean over seeds with a band of one standard deviation. SVG files as bytes."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rkdo_dist.rundir import SCORE_TITLES
from rkdo_dist.studies.report.runs import Group, Run
from rkdo_dist.studies.report.words import COMMON

COLOURS = ("#1f6f8b", "#c8553d", "#6a8d2f", "#7b5ea7", "#b8860b", "#4d4d4d", "#d16ba5", "#2a9d8f")
_SHOWN = ("linear_accuracy", "knn_accuracy", "infonce", "alignment", "uniformity", "effective_rank")


def loss_chart(groups: Sequence[Group]) -> bytes | None:
    """Each objective's own loss by step, and the share attained of its way; None before any step."""
    if not any(run.epochs for group in groups for run in group.runs):
        return None
    figure, (own, share) = _panels(1, 2)
    for group in groups:
        _band(own, group, lambda run: {e.steps: e.loss for e in run.epochs})
        _band(share, group, lambda run: {e.steps: e.attained for e in run.epochs if e.attained is not None})
        first = next((run.epochs[0] for run in group.runs if run.epochs), None)
        if first is not None:
            own.axhline(first.at_uniform, color=_colour(group), linestyle=":", linewidth=1)
    _whole(own, share)
    own.set(title="Own loss, mean of an epoch (dotted: knows nothing)", xlabel="step")
    share.set(title="Share attained of its own way", xlabel="step")
    share.yaxis.set_major_formatter(pyplot().matplotlib.ticker.PercentFormatter(1))
    return _svg(figure)


def score_chart(groups: Sequence[Group]) -> bytes | None:
    """Scores that are the same function for all, by step; None without evaluations."""
    names = [n for n in _SHOWN if any(_scores(run, n) for group in groups for run in group.runs)]
    if not names:
        return None
    figure, panels = _panels(-(-len(names) // 3), 3)
    for panel, name in zip(panels.flat, names, strict=False):
        for group in groups:
            _band(panel, group, partial(_scores, name=name))
        panel.set(title=COMMON[name], xlabel="step")
        _whole(panel)
    for panel in panels.flat[len(names) :]:
        panel.remove()
    return _svg(figure)


def resource_chart(groups: Sequence[Group], flops: dict[int, float], name: str) -> bytes | None:
    """A score against steps, operations and seconds.

    Args:
        flops: of a step, by group number; groups without are left out of that panel.
        name: of the score.
    """
    if not any(_scores(run, name) for group in groups for run in group.runs):
        return None
    figure, panels = _panels(1, 3)
    for group in groups:
        steps, means = score_curve(group, name)
        seconds = mean_seconds(group, steps)
        if not steps:
            continue
        style: dict[str, Any] = {"color": _colour(group), "marker": "o", "markersize": 4, "label": group.label}
        panels.flat[0].plot(steps, means, **style)
        if group.number in flops:
            panels.flat[1].plot([step * flops[group.number] / 1e12 for step in steps], means, **style)
        panels.flat[2].plot(seconds, means, **style)
    for panel, unit in zip(panels.flat, ("steps", "TFLOPs, forward and backward", "seconds in steps"), strict=True):
        panel.set(xlabel=unit, title=SCORE_TITLES[name])
        panel.set_xlim(left=0)
    return _svg(figure)


def score_curve(group: Group, name: str) -> tuple[list[int], list[float]]:
    """Steps with an evaluation, and the score's mean over the seeds that have it."""
    steps, values = group.curve(lambda run: _scores(run, name))
    return steps, [statistics.fmean(found) for found in values]


def mean_seconds(group: Group, steps: Sequence[int]) -> list[float]:
    """Seconds that a run of the group spent in steps until these steps, mean over seeds."""
    return [
        statistics.fmean([run.seconds[step] for run in group.runs if step in run.seconds] or [float("nan")])
        for step in steps
    ]


def _scores(run: Run, name: str) -> dict[int, float]:
    found = {step: run.score(step, name) for step in run.evaluations}
    return {step: value for step, value in found.items() if value is not None}


def _band(panel: Any, group: Group, values: Callable[[Run], dict[int, float]]) -> None:
    steps, found = group.curve(values)
    if not steps:
        return
    means = [statistics.fmean(some) for some in found]
    spread = [statistics.stdev(some) if len(some) > 1 else 0.0 for some in found]
    marker = "o" if len(steps) < 25 else None
    panel.plot(steps, means, color=_colour(group), marker=marker, markersize=3.5, label=group.label)
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    panel.fill_between(steps, low, high, color=_colour(group), alpha=0.18, linewidth=0)


def _whole(*panels: Any) -> None:
    """Whole steps only."""
    for panel in panels:
        panel.xaxis.get_major_locator().set_params(integer=True)


def _colour(group: Group) -> str:
    return COLOURS[group.number % len(COLOURS)]


def _panels(rows: int, columns: int) -> tuple[Any, Any]:
    plt = pyplot()
    return plt.subplots(rows, columns, figsize=(11.5, 3.3 * rows + 0.5), constrained_layout=True, squeeze=True)


def pyplot() -> Any:
    """matplotlib, without a display and with the page's looks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({
        "svg.hashsalt": "rkdo",  # the same file for the same runs
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    })  # fmt: skip
    return plt


def _svg(figure: Any) -> bytes:
    """The figure with one legend below all panels."""
    entries: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False)
    return saved(figure, "svg")


def saved(figure: Any, kind: str) -> bytes:
    """A figure as a file, closed."""
    out = io.BytesIO()
    options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 130}
    figure.savefig(out, format=kind, **options)
    pyplot().close(figure)
    return out.getvalue()
