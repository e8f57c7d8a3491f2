"""Curves of groups of runs: the mean over seeds with a band of one standard deviation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rkdo_dist.rundir import SCORE_TITLES
from rkdo_dist.studies.plots import band, calm, encoded, legend_below, over, panels, pyplot, title, whole_numbers
from rkdo_dist.studies.report.groups import Group
from rkdo_dist.studies.report.words import COMMON
from rkdo_dist.studies.sheets import mean_sd

_WIDTH = {1: 4.6, 2: 8.4, 3: 9.9}  # inches, by panels side by side
_UNITS = {  # of scores; all others are shares
    "infonce": "nats",
    "alignment": "squared distance",
    "uniformity": "log of a mean",
    "effective_rank": "dimensions",
}
_FLOPS = ((1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))
_SHOWN = ("linear_accuracy", "knn_accuracy", "infonce", "alignment", "uniformity", "effective_rank")


def loss_chart(groups: Sequence[Group]) -> Any | None:
    """A figure of each objective's own loss by step, and of its attained share; None before any step."""
    if not any(run.epochs for group in groups for run in group.runs):
        return None
    figure, (own, share) = panels(1, 2, (_WIDTH[2], 3.9))
    for group in groups:
        band(own, group.curve(lambda run: {e.steps: e.loss for e in run.epochs}), group.style, group.label)
        band(share, group.curve(lambda run: {e.steps: e.attained for e in run.epochs}), group.style, group.label)
        first = next((run.epochs[0] for run in group.runs if run.epochs), None)
        if first is not None:
            own.plot(0, first.at_uniform, **group.style.points, markerfacecolor="white")
    whole_numbers(own, share)
    calm(own)
    own.set(title="Own loss, epoch means (hollow: untrained)", xlabel="step", ylabel="nats")
    share.set(title="Attained share (untrained 0 %, ideal 100 %)", xlabel="step", ylabel="% of the way")
    share.yaxis.set_major_formatter(pyplot().matplotlib.ticker.PercentFormatter(1))
    legend_below(figure)
    return figure


def write_loss_chart(groups: Sequence[Group], path: Path) -> bool:
    """Write the loss chart as the kind of file that the name's ending says; False before any step.

    Raises:
        ValueError: for an ending that matplotlib does not know.
    """
    figure = loss_chart(groups)
    if figure is not None:
        title(figure, over([len(group.runs) for group in groups]))
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
    figure, axes = panels(rows, 3, (_WIDTH[3], 3.2 * rows + 0.5))
    for panel, name in zip(axes, names, strict=False):
        for group in groups:
            band(panel, group.scores(name), group.style, group.label)
        panel.set(title=COMMON[name], xlabel="step", ylabel=_UNITS.get(name, "share"))
        whole_numbers(panel)
        calm(panel)
    for panel in axes[len(names) :]:
        panel.remove()
    legend_below(figure)
    return figure


def probe_chart(groups: Sequence[Group]) -> Any | None:
    """A figure of the online probes by step; None without any."""
    names = {"probe_linear": "linear probe (backbone)", "probe_knn": "k-NN probe (backbone)"}

    def curves(name: str) -> list[dict[int, list[float]]]:
        return [group.curve(lambda run: run.curve(name)) for group in groups]

    shown = {called: found for name, called in names.items() if any(found := curves(name))}
    if not shown:
        return None
    figure, axes = panels(1, len(shown), (_WIDTH[len(shown)], 3.8))
    for panel, (name, found) in zip(axes, shown.items(), strict=True):
        for group, curve in zip(groups, found, strict=True):
            band(panel, curve, group.style, group.label)
        panel.set(title=name, xlabel="step", ylabel="share")
        whole_numbers(panel)
        calm(panel)
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
    figure, (by_step, by_flops, by_second) = panels(1, 3, (_WIDTH[3], 3.6))
    most = max((max(group.scores(name), default=0) * flops.get(group.number, 0) for group in groups), default=0)
    unit, called = next(((size, word) for size, word in _FLOPS if most >= size), _FLOPS[-1])
    for group in groups:
        means = {step: mean_sd(values)[0] for step, values in group.scores(name).items()}
        look: dict[str, Any] = {**group.style.curve, "label": group.label}
        by_step.plot(list(means), list(means.values()), **look)
        if group.number in flops:
            by_flops.plot([step * flops[group.number] / unit for step in means], list(means.values()), **look)
        by_second.plot(mean_seconds(group, list(means)), list(means.values()), **look)
    for panel, what in (
        (by_step, "steps"),
        (by_flops, f"{called}, forward and backward"),
        (by_second, "seconds in steps"),
    ):
        panel.set(xlabel=what, title=f"by {what.partition(',')[0]}", ylabel=SCORE_TITLES[name])
        panel.set_xlim(left=0)
        panel.locator_params(axis="x", nbins=4)
        calm(panel)
        if not panel.lines:
            panel.text(0.5, 0.5, "the images' size is not known", ha="center", transform=panel.transAxes)
            panel.set(xticks=[], yticks=[])
    legend_below(figure)
    return figure


def mean_seconds(group: Group, steps: Sequence[int]) -> list[float]:
    """Seconds that a run of the group spent in steps until these steps, mean over seeds."""
    return [mean_sd([run.seconds[step] for run in group.runs if step in run.seconds])[0] for step in steps]
