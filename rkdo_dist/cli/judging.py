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

    sweep = commands.add_parser("sweep", help="train over a grid of settings: one table, a figure per pair of keys")
    sweep.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/digits-rkdo.yaml")
    sweep.add_argument(
        "--vary", action="append", default=[], metavar="KEY=V1,V2", help="values of a setting; once per key"
    )
    sweep.add_argument(
        "--variant", action="append", default=[], metavar="'NAME: KEY=VALUE ...'", help="settings by a name; repeat it"
    )
    sweep.add_argument("--only", type=_names, default=(), metavar="NAME,...", help="of the variants these alone")
    sweep.add_argument("--seeds", type=_numbers, default=None, metavar="N,...", help="default: the one of CONFIG")
    sweep.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all runs")
    sweep.add_argument(
        "--metric", type=_names, default=("linear_accuracy",), metavar="A,B", help="scores of the evaluations"
    )
    sweep.add_argument("--out", type=Path, default=Path("runs/sweep"), metavar="DIR")
    sweep.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time")
    sweep.set_defaults(run=_sweep)


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


def _sweep(options: argparse.Namespace, words: list[str]) -> int:
    from rkdo_dist import config as configuration
    from rkdo_dist.studies import sheets
    from rkdo_dist.studies.sweep import Sweep, axis, only, sweep, variants

    if not options.vary and not options.variant:
        raise ValueError("say what to vary: --vary KEY=V1,V2, or --variant 'NAME: KEY=VALUE ...' at least twice")
    if not options.metric:
        raise ValueError("--metric needs the name of a score, such as linear_accuracy")

    base = configuration.load(options.config, options.set)
    seeds = (base.run.seed,) if options.seeds is None else options.seeds
    if options.only and not options.variant:
        raise ValueError("--only chooses among variants: give them with --variant")
    axes = [axis(text) for text in options.vary]
    if options.variant:
        named = variants(options.variant)
        axes.append(only(named, options.only) if options.only else named)
    asked = Sweep(base, tuple(axes), seeds, options.out, options.metric[0], options.metric[1:])
    return sweep(asked, options.processes, sheets.console())
