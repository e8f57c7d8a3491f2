"""The first samples of a split in its source's own order, as the released notebook judges them.

`prepare` puts the samples of a split into an order drawn from its seed; the draw is known, so it can be undone. Only
sources whose own order mixes the classes have one worth undoing: the data sets of torchvision and the digits. That of a
folder is by class, so that its first samples would be of one class: there, as in shards that somebody else has made,
the first samples are the first of the index.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rkdo_dist.data.index import OpenSamples, Shard, ShardIndex, Split
from rkdo_dist.data.order import hash64, permutation
from rkdo_dist.data.shards import open_shard

SOURCES = ("cifar10", "cifar100", "stl10", "digits")


def first_samples(index: ShardIndex, split: str, count: int) -> ShardIndex:
    """The index with the first `count` samples alone of a split (all, if there are fewer), in their source's own order.

    Args:
        index: if its source has no order of its own, it is returned as it is.

    Raises:
        DataError: for a split that is not there.
    """
    found = index.split(split)
    if index.source not in SOURCES or index.seed is None:
        return index
    ids = np.argsort(permutation(found.samples, hash64(index.seed, *split.encode())), kind="stable")[:count]
    ends = np.cumsum(found.counts)
    shards = np.searchsorted(ends, ids, side="right")
    places = tuple((int(s), int(k - ends[s] + found.counts[s])) for s, k in zip(shards, ids, strict=True))
    facts = found.shards[0] if found.shards else Shard("", 0, "", 0)
    chosen = replace(facts, name=f"{split}, own order", samples=len(places), content=_Chosen(index, found, places))
    return replace(index, splits={**index.splits, split: Split(split, (chosen,))})


@dataclass(frozen=True)
class _Chosen:
    """Samples of several shards in the role of one: (shard, position inside it) of each."""

    index: ShardIndex
    split: Split
    places: tuple[tuple[int, int], ...]

    def open(self, name: str) -> _OpenChosen:
        return _OpenChosen(self, name)


class _OpenChosen:
    """See `index.OpenSamples`."""

    def __init__(self, chosen: _Chosen, name: str) -> None:
        self.name, self._chosen = name, chosen
        needed = sorted({shard for shard, _ in chosen.places})
        self._open: dict[int, OpenSamples] = {s: open_shard(chosen.index, chosen.split.shards[s]) for s in needed}
        self.keys = tuple(self._open[s].keys[k] for s, k in chosen.places)

    def pixels(self, position: int, size: int | None) -> np.ndarray:
        shard, k = self._chosen.places[position]
        return self._open[shard].pixels(k, size)

    def label(self, position: int) -> bytes | None:
        shard, k = self._chosen.places[position]
        return self._open[shard].label(k)

    def where(self, position: int) -> str:
        shard, k = self._chosen.places[position]
        return self._open[shard].where(k)

    def check_unchanged(self) -> None:
        for opened in self._open.values():
            opened.check_unchanged()

    def close(self) -> None:
        for opened in self._open.values():
            opened.close()
