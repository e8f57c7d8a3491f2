"""A run directory as numbers: losses by epoch, evaluations by epoch, and whether the run is complete."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkdo_dist.config import Config
from rkdo_dist.rundir import RunDirectory, RunError
from rkdo_dist.train.early_stop import EarlyStop


@dataclass(frozen=True)
class Record:
    """What one run has left.

    Attributes:
        steps: steps done; steps_per_epoch: of the first epoch.
        losses: mean loss of each epoch, in order.
        at_uniform, at_ideal: of each epoch: the objective's value for an encoder that knows nothing, for an ideal one.
        evaluations: scores by epoch (those at the end of an epoch, and the last one).
        last: the scores of the last evaluation, empty if there is none; last_step: of which step.
    """

    config: Config
    steps: int
    steps_per_epoch: int
    losses: list[float]
    at_uniform: list[float]
    at_ideal: list[float]
    evaluations: dict[int, dict[str, Any]]
    last: dict[str, Any]
    last_step: int

    @property
    def attained(self) -> list[float]:
        """Of each epoch, how much of the way from the value at uniform to the ideal one its mean loss has come."""
        rows = zip(self.losses, self.at_uniform, self.at_ideal, strict=True)
        return [(uniform - loss) / (uniform - ideal) for loss, uniform, ideal in rows]


def read(directory: Path) -> Record:
    """Read one run directory.

    Raises:
        RunError: if it is no run, or has no steps with a loss yet.
    """
    run = RunDirectory(directory)
    config, epochs, steps = run.config(), {}, 0  # type: tuple[Config, dict[int, list[list[float]]], int]
    first_epoch = 0
    for record in run.steps():
        steps = record["step"]
        first_epoch += record["epoch"] == 0
        if record["loss"] is not None:  # a skipped step has none
            values = [record["loss"], record["loss_at_uniform"], record["loss_at_ideal"]]
            epochs.setdefault(record["epoch"], []).append(values)
    if not epochs:
        raise RunError(f"{directory} has no steps in metrics.jsonl yet")
    means = [[statistics.fmean(column) for column in zip(*rows, strict=True)] for _, rows in sorted(epochs.items())]
    found = evaluations(run)
    by_epoch = {step // first_epoch: scores for step, scores in found.items() if step % first_epoch == 0}
    last_step = max(found, default=0)
    losses, at_uniform, at_ideal = (list(column) for column in zip(*means, strict=True))
    return Record(
        config, steps, first_epoch, losses, at_uniform, at_ideal, by_epoch, found.get(last_step, {}), last_step
    )


def evaluations(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """All evaluations of a run by step."""
    return {int(p.stem): json.loads(p.read_text(encoding="utf-8")) for p in run.evaluations.glob("*.json")}


def complete(directory: Path, total_steps: int) -> bool:
    """Whether a run has nothing left to do: all its steps (or an early stop) and, if asked for, its last evaluation."""
    run = RunDirectory(directory)
    if not (run.path / "config.yaml").is_file():
        return False
    config, steps = run.config(), 0
    watch = EarlyStop(config.train.early_stop_slope, config.train.early_stop_window)
    for record in run.steps():
        steps = record["step"]
        watch.add(record.get("objective", config.field.objective), record["loss"])
    judged = not config.evaluate.at_end or (run.evaluations / f"{steps}.json").is_file()
    saved = (run.checkpoints / str(steps)).is_dir()
    return saved and judged and (steps >= total_steps or watch.reached)


def mean_sd(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, NaN where there are too few values."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan
