"""The relation in a step (`field.relation`): the teacher's keys come in, the loss and its gradient go out.

Keys of the global batch are gathered on every rank; they carry no gradient, so nothing else travels than the batch's
columns. A queue holds the keys of the last steps, the step's own among them, the same on every rank. It moves on when
the weights have moved: the keys of a step that is skipped are overwritten by the next one's. A bank holds the newest
key of every sample, also of a skipped step, at its owner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rkdo_dist import config as configuration
from rkdo_dist.checkpoint import Checkpoint
from rkdo_dist.config import Config
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.exchange import group
from rkdo_dist.exchange.bank import KeyBank
from rkdo_dist.exchange.columns import GatheredColumns
from rkdo_dist.exchange.transfer import upload
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.presets import Relation
from rkdo_dist.field.relation import Columns, nearest_columns, value_and_gradient
from rkdo_dist.training.persistent import Pair

QUEUE, BANK = "queue", "bank"  # their parts of a checkpoint


class Queue:
    """The keys of the last steps, first in, first out.

    Args:
        size: a multiple of the global batch.
        width: d of the keys.

    Attributes:
        keys: (size, d), with their `samples` and `labels` (size,) int64.
        place: where the next step's keys go.
        filled: how many slots have been.
    """

    def __init__(self, size: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.keys = torch.zeros(size, width, device=device, dtype=dtype)
        self.samples, self.labels = (torch.full((size,), -1, dtype=torch.int64, device=device) for _ in range(2))
        self.place = self.filled = 0

    def put(self, keys: Tensor, samples: Tensor, labels: Tensor) -> int:
        """Write a step's keys (B, d) over the oldest ones; how many slots then hold keys."""
        here = slice(self.place, self.place + len(keys))
        self.keys[here], self.samples[here], self.labels[here] = keys, samples, labels
        return max(self.filled, here.stop)

    def advance(self, count: int) -> None:
        """Keep the step's keys: those of the next go elsewhere."""
        self.filled = max(self.filled, self.place + count)
        self.place = (self.place + count) % len(self.keys)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        position = torch.tensor([self.place, self.filled])
        return {"keys": self.keys, "samples": self.samples, "labels": self.labels, "position": position}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the result of `tensors`.

        Raises:
            ValueError: if it has another shape.
        """
        for name, mine in self.tensors().items():
            if name not in tensors or tensors[name].shape != mine.shape:
                raise ValueError(f"{name} of the queue is not {tuple(mine.shape)}: field.queue has changed")
            mine.copy_(tensors[name])
        self.place, self.filled = tensors["position"].tolist()


class RelationalField:
    """What a recursion with restart keeps from step to step. Every method is collective.

    Args:
        relation: of the run; its weight is that of the objective of a step.
        samples: of the training split.
        width: d of the embeddings.
        labelled: whether labels are known, for the share of the relation that lies on a row's own class.
        device, dtype: of the embeddings.

    Attributes:
        queue, bank: if columns come from there.
    """

    def __init__(
        self,
        relation: Relation,
        samples: int,
        width: int,
        labelled: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.relation, self._labelled, self._device = relation, labelled, device
        self.queue = Queue(relation.queue, width, device, dtype) if relation.columns == "queue" else None
        self.bank = KeyBank(samples, width, device, dtype) if relation.columns == "bank" else None
        self._mine: list[Tensor] = []
        self._keys = self._samples = self._labels = torch.empty(0)

    def takes_part(self, objective: Objective) -> bool:
        """Whether the objective of a step asks for keys: over the batch a relation of weight 0 is InfoNCE."""
        return objective.relation is not None and (objective.relation.weight > 0 or self.relation.columns != "batch")

    def begin(self, keys: Sequence[Tensor], samples: Tensor, labels: Tensor) -> None:
        """Gather the keys of a step.

        Args:
            keys: the teacher's embeddings (m, d) of this rank's lanes.
            samples, labels: (b,) int64 of the same, on the CPU.
        """
        self._mine = list(keys)
        self._keys = group.all_gather_rows(torch.cat(self._mine))
        numbers = group.all_gather_rows(upload(torch.stack([samples, labels], 1), self._device))
        self._samples, self._labels = numbers.unbind(1)
        if self.bank is not None:
            self.bank.refresh(self._samples, self._keys, self._labels)

    def field(
        self, lanes: Sequence[Pair], objective: Objective, columns: GatheredColumns, merged: bool
    ) -> tuple[list[Pair], dict[str, Tensor]]:
        """Sums of the loss and its parts over each lane, and their gradients by the embeddings.

        Args:
            lanes: embeddings of this rank's lanes, without graph; of a queue's rows, the second ones are not used.
            objective: with a relation.
            columns: how the batch's columns travel.
            merged: whether all lanes are taken as one, and the sums are so too.
        """
        assert objective.relation is not None
        sizes, keys = [len(u) for u, _ in lanes], self._mine
        if self.bank is not None:
            return self._over_bank(self.bank, torch.cat([u for u, _ in lanes]), sizes, objective, merged)
        if merged:
            lanes = [(torch.cat([u for u, _ in lanes]), torch.cat([v for _, v in lanes]))]
            keys = [torch.cat(keys)]
        labels = self._labels if self._labelled else None
        first = group.rank() * sum(sizes)
        if self.queue is None:
            student = columns.gather(torch.cat([v for _, v in lanes])[None])[0]
            given = Columns(student, self._keys, self._samples, labels)
        else:
            filled, queue = self.queue.put(self._keys, self._samples, self._labels), self.queue
            known = None if labels is None else queue.labels[:filled]
            given = Columns(queue.keys[:filled], queue.keys[:filled], queue.samples[:filled], known)
            first += queue.place
        rows = torch.arange(first, first + sum(sizes), device=self._device).split([len(u) for u, _ in lanes])
        mutual = None
        if self.relation.mutual:
            lists = [nearest_columns(self.relation, k, given, at) for k, at in zip(keys, rows, strict=True)]
            mutual = group.all_gather_rows(torch.cat(lists))
        tree: group.TreeSum[Tensor] = group.TreeSum(len(lanes))
        results = []
        for (u, _), k, at in zip(lanes, keys, rows, strict=True):
            of = objective.relation, objective.temperature, objective.relation.weight
            result = value_and_gradient(*of, u, k, given, at, mutual, self.queue is None)
            if result.columns is not None:
                tree.add(result.columns)
            results.append(result)
        du = torch.cat([result.rows for result in results])
        dv = columns.send_home(tree.total()[None])[0] if self.queue is None else torch.zeros_like(du)
        sums = {name: torch.stack([r.parts[name] for r in results]) for name in results[0].parts}
        sums = {"loss": torch.stack([result.loss for result in results]), **sums}
        return list(zip(du.split(sizes), dv.split(sizes), strict=True)), sums

    def _over_bank(
        self, bank: KeyBank, rows: Tensor, sizes: list[int], objective: Objective, merged: bool
    ) -> tuple[list[Pair], dict[str, Tensor]]:
        assert objective.relation is not None
        batch = self._keys, self._samples, self._labels
        parts, du = bank.field(rows, *batch, objective.relation, objective.temperature)
        if not self._labelled:
            del parts["relation_precision"]
        lanes = [len(rows)] if merged else sizes
        sums = {name: torch.stack([lane.sum() for lane in part.split(lanes)]) for name, part in parts.items()}
        pairs = list(zip(du.split(sizes), torch.zeros_like(du).split(sizes), strict=True))
        return pairs, {"loss": sums["kl_1"], **sums}

    def commit(self) -> None:
        """Keep the keys of the step."""
        if self.queue is not None:
            self.queue.advance(len(self._keys))

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The queue, or this rank's tiles of the bank; see `checkpoint.Kept`."""
        if self.bank is not None:
            return {f"{BANK}.{tile:06d}": self.bank.tensors(tile) for tile in self.bank.shards.tiles_of(group.rank())}
        return {QUEUE: self.queue.tensors()} if self.queue is not None and group.rank() == 0 else {}

    def restore(self, found: Checkpoint) -> None:
        """See `checkpoint.Kept`."""
        try:
            if self.queue is not None:
                self.queue.load(found.part(QUEUE))
            if self.bank is not None:
                for tile in self.bank.shards.tiles_of(group.rank()):
                    self.bank.load(tile, found.part(f"{BANK}.{tile:06d}"))
        except ValueError as error:
            what = "queue" if self.bank is None else "bank"
            raise ValueError(f"the {what} in {found.path} does not match this run: {error}") from error


def make_relational(config: Config, index: ShardIndex, device: torch.device) -> RelationalField | None:
    """The relation of a run's steps, if one of its objectives has one (`training.snapshot` has that of epochs)."""
    relations = (configuration.relation_of(config, name) for name in configuration.used_objectives(config))
    relation = next((relation for relation in relations if relation is not None), None)
    if relation is None or relation.teacher == "snapshot":
        return None
    samples = index.split(config.data.split).samples
    return RelationalField(relation, samples, config.encoder.embedding_dim, bool(index.classes), device)
