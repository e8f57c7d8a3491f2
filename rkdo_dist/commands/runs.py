"""Commands for one run, on the ranks that a launcher has started: their arguments, and the one call each makes."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rkdo_dist.commands.arguments import Command, add_config, add_overrides, configuration_of, local
from rkdo_dist.printable import printable


def run_commands(command: Command) -> None:
    """Add the commands."""
    add = command("train", _train, "train an encoder", "configs/digits-rkdo.yaml train.epochs=5 run.dir=runs/five")
    add_config(add)

    add = command("settings", _settings, "every setting: its default, its range, what it does", "temperature")
    add("pattern", nargs="?", default="", metavar="PATTERN", help="those with this in their name or explanation")
    add("--markdown", action="store_true", help="all of them as docs/settings.md")

    add = command("completion", _completion, "a script that completes commands and settings in your shell", "bash")
    add("shell", choices=("bash", "zsh", "fish"), help='bash: eval "$(rkdo completion bash)" in ~/.bashrc')

    add = command(
        "evaluate", _evaluate, "evaluate the newest checkpoint of a run", "runs/digits-rkdo evaluate.protocol=paper"
    )
    add("directory", type=local, metavar="RUN", help="a run directory")
    add_overrides(add, "e.g. evaluate.protocol=paper")

    add = command("status", _status, "how a run stands (its first word is for scripts)", "runs/digits-rkdo")
    add("directory", type=local, metavar="RUN", help="a run directory")

    add = command(
        "doctor", _doctor, "check a configuration, shards and launch, without training", "configs/digits-rkdo.yaml"
    )
    add_config(add)


def _train(options: argparse.Namespace) -> int:
    config = configuration_of(options)
    from rkdo_dist.training.main import Given, train

    return train(config, Given(name=Path(options.config).stem)).code


def _settings(options: argparse.Namespace) -> int:
    from rkdo_dist.config import listing

    width = shutil.get_terminal_size().columns
    print(listing.as_markdown() if options.markdown else listing.as_text(listing.settings(options.pattern), width))
    return 0


def _completion(options: argparse.Namespace) -> int:
    from rkdo_dist.completion import commands_of, script
    from rkdo_dist.config import listing

    settings = {one.key: one.about for one in listing.settings()}
    print(script(options.shell, commands_of(options.parser, settings, listing.values())), end="")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from rkdo_dist.ranks.relaunch import with_all_ranks
    from rkdo_dist.training.main import evaluate_run

    with_all_ranks(options.words)

    evaluate_run(options.directory, options.overrides)
    return 0


def _status(options: argparse.Namespace) -> int:
    from rkdo_dist.rundir import RunDirectory

    status = RunDirectory(options.directory).status()
    print(printable(f"{status['status']} at step {status['step']}"))
    for word in ("message", "remark"):
        if word in status:
            print(printable(status[word]))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    config = configuration_of(options)
    from rkdo_dist.measure.doctor import doctor

    return doctor(config)
