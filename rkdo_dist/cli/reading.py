"""Commands that read run directories: `rkdo compare`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's commands."""
    compare = commands.add_parser("compare", help="a table and a figure of several runs")
    compare.add_argument("directories", nargs="+", metavar="RUN", help="run directories")
    compare.add_argument("--figure", metavar="FILE", help="save the loss curves here (.png or .svg)")
    compare.set_defaults(run=_compare)


def _compare(options: argparse.Namespace, words: list[str]) -> int:
    from rich.console import Console

    from rkdo_dist.studies.compare import comparison_table, loss_figure

    directories = [Path(d) for d in options.directories]
    console = Console()
    console.print(comparison_table(directories))
    if options.figure:
        loss_figure(directories, Path(options.figure))
        console.print(f"figure: {options.figure}", soft_wrap=True)
    return 0
