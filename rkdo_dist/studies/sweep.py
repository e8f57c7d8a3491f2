"""`rkdo sweep`: a grid over any settings, resumable; one table, and a figure for every pair of keys.

Losses of different settings are different functions (depth alone changes their number of terms), so the loss appears as
its attained share of the way from an untrained encoder to an ideal one, beside a score of the embeddings.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from rkdo_dist.addresses import shown
from rkdo_dist.config import ConfigError
from rkdo_dist.console import say
from rkdo_dist.rundir import COMMON_METRIC_TITLES, SCORE_TITLES
from rkdo_dist.studies import sheets
from rkdo_dist.studies.grid import Axis, Row, Sweep, plan, results
from rkdo_dist.studies.runner import run_all
from rkdo_dist.studies.sheets import Sheet, mean_sd, of_values
from rkdo_dist.studies.statistics import Paired, holm, paired, verdict
from rkdo_dist.studies.sweep_figures import TITLES, figures

_TESTED = (
    "Mean ± standard deviation over seeds. Differences by seed: mean and Student's 95 % margin (not corrected for the "
    "number of rows). Verdict: paired t-test by seed, Holm-adjusted over the rows."
)
_UNTESTED = "One seed in common: no spread is known, and a difference of two single runs is no evidence."

_METRICS = {*SCORE_TITLES, *COMMON_METRIC_TITLES, "knn_accuracy_backbone", "effective_rank_backbone"}
_METRICS |= {"loss", "attained"}  # of the journal
_PLACED = ("infonce_", "own_")  # losses beside their values for other encoders


def sweep(asked: Sweep, processes: int, console: Console) -> int:
    """Train what is missing, write `table.csv`, `table.md` and `figures/` below `asked.out`, print the table.

    Returns:
        0; 2 if a run failed; the exit code of a request to stop, if one came.

    Raises:
        ValueError: for a mistake in any combination, before anything is run.
    """
    keys = [a.key for a in asked.axes]
    if len(set(keys)) < len(keys):
        raise ConfigError("--vary: a key is given twice; list all its values in one")
    if not asked.seeds or len(set(asked.seeds)) < len(asked.seeds):
        raise ConfigError("--seeds needs different whole numbers")
    for metric in (asked.metric, *asked.more_metrics):
        inner = metric.removeprefix("yardsticks.")
        if inner not in _METRICS and not inner.startswith(_PLACED):
            near = difflib.get_close_matches(metric, _METRICS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"--metric {metric}: no evaluation has it{hint}; there are {', '.join(sorted(_METRICS))}")
    planned = list(plan(asked))
    outcome = run_all(planned, processes, console)
    rows = results(asked, planned)
    if any(row.runs for row in rows):
        write(asked, rows, console)
    return outcome.report(console)


def table(asked: Sweep, rows: list[Row]) -> Sheet:
    """One row per combination: loss, attained share, the metric, and the test against the first combination."""
    first = rows[0].values(asked.metric)
    tests = []
    for row in rows:
        mine = row.values(asked.metric)
        both = [seed for seed in asked.seeds if seed in first and seed in mine]
        tests.append(paired([mine[s] for s in both], [first[s] for s in both]) if both and row is not rows[0] else None)
    adjusted = holm([math.nan if test is None else test.t_p for test in tests])
    protocols = sorted({name for row in rows for name in _protocols(row)})
    named = [a.key for a in asked.axes]
    columns = [*named, "seeds", "loss", "attained", TITLES.get(asked.metric, asked.metric)]
    testable = any(test is not None and test.n > 1 for test in tests)
    sheet = Sheet(
        "table",
        f"Sweep of {', '.join(named)} (protocol {', '.join(protocols) or '-'})",
        [*columns, "minus the first row", "against the first row"] if testable else columns,
        "Losses of different settings are different functions: compare the attained share and the score. "
        + (_TESTED if testable else _UNTESTED)
        + "".join(f" {line}." for line in _legend(asked.axes)),
        names=len(named),
    )
    for row, test, p in zip(rows, tests, adjusted, strict=True):
        settings = {a.key: a.texts[i] for a, i in zip(asked.axes, row.combination, strict=True)}
        shown_scores = ("loss", "attained", asked.metric)  # the metric may be one of the two
        words = "-" if test is None else verdict(test, p, ("this", "the first"))
        cells = [of_values(list(row.values(s).values()), 3 if s == "attained" else 4) for s in shown_scores]
        compared = [_difference(test), words] if testable else []
        sheet.rows.append([*settings.values(), str(len(row.runs)), *cells, *compared])
        sheet.data.append({**settings, **_for_programs(asked, row), **_tested(test), "holm_p": p})
    return sheet


def _difference(test: Paired | None) -> str:
    if test is None:
        return "-"
    return f"{test.difference:+.4f}" + ("" if math.isnan(test.margin) else f" ± {test.margin:.4f}")


def _tested(test: Paired | None) -> dict[str, float]:
    """For programs: what a row's test against the first one found; NaN where there was none."""
    if test is None:
        return dict.fromkeys(("difference", "difference_margin", "bootstrap_low", "bootstrap_high", "t_p"), math.nan)
    found = {"difference": test.difference, "difference_margin": test.margin}
    return {**found, "bootstrap_low": test.interval[0], "bootstrap_high": test.interval[1], "t_p": test.t_p}


def _legend(axes: Sequence[Axis]) -> Iterator[str]:
    """What the named variants are."""
    for one in axes:
        if one.settings:
            yield from (f"{name}: {shown(' '.join(one.changes(i)))}" for i, name in enumerate(one.texts))


def _protocols(row: Row) -> list[str]:
    return sorted({str(run.last["protocol"]) for run in row.runs.values() if "protocol" in run.last})


def _for_programs(asked: Sweep, row: Row) -> dict[str, Any]:
    data: dict[str, Any] = {"seeds": len(row.runs), "protocol": ", ".join(_protocols(row))}
    for name in dict.fromkeys(("loss", "attained", asked.metric, *SCORE_TITLES)):
        data[name], data[f"{name}_sd"] = mean_sd(list(row.values(name).values()))
    return data


def write(asked: Sweep, rows: list[Row], console: Console) -> None:
    """The table in its three forms, and the figures.

    Raises:
        ConfigError: if no run has the metric, naming those there are.
    """
    known = sorted({name for row in rows for run in row.runs.values() for name in _names(run.last)})
    for metric in (asked.metric, *asked.more_metrics):
        if known and metric not in (*known, "loss", "attained"):
            raise ConfigError(f"--metric {metric}: no evaluation has it; choose from {', '.join(known)}")
    for metric in (asked.metric, *asked.more_metrics):
        this = replace(asked, metric=metric)
        name, folder = ("table", "figures") if metric == asked.metric else (f"table-{metric}", f"figures-{metric}")
        sheet = replace(table(this, rows), name=name)
        sheet.save(asked.out)
        sheets.show(console, [sheet])
        paths = figures(this, rows, asked.out / folder, sheet.title)
        drawn = ", ".join(path.name for path in paths)
        say(console, f"table: {asked.out / name}.csv   {folder}: {drawn}")


def _names(scores: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of all numbers in an evaluation, inner ones with dots."""
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield prefix + name
