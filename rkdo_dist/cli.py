"""The command line: prepare, index, train, evaluate, compare. Imports are lazy, so `--help` is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from rkdo_dist.data.index import ShardIndex

USER_ERROR = 2
INTERRUPTED = 130

_SOURCES = ("digits", "cifar10", "cifar100", "stl10", "imagefolder")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 a mistake in the request, 75 pre-empted, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
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
        code = USER_ERROR
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


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

    prepare = commands.add_parser("prepare", help="turn a data set into WebDataset shards with an index")
    prepare.add_argument(
        "source", metavar="SOURCE", help=f"{', '.join(_SOURCES)}, or the path of an image folder or tar"
    )
    prepare.add_argument("--out", required=True, metavar="DIR", help="where the shards go")
    prepare.add_argument(
        "--root",
        metavar="PATH",
        help="files already there: torchvision's root, an image folder or a tar of one",
    )
    prepare.add_argument("--shard-size", type=int, metavar="N", help="samples per shard")
    prepare.add_argument("--force", action="store_true", help="rebuild what is complete")
    prepare.set_defaults(run=_prepare)

    index = commands.add_parser("index", help="describe existing WebDataset shards, without rewriting them")
    index.add_argument("shards", nargs="+", metavar="DIR_OR_URL", help="a directory of tar files, or tar files or URLs")
    index.add_argument("--out", metavar="DIR", help="where index.json goes (default: beside the shards)")
    index.set_defaults(run=_index)

    train = commands.add_parser("train", help="train an encoder")
    train.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/digits-rkdo.yaml")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. train.epochs=5 run.dir=runs/five")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="judge the newest checkpoint of a run")
    evaluate.add_argument("directory", metavar="RUN", help="a run directory")
    evaluate.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. evaluate.protocol=paper")
    evaluate.set_defaults(run=_evaluate)

    compare = commands.add_parser("compare", help="a table and a figure of several runs")
    compare.add_argument("directories", nargs="+", metavar="RUN", help="run directories")
    compare.add_argument("--figure", metavar="FILE", help="save the loss curves here (.png or .svg)")
    compare.set_defaults(run=_compare)
    return parser


def _prepare(options: argparse.Namespace, words: list[str]) -> int:
    from rich.console import Console

    from rkdo_dist.data.prepare import prepare
    from rkdo_dist.train.journal import progress_bar

    console = Console(stderr=True)
    with progress_bar(console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"preparing {options.source}", total=None, note="")

        def progress(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, note=label)

        made = prepare(
            options.source,
            options.out,
            options.root,
            shard_size=options.shard_size,
            force=options.force,
            progress=progress,
        )
    console.print(_split_table(made))
    console.print("written" if made.built else "complete already: nothing to do (--force rebuilds it)")
    return 0


def _index(options: argparse.Namespace, words: list[str]) -> int:
    from rich.console import Console

    from rkdo_dist.data.foreign import index_shards
    from rkdo_dist.train.journal import progress_bar

    console = Console(stderr=True)
    source = options.shards[0] if len(options.shards) == 1 else options.shards
    with progress_bar(console, disable=not console.is_terminal) as bar:
        task = bar.add_task("indexing", total=None, note="")

        def progress(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, note=label)

        made = index_shards(source, out=options.out, progress=progress)
    console.print(_split_table(made))
    return 0


def _split_table(index: ShardIndex) -> Table:
    from rich.table import Table

    table = Table(title=str(index.root))
    for column in ("split", "samples", "shards", "classes", "image size"):
        table.add_column(column, justify="left" if column == "split" else "right")
    size = "varies" if index.image_size is None else "x".join(map(str, index.image_size))
    for split in index.splits.values():
        table.add_row(split.name, f"{split.samples:,}", str(len(split.shards)), str(len(index.classes)), size)
    return table


def _train(options: argparse.Namespace, words: list[str]) -> int:
    from rkdo_dist import config as configuration

    config = configuration.load(options.config, options.overrides)
    from rkdo_dist.train.relaunch import with_all_ranks

    with_all_ranks(words)
    from rkdo_dist.train.main import train

    return train(config)


def _evaluate(options: argparse.Namespace, words: list[str]) -> int:
    from rkdo_dist.train.relaunch import with_all_ranks

    with_all_ranks(words)
    from rkdo_dist.train.main import evaluate_run

    evaluate_run(Path(options.directory), options.overrides)
    return 0


def _compare(options: argparse.Namespace, words: list[str]) -> int:
    from rich.console import Console

    from rkdo_dist.studies.compare import comparison_table, loss_figure

    directories = [Path(d) for d in options.directories]
    console = Console()
    console.print(comparison_table(directories))
    if options.figure:
        loss_figure(directories, Path(options.figure))
        console.print(f"figure: {options.figure}")
    return 0
