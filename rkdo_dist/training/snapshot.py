"""Snapshots of the encoder as the teacher of a relation (`field.teacher=snapshot`).

When an epoch begins that is due, the encoder as it is embeds every training sample's plain view; the nearest
neighbours of all samples, found exactly over all ranks, make the rows that the epochs until the next snapshot draw
second views of (`field.delivery=sampled`). A step costs what it costs without, and nothing is diluted: the relation
reaches samples that are not in the batch. Before the first snapshot every row is the identity. The rows, the epoch of
the newest snapshot and what is told of it are in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.config import Config
from rkdo_dist.config.sections import DataConfig
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.shards import labels_of
from rkdo_dist.data.views import Views
from rkdo_dist.encoders import Encoder
from rkdo_dist.exchange.neighbours import nearest_of_all
from rkdo_dist.exchange.store import RowStore, Shards
from rkdo_dist.field.neighbours import mutual
from rkdo_dist.field.persistent import Rows, identity
from rkdo_dist.field.presets import Relation
from rkdo_dist.field.snapshot import at, attended, entropy, remember, supervising
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.training.supervision import check_neighbours, features_of


class Snapshots:
    """Takes them. Every method is collective.

    Args:
        relation: its teacher is "snapshot".
        weight: returns the relation's share a at an epoch.
        start: the first epoch that has one.
        index, split, data: the training samples, and how they are read.
        views: of which the plain one is embedded.

    Attributes:
        stored: entries of a row beside the sample itself.
        taken: the epoch of the newest snapshot, -1 before the first.
        facts: means over all samples at the newest snapshot: `relation_weight`, `relation_entropy` and, with labels,
            `relation_precision` (see `field.relation`).
    """

    def __init__(
        self,
        relation: Relation,
        weight: Callable[[int], float],
        start: int,
        stored: int,
        runtime: Runtime,
        index: ShardIndex,
        split: str,
        data: DataConfig,
        views: Views,
    ) -> None:
        self.relation, self.stored, self._start, self._runtime = relation, stored, start, runtime
        self._weight = weight
        self._index, self._split, self._data, self._views = index, split, data, views
        self._samples = index.split(split).samples
        self.taken, self.facts = -1, dict[str, float]()

    def first(self) -> Rows:
        """The rows of this rank's samples before the first snapshot."""
        first, stop = Shards(self._samples, self._runtime.world, rows_alone=True).own(self._runtime.rank)
        return identity(torch.arange(first, stop), self._samples, self.stored + 1)

    def due(self, epoch: int) -> bool:
        """Whether an epoch must not begin before a snapshot has been taken."""
        return epoch >= self._start and self.taken < epoch - (epoch - self._start) % self.relation.every

    def take(self, epoch: int, encoder: Encoder, store: RowStore) -> None:
        """Replace the rows of the store by those of the encoder as it is."""
        n, relation = self._samples, self.relation
        of = self._runtime, self._index, self._split, self._data, encoder, self._views
        x = features_of(range(n), *of, "embeddings")
        own = range(store.first, store.stop)
        searched = slice(*Shards(n, self._runtime.world).own(self._runtime.rank))  # tiles, which a search does not part
        table = nearest_of_all(x[searched].to(self._runtime.device), n, relation.neighbours)
        table = (mutual(table) if relation.mutual else table)[own.start : own.stop]
        new = table.long(), attended(x, table, own, relation.temperature)
        before = store.rows.to(torch.device("cpu"))
        mass = before.probabilities[:, 1:].double()
        old = before.columns[:, 1:].long(), mass / mass.sum(1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
        r = remember(old, new, relation.momentum, relation.mean, self.stored, n)
        confidence: Tensor | None = torch.ones(len(own), dtype=torch.float64)
        if relation.confidence == "agreement":  # of the snapshot with the memory; a row's first has none to agree with
            overlap = torch.minimum(at(*old, new[0], n), new[1]).sum(1)
            confidence = torch.where(mass.sum(1) > 0, overlap, 1.0)
        elif relation.confidence == "entropy":
            confidence = None
        rows, a = supervising(r, own, self._weight(epoch), confidence, n)
        store.rows.columns.copy_(rows.columns)
        store.rows.probabilities.copy_(rows.probabilities)
        store.rows.rest.zero_()
        self.taken, self.facts = epoch, self._told(own, r, a)

    def state(self) -> dict[str, Any]:
        """For a checkpoint (JSON-able)."""
        return {"taken": self.taken, "facts": self.facts}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the result of `state`; an empty one is before the first snapshot."""
        self.taken, self.facts = state.get("taken", -1), state.get("facts", {})

    def _told(self, own: range, r: tuple[Tensor, Tensor], a: Tensor) -> dict[str, float]:
        """Means, in one collective and one order: of the weight over all samples, else over those with a relation."""
        told = {"related": (r[1].sum(1) > 0).double(), "relation_weight": a, "relation_entropy": entropy(r[1])}
        if self._index.classes:
            labels = torch.tensor([*labels_of(self._index, self._split), -1])
            same = labels[own.start : own.stop, None] == labels[r[0].clamp(max=self._samples)]
            told["relation_precision"] = (r[1] * same).sum(1)
        table = torch.zeros(self._samples, len(told), dtype=torch.float64)
        table[own.start : own.stop] = torch.stack(list(told.values()), 1)
        if self._runtime.world > 1:
            table = table.to(self._runtime.device)
            dist.all_reduce(table)  # every row is of one rank, so no order enters
        related, weight, *others = table.sum(0).tolist()
        means = [weight / self._samples, *(total / max(1.0, related) for total in others)]
        return dict(zip(list(told)[1:], means, strict=True))


def make_snapshots(config: Config, runtime: Runtime, index: ShardIndex, views: Views) -> Snapshots | None:
    """The snapshots of a run whose teacher they are.

    Raises:
        ConfigError: for more neighbours than there are.
    """
    relations = {name: configuration.relation_of(config, name) for name in configuration.used_objectives(config)}
    name, relation = next(((k, r) for k, r in relations.items() if r and r.teacher == "snapshot"), ("", None))
    if relation is None:
        return None
    split, samples = config.data.split, index.split(config.data.split).samples
    check_neighbours(relation.neighbours, samples)
    remembers = relation.momentum > 0 and relation.mean == "arithmetic"
    stored = min(max(config.field.stored, relation.neighbours), samples - 1) if remembers else relation.neighbours
    start = -int(-config.field.relation_start_epoch // 1)

    def weight(epoch: int) -> float:
        found = parts.relation_at(config, name, epoch / config.train.epochs)
        assert found is not None
        return found.weight

    return Snapshots(relation, weight, start, stored, runtime, index, split, config.data, views)
