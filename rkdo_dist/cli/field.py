"""`rkdo field`: how the rows of a persistent field evolve."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's commands."""
    field = commands.add_parser("field", help="a picture of how rows of a persistent field evolve")
    field.add_argument("directory", metavar="RUN", help="a run with field.recursion=persistent")
    field.add_argument("--out", metavar="DIR", help="write field.png and field.svg here (default: RUN)")
    field.set_defaults(run=_field)


def _field(options: argparse.Namespace, words: list[str]) -> int:
    from rich.console import Console

    from rkdo_dist.studies.field_figure import write_figure

    console = Console(stderr=True)
    with console.status("drawing"):
        paths = write_figure(Path(options.directory), Path(options.out or options.directory))
    console.print(f"figure: {paths[0]}", soft_wrap=True)
    return 0
