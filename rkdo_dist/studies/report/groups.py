"""Runs grouped by configuration apart from the seed, their labels and colours, and the first table of a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rkdo_dist import config as configuration
from rkdo_dist.config import Config
from rkdo_dist.field.presets import PRESETS, named
from rkdo_dist.history import Epoch, History
from rkdo_dist.rundir import COMMON_METRIC_TITLES, SCORE_TITLES, RunDirectory
from rkdo_dist.studies import palette
from rkdo_dist.studies.plots import over, sentence
from rkdo_dist.studies.sheets import Sheet, mean_sd, number, of_values


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, in the order of their seeds.

    Attributes:
        label: the objective, and what else tells the groups apart.
        number: position.
        style: the objective's own one, unless several groups have that objective.
    """

    label: str
    number: int
    style: palette.Style
    runs: list[History]

    @property
    def config(self) -> Config:
        """Of its first run."""
        return self.runs[0].config

    @property
    def last_step(self) -> int | None:
        """The last step at which all runs that were evaluated at all have an evaluation."""
        judged = [set(run.evaluations) for run in self.runs if run.evaluations]
        return max(set.intersection(*judged), default=None) if judged else None

    def curve(self, values: Callable[[History], Mapping[int, float | None]]) -> dict[int, list[float]]:
        """By rising step: the values of the runs that have one there."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for step, value in values(run).items():
                if value is not None:
                    found.setdefault(step, []).append(value)
        return dict(sorted(found.items()))

    def scores(self, name: str) -> dict[int, list[float]]:
        """A score by step of evaluation, of the runs that have it."""
        return self.curve(lambda run: {step: run.score(name, step) for step in run.evaluations})

    def mean_epoch(self, number: int) -> Epoch:
        """An epoch (its index), averaged over the seeds that have it."""
        found = [run.epochs[number] for run in self.runs if number < len(run.epochs)]
        names = [name for name in found[0].means if all(name in one.means for one in found)]
        means = {name: mean_sd([one.means[name] for one in found])[0] for name in names}
        return Epoch(found[0].steps, mean_sd([one.seconds for one in found])[0], means)


def last_common_epoch(groups: Sequence[Group]) -> int | None:
    """Index of the last epoch of which every run has done as many steps; None if there is none."""
    epochs = [run.epochs for group in groups for run in group.runs]
    for last in reversed(range(min(map(len, epochs), default=0))):
        if len({one[last].steps for one in epochs}) == 1:
            return last
    return None


def read_groups(directories: Sequence[Path]) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first runs, and remarks on what was left out.

    Raises:
        RunError: for a directory that is not a run directory.
    """
    found: dict[str, list[History]] = {}
    remarks = []
    for run in [RunDirectory(directory).history() for directory in directories]:
        settings = {k: v for k, v in configuration.decisive(run.config).items() if k != "run.seed"}
        same = found.setdefault(json.dumps(settings, sort_keys=True), [])
        twin = next((other for other in same if other.seed == run.seed), None)
        if twin is None:
            same.append(run)
        else:
            remarks.append(f"{run.path} is left out: {twin.path} has the same configuration and seed.")
    kept = [sorted(same, key=lambda run: run.seed) for same in found.values()]
    labels = _labels([same[0].config for same in kept])
    kinds = [_kind(same[0].config) for same in kept]
    styles = [palette.of_objective(kind) for kind in kinds if kind in PRESETS]
    if len(set(styles)) < len(kept):
        styles = [palette.style(number) for number in range(len(kept))]
    numbered = enumerate(zip(labels, styles, kept, strict=True))
    return [Group(label, number, style, same) for number, (label, style, same) in numbered], remarks


def _kind(config: Config) -> str:
    return named(config.field.objective, config.field.recursion)


def _labels(configs: list[Config]) -> list[str]:
    """The objective; among groups of one objective also the settings that differ."""
    labels = []
    for config in configs:
        kind = _kind(config)
        name = PRESETS[kind].label if kind in PRESETS else kind
        rivals = [configuration.flatten(c) for c in configs if _kind(c) == kind]
        mine, decisive = configuration.flatten(config), configuration.decisive(config)
        told = [k for k in decisive if k != "run.seed" and any(other[k] != mine[k] for other in rivals)]
        words = ", ".join(f"{key.split('.')[1]} {mine[key]}" for key in told[:4])
        labels.append(f"{name} ({words})" if words else name)
    twice = {label for label in labels if labels.count(label) > 1}
    return [f"{label} #{n + 1}" if label in twice else label for n, label in enumerate(labels)]


def overview(groups: Sequence[Group]) -> Sheet:
    """A column per group: its loss between its values at uniform and for ideal embeddings, the scores, the speed."""
    sheet = Sheet(
        "scores",
        "Scores",
        ["", *(group.label for group in groups)],
        f"{sentence(over([len(group.runs) for group in groups]))} Losses of different objectives are different "
        "functions: compare the scores, and each loss with its own value at uniform (an untrained encoder).",
    )
    sheet.rows.append(["seeds", *(", ".join(str(run.seed) for run in group.runs) for group in groups)])
    lasts = [last_common_epoch([group]) for group in groups]
    sheet.rows.append(["epoch", *("-" if last is None else str(last + 1) for last in lasts)])
    each = [
        [] if last is None else [run.epochs[last] for run in group.runs]
        for group, last in zip(groups, lasts, strict=True)
    ]
    sheet.rows.append(["loss, mean of that epoch", *(of_values([e.loss for e in epochs]) for epochs in each)])
    for title, which in (("  at uniform (untrained)", "loss_at_uniform"), ("  for ideal embeddings", "loss_at_ideal")):
        means = [[e.means[which] for e in epochs if which in e.means] for epochs in each]
        sheet.rows.append([title, *(number(mean_sd(values)[0]) for values in means)])
    shares = [of_values([epoch.attained for epoch in epochs], 1, percent=True) for epochs in each]
    sheet.rows.append(["  attained share of the way", *shares])
    sheet.rows.append(["evaluated after step", *(str(group.last_step or "-") for group in groups)])
    sheet.rows.append(["protocol", *(_protocols(group) for group in groups)])
    for name, title in (SCORE_TITLES | COMMON_METRIC_TITLES).items():
        cells = [of_values([run.score(name, group.last_step or 0) for run in group.runs]) for group in groups]
        if any(cell != "-" for cell in cells):
            sheet.rows.append([title, *cells])
    speeds = [mean_sd([run.pairs_per_second for run in group.runs])[0] for group in groups]
    sheet.rows.append(["pairs/s, median step", *("-" if v != v else f"{v:.0f}" for v in speeds)])
    return sheet


def _protocols(group: Group) -> str:
    found = {run.evaluations.get(group.last_step or 0, {}).get("protocol") for run in group.runs}
    return ", ".join(sorted(name for name in found if name)) or "-"
