"""Curves of groups of runs: the mean over seeds with a band of one standard deviation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rkdo_dist.rundir import SCORE_TITLES
from rkdo_dist.studies.plots import band, encoded, legend_below, panels, pyplot, whole_numbers
from rkdo_dist.studies.report.groups import Group
from rkdo_dist.studies.report.words import COMMON
from rkdo_dist.studies.sheets import mean_sd

_SHOWN = ("linear_accuracy", "knn_accuracy", "infonce", "alignment", "uniformity", "effective_rank")


def loss_chart(groups: Sequence[Group]) -> Any | None:
    """A figure of each objective's own loss by step, and of its attained share; None before any step."""
    if not any(run.epochs for group in groups for run in group.runs):
        return None
    figure, (own, share) = panels(1, 2, (11.5, 3.9))
    for group in groups:
        band(own, group.curve(lambda run: {e.steps: e.loss for e in run.epochs}), group.style, group.label)
        band(share, group.curve(lambda run: {e.steps: e.attained for e in run.epochs}), group.style, group.label)
        first = next((run.epochs[0] for run in group.runs if run.epochs), None)
        if first is not None:
            own.axhline(first.at_uniform, color=group.style.colour, linestyle=":", linewidth=1)
    whole_numbers(own, share)
    own.set(title="Own loss, epoch means (dotted: untrained)", xlabel="step")
    share.set(title="Attained share: untrained 0 %, ideal 100 %", xlabel="step")
    share.yaxis.set_major_formatter(pyplot().matplotlib.ticker.PercentFormatter(1, decimals=0))
    legend_below(figure)
    return figure


def write_loss_chart(groups: Sequence[Group], path: Path) -> bool:
    """Write the loss chart as the kind of file that the name's ending says; False before any step.

    Raises:
        ValueError: for an ending that matplotlib does not know.
    """
    figure = loss_chart(groups)
    if figure is not None:
        picture = encoded(figure, path.suffix[1:])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    return figure is not None


def score_chart(groups: Sequence[Group]) -> Any | None:
    """A figure of the scores that are the same function for all, by step; None without evaluations."""
    names = [name for name in _SHOWN if any(group.scores(name) for group in groups)]
    if not names:
        return None
    rows = -(-len(names) // 3)
    figure, axes = panels(rows, 3, (11.5, 3.3 * rows + 0.5))
    for panel, name in zip(axes, names, strict=False):
        for group in groups:
            band(panel, group.scores(name), group.style, group.label)
        panel.set(title=COMMON[name], xlabel="step")
        whole_numbers(panel)
    for panel in axes[len(names) :]:
        panel.remove()
    legend_below(figure)
    return figure


def probe_chart(groups: Sequence[Group]) -> Any | None:
    """A figure of the online probes by step; None without any."""
    names = {"probe_linear": "linear probe (backbone)", "probe_knn": "k-NN probe (backbone)"}

    def curves(name: str) -> list[dict[int, list[float]]]:
        return [group.curve(lambda run: run.curve(name)) for group in groups]

    shown = {title: found for name, title in names.items() if any(found := curves(name))}
    if not shown:
        return None
    figure, axes = panels(1, len(shown), (5.75 * len(shown), 3.8))
    for panel, (title, found) in zip(axes, shown.items(), strict=True):
        for group, curve in zip(groups, found, strict=True):
            band(panel, curve, group.style, group.label)
        panel.set(title=title, xlabel="step")
        whole_numbers(panel)
    legend_below(figure)
    return figure


def resource_chart(groups: Sequence[Group], flops: Mapping[int, float], name: str) -> Any | None:
    """A figure of a score against steps, operations and seconds; None without evaluations.

    Args:
        flops: of a step, by group number; groups without are left out of that panel.
        name: of the score.
    """
    if not any(group.scores(name) for group in groups):
        return None
    figure, (by_step, by_flops, by_second) = panels(1, 3, (11.5, 3.8))
    for group in groups:
        means = {step: mean_sd(values)[0] for step, values in group.scores(name).items()}
        style: dict[str, Any] = {**group.style.curve, "label": group.label}
        by_step.plot(list(means), list(means.values()), **style)
        if group.number in flops:
            by_flops.plot([step * flops[group.number] / 1e12 for step in means], list(means.values()), **style)
        by_second.plot(mean_seconds(group, list(means)), list(means.values()), **style)
    units = ("steps", "TFLOPs, forward and backward", "seconds in steps")
    for panel, unit in zip((by_step, by_flops, by_second), units, strict=True):
        panel.set(xlabel=unit, title=SCORE_TITLES[name])
        panel.set_xlim(left=0)
        panel.locator_params(axis="x", nbins=5)
    legend_below(figure)
    return figure


def mean_seconds(group: Group, steps: Sequence[int]) -> list[float]:
    """Seconds that a run of the group spent in steps until these steps, mean over seeds."""
    return [mean_sd([run.seconds[step] for run in group.runs if step in run.seconds])[0] for step in steps]
