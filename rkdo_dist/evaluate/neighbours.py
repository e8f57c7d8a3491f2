"""Nearest neighbours among features that stay on the ranks that computed them.

A few queries of every rank travel to all, each rank searches its own samples, and what it found travels back: k
distances, ids and labels of each query. As in `scores.nearest`, candidates are found in float32 by matrix products, and
a few more than k of them are then ordered by exact float64 distances, ties by id, so rounding decides nothing that an
exact search would not. (Where more samples than that are equally near, as with a collapsed encoder, it does.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rkdo_dist.exchange import group
from rkdo_dist.field.nearest import ROWS, Nearest, note
from rkdo_dist.ranks import signals

QUERIES = 2048  # that travel at once, of all ranks together
TILE = 4096  # samples that are compared with `ROWS` queries at once
MORE = 16  # candidates beyond k
_ENTRIES = 1 << 22  # of a block of differences


def nearest(
    queries: Tensor, base: Tensor, ids: Tensor, labels: Tensor, k: int, query_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest samples (Euclidean) of this rank's queries among the samples of all ranks (collective).

    Args:
        queries: (m, d) float32, where tensors travel; ranks may have different numbers, also none.
        base: (r, d) float32, this rank's samples.
        ids: (r,) int64, their numbers, rising.
        labels: (r,) int64.
        k: of all samples together there must be so many, those that are left out not counted.
        query_ids: (m,) numbers of the queries, which are not their own neighbours; None: they are no samples.

    Returns:
        Of each query, nearest first: squared distances (m, k) float64, ids and labels (m, k) int64.

    Raises:
        Stopped: on every rank, when one was asked to stop.
    """
    world, own = group.world_size(), _Own(base, ids, labels, k)
    longest = int(group.all_reduce_max(len(queries)))
    each = max(1, min(QUERIES // world, longest))
    numbers = torch.full((len(queries),), -1, device=queries.device) if query_ids is None else query_ids
    found = []
    for start in range(0, longest, each):
        part = slice(start, start + each)
        if code := int(group.all_reduce_max(float(signals.current().code))):
            raise signals.Stopped(code)
        sent, own_numbers = queries.new_zeros(each, queries.shape[1]), numbers.new_full((each,), -1)
        count = len(queries[part])
        sent[:count], own_numbers[:count] = queries[part], numbers[part]
        here = own.search(group.all_gather_rows(sent), group.all_gather_rows(own_numbers))
        arrived = here
        if world > 1:
            arrived = torch.empty_like(here)
            dist.all_to_all_single(arrived, here)
        by_query = arrived.view(world, each, k, 3).transpose(0, 1).reshape(each, world * k, 3)[:count]
        found.append(_first(by_query, k))
    everything = torch.cat(found) if found else queries.new_zeros(0, k, 3, dtype=torch.float64)
    return everything[..., 0], everything[..., 1].long(), everything[..., 2].long()


class _Own:
    """This rank's samples, made ready."""

    def __init__(self, base: Tensor, ids: Tensor, labels: Tensor, k: int) -> None:
        self._base, self._ids, self._k = base, ids, k
        self._facts = torch.stack([ids, labels], dim=1).double()
        # Distances do not change with the origin, and float32 loses less near it.
        self._centre = base.double().mean(0) if len(base) else base.new_zeros(base.shape[1], dtype=torch.float64)
        self._centred = (base - self._centre).float()
        self._norms = self._centred.square().sum(1)

    def search(self, queries: Tensor, numbers: Tensor) -> Tensor:
        """(q, k, 3) float64 of queries (q, d): squared distance (infinite: no sample), id and label, nearest first."""
        found = []
        for rows, of in zip(queries.split(ROWS), numbers.split(ROWS), strict=True):
            places = self._candidates(rows)
            size = max(1, _ENTRIES // max(1, places.shape[1] * rows.shape[1]))
            parts = zip(rows.split(size), of.split(size), places.split(size), strict=True)
            found += [self._ordered(*part) for part in parts]
        return torch.cat(found)

    def _candidates(self, queries: Tensor) -> Tensor:
        """Places (q, c) int64 of samples among which the nearest are, rising; `len(base)` for none."""
        n = len(self._base)
        asked = torch.zeros(len(queries), 0, dtype=torch.int32, device=queries.device)
        nearest = Nearest.none(asked, min(self._k + MORE, n), 0, n, torch.float32)
        centred = (queries - self._centre).float() * 2
        for start in range(0, n, TILE):
            tile = slice(start, start + TILE)
            note(nearest, torch.addmm(-self._norms[tile], centred, self._centred[tile].T), start)
        return nearest.samples.long().sort(dim=1).values

    def _ordered(self, queries: Tensor, numbers: Tensor, places: Tensor) -> Tensor:
        some = torch.full((len(queries), self._k, 3), torch.inf, dtype=torch.float64, device=queries.device)
        if places.shape[1]:
            there = places < len(self._base)
            places = places.clamp(max=len(self._base) - 1)
            difference = self._base[places].double() - queries[:, None].double()
            squared = torch.where(
                there & (self._ids[places] != numbers[:, None]), difference.square().sum(2), torch.inf
            )
            all_found = _first(torch.cat([squared[..., None], self._facts[places]], 2), self._k)
            some[:, : all_found.shape[1]] = all_found
        return some


def _first(found: Tensor, k: int) -> Tensor:
    """The k nearest (q, k, 3) of (q, c, 3), equally near ones by id."""
    found = found.gather(1, found[..., 1].argsort(dim=1, stable=True)[..., None].expand_as(found))
    order = found[..., 0].argsort(dim=1, stable=True)[:, :k]
    return found.gather(1, order[..., None].expand(-1, -1, 3))
