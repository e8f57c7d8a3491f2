"""`rkdo status`: how a run stands, for people and for scripts that decide whether to submit it again."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's command."""
    status = commands.add_parser("status", help="how a run stands (its first word is for scripts)")
    status.add_argument("directory", metavar="RUN", help="a run directory")
    status.set_defaults(run=_status)


def _status(options: argparse.Namespace, words: list[str]) -> int:
    from rkdo_dist.rundir import RunDirectory

    status = RunDirectory(Path(options.directory)).status()
    print(f"{status['status']} at step {status['step']}")
    if "message" in status:
        print(status["message"])
    return 0
