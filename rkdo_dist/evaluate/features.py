"""Frozen features of a whole split, each sample exactly once: where they were computed, or all on rank zero."""

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
_TRAVELLING = 4096  # rows that travel at once, of all ranks together


class Block(Protocol):
    """What is used of a micro-batch: `ids` int64 (m,), `images` (m, 3, H, W), `labels` int64 (m,) or -1."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class OwnFeatures:
    """This rank's part of the features of a split: the blocks that it embedded, in order, where tensors travel.

    Attributes:
        ids: (m,) int64.
        labels: (m,) int64, -1 where there is none.
        backbone: (m, f) float32.
        embeddings: (m, d) float32, rows of norm 1.
    """

    ids: Tensor
    labels: Tensor
    backbone: Tensor
    embeddings: Tensor


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

    Arguments and errors are those of `own_features`.

    Returns:
        The features on rank zero, None on the others.
    """
    own = own_features(blocks, embed, samples, first_id, device, group)
    return at_rank_zero(own, own.ids - first_id, samples, first_id, group)


def own_features(
    blocks: Iterable[tuple[int, Block]],
    embed: Embed,
    samples: int,
    first_id: int = 0,
    device: torch.device | str = "cpu",
    group: ranks.Group = None,
) -> OwnFeatures:
    """Embed this rank's blocks; the features stay here (collective).

    A block is embedded whole, by one rank, so the features do not depend on how many ranks there are. After each block
    the ranks agree on whether to go on.

    Args:
        blocks: (block number, block) for this rank; ranks may have different numbers of blocks, also none.
        embed: called without gradient; put the encoder into evaluation mode and the images on its device.
        samples: how many samples all ranks have together: the ids `first_id` up to `first_id + samples`.
        first_id: the smallest id.
        device: where tensors travel: the accelerator for nccl, the CPU for gloo.
        group: the ranks; the default group if None.

    Raises:
        Stopped: on every rank, when one was asked to stop.
        ValueError: on a single rank, if a sample comes twice, has an id outside the range, or is missing.
        RankError: the same with several ranks, and for any error of reading or embedding on any rank: on
            all.
    """
    iterator = iter(blocks)
    found: list[OwnFeatures] = []
    widths = [0, 0]
    while True:
        attempt = ranks.Attempt(lambda: _next(iterator, embed, device))
        rows = attempt.value
        if rows is not None:
            found.append(rows)
            widths = [rows.backbone.shape[1], rows.embeddings.shape[1]]
        header = torch.tensor([attempt.failed, signals.current().code, rows is not None, *widths], device=device)
        failed, code, any_blocks, *widths = _largest(header, group)
        attempt.result(failed > 0, "embedding the samples to evaluate")
        if code:
            raise signals.Stopped(code)
        if not any_blocks:
            break
    found.append(_rows([], [], torch.zeros(0, widths[0]), torch.zeros(0, widths[1]), device))
    own = OwnFeatures(*(torch.cat(parts) for parts in zip(*(vars(part).values() for part in found), strict=True)))
    _check(own.ids - first_id, samples, first_id, group)
    return own


def class_counts(labels: Tensor) -> Tensor:
    """Labelled samples of each class (C,) int64, of all ranks together (collective, default group).

    Args:
        labels: (m,) int64 of this rank's samples, where tensors travel; -1 where there is none.
    """
    labelled = labels[labels >= 0]
    highest = int(ranks.all_reduce_max(float(labelled.max()) if len(labelled) else -1.0))
    return ranks.all_reduce_integers(torch.bincount(labelled, minlength=highest + 1))


def _next(iterator: Iterator[tuple[int, Block]], embed: Embed, device: torch.device | str) -> OwnFeatures | None:
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
    return _rows(block.ids, block.labels, backbone, embeddings, device)


def _rows(ids: object, labels: object, backbone: Tensor, embeddings: Tensor, device: torch.device | str) -> OwnFeatures:
    facts = (torch.as_tensor(x, dtype=torch.int64, device=device) for x in (ids, labels))
    return OwnFeatures(*facts, *(x.to(device, torch.float32) for x in (backbone, embeddings)))


def _check(places: Tensor, samples: int, first_id: int, group: ranks.Group) -> None:
    """Check that all ranks together have every place once: a whole number for each travels (collective)."""
    stray = places[(places < 0) | (places >= samples)]
    inside = places[(places >= 0) & (places < samples)]
    counts = torch.bincount(inside, minlength=samples).int()
    if ranks.world_size(group) > 1:
        dist.all_reduce(counts, group=group)

    def complain() -> None:
        if len(stray):
            where = f"{first_id} to {first_id + samples - 1}"
            raise ValueError(f"sample {int(stray[0]) + first_id} is not among those to evaluate, {where}")
        twice, missing = (counts > 1).nonzero(), (counts == 0).nonzero()
        if len(twice):
            raise ValueError(f"sample {int(twice[0]) + first_id} came twice; each must be evaluated once")
        if len(missing):
            first = f", the first is {int(missing[0]) + first_id}"
            raise ValueError(f"{len(missing)} of {samples} samples to evaluate are missing{first}")

    ranks.together(complain, "gathering features")


def at_rank_zero(
    own: OwnFeatures, places: Tensor, samples: int, first_id: int = 0, group: ranks.Group = None
) -> FrozenFeatures | None:
    """Features of some samples on rank zero, None on the others (collective).

    Args:
        own: what each rank has.
        places: (m,) int64, the place of each of its rows in the result; -1: not in it.
        samples: how many places there are; each must be taken by one row of one rank.
        first_id: the `ids` of the result count from here.
    """
    chosen, world = places >= 0, ranks.world_size(group)
    facts = torch.stack([places[chosen], own.labels[chosen]], dim=1)
    values = torch.cat([own.backbone[chosen], own.embeddings[chosen]], dim=1)
    f, main = own.backbone.shape[1], ranks.rank(group) == 0
    labels = np.empty(samples if main else 0, dtype=np.int64)
    table = np.empty((len(labels), values.shape[1]), dtype=np.float32)
    each = max(1, _TRAVELLING // world)
    for start in range(0, _largest(places.new_tensor([len(facts)]), group)[0], each):
        part = slice(start, start + each)
        padded = facts.new_full((each, 2), -1), values.new_zeros(each, values.shape[1])
        padded[0][: len(facts[part])], padded[1][: len(facts[part])] = facts[part], values[part]
        for some_facts, some_values in zip(*(_gather(x, group) for x in padded), strict=True):
            real = some_facts[:, 0] >= 0
            at = some_facts[real, 0].cpu().numpy()
            labels[at], table[at] = some_facts[real, 1].cpu().numpy(), some_values[real].cpu().numpy()
    if not main:
        return None
    ids = np.arange(first_id, first_id + samples, dtype=np.int64)
    return FrozenFeatures(ids, labels, *(np.ascontiguousarray(x) for x in np.split(table, [f], axis=1)))


def _gather(tensor: Tensor, group: ranks.Group) -> list[Tensor]:
    """The tensors of all ranks in rank order on rank zero, an empty list on the others."""
    if ranks.world_size(group) == 1:
        return [tensor]
    senders = ranks.world_size(group) if ranks.rank(group) == 0 else 0
    out = [torch.empty_like(tensor) for _ in range(senders)]
    dist.gather(tensor, out or None, group=group, group_dst=0)
    return out


def _largest(numbers: Tensor, group: ranks.Group) -> list[int]:
    """The largest of every rank's `numbers` (c,) int64, where tensors travel."""
    if ranks.world_size(group) > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    return numbers.tolist()
