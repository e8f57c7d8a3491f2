"""What the commands of several groups share: types, arguments, the configuration asked for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rkdo_dist.addresses import holds_address
from rkdo_dist.files import at_home
from rkdo_dist.printable import shortened

if TYPE_CHECKING:
    from rich.console import Console

    from rkdo_dist.config import Config

Run = Callable[[argparse.Namespace], int]
Add = Callable[..., argparse.Action]  # a parser's add_argument
Command = Callable[[str, Run, str, str], Add]  # name, what it runs, what it does, an example
CONFIG = "a YAML file, such as configs/digits-rkdo.yaml"
WAYS = "values of run.reduction: some of exact, fast, ring (default: as the configuration says)"


def add_config(add: Add) -> None:
    """The arguments CONFIG and KEY=VALUE."""
    add("config", metavar="CONFIG", help=CONFIG)
    add_overrides(add, "e.g. train.epochs=5 run.dir=runs/five")


def add_overrides(add: Add, about: str) -> None:
    """The arguments KEY=VALUE."""
    add("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=about)


def local(text: str) -> Path:
    """A path on this machine. An address would become a directory of that name, with all that is secret in it."""
    if holds_address(text):
        raise argparse.ArgumentTypeError(f"needs a path on this machine, got the address {text}")
    return Path(given(text))


def given(text: str) -> str:
    """A text, a leading ~ being the home directory. An empty one, of a shell variable that is not set, would be the
    working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"needs a name or a path, got {text!r}")
    return at_home(text)


def file(text: str) -> Path:
    """Where a file is to be written."""
    path = local(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"needs a file, but {path} is a directory")
    folder(str(path.parent))
    return path


def folder(text: str) -> Path:
    """Where a directory is, or is to be made."""
    path = local(text)
    above = next((one for one in (path, *path.parents) if one.exists() and not one.is_dir()), None)
    if above is not None:
        raise argparse.ArgumentTypeError(f"needs a directory, but {above} is a file")
    return path


@dataclasses.dataclass(frozen=True)
class Range:
    """The type of an option that is a number: whole where the ends are. What else is asked of it, its owner checks."""

    least: float
    most: float

    def __call__(self, text: str) -> float:
        kind = type(self.most)
        try:
            number = kind(text)
        except (ValueError, OverflowError):
            number = None
        if number is None or not self.least <= number <= self.most:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"needs {what} from {self.least:,} to {self.most:,}, got {shortened(text)!r}"
            )
        return number


COUNT = Range(0, 2**31 - 1)
SEED = Range(0, 2**63 - 1)
LENGTH = Range(0, 10**9)  # of a loop: steps, repeats
SHARE = Range(0.0, 1.0)


def names(text: str) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs whole numbers with commas, e.g. 1,2,4; got {text!r}") from None


def configuration_of(options: argparse.Namespace, relaunch: bool = True) -> Config:
    """The configuration asked for, checked as far as it can be without data; then all ranks that were promised."""
    from rkdo_dist import config

    loaded = config.load(options.config, options.overrides)
    from rkdo_dist import parts  # torch: after a misspelt key has been named

    parts.check(loaded)
    if relaunch:
        from rkdo_dist.ranks.relaunch import with_all_ranks

        with_all_ranks(options.words)
    return loaded


def terminal(stderr: bool = False) -> Console:
    """Where tables and progress go."""
    from rkdo_dist.console import Terminal

    return Terminal(stderr=stderr)
