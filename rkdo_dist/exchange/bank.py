"""A teacher's newest key of every training sample, sharded by owner over the ranks (`field.columns=bank`).

Keys stay where they are: rows travel to them (b x 2 d numbers to every rank), back come nine numbers of every row and
tile, and one gradient of every row and tile, which the row's rank adds in the order of the tiles. Tiles do not depend
on the number of ranks and neither does any shape in the computation, so on CPUs the result is the same, bit for bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rkdo_dist.exchange import group as ranks
from rkdo_dist.exchange.store import Shards
from rkdo_dist.field.presets import Relation
from rkdo_dist.field.relation_tiles import NUMBERS, Combined, Queries, Tile, combined, differentiate, visit

ROWS = 512  # of a block


class KeyBank:
    """This rank's share of the keys. Every method but `tensors` and `load` is collective (default group).

    Args:
        samples: n.
        width: d.
        device: where the keys are and the step computes.
    """

    def __init__(self, samples: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.shards, self._rank = Shards(samples, ranks.world_size()), ranks.rank()
        self._first, self._stop = self.shards.own(self._rank)
        own = self._stop - self._first
        # One place more, where keys of other ranks' samples go: choosing those that are not would wait for a GPU.
        self._keys = torch.zeros(own + 1, width, dtype=dtype, device=device)
        self._seen = torch.zeros(own + 1, dtype=torch.bool, device=device)
        self._labels = torch.full((own + 1,), -1, dtype=torch.int64, device=device)

    def refresh(self, samples: Tensor, keys: Tensor, labels: Tensor) -> None:
        """Take the newest keys (B, d) of the samples (B,) of a global batch, where finite; every rank has them all."""
        mine = (samples >= self._first) & (samples < self._stop) & keys.isfinite().all(1)
        places = torch.where(mine, samples - self._first, self._stop - self._first)
        self._keys[places] = keys.to(self._keys.dtype)
        self._labels[places], self._seen[places] = labels, True

    def field(
        self, rows: Tensor, keys: Tensor, samples: Tensor, labels: Tensor, relation: Relation, temperature: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Parts of the losses of this rank's rows, each (b,) float64, and the gradients by their embeddings (b, d).

        Args:
            rows: the student's embeddings (b, d).
            keys, samples, labels: of the global batch (B, d), (B,), as they were `refresh`ed.
            relation: with the weight of the step.
            temperature: tau.
        """
        world, b = self.shards.world, len(rows)
        everyone = ranks.all_gather_rows(rows.to(self._keys.dtype)) / temperature
        of = Queries(everyone, keys.to(self._keys.dtype) / relation.temperature, samples, labels)
        blocks = [(start, min(start + ROWS, len(samples))) for start in range(0, len(samples), ROWS)]
        tiles = [self._tile(number) for number in self.shards.tiles_of(self._rank)]
        owners, places = self.shards.places()
        longest = -(-self.shards.tiles // world)  # tiles of a rank
        numbers = torch.zeros(self.shards.tiles, len(samples), NUMBERS, dtype=torch.float64, device=rows.device)
        for number, tile in zip(self.shards.tiles_of(self._rank), tiles, strict=True):
            for start, stop in blocks:
                numbers[number, start:stop] = visit(of.part(start, stop), tile)
        # Each tile's bits from its owner, nought from the others: there may be many more ranks than tiles.
        ranks.all_reduce_integers(numbers.view(torch.int64))
        values = combined(numbers, relation, relation.weight)
        sent = rows.new_zeros(world, longest, b, rows.shape[1], dtype=self._keys.dtype)
        for place, tile in enumerate(tiles):
            found = torch.cat([differentiate(of.part(*x), tile, _part(values, *x), temperature) for x in blocks])
            sent[:, place] = found.view(world, b, -1)
        received = sent
        if world > 1:
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent)
        gradient = torch.zeros_like(received[0, 0])
        for rank, place in zip(owners.tolist(), places.tolist(), strict=True):
            gradient += received[rank, place]
        here = slice(self._rank * b, (self._rank + 1) * b)
        return {name: part[here] for name, part in values.values.parts.items()}, gradient

    def tensors(self, tile: int) -> dict[str, Tensor]:
        """A tile that this rank owns, for a checkpoint."""
        part = self._tile(tile)
        return {"keys": part.keys, "seen": part.seen, "labels": part.labels}

    def load(self, tile: int, tensors: dict[str, Tensor]) -> None:
        """Restore a tile from the result of `tensors`.

        Raises:
            ValueError: if it has other shapes than here.
        """
        for name, mine in self.tensors(tile).items():
            if name not in tensors or tensors[name].shape != mine.shape:
                raise ValueError(f"{name} of tile {tile} of the bank is not {tuple(mine.shape)}")
            mine.copy_(tensors[name])

    def _tile(self, number: int) -> Tile:
        start, stop = self.shards.bounds(range(number, number + 1))
        own = slice(start - self._first, stop - self._first)
        return Tile(self._keys[own], self._seen[own], self._labels[own], start)


def _part(rows: Combined, start: int, stop: int) -> Combined:
    """Rows start..stop - 1, without their parts."""
    values = type(rows.values)({}, *(x[start:stop] for x in list(vars(rows.values).values())[1:]))
    return Combined(values, rows.log_rest[start:stop], rows.log_relation[start:stop])
