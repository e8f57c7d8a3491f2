"""`rkdo reproduce`: run what is missing of the paper's experiment, and write its tables and figures beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from rkdo_dist.addresses import shown
from rkdo_dist.config import ConfigError
from rkdo_dist.console import say
from rkdo_dist.data.errors import DataError
from rkdo_dist.data.index import load_index
from rkdo_dist.files import write_atomic
from rkdo_dist.rundir import machine
from rkdo_dist.studies import paper, paper_tables, published
from rkdo_dist.studies.paper import Request, Results
from rkdo_dist.studies.paper_figures import all_figures
from rkdo_dist.studies.runner import Outcome, Planned, run_all
from rkdo_dist.studies.sheets import show

# What the command itself decides.
_DECIDED = (
    "field.objective",
    "data.shards",
    "train.epochs",
    "train.evaluate_at",
    "evaluate.protocol",
    "run.dir",
    "run.resume",
)


def reproduce(request: Request, data: tuple[str, ...], processes: int, console: Console) -> int:
    """Train, evaluate and tabulate.

    Args:
        data: where the shards are (`paper.locations`).
        processes: how many runs at a time.

    Returns:
        0; 2 if a run failed or no data set is there; the exit code of a request to stop, if one came.

    Raises:
        ValueError: for a mistake in the request, before anything is run.
    """
    check(request)
    places = paper.locations(data, request.datasets)
    notes: list[str] = []
    absent: list[str] = []
    runs: list[Planned] = []
    for dataset in request.datasets:
        try:
            runs += _planned(request, dataset, places[dataset], notes)
        except DataError as error:
            absent.append(paper.missing(dataset, places[dataset], error))
    for line in absent:
        say(console, line, "yellow")
    outcome = run_all(runs, processes, console) if runs else Outcome()
    results = Results(request)
    if results.runs:
        write(results, notes, absent, console)
    else:
        console.print("nothing has been run: there is nothing to tabulate")
    return outcome.report(console) or (0 if results.runs else 2)


def check(request: Request) -> None:
    """Validate the request.

    Raises:
        ConfigError: naming the option.
    """
    unknown = [name for name in request.datasets if name not in published.DATASETS]
    if unknown or not request.datasets:
        raise ConfigError(f"--datasets: unknown {', '.join(unknown)!r}; choose from {', '.join(published.DATASETS)}")
    for option, values in (("--seeds", request.seeds), ("--epochs", request.epochs)):
        if not values or len(set(values)) < len(values) or min(values) < (option == "--epochs"):
            raise ConfigError(f"{option} needs different whole numbers, got {','.join(map(str, values)) or 'none'}")
    for text in request.changes:
        if text.partition("=")[0].strip() in (*_DECIDED, "run.seed"):
            raise ConfigError(f"--set {text}: the command decides that itself (see its options)")


def _planned(request: Request, dataset: str, place: str, notes: list[str]) -> list[Planned]:
    runs = paper.plan(request, dataset, place)
    note = paper.data_note(dataset, load_index(place))
    notes += [note] if note else []
    return runs


def write(results: Results, notes: list[str], absent: list[str], console: Console) -> None:
    """Tables (terminal, CSV, Markdown), figures (PNG, SVG) and `reproduction.json`, below out/protocol."""
    folder: Path = results.request.out / results.request.protocol
    sheets = paper_tables.all_tables(results)
    for sheet in sheets:
        sheet.caption = " ".join([sheet.caption, *notes]).strip()
        sheet.save(folder / "tables")
    show(console, sheets)
    figures = all_figures(results, folder / "figures")
    said = [*paper_tables.agreement(results), *notes]
    for line in said:
        say(console, line)
    facts: dict[str, Any] = {
        "protocol": results.request.protocol,
        "changes": [shown(change) for change in results.request.changes],
        "seeds": results.request.seeds,
        "epochs": results.request.epochs,
        "datasets": results.request.datasets,
        "runs": sorted("-".join(map(str, key)) for key in results.runs),
        "said": said,
        "left_out": absent,
        "tables": {sheet.name: sheet.data for sheet in sheets},
        **machine(),
    }
    write_atomic(folder / "reproduction.json", json.dumps(_plain(facts), indent=2) + "\n")
    say(console, f"tables: {folder / 'tables'}   figures: {figures[0].parent}")


def _plain(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None if value != value else str(value)
    return value
