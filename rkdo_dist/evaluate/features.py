"""Frozen features of a whole split, each sample exactly once: where they were computed, or all on rank zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rkdo_dist.exchange import group as ranks
from rkdo_dist.exchange.transfer import upload
from rkdo_dist.ranks import signals
from rkdo_dist.ranks.runtime import Runtime

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


def plain_features(encoder: Any, plain: Callable[[Tensor], Tensor], runtime: Runtime) -> Embed:
    """Embeds images as they are; `encoder` has `features`, `plain` makes its inputs (`Views.plain`)."""

    def embed(images: Tensor) -> tuple[Tensor, Tensor]:
        with runtime.autocast():
            return encoder.features(plain(upload(images, runtime.device)))

    return embed


def gather_features(
    blocks: Iterable[tuple[int, Block]],
    embed: Embed,
    samples: int,
    first_id: int = 0,
    device: torch.device | str = "cpu",
) -> FrozenFeatures | None:
    """Embed this rank's blocks and bring the features of all ranks to rank zero (collective).

    Arguments and errors are those of `own_features`.

    Returns:
        The features on rank zero, None on the others.
    """
    own = own_features(blocks, embed, samples, first_id, device)
    return at_rank_zero(own, own.ids - first_id, samples, first_id)


def own_features(
    blocks: Iterable[tuple[int, Block]],
    embed: Embed,
    samples: int,
    first_id: int = 0,
    device: torch.device | str = "cpu",
) -> OwnFeatures:
    """Embed this rank's blocks; the features stay here (collective, default group).

    A block is embedded whole, by one rank, so the features do not depend on how many ranks there are. After each block
    the ranks agree on whether to go on, on the host: a device is not waited for.

    Args:
        blocks: (block number, block) for this rank; ranks may have different numbers of blocks, also none.
        embed: called without gradient; put the encoder into evaluation mode and the images on its device.
        samples: how many samples all ranks have together: the ids `first_id` up to `first_id + samples`.
        first_id: the smallest id.
        device: where tensors travel: the accelerator for nccl, the CPU for gloo.

    Raises:
        Stopped: on every rank, when one was asked to stop.
        ValueError: on a single rank, if a sample comes twice, has an id outside the range, or is missing.
        RankError: the same with several ranks, and for any error of reading or embedding on any rank: on
            all.
    """
    iterator, device = iter(blocks), torch.device(device)
    found: list[OwnFeatures] = []
    widths = [0, 0]
    while True:
        attempt = ranks.Attempt(lambda: _next(iterator, embed, device))
        rows = attempt.value
        if rows is not None:
            found.append(rows)
            widths = [rows.backbone.shape[1], rows.embeddings.shape[1]]
        header = [attempt.failed, signals.current().code, rows is not None, *widths]
        failed, code, any_blocks, *widths = _largest(header)
        attempt.result(failed > 0, "embedding the samples to evaluate")
        if code:
            raise signals.Stopped(code)
        if not any_blocks:
            break
    none = torch.zeros(0, dtype=torch.int64)
    found.append(OwnFeatures(none, none, *(torch.zeros(0, width, device=device) for width in widths)))
    ids, *others = (torch.cat(parts) for parts in zip(*(vars(part).values() for part in found), strict=True))
    _check(ids - first_id, samples, first_id, device)
    return OwnFeatures(*(upload(x, device) for x in (ids, *others)))


def class_counts(labels: Tensor) -> Tensor:
    """Labelled samples of each class (C,) int64, of all ranks together (collective, default group).

    Args:
        labels: (m,) int64 of this rank's samples, where tensors travel; -1 where there is none.
    """
    labelled = labels.cpu()
    labelled = labelled[labelled >= 0]
    highest = int(ranks.all_reduce_max(float(labelled.max()) if len(labelled) else -1.0))
    return ranks.all_reduce_integers(upload(torch.bincount(labelled, minlength=highest + 1), labels.device))


def _next(iterator: Iterator[tuple[int, Block]], embed: Embed, device: torch.device) -> OwnFeatures | None:
    """This rank's next block, embedded, with ids and labels on the host; None after the last."""
    entry = next(iterator, None)
    if entry is None:
        return None
    number, block = entry
    with torch.no_grad():
        backbone, embeddings = embed(block.images)
    for name, rows in (("labels", block.labels), ("backbone features", backbone), ("embeddings", embeddings)):
        if len(rows) != len(block.ids):
            raise ValueError(f"block {number} has {len(block.ids)} samples but {len(rows)} {name}")
    facts = (torch.as_tensor(x, dtype=torch.int64) for x in (block.ids, block.labels))
    return OwnFeatures(*facts, *(x.to(device, torch.float32) for x in (backbone, embeddings)))


def _check(places: Tensor, samples: int, first_id: int, device: torch.device) -> None:
    """Check that all ranks together have every place once: a whole number for each travels (collective)."""
    stray = places[(places < 0) | (places >= samples)]
    inside = places[(places >= 0) & (places < samples)]
    counts = ranks.all_reduce_integers(upload(torch.bincount(inside, minlength=samples).int(), device)).cpu()

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


def at_rank_zero(own: OwnFeatures, places: Tensor, samples: int, first_id: int = 0) -> FrozenFeatures | None:
    """Features of some samples on rank zero, None on the others (collective, default group).

    Args:
        own: what each rank has.
        places: (m,) int64, the place of each of its rows in the result; -1: not in it.
        samples: how many places there are; each must be taken by one row of one rank.
        first_id: the `ids` of the result count from here.
    """
    main, f = ranks.rank() == 0, own.backbone.shape[1]
    table = collected([own.labels[:, None], own.backbone, own.embeddings], places, range(samples if main else 0))
    if not main:
        return None
    ids = np.arange(first_id, first_id + samples, dtype=np.int64)
    labels, values = np.ascontiguousarray(table[:, :2]).view(np.int64)[:, 0], table[:, 2:].view(np.float32)
    return FrozenFeatures(ids, labels, *(np.ascontiguousarray(x) for x in np.split(values, [f], axis=1)))


def collected(columns: Sequence[Tensor], places: Tensor, wanted: range) -> NDArray[np.int32]:
    """Rows of all ranks that this one wants, on its host (collective, default group): a few thousand travel at once.

    Args:
        columns: (m, c) tensors of this rank, where tensors travel; of any numbers, whose bits stay as they are.
        places: (m,) int64 of its rows in all ranks' table; each is taken by one row of one rank; -1: not in it.
        wanted: places, consecutive ones, which may be another rank's too.

    Returns:
        (len(wanted), C): words of 32 bits; one of 64 bits is two of them.
    """
    rows = torch.cat([x.contiguous().view(torch.int32) for x in (places[:, None], *columns)], dim=1)
    rows = rows[places >= 0]
    table = np.empty((len(wanted), rows.shape[1] - 2), dtype=np.int32)
    each = max(1, _TRAVELLING // ranks.world_size())
    for start in range(0, _largest([len(rows)])[0], each):
        part = rows[start : start + each]
        padded = torch.nn.functional.pad(part, (0, 0, 0, each - len(part)), value=-1)
        everyones = ranks.all_gather_rows(padded)
        if len(wanted):
            arrived = everyones.cpu().numpy()
            at = np.ascontiguousarray(arrived[:, :2]).view(np.int64)[:, 0] - wanted.start
            mine = (at >= 0) & (at < len(wanted))
            table[at[mine]] = arrived[mine, 2:]
    return table


def _largest(numbers: Sequence[int]) -> list[int]:
    """The largest of every rank's `numbers`, on the host."""
    found = torch.tensor(numbers, dtype=torch.int64)
    if ranks.world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=ranks.control())
    return found.tolist()
