"""`rkdo train` and `rkdo evaluate`, on the ranks that a launcher has started."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's commands."""
    train = commands.add_parser("train", help="train an encoder")
    train.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/digits-rkdo.yaml")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. train.epochs=5 run.dir=runs/five")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="judge the newest checkpoint of a run")
    evaluate.add_argument("directory", metavar="RUN", help="a run directory")
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. evaluate.protocol=paper")
    evaluate.set_defaults(run=_evaluate)


def _train(options: argparse.Namespace, words: list[str]) -> int:
    from rkdo_dist import config as configuration

    config = configuration.load(options.config, options.overrides)
    from rkdo_dist.ranks.relaunch import with_all_ranks

    with_all_ranks(words)
    from rkdo_dist.train.main import train

    return train(config)


def _evaluate(options: argparse.Namespace, words: list[str]) -> int:
    from rkdo_dist.ranks.relaunch import with_all_ranks

    with_all_ranks(words)
    from rkdo_dist.train.main import evaluate_run

    evaluate_run(Path(options.directory), options.overrides)
    return 0
