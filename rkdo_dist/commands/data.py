"""`rkdo init`, `rkdo prepare` and `rkdo index`: their arguments, and the one call each makes (imported when made)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rkdo_dist.commands.arguments import COUNT, Command, folder, given, local, terminal
from rkdo_dist.printable import printable

if TYPE_CHECKING:
    from rich.table import Table

    from rkdo_dist.data.index import ShardIndex


def data_commands(command: Command) -> None:
    """Add the commands."""
    add = command("init", _init, "write starting configurations and a launch script", "mine --data path/to/pictures")
    add("directory", type=folder, metavar="DIR", help="where they go")
    add(
        "--data",
        type=given,
        metavar="SOURCE",
        help="as data.source: a folder of images, shards, an address (default: the digits)",
    )
    add("--force", action="store_true", help="replace files that are there")

    add = command(
        "prepare", _prepare, "turn a data set into WebDataset shards with an index", "digits --out data/digits"
    )
    add(
        "source",
        type=given,
        metavar="SOURCE",
        help="digits, cifar10, cifar100, stl10, imagefolder, or the path of images",
    )
    add("--out", type=folder, required=True, metavar="DIR", help="where the shards go")
    add(
        "--root",
        type=local,
        metavar="PATH",
        help="files already there: torchvision's root, or a folder or tar of images",
    )
    add("--shard-size", type=COUNT, metavar="N", help="samples per shard")
    add("--force", action="store_true", help="rebuild what is complete")

    add = command("index", _index, "describe existing shards, or read a folder of images through once", "data/mine")
    add(
        "shards",
        type=given,
        nargs="+",
        metavar="DIR_OR_URL",
        help="a directory of tar files, tar files or URLs, or any data.source",
    )
    add("--out", type=folder, metavar="DIR", help="where index.json of shards goes (default: beside them)")


def _init(options: argparse.Namespace) -> int:
    from rkdo_dist.start import init

    for path in init(options.directory, options.data, options.force):
        print(printable(str(path)))
    print(printable(f"next: {options.directory}/train.sh"))
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from rkdo_dist.console import counting
    from rkdo_dist.data.prepare import prepare

    console = terminal(stderr=True)
    with counting(console, f"preparing {options.source}") as progress:
        size, force = options.shard_size, options.force
        made = prepare(options.source, options.out, options.root, shard_size=size, force=force, progress=progress)
    console.print(_split_table(made))
    console.print("written" if made.built else "complete already: nothing to do (--force rebuilds it)")
    return 0


def _index(options: argparse.Namespace) -> int:
    from rkdo_dist.console import counting
    from rkdo_dist.data.source import index

    console = terminal(stderr=True)
    with counting(console, "indexing") as progress:
        made = index(options.shards, options.out, progress)
    console.print(_split_table(made), *made.notes, sep="\n", soft_wrap=True, markup=False, highlight=False)
    return 0


def _split_table(index: ShardIndex) -> Table:
    from rkdo_dist.console import table

    size = "varies" if index.image_size is None else "x".join(map(str, index.image_size))
    rows = [(s.name, f"{s.samples:,}", len(s.shards), len(index.classes), size) for s in index.splits.values()]
    return table(index.place, ("split", "samples", "shards", "classes", "image size"), rows)
