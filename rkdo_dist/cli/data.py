"""`rkdo prepare` and `rkdo index`: a data set into shards, or shards into an index."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rkdo_dist.data.index import ShardIndex

_SOURCES = ("digits", "cifar10", "cifar100", "stl10", "imagefolder")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this file's commands."""
    prepare = commands.add_parser("prepare", help="turn a data set into WebDataset shards with an index")
    prepare.add_argument(
        "source", metavar="SOURCE", help=f"{', '.join(_SOURCES)}, or the path of an image folder or tar"
    )
    prepare.add_argument("--out", required=True, metavar="DIR", help="where the shards go")
    prepare.add_argument(
        "--root", metavar="PATH", help="files already there: torchvision's root, an image folder or a tar of one"
    )
    prepare.add_argument("--shard-size", type=int, metavar="N", help="samples per shard")
    prepare.add_argument("--force", action="store_true", help="rebuild what is complete")
    prepare.set_defaults(run=_prepare)

    index = commands.add_parser("index", help="describe existing WebDataset shards, without rewriting them")
    index.add_argument("shards", nargs="+", metavar="DIR_OR_URL", help="a directory of tar files, or tar files or URLs")
    index.add_argument("--out", metavar="DIR", help="where index.json goes (default: beside the shards)")
    index.set_defaults(run=_index)


def _prepare(options: argparse.Namespace, words: list[str]) -> int:
    from rich.console import Console

    from rkdo_dist.data.prepare import prepare

    console = Console(stderr=True)
    with _progress(console, f"preparing {options.source}") as progress:
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

    console = Console(stderr=True)
    source = options.shards[0] if len(options.shards) == 1 else options.shards
    with _progress(console, "indexing") as progress:
        made = index_shards(source, out=options.out, progress=progress)
    console.print(_split_table(made))
    return 0


@contextlib.contextmanager
def _progress(console: Console, title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar, and the function that moves it: (done, total, what)."""
    from rkdo_dist.console import progress_bar

    with progress_bar(console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, note="")

        def progress(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, note=label)

        yield progress


def _split_table(index: ShardIndex) -> Table:
    from rich.table import Table

    table = Table(title=str(index.root))
    for column in ("split", "samples", "shards", "classes", "image size"):
        table.add_column(column, justify="left" if column == "split" else "right")
    size = "varies" if index.image_size is None else "x".join(map(str, index.image_size))
    for split in index.splits.values():
        table.add_row(split.name, f"{split.samples:,}", str(len(split.shards)), str(len(index.classes)), size)
    return table
