"""Frozen features of a whole split, from all ranks to rank zero, each sample exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rkdo_dist.exchange import group as ranks
from rkdo_dist.ranks import signals

# images (m, 3, H, W) as the stream gives them -> backbone features (m, f), embeddings (m, d)
Embed = Callable[[Tensor], tuple[Tensor, Tensor]]


class Block(Protocol):
    """What is used of a micro-batch: `ids` int64 (m,), `images` (m, 3, H, W), `labels` int64 (m,) or -1."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class FrozenFeatures:
    """Features of n samples in the order of their ids.

    Attributes:
        ids: (n,) int64, rising by one.
        labels: (n,) int64, -1 where there is none.
        backbone: (n, f) float32.
        embeddings: (n, d) float32, rows of norm 1.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    backbone: NDArray[np.float32]
    embeddings: NDArray[np.float32]


def gather_features(
    blocks: Iterable[tuple[int, Block]],
    embed: Embed,
    samples: int,
    first_id: int = 0,
    device: torch.device | str = "cpu",
    group: ranks.Group = None,
) -> FrozenFeatures | None:
    """Embed this rank's blocks and bring the features of all ranks to rank zero (collective).

    A block is embedded whole, by one rank, so the features do not depend on how many ranks there are.
    Blocks travel one per rank and round; rank zero keeps the features of all samples, the others never more
    than a block.

    Args:
        blocks: (block number, block) for this rank; ranks may have different numbers of blocks, also none.
        embed: called without gradient; put the encoder into evaluation mode and the images on its device.
        samples: how many samples all ranks have together: the ids `first_id` up to `first_id + samples`.
        first_id: the smallest id.
        device: where tensors travel: the accelerator for nccl, the CPU for gloo.
        group: the ranks; the default group if None.

    Returns:
        The features on rank zero, None on the others.

    Raises:
        Stopped: on every rank, when one was asked to stop.
        ValueError: on a single rank, if a sample comes twice, has an id outside the range, or is missing.
        RankError: the same with several ranks, and for any error of reading or embedding on any rank: on
            all.
    """
    table = _Table(samples, first_id) if ranks.rank(group) == 0 else None
    iterator = iter(blocks)
    failure: Exception | None = None
    while True:
        rows: _Rows | None = None
        if failure is None:
            try:
                rows = _next(iterator, embed, device)
            except Exception as error:  # shared with all ranks below
                failure = error
        round_ = _agree(rows, failure is not None, device, group)
        if round_.failed:
            ranks.together(_raising(failure), "embedding the samples to evaluate")
        if round_.stop:
            raise signals.Stopped(round_.stop)
        if not round_.blocks:
            break
        try:
            for received in _to_rank_zero(rows, round_, device, group):
                assert table is not None  # only rank zero receives
                table.put(received)
        except ValueError as error:  # shared in the next round, which there always is
            failure = error
    ranks.together(table.check if table is not None else _raising(None), "gathering features")
    return table.features() if table is not None else None


@dataclass(frozen=True)
class _Rows:
    """m samples: facts (m, 2) int64 are ids and labels; backbone (m, f) and embeddings (m, d) are float32."""

    facts: Tensor
    backbone: Tensor
    embeddings: Tensor


@dataclass(frozen=True)
class _Round:
    """What all ranks know of a round: whether any failed, is to stop or has a block, the largest one's rows, f, d."""

    failed: bool
    stop: int
    blocks: bool
    rows: int
    f: int
    d: int


def _next(iterator: Iterator[tuple[int, Block]], embed: Embed, device: torch.device | str) -> _Rows | None:
    """This rank's next block, embedded; None after the last."""
    entry = next(iterator, None)
    if entry is None:
        return None
    number, block = entry
    with torch.no_grad():
        backbone, embeddings = embed(block.images)
    for name, rows in (("labels", block.labels), ("backbone features", backbone), ("embeddings", embeddings)):
        if len(rows) != len(block.ids):
            raise ValueError(f"block {number} has {len(block.ids)} samples but {len(rows)} {name}")
    facts = torch.stack([block.ids, block.labels], dim=1).to(device)
    return _Rows(facts, backbone.to(device, torch.float32), embeddings.to(device, torch.float32))


def _agree(rows: _Rows | None, failed: bool, device: torch.device | str, group: ranks.Group) -> _Round:
    shape = [0, 0, 0] if rows is None else [len(rows.facts), rows.backbone.shape[1], rows.embeddings.shape[1]]
    header = torch.tensor([failed, signals.current().code, rows is not None, *shape], dtype=torch.int64, device=device)
    if ranks.world_size(group) > 1:
        dist.all_reduce(header, op=dist.ReduceOp.MAX, group=group)
    any_failed, code, any_blocks, largest, f, d = header.tolist()
    return _Round(bool(any_failed), code, bool(any_blocks), largest, f, d)


_PADDING = -(2**62)  # the id of rows that only fill up a block


def _to_rank_zero(
    rows: _Rows | None, round_: _Round, device: torch.device | str, group: ranks.Group
) -> Iterator[_Rows]:
    """Every rank's rows on rank zero, none on others. Blocks are padded to the largest, as gather asks."""
    facts = torch.full((round_.rows, 2), _PADDING, dtype=torch.int64, device=device)
    values = torch.zeros((round_.rows, round_.f + round_.d), device=device)
    if rows is not None:
        facts[: len(rows.facts)] = rows.facts
        values[: len(rows.facts)] = torch.cat([rows.backbone, rows.embeddings], dim=1)
    all_facts, all_values = _gather(facts, group), _gather(values, group)
    for some_facts, some_values in zip(all_facts, all_values, strict=True):
        real = some_facts[:, 0] != _PADDING
        yield _Rows(some_facts[real].cpu(), *some_values[real].cpu().split([round_.f, round_.d], dim=1))


def _gather(tensor: Tensor, group: ranks.Group) -> list[Tensor]:
    """The tensors of all ranks in rank order on rank zero, an empty list on the others."""
    if ranks.world_size(group) == 1:
        return [tensor]
    senders = ranks.world_size(group) if ranks.rank(group) == 0 else 0
    out = [torch.empty_like(tensor) for _ in range(senders)]
    dist.gather(tensor, out or None, group=group, group_dst=0)
    return out


def _raising(failure: Exception | None) -> Callable[[], None]:
    def action() -> None:
        if failure is not None:
            raise failure

    return action


class _Table:
    """The rows of all samples, put in any order, each once."""

    def __init__(self, samples: int, first_id: int) -> None:
        self._first, self._seen = first_id, np.zeros(samples, dtype=bool)
        self._labels = np.full(samples, -1, dtype=np.int64)
        self._values: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def put(self, rows: _Rows) -> None:
        """Put rows at their ids.

        Raises:
            ValueError: for an id outside the range or one that was there already.
        """
        places = rows.facts[:, 0].numpy() - self._first
        stray = places[(places < 0) | (places >= len(self._seen))]
        if len(stray):
            last = self._first + len(self._seen) - 1
            raise ValueError(f"sample {stray[0] + self._first} is not among those to evaluate, {self._first} to {last}")
        unique, counts = np.unique(places, return_counts=True)
        twice = np.concatenate([unique[counts > 1], places[self._seen[places]]])
        if len(twice):
            raise ValueError(f"sample {twice[0] + self._first} came twice; each must be evaluated once")
        if self._values is None:
            widths = rows.backbone.shape[1], rows.embeddings.shape[1]
            f, d = (np.empty((len(self._seen), width), dtype=np.float32) for width in widths)
            self._values = f, d
        self._seen[places] = True
        self._labels[places] = rows.facts[:, 1].numpy()
        self._values[0][places] = rows.backbone.numpy()
        self._values[1][places] = rows.embeddings.numpy()

    def check(self) -> None:
        """Raises ValueError unless every sample has been put."""
        missing = np.flatnonzero(~self._seen)
        if len(missing) or self._values is None:
            first = f", the first is {missing[0] + self._first}" if len(missing) else ""
            raise ValueError(f"{len(missing)} of {len(self._seen)} samples to evaluate are missing{first}")

    def features(self) -> FrozenFeatures:
        assert self._values is not None  # `check` has passed
        ids = np.arange(self._first, self._first + len(self._seen), dtype=np.int64)
        return FrozenFeatures(ids, self._labels, *self._values)
