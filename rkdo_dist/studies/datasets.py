"""What a data set is called: by what it is, not by the place where somebody has put it."""

from __future__ import annotations

from pathlib import Path

from rkdo_dist import parts
from rkdo_dist.config import Config
from rkdo_dist.data.index import ShardIndex

TITLES = {"digits": "digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10"}
# Number of classes, and names that tell them from others of as many: an image folder may hold them too.
_CLASSES = {
    "cifar10": (10, {"automobile", "frog"}),
    "cifar100": (100, {"aquarium_fish", "worm"}),
    "stl10": (10, {"car", "monkey"}),
}


def known_as(index: ShardIndex) -> str:
    """The key of `TITLES` of a data set that everybody knows, found by its source or its classes; "" for any other."""
    if index.source in TITLES:
        return index.source
    for name, (count, some) in _CLASSES.items():
        if len(index.classes) == count and some <= set(index.classes):
            return name
    return ""


def name_of(index: ShardIndex) -> str:
    """A data set's own name; that of its place where nobody knows it."""
    return TITLES.get(known_as(index), "") or Path(index.place).name or "unnamed data"


def index_of(config: Config) -> ShardIndex | None:
    """The index of a run's data; None where they are not there any more."""
    try:
        return parts.open_index(config)
    except (ValueError, OSError):
        return None
