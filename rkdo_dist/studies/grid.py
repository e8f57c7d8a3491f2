"""The grid of a sweep: axes, combinations, run directories, and the records of complete runs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.addresses import shown
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.history import History
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies.runner import Planned, complete

_DECIDED = {"run.dir": "--out", "run.resume": "", "run.seed": "--seeds"}
_CHANGE = re.compile(r"\w+\.\w+=")  # what stands before = in an address is no key
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
        """The values as text, addresses without their secret parts."""
        return [shown(value if isinstance(value, str) else json.dumps(value)) for value in self.values]

    def changes(self, position: int) -> tuple[str, ...]:
        """The settings of the value at a position, as "section.key=value"."""
        return self.settings[position] if self.settings else (f"{self.key}={json.dumps(self.values[position])}",)


@dataclass(frozen=True)
class Sweep:
    """The request: every combination of the axes' values with every seed.

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
        """Directory of a run: its settings in the order of the axes' names, whatever the order of --vary."""
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
    if not _CHANGE.match(f"{key}{equals}"):
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
        if not colon or not name.strip() or "=" in name or not changes or not all(map(_CHANGE.match, changes)):
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


def plan(asked: Sweep) -> Iterator[Planned]:
    """All runs, seeds innermost, so that the first combinations are complete first.

    Raises:
        ConfigError: for a mistake in a combination, or two that are the same by value (1 and 1.0).
    """
    known: dict[Config, str] = {}
    for combination in asked.combinations():
        for seed in asked.seeds:
            config = asked.config(combination, seed)
            alike = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=""))
            if alike in known:
                raise ConfigError(f"{asked.said(combination)} is the run of {known[alike]}: leave one of them out")
            known[alike] = asked.said(combination)
            _, steps = parts.run_length(config, parts.open_index(config))
            yield Planned(config, steps)


@dataclass(frozen=True)
class Row:
    """A combination and the records of its complete runs, by seed."""

    combination: tuple[int, ...]
    runs: Mapping[int, History]

    def values(self, name: str) -> dict[int, float]:
        """By seed: a score, or "loss" or "attained" (of the last epoch); only seeds that have it."""
        found = {seed: score(run, name) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}


def score(run: History, name: str) -> float | None:
    """A number of a run by its name, None if it has none."""
    if name in ("loss", "attained"):
        value: float | None = getattr(run.epochs[-1], name) if run.epochs else None
        return value
    return run.score(name)


def results(asked: Sweep, planned: list[Planned]) -> list[Row]:
    """A row per combination, of complete runs."""
    done = {run.directory for run in planned if complete(run)}
    rows = []
    for combination in asked.combinations():
        places = {seed: asked.directory(combination, seed) for seed in asked.seeds}
        rows.append(Row(combination, {s: RunDirectory(p).history() for s, p in places.items() if p in done}))
    return rows
