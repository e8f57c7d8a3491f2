"""The command line: from words to a command, and from how it ends to an exit code.

Imports of a command's code are inside its function (`commands/`), so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rkdo_dist import __version__
from rkdo_dist.addresses import Parser
from rkdo_dist.commands.arguments import Add, Run
from rkdo_dist.commands.cost import cost_commands
from rkdo_dist.commands.data import data_commands
from rkdo_dist.commands.frozen import frozen_commands
from rkdo_dist.commands.output import output_commands
from rkdo_dist.commands.reading import reading_commands
from rkdo_dist.commands.runs import run_commands
from rkdo_dist.commands.studies import study_commands
from rkdo_dist.faults import fault, shortage

USER_ERROR, INTERRUPTED = 2, 130
_EXTRAS = {  # that bring a module; all others come with "train"
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "fsspec": "object-stores",
    "gcsfs": "object-stores",
    "huggingface_hub": "hub",
    "mlflow": "mlflow",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "pyarrow": "parquet",
    "s3fs": "object-stores",
    "tensorboard": "tracking",
    "timm": "timm",
    "transformers": "deepspeed",
    "wandb": "tracking",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 lost a peer, 2 a mistake in the request, 75 pre-empted, 130 interrupted."""
    if arguments is None:
        sys.excepthook = fault
        _open_closed_streams()
    options = parsed(list(sys.argv[1:] if arguments is None else arguments))
    from rkdo_dist.diagnostics import logger, show_diagnostics

    show_diagnostics()
    from rkdo_dist.ranks.signals import Stopped, StopRequest

    try:
        with StopRequest() as stop, stop.at_once():  # training, evaluation and studies have requests of their own
            code = options.run(options)
    except KeyboardInterrupt:
        logger.info("interrupted")
        code = INTERRUPTED
    except Stopped as stopped:
        logger.info("interrupted" if stopped.code == INTERRUPTED else "stopped by a signal")
        code = stopped.code
    except ModuleNotFoundError as error:
        if not error.name or "." in error.name:  # not a library, but a fault in one or here
            raise
        extra = _EXTRAS.get(error.name, "train")
        logger.error("this command needs %s, which is not installed: pip install 'rkdo_dist[%s]'", error.name, extra)
        code = USER_ERROR
    except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        if os.environ.get("RKDO_TRACEBACK") or not _is_users(error):
            raise
        logger.error("%s", shortage(error) or error)
        code = getattr(error, "exit_code", USER_ERROR)
    if arguments is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a late Ctrl-C must not change how a finished command ends
    sys.stdout.flush()  # stderr is not buffered
    sys.exit(code)


def _open_closed_streams() -> None:
    """Nothing in place of standard streams that were closed (`>&-`): the next files opened would take their numbers."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def parsed(words: list[str]) -> argparse.Namespace:
    """The options; settings may stand before, between and after them (argparse takes a list in one piece only)."""
    parser = _parser()
    commands = _commands_of(parser)
    if words and not words[0].startswith("-") and words[0] not in commands:
        near = difflib.get_close_matches(words[0], commands, n=1)
        hint = f"did you mean: {shlex.join(['rkdo', near[0], *words[1:]])}" if near else "`rkdo --help` lists them"
        parser.error(f"there is no command {words[0]!r}; {hint}")
    options, rest = parser.parse_known_args(words)
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(settings) < len(rest) or (rest and not hasattr(options, "overrides")):
        known = [option for action in commands[words[0]]._actions for option in action.option_strings]
        near = difflib.get_close_matches(rest[0].partition("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint} (rkdo {words[0]} --help)")
    if rest:
        options.overrides = [*options.overrides, *settings]
    _config_first(options)
    options.words = words
    return options


def _commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (added,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return added.choices


def _config_first(options: argparse.Namespace) -> None:
    """Where a setting stands before the configuration, argparse takes it for that."""
    config, overrides = getattr(options, "config", None), getattr(options, "overrides", [])
    other = next((word for word in overrides if "=" not in word), None)
    if config is not None and other is not None and "=" in str(config) and not Path(config).exists():
        options.overrides = [str(config) if word is other else word for word in overrides]
        options.config = type(config)(other)


def _is_users(error: BaseException) -> bool:
    """Whether an error speaks to the user (a message of ours) rather than of a fault in the program."""
    from rkdo_dist.exchange.group import RankError

    return isinstance(error, ValueError | OSError | RankError | ArithmeticError) or bool(shortage(error))


# -- arguments ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="rkdo",
        description="Recursive KL Divergence Optimization: prepare data, train, evaluate, compare.",
        epilog="example:\n  rkdo train configs/digits-rkdo.yaml train.epochs=2 run.dir=runs/first\n\n"
        "`rkdo COMMAND --help` has an example of every command.\n"
        "Set RKDO_TRACEBACK=1 to see the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("--version", action="version", version=f"rkdo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Run, about: str, example: str) -> Add:
        added = commands.add_parser(
            name,
            help=about,
            description=textwrap.fill(f"{about[0].upper()}{about[1:]}.", 78),
            epilog=f"example:\n  rkdo {name} {example}" + (_settings_text() if name == "train" else ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added.add_argument

    groups = (data_commands, run_commands, output_commands, frozen_commands)
    for add in (*groups, reading_commands, study_commands, cost_commands):
        add(command)
    return parser


def _settings_text() -> str:
    try:
        from rkdo_dist.config import listing
    except ModuleNotFoundError:  # installed without the trainer
        return ""

    text = listing.as_text(listing.settings(), shutil.get_terminal_size().columns)
    return f"\n\nsettings and their defaults (rkdo settings PATTERN shows some of them):\n\n{text}"
