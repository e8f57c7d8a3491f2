"""The findings of a report: paired comparisons of groups, and sentences about losses and scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from rkdo_dist.history import History
from rkdo_dist.rundir import COMMON_METRIC_TITLES, SCORE_TITLES
from rkdo_dist.studies import datasets
from rkdo_dist.studies.audit import find
from rkdo_dist.studies.report.groups import Group, last_common_epoch
from rkdo_dist.studies.statistics import LEVEL, NO_EVIDENCE, Paired, holm, paired, verdict
from rkdo_dist.training.outlook import expectations

NO_IDEAL = "Its value for ideal embeddings has no closed form (other affinities, relations): no share is attained."
# The same function for every objective, so that differences mean something.
COMMON = {k: t for k, t in (SCORE_TITLES | COMMON_METRIC_TITLES).items() if not k.startswith("own_")}
_SIZES = 2  # scores whose smallest visible difference is said
_MANY = 3  # with more groups, each is compared with the first only


@dataclass(frozen=True)
class Comparison:
    """One score of two groups, seed by seed.

    Attributes:
        step: of the evaluations.
        result: paired by seed.
        p: of the t-test (of Wilcoxon's where all differences are equal), adjusted over all comparisons of the page.
    """

    first: Group
    second: Group
    name: str
    step: int
    result: Paired
    p: float

    @property
    def says(self) -> str:
        """The verdict in words."""
        return verdict(self.result, self.p, (self.first.label, self.second.label))

    @property
    def evident(self) -> bool:
        """Whether there is evidence of a difference."""
        return self.result.n > 1 and self.p < LEVEL


def pairs_of(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Which groups are compared: all with all, or (with many) each with the first."""
    if len(groups) <= _MANY:
        return list(combinations(groups, 2))
    return [(groups[0], other) for other in groups[1:]]


def common_step(first: Group, second: Group) -> tuple[int, list[int]] | None:
    """The last step at which all shared seeds were evaluated under one protocol, and these seeds; None without one."""
    runs = [{run.seed: run for run in group.runs if run.evaluations} for group in (first, second)]
    seeds = sorted(set(runs[0]) & set(runs[1]))
    chosen = [by_seed[seed] for by_seed in runs for seed in seeds]
    if not chosen:
        return None
    for step in sorted(set.intersection(*(set(run.evaluations) for run in chosen)), reverse=True):
        if len({run.evaluations[step].get("protocol") for run in chosen}) == 1:
            return step, seeds
    return None


def comparisons(groups: Sequence[Group]) -> list[Comparison]:
    """Every common score of every pair of groups, Holm's correction over all of them."""
    found = []
    for first, second in pairs_of(groups):
        at = common_step(first, second)
        if at is None:
            continue
        step, seeds = at
        for name in COMMON:
            sides = [[_of_seed(group, seed).score(name, step) for seed in seeds] for group in (first, second)]
            numbers = [[x for x in side if x is not None] for side in sides]
            if all(len(side) == len(seeds) for side in numbers):
                found.append(Comparison(first, second, name, step, paired(*numbers), math.nan))
    adjusted = holm([one.result.t_p for one in found])
    return [replace(one, p=p) for one, p in zip(found, adjusted, strict=True)]


def _of_seed(group: Group, seed: int) -> History:
    return next(run for run in group.runs if run.seed == seed)


def loss_gap(first: Group, second: Group) -> list[str]:
    """Sentences on what the difference of two groups' losses consists of."""
    number = last_common_epoch([first, second])
    if number is None:
        return [f"{first.label} and {second.label} have no epoch in common yet, so their losses are not compared."]
    a, b = first.mean_epoch(number), second.mean_epoch(number)
    low, high = (first, second) if a.loss <= b.loss else (second, first)
    if a.loss > b.loss:
        a, b = b, a
    gap, before = b.loss - a.loss, b.at_uniform - a.at_uniform
    said = [
        f"In epoch {number + 1} the mean loss of {low.label} is {a.loss:.4f} and that of {high.label} {b.loss:.4f}: "
        f"{low.label} is {_percent(gap, b.loss)} lower."
    ]
    if math.isclose(a.at_uniform, b.at_uniform, rel_tol=1e-9):
        if a.at_ideal is None or b.at_ideal is None:
            said.append(f"Both losses have the same value for an untrained encoder. {NO_IDEAL}")
            return said
        if math.isclose(a.at_ideal, b.at_ideal, rel_tol=1e-9):
            said.append("Both losses have the same value for an untrained encoder and for an ideal one.")
            return said
    said.append(
        f"These are different functions. An untrained encoder scores {a.at_uniform:.4f} and "
        f"{b.at_uniform:.4f}: {_lower(before, b.at_uniform)} before any training."
    )
    if gap > 0:
        said.append(_origin(gap, before))
    if a.attained is not None and b.attained is not None:
        said.append(
            f"Of the way from there to the value for ideal embeddings, {low.label} has attained {a.attained:z.1%} and "
            f"{high.label} {b.attained:z.1%}."
        )
    return said


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "0 %"


def _lower(before: float, whole: float) -> str:
    return f"{_percent(abs(before), whole)} {'lower' if before >= 0 else 'higher'}"


def _origin(gap: float, before: float) -> str:
    """How much of a gap was there before training."""
    share, change = before / gap, gap - before
    if before <= 0:
        return f"So training made the whole gap of {gap:.4f}."
    if change < 0:
        return (
            f"So the gap before training was larger ({before:.4f}) than the {gap:.4f} now: "
            f"training has narrowed it by {-change:.4f}."
        )
    return (
        f"So {before:.4f} of the gap of {gap:.4f} ({share:.0%}) existed before training; "
        f"training added the other {change:.4f}."
    )


def evidence(first: Group, second: Group, found: Sequence[Comparison]) -> list[str]:
    """Sentences on how two groups compare by the scores that are the same function for both."""
    mine = [one for one in found if one.first is first and one.second is second]
    names = f"{first.label} and {second.label}"
    if not mine:
        shared = {run.seed for run in first.runs} & {run.seed for run in second.runs}
        why = "no evaluation at the same step under the same protocol" if shared else "no seed in common"
        return [f"{names} have {why}: nothing is compared."]
    n, step = mine[0].result.n, mine[0].step
    if n < 2:
        return [
            f"{names} share one seed: nothing can be tested, and a difference of two single runs is no evidence of a "
            f"difference between objectives. The scores after step {step} are in the table below."
        ]
    clear = [one for one in mine if one.evident]
    said = [
        f"{names} were compared on {len(mine)} scores that are the same function for both, after step {step}, "
        f"{n} seeds."
    ]
    named = [one for one in mine if one.name in SCORE_TITLES] or mine
    sizes = ", ".join(f"{one.result.detectable:.4f} in {COMMON[one.name]}" for one in named[:_SIZES])
    said.append(f"By their spread over seeds these tests see, with 80 % power, a difference of {sizes}.")
    if not clear:
        return [*said, f"There is {NO_EVIDENCE} in any of them (paired t-tests, Holm's correction, level {LEVEL})."]
    said.append("; ".join(f"{COMMON[one.name]}: {one.says}" for one in clear) + ".")
    if len(clear) < len(mine):
        rest = ", ".join(COMMON[one.name] for one in mine if not one.evident)
        said.append(f"There is {NO_EVIDENCE} in the others: {rest}.")
    return said


def supervisors(group: Group) -> list[str]:
    """Sentences on what a group's supervisors could transfer: dilution, forgetting, and how often rows were right."""
    run, config = group.runs[0], group.config
    index = datasets.index_of(config)
    batch = config.train.global_batch
    samples = run.steps_per_epoch * batch if index is None else index.split(config.data.split).samples
    said = [f"{group.label}: {line}." for line in expectations(config, samples, run.steps_per_epoch)]
    right = [one.epochs[-1].means.get("relation_precision") for one in group.runs if one.epochs]
    numbers = [share for share in right if share is not None]
    if numbers:
        said.append(
            f"{group.label}: in the last epoch {sum(numbers) / len(numbers):.3f} of the relation's mass lay on samples "
            "of the same class. What transfers is the gap to the student's own rows (`rkdo audit` measures both)."
        )
    for one in group.runs:
        try:
            audit = find(one.path)
        except ValueError:  # the audit's own section of the page says why
            continue
        if audit is not None and audit["best"] is not None and audit["student"] is not None:
            best, student = audit["best"]["precision"], audit["student"]
            said.append(
                f"{one.path}: precision gap {best - student:+.3f} (best rows of the audit {best:.3f}, the student's "
                f"own {student:.3f})."
            )
    return said
