"""`rkdo sweep`: a grid over any settings, resumable; one table, and a figure for every pair of keys.

Losses of different settings are different functions (depth alone changes their number of terms), so the loss appears as
the share of its way from an encoder that knows nothing to an ideal one, beside a score of the embeddings.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.addresses import shown
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.rundir import SCORE_TITLES
from rkdo_dist.studies import sheets
from rkdo_dist.studies.records import Record, complete, mean_sd, read
from rkdo_dist.studies.runner import Planned, failures, run_all
from rkdo_dist.studies.sheets import Sheet, spread
from rkdo_dist.studies.statistics import Paired, holm, paired, verdict

_DECIDED = {"run.dir": "--out", "run.resume": "", "run.seed": "--seeds"}
_NAME = 120  # characters of a directory's name
VARIANT = "variant"


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes; or named variants, each with several settings.

    Attributes:
        key: "section.key", or "variant".
        values: of the setting, or the variants' names.
        settings: of each variant, as "section.key=value"; empty for a single setting.
    """

    key: str
    values: tuple[Any, ...]
    settings: tuple[tuple[str, ...], ...] = ()

    @property
    def texts(self) -> list[str]:
        """The values as a person would write them, addresses without their secret parts."""
        return [shown(value if isinstance(value, str) else json.dumps(value)) for value in self.values]

    def changes(self, position: int) -> tuple[str, ...]:
        """What the value at a position sets, as "section.key=value"."""
        return self.settings[position] if self.settings else (f"{self.key}={json.dumps(self.values[position])}",)


@dataclass(frozen=True)
class Sweep:
    """What is to be run: every combination of the axes' values with every seed.

    Attributes:
        metric: the name of a score in the evaluations; "yardsticks.infonce" for one inside another.
        more_metrics: others, each with a table and figures of its own.
    """

    base: Config
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    out: Path
    metric: str
    more_metrics: tuple[str, ...] = ()

    def combinations(self) -> Iterator[tuple[int, ...]]:
        """Positions in every axis, the last one fastest."""
        return itertools.product(*(range(len(axis.values)) for axis in self.axes))

    def said(self, combination: tuple[int, ...]) -> str:
        """A combination for people."""
        return ", ".join(f"{a.key}={a.texts[i]}" for a, i in zip(self.axes, combination, strict=True))

    def directory(self, combination: tuple[int, ...], seed: int) -> Path:
        """Where a run is: its settings, in the order of the axes' names so that the order of --vary does not matter."""
        pairs = sorted((a.key, a.texts[i]) for a, i in zip(self.axes, combination, strict=True))
        plain = ",".join(f"{key}={text}" for key, text in pairs)
        clean = re.sub(r"[^\w.,=+-]+", "_", plain)
        if clean != plain or len(clean) > _NAME:
            clean = f"{clean[:_NAME]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"
        return self.out / "runs" / f"{clean},seed={seed}"

    def config(self, combination: tuple[int, ...], seed: int) -> Config:
        """The configuration of a run.

        Raises:
            ConfigError: naming the combination.
        """
        changes = [change for a, i in zip(self.axes, combination, strict=True) for change in a.changes(i)]
        fixed = [f"run.dir={json.dumps(str(self.directory(combination, seed)))}", f"run.seed={seed}", "run.resume=auto"]
        try:
            config = configuration.change(self.base, [*changes, *fixed, "train.keep_checkpoints=1"])
            parts.check(config)
            return config
        except ConfigError as error:
            raise ConfigError(f"{self.said(combination)}: {error}") from error


def axis(text: str) -> Axis:
    """An axis from "section.key=value,value,...".

    Raises:
        ConfigError: for anything else, or a value given twice.
    """
    key, equals, values = text.partition("=")
    key = key.strip()
    if not equals or "." not in key:
        raise ConfigError(f"--vary {text!r} is not of the form section.key=value,value, e.g. field.depth=1,3,5")
    if key in _DECIDED:
        raise ConfigError(
            f"--vary {text}: the sweep decides {key} itself {_DECIDED[key] and f'({_DECIDED[key]})'}".strip()
        )
    found = Axis(key, tuple(configuration.listed(values)))
    if len(set(found.texts)) < len(found.texts):
        raise ConfigError(f"--vary {text}: a value is given twice")
    return found


def variants(texts: Sequence[str]) -> Axis:
    """An axis of named variants, each from "NAME: section.key=value section.key=value ...".

    Raises:
        ConfigError: for anything else, a name given twice, or a setting that the sweep decides itself.
    """
    names, settings = [], []
    for text in texts:
        name, colon, words = text.partition(":")
        try:
            changes = shlex.split(words)
        except ValueError:  # a quotation without its end
            changes = []
        if not colon or not name.strip() or "=" in name or not changes or not all("=" in change for change in changes):
            raise ConfigError(f"--variant {text!r} is not of the form 'NAME: section.key=value section.key=value'")
        decided = next((key for key in _DECIDED if any(change.startswith(key + "=") for change in changes)), None)
        if decided:
            raise ConfigError(f"--variant {text!r}: the sweep decides {decided} itself")
        names.append(name.strip())
        settings.append(tuple(changes))
    if len(set(names)) < len(names):
        raise ConfigError("--variant: a name is given twice")
    return Axis(VARIANT, tuple(names), tuple(settings))


def only(axis: Axis, names: Sequence[str]) -> Axis:
    """Some of the named variants, in the axis' order.

    Raises:
        ConfigError: for a name that no variant has.
    """
    for name in names:
        if name not in axis.texts:
            raise ConfigError(f"--only {name}: no --variant has this name; choose from {', '.join(axis.texts)}")
    kept = [i for i, text in enumerate(axis.texts) if text in names]
    return Axis(axis.key, tuple(axis.values[i] for i in kept), tuple(axis.settings[i] for i in kept))


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
    planned = list(plan(asked))
    outcome = run_all(planned, processes, console)
    rows = results(asked, planned)
    if any(row.records for row in rows):
        write(asked, rows, console)
    for line in failures(outcome):
        console.print(f"[red]failed: {line}[/red]", highlight=False, soft_wrap=True)
    if outcome.stopped:
        console.print("stopped: the same command goes on")
    return outcome.stopped or (2 if outcome.failed else 0)


def plan(asked: Sweep) -> Iterator[Planned]:
    """All runs, seeds innermost, so that the first combinations are complete first."""
    for combination in asked.combinations():
        for seed in asked.seeds:
            config = asked.config(combination, seed)
            _, steps = parts.run_length(config, parts.open_index(config))
            yield Planned(config, steps)


@dataclass(frozen=True)
class Row:
    """A combination and what its complete runs have left, by seed."""

    combination: tuple[int, ...]
    records: Mapping[int, Record]

    def values(self, name: str) -> dict[int, float]:
        """By seed: a score, or "loss" or "attained" (of the last epoch); only seeds that have it."""
        found = {seed: score(record, name) for seed, record in self.records.items()}
        return {seed: value for seed, value in found.items() if value is not None}


def score(record: Record, name: str) -> float | None:
    """A number of a run by its name, None if it has none."""
    if name == "loss":
        return record.losses[-1]
    if name == "attained":
        return record.attained[-1]
    value: Any = record.last
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def results(asked: Sweep, planned: list[Planned]) -> list[Row]:
    """A row per combination, of complete runs."""
    steps = {run.directory: run.steps for run in planned}
    rows = []
    for combination in asked.combinations():
        places = {seed: asked.directory(combination, seed) for seed in asked.seeds}
        rows.append(Row(combination, {s: read(p) for s, p in places.items() if complete(p, steps[p])}))
    return rows


def table(asked: Sweep, rows: list[Row]) -> Sheet:
    """One row per combination: loss, attained share, the metric, and the test against the first combination."""
    first = rows[0].values(asked.metric)
    tests = []
    for row in rows:
        mine = row.values(asked.metric)
        both = [seed for seed in asked.seeds if seed in first and seed in mine]
        tests.append(paired([mine[s] for s in both], [first[s] for s in both]) if both and row is not rows[0] else None)
    adjusted = holm([math.nan if test is None else test.t_p for test in tests])
    protocols = sorted({r.last["protocol"] for row in rows for r in row.records.values() if "protocol" in r.last})
    named = [a.key for a in asked.axes]
    columns = [*named, "seeds", "loss", "attained", asked.metric, "minus the first row", "against the first row"]
    sheet = Sheet(
        "table",
        f"Sweep of {', '.join(named)} (protocol {', '.join(protocols) or '-'})",
        columns,
        "Losses of different settings are different functions: compare the attained share and the score. Differences "
        "by seed: mean and Student's 95 % margin (not corrected for the number of rows). Verdict: paired t-test by "
        "seed, Holm-adjusted over the rows." + "".join(f" {line}." for line in _legend(asked.axes)),
    )
    for row, test, p in zip(rows, tests, adjusted, strict=True):
        settings = {a.key: a.texts[i] for a, i in zip(asked.axes, row.combination, strict=True)}
        numbers = {name: mean_sd(list(row.values(name).values())) for name in ("loss", "attained", asked.metric)}
        words = "-" if test is None else verdict(test, p, ("this", "the first"))
        cells = [spread(*numbers["loss"]), spread(*numbers["attained"], 3), spread(*numbers[asked.metric])]
        sheet.rows.append([*settings.values(), str(len(row.records)), *cells, _difference(test), words])
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


def _for_programs(asked: Sweep, row: Row) -> dict[str, Any]:
    data: dict[str, Any] = {"seeds": len(row.records)}
    protocols = {record.last.get("protocol", "") for record in row.records.values()}
    data["protocol"] = ", ".join(sorted(protocols))
    for name in dict.fromkeys(("loss", "attained", asked.metric, *SCORE_TITLES)):
        data[name], data[f"{name}_sd"] = mean_sd(list(row.values(name).values()))
    return data


def write(asked: Sweep, rows: list[Row], console: Console) -> None:
    """The table in its three forms, and the figures.

    Raises:
        ConfigError: if no run has the metric, naming those there are.
    """
    from rkdo_dist.studies.sweep_figures import figures

    known = sorted({name for row in rows for record in row.records.values() for name in _names(record.last)})
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
        console.print(f"table: {asked.out / name}.csv   {folder}: {drawn}", highlight=False, soft_wrap=True)


def _names(scores: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of all numbers in an evaluation, inner ones with dots."""
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield prefix + name
