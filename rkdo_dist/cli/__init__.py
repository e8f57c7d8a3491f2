"""The command line. Each file of this folder adds its commands; imports are lazy, so `--help` is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rkdo_dist.cli import data, field, judging, reading, reporting, scaling, status, training

USER_ERROR = 2
INTERRUPTED = 130

_FILES = (data, training, status, scaling, judging, reading, reporting, field)  # in the order of --help


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 lost a peer, 2 a mistake in the request, 75 pre-empted, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parsed(words)
    try:
        code = options.run(options, words)
    except KeyboardInterrupt:
        _say("interrupted")
        code = INTERRUPTED
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("RKDO_TRACEBACK"):
            raise
        if not _is_users(error):
            raise
        _say(f"error: {error}")
        code = getattr(error, "exit_code", USER_ERROR)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _parsed(words: list[str]) -> argparse.Namespace:
    """The options; settings may stand before, between and after them (argparse takes a list in one piece only)."""
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(settings) < len(rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *settings]
    return options


def _is_users(error: BaseException) -> bool:
    """Whether an error speaks to the user (a message of ours) rather than of a fault in the program."""
    from rkdo_dist.exchange.group import RankError

    return isinstance(error, ValueError | OSError | RankError | ArithmeticError)


def _say(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    prefix = "rkdo: " if rank == "0" else f"rkdo [rank {rank}]: "
    print(prefix + text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rkdo",
        description="Recursive KL Divergence Optimization: prepare data, train, evaluate, compare.",
        epilog="Set RKDO_TRACEBACK=1 to see the traceback of an error.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for file in _FILES:
        file.add(commands)
    return parser
