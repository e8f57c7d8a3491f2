"""Exact nearest neighbours of samples whose features are sharded over the ranks.

Tiles travel one after the other from their owner to everybody, and every rank visits them with its own queries: O(n d)
words arrive at each rank, and it holds its own features and one tile. Products are those of one tile of queries and one
tile of samples, cut by n alone, so on CPUs the result is the same, bit for bit, on any number of ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rkdo_dist.exchange import group as ranks
from rkdo_dist.exchange.store import Shards
from rkdo_dist.field.nearest import Nearest
from rkdo_dist.field.neighbours import prepared, require_neighbours, visit


def nearest_of_all(own: Tensor, samples: int, k: int) -> Tensor:
    """The k nearest other samples of every sample by their cosine, on every rank (collective, default group).

    Args:
        own: (own, d) features of the samples that this rank owns (`Shards.own`), where tensors travel between ranks.
        samples: n.
        k: in [1, n - 1].

    Returns:
        (n, k) int32 on the CPU, nearest first.

    Raises:
        ValueError: as `field.neighbours.nearest`; on every rank.
    """
    shards, rank = Shards(samples, ranks.world_size()), ranks.rank()
    require_neighbours(k, samples)
    queries = ranks.together(lambda: prepared(own)[0], "looking at the features")
    first, stop = shards.own(rank)
    tiles = [shards.bounds(range(tile, tile + 1)) for tile in shards.tiles_of(rank)]
    no_columns = torch.empty(len(queries), 0, dtype=torch.int32, device=queries.device)
    found = Nearest.none(no_columns, k, 0, samples, queries.dtype)
    for owner in range(shards.world):
        for tile in shards.tiles_of(owner):
            start, end = shards.bounds(range(tile, tile + 1))
            columns = (
                queries[start - first : end - first].clone()
                if owner == rank
                else queries.new_empty(end - start, queries.shape[1])
            )
            if shards.world > 1:
                dist.broadcast(columns, src=owner)
            for begin, until in tiles:
                part = found.slice(begin - first, until - first)
                visit(part, queries[begin - first : until - first], begin, columns, start)
    found.sort()
    table = torch.zeros(samples, k, dtype=torch.int32, device=queries.device)
    table[first:stop] = found.samples
    if shards.world > 1:
        dist.all_reduce(table)
    return table.cpu()
