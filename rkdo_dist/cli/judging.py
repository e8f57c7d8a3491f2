"""`rkdo reproduce` and `rkdo sweep`: many runs, then tables and figures."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's commands."""
    reproduce = commands.add_parser("reproduce", help="the paper's tables and figures, beside the published numbers")
    reproduce.add_argument("--datasets", type=_names, default=("cifar10", "cifar100", "stl10"), metavar="A,B,...")
    reproduce.add_argument("--protocol", choices=("paper", "full"), default="paper", help="see the README")
    reproduce.add_argument("--seeds", type=_numbers, default=(42, 123, 456, 789, 101), metavar="N,...")
    reproduce.add_argument("--epochs", type=_numbers, default=(1, 2, 5, 10), metavar="N,...")
    reproduce.add_argument(
        "--data", action="append", default=[], metavar="DIR", help="DIR/<data set> hold the shards, or DATASET=DIR"
    )
    reproduce.add_argument("--out", type=Path, default=Path("runs/reproduce"), metavar="DIR")
    reproduce.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time")
    reproduce.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all runs; tables say so"
    )
    reproduce.set_defaults(run=_reproduce)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _names(text))


def _reproduce(options: argparse.Namespace, words: list[str]) -> int:
    from rkdo_dist.studies import sheets
    from rkdo_dist.studies.paper import Request
    from rkdo_dist.studies.reproduce import reproduce

    request = Request(
        options.datasets, options.protocol, options.seeds, options.epochs, options.out, tuple(options.set)
    )
    return reproduce(request, tuple(options.data), options.processes, sheets.console())
