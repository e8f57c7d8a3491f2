"""The numbers of a run: the one record that reports, sweeps and figures read (`RunDirectory.history`)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rkdo_dist.config import Config


def attained_share(loss: float, at_uniform: float, at_ideal: float | None) -> float | None:
    """How far a loss has come from its value for an untrained encoder (0) to that for an ideal one (1).

    None where the two are the same, as for objectives that nothing can improve, and where the ideal is not known.
    """
    return None if at_ideal is None or at_uniform == at_ideal else (at_uniform - loss) / (at_uniform - at_ideal)


@dataclass(frozen=True)
class Epoch:
    """One epoch of a run (the last one perhaps unfinished), or several of one number averaged over seeds.

    Attributes:
        steps: of the run until its end.
        seconds: spent in steps until its end.
        means: of every number that all its steps have in metrics.jsonl; steps without a finite loss are left out.
    """

    steps: int
    seconds: float
    means: dict[str, float]

    @property
    def loss(self) -> float:
        return self.means["loss"]

    @property
    def at_uniform(self) -> float:
        """The loss of an untrained encoder, whose learned rows are uniform."""
        return self.means["loss_at_uniform"]

    @property
    def at_ideal(self) -> float | None:
        """The loss of ideal embeddings (the simplex); None for an objective that has no closed form of it."""
        return self.means.get("loss_at_ideal")

    @property
    def attained(self) -> float | None:
        """The share of the gap from `at_uniform` to `at_ideal` that is closed; None if there is no gap."""
        return attained_share(self.loss, self.at_uniform, self.at_ideal)


@dataclass(frozen=True)
class History:
    """One run.

    Attributes:
        path: its directory.
        config: as resolved when it was started.
        records: of metrics.jsonl, one per step, in order.
        evaluations: scores by step, rising.
        environment: versions, devices, world size; empty if it has not been written.
    """

    path: Path
    config: Config
    records: list[dict[str, Any]]
    evaluations: dict[int, dict[str, Any]]
    environment: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch."""
        return sum(record["epoch"] == 0 for record in self.records)

    @property
    def skipped(self) -> int:
        """Steps without a finite loss, which changed nothing."""
        return sum(record["loss"] is None for record in self.records)

    @property
    def collapsed(self) -> int | None:
        """The step at which collapse was noticed (`training.collapse`); None if it was not."""
        return next((record["step"] for record in self.records if record.get("collapsed")), None)

    @property
    def last(self) -> dict[str, Any]:
        """The evaluation of the largest step, empty if there is none."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}

    @cached_property
    def epochs(self) -> list[Epoch]:
        """In order; none before the first step that has a loss."""
        found: dict[int, list[dict[str, Any]]] = {}
        for record in self.records:
            if record["loss"] is not None:
                found.setdefault(record["epoch"], []).append(record)
        seconds = self.seconds
        return [Epoch(some[-1]["step"], seconds[some[-1]["step"]], _means(some)) for _, some in sorted(found.items())]

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Spent in steps until a step, by step."""
        spent, found = 0.0, {}
        for record in self.records:
            spent += record.get("seconds", 0.0)
            found[record["step"]] = spent
        return found

    @property
    def pairs_per_second(self) -> float:
        """Median over steps, NaN without any."""
        return statistics.median(self.curve("pairs_per_second").values() or [math.nan])

    def curve(self, name: str) -> dict[int, float]:
        """A number of metrics.jsonl by step; only steps that have it."""
        return {r["step"]: r[name] for r in self.records if r.get(name) is not None}

    def after_epoch(self, number: int) -> dict[str, Any]:
        """The evaluation at the end of an epoch, counted from 1; empty if there is none."""
        return self.evaluations.get(number * self.steps_per_epoch, {})

    def score(self, name: str, step: int | None = None) -> float | None:
        """A finite number of an evaluation (the last one if `step` is None).

        Args:
            name: of a score or a common metric, or "outer.inner" for one inside another.
        """
        value: Any = self.last if step is None else self.evaluations.get(step, {})
        for part in name.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(part, value.get("yardsticks", {}).get(part))
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _means(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = [name for name, value in records[0].items() if isinstance(value, int | float)]
    every = [name for name in names if all(isinstance(record.get(name), int | float) for record in records)]
    return {name: statistics.fmean(record[name] for record in records) for name in every}
