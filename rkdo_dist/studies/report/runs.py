"""Run directories as the report needs them: by epoch, by evaluation, grouped by configuration apart from the seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkdo_dist import config as configuration
from rkdo_dist.config import Config
from rkdo_dist.rundir import RunDirectory

_NAMES = {"rkdo": "RKDO", "icon": "I-Con", "infonce": "InfoNCE"}
_PARTS = ("cross_entropy", "entropy_p", "positive_mass")


@dataclass(frozen=True)
class Epoch:
    """One epoch of a run, perhaps not finished.

    Attributes:
        steps: of the run until its end.
        seconds: spent in steps until its end.
        loss, at_uniform, at_ideal: means over its steps.
        parts: means of the loss's parts.
    """

    steps: int
    seconds: float
    loss: float
    at_uniform: float
    at_ideal: float
    parts: dict[str, float]

    @property
    def attained(self) -> float | None:
        """Share of the way from the value at uniform to the ideal one; None if there is no way."""
        way = self.at_uniform - self.at_ideal
        return (self.at_uniform - self.loss) / way if way else None


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        epochs: in order; empty before the first step.
        evaluations: scores by step, rising.
        seconds: spent in steps until a step, by step with an evaluation.
        skipped: steps without a finite loss.
    """

    path: Path
    config: Config
    epochs: list[Epoch]
    evaluations: dict[int, dict[str, Any]]
    seconds: dict[int, float]
    environment: dict[str, Any]
    skipped: int

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.run.seed

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.epochs[-1].steps if self.epochs else 0

    def score(self, step: int, name: str) -> float | None:
        """A score or yardstick of the evaluation at a step."""
        found = self.evaluations.get(step, {})
        value = found.get(name, found.get("yardsticks", {}).get(name))
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, in the order of their seeds.

    Attributes:
        label: the objective, and what else tells the groups apart.
        number: position, which is also the colour.
    """

    label: str
    number: int
    runs: list[Run]

    @property
    def config(self) -> Config:
        """Of its first run."""
        return self.runs[0].config

    def curve(self, values: Callable[[Run], dict[int, float]]) -> tuple[list[int], list[list[float]]]:
        """By rising step: the values of the runs that have one there."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for step, value in values(run).items():
                found.setdefault(step, []).append(value)
        steps = sorted(found)
        return steps, [found[step] for step in steps]


def read(path: Path) -> Run:
    """Read a run directory, also of a run that has only begun.

    Raises:
        RunError: if it is no run.
    """
    run = RunDirectory(path)
    config = run.config()
    rows: dict[int, list[dict[str, Any]]] = {}
    by_step: dict[int, float] = {}
    spent, skipped = 0.0, 0
    for record in run.steps():
        spent += record["seconds"]
        by_step[record["step"]] = spent
        if record["loss"] is None:
            skipped += 1
        else:
            rows.setdefault(record["epoch"], []).append(record)
    epochs = [_epoch(records, by_step) for _, records in sorted(rows.items())]
    files = sorted(run.evaluations.glob("*.json"), key=lambda p: int(p.stem)) if run.evaluations.is_dir() else []
    evaluations = {int(p.stem): json.loads(p.read_text(encoding="utf-8")) for p in files}
    seconds = {step: by_step[step] for step in evaluations if step in by_step}
    file = path / "environment.json"
    environment = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return Run(path, config, epochs, evaluations, seconds, environment, skipped)


def _epoch(records: list[dict[str, Any]], seconds: dict[int, float]) -> Epoch:
    def mean(name: str) -> float:
        return statistics.fmean(record[name] for record in records)

    last = records[-1]
    names = [n for n in last if n in _PARTS or n.startswith("kl_")]
    parts = {name: mean(name) for name in names if all(name in record for record in records)}
    return Epoch(
        steps=last["step"],
        seconds=seconds[last["step"]],
        loss=mean("loss"),
        at_uniform=mean("loss_at_uniform"),
        at_ideal=mean("loss_at_ideal"),
        parts=parts,
    )


def grouped(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first runs, and remarks on what was left out."""
    found: dict[str, list[Run]] = {}
    remarks = []
    for run in runs:
        settings = {k: v for k, v in configuration.decisive(run.config).items() if k != "run.seed"}
        same = found.setdefault(json.dumps(settings, sort_keys=True), [])
        twin = next((other for other in same if other.seed == run.seed), None)
        if twin is None:
            same.append(run)
        else:
            remarks.append(f"{run.path} is left out: {twin.path} has the same configuration and seed.")
    kept = [sorted(same, key=lambda run: run.seed) for same in found.values()]
    labels = _labels([same[0].config for same in kept])
    return [Group(label, number, same) for number, (label, same) in enumerate(zip(labels, kept, strict=True))], remarks


def _labels(configs: list[Config]) -> list[str]:
    """The objective; among groups of one objective also the settings that differ."""
    labels = []
    for config in configs:
        rivals = [configuration.flatten(c) for c in configs if c.field.objective == config.field.objective]
        mine, decisive = configuration.flatten(config), configuration.decisive(config)
        told = [k for k in decisive if k != "run.seed" and any(other[k] != mine[k] for other in rivals)]
        words = ", ".join(f"{key.split('.')[1]} {mine[key]}" for key in told[:4])
        name = _NAMES.get(config.field.objective, config.field.objective)
        labels.append(f"{name} ({words})" if words else name)
    twice = {label for label in labels if labels.count(label) > 1}
    return [f"{label} #{n + 1}" if label in twice else label for n, label in enumerate(labels)]
