"""Studies of many runs: the commands' arguments, and the one call each makes."""

from __future__ import annotations

import argparse
from pathlib import Path

from rkdo_dist.commands.arguments import CONFIG, COUNT, LENGTH, Command, folder, names, numbers


def study_commands(command: Command) -> None:
    """Add the commands."""
    add = command(
        "sweep",
        _sweep,
        "train over a grid of settings: one table, a figure per pair of keys",
        "configs/digits-rkdo.yaml --vary field.depth=1,3 --seeds 1,2,3",
    )
    add("config", metavar="CONFIG", help=CONFIG)
    add("--vary", action="append", default=[], metavar="KEY=V1,V2", help="values of a setting; once per key")
    add("--variant", action="append", default=[], metavar="'NAME: KEY=VALUE ...'", help="settings by a name; repeat it")
    add("--only", type=names, default=(), metavar="NAME,...", help="run only these variants")
    add("--seeds", type=numbers, default=None, metavar="N,...", help="default: the one of CONFIG")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all runs")
    add("--metric", type=names, default=("linear_accuracy",), metavar="A,B", help="scores of the evaluations")
    add("--out", type=folder, default=Path("runs/sweep"), metavar="DIR", help="default: runs/sweep")
    add("--processes", type=COUNT, default=1, metavar="N", help="runs at a time")

    add = command(
        "reproduce",
        _reproduce,
        "the paper's tables and figures, beside the published numbers",
        "--datasets cifar10 --data data --out runs/reproduce",
    )
    add("--datasets", type=names, default=("cifar10", "cifar100", "stl10"), metavar="A,B,...", help="default: all")
    add("--protocol", choices=("paper", "full"), default="paper", help="as evaluate.protocol")
    add("--seeds", type=numbers, default=(42, 123, 456, 789, 101), metavar="N,...", help="default: the paper's five")
    add("--epochs", type=numbers, default=(1, 2, 5, 10), metavar="N,...", help="numbers of epochs (default 1,2,5,10)")
    add("--data", action="append", default=[], metavar="DIR", help="DIR/<data set> hold the shards, or DATASET=DIR")
    add("--out", type=folder, default=Path("runs/reproduce"), metavar="DIR", help="default: runs/reproduce")
    add("--processes", type=COUNT, default=1, metavar="N", help="runs at a time")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of all runs; tables say so")

    add = command(
        "verify-theory",
        _verify_theory,
        "measure the paper's lemmas and theorem on explicit distributions",
        "--out runs/theory",
    )
    add("--out", type=folder, metavar="DIR", help="write theory.json and a figure here (.png and .svg)")
    add("--repeats", type=LENGTH, default=1, metavar="N", help="random draws of every kind (default 1)")


def _sweep(options: argparse.Namespace) -> int:
    from rkdo_dist import config as configuration
    from rkdo_dist.studies import sheets
    from rkdo_dist.studies.grid import Sweep, axis, only, variants
    from rkdo_dist.studies.sweep import sweep

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


def _reproduce(options: argparse.Namespace) -> int:
    from rkdo_dist.studies import sheets
    from rkdo_dist.studies.paper import Request
    from rkdo_dist.studies.reproduce import reproduce

    o = options
    request = Request(o.datasets, o.protocol, o.seeds, o.epochs, o.out, tuple(o.set))
    return reproduce(request, tuple(o.data), o.processes, sheets.console())


def _verify_theory(options: argparse.Namespace) -> int:
    if not (Path(__file__).resolve().parents[2] / "examples" / "theory").is_dir():
        raise ValueError("verify-theory is an example of the repository: run `python -m examples.theory` in a checkout")
    from examples.theory.__main__ import verify

    return verify(options.out, options.repeats)
