"""Rows of the persistent field, and the embedding bank, sharded by owner over the ranks.

The n samples are cut into tiles of consecutive samples, by n alone; a rank owns consecutive tiles. Rows alone depend on
nothing but themselves, so where there is no bank and there are few tiles for the ranks, ranks share tiles, in even
parts. Rows of the global batch are fetched from their owners and written back by all-to-all. Every rank knows the
samples of every rank's batch from the data order, so no request needs to be sent, and rows can be fetched before the
step that uses them.

The bank stays where it is: queries travel to it (b x d numbers), and what comes back is, for every query, the K largest
logits and one log-sum-exp per tile (`field.nearest`). Tiles do not depend on the number of ranks and neither does any
shape in the computation, so on CPUs the result is the same, bit for bit, on any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rkdo_dist.exchange import group as ranks
from rkdo_dist.exchange.group import Group
from rkdo_dist.exchange.transfer import upload
from rkdo_dist.field.nearest import Nearest, visit_tile
from rkdo_dist.field.persistent import Rows, identity

TILES, LONGEST_TILE = 16, 8192  # at least so many tiles, of at most so many samples
ALIGNED = 16  # samples: tiles, and parts of tiles, begin at multiples
FEW = 4  # tiles of a rank: with more of them no rank owns a quarter more than the mean


@dataclass(frozen=True)
class Shards:
    """Which rank owns which samples.

    Attributes:
        samples: n.
        world: number of ranks.
        rows_alone: whether ranks may share tiles: what a rank does depends on single rows.
    """

    samples: int
    world: int
    rows_alone: bool = False

    @property
    def tile(self) -> int:
        """Samples in a tile (the last may be shorter): a multiple of 16, so that tiles begin at aligned addresses."""
        return min(LONGEST_TILE, -(-self.samples // (ALIGNED * TILES)) * ALIGNED)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return -(-self.samples // self.tile)

    def tiles_of(self, rank: int) -> range:
        """The tiles that a rank owns, where none is shared; none on some ranks, if there are more ranks than tiles."""
        return range(rank * self.tiles // self.world, (rank + 1) * self.tiles // self.world)

    def bounds(self, tiles: range) -> tuple[int, int]:
        """First sample of a run of tiles, and the one after its last."""
        return min(self.samples, tiles.start * self.tile), min(self.samples, tiles.stop * self.tile)

    def own(self, rank: int) -> tuple[int, int]:
        """First sample that a rank owns, and the one after its last."""
        first, stop = (k * self._units // self.world * self._unit for k in (rank, rank + 1))
        return min(self.samples, first), min(self.samples, stop)

    def owners(self, samples: Tensor) -> Tensor:
        """The owner of each sample, int64."""
        return self._owners(samples // self._unit, self._units)

    def touched(self, rank: int) -> range:
        """The tiles that a rank owns, or shares."""
        first, stop = self.own(rank)
        return range(first // self.tile, -(-stop // self.tile)) if stop > first else range(0)

    @property
    def _unit(self) -> int:
        """Samples that are not parted."""
        return ALIGNED if self.rows_alone and self.tiles < FEW * self.world else self.tile

    @property
    def _units(self) -> int:
        return -(-self.samples // self._unit)

    def places(self) -> tuple[Tensor, Tensor]:
        """Of every tile its owner, and its place among those of the owner, int64."""
        tiles = torch.arange(self.tiles)
        owners = self._owners(tiles, self.tiles)
        return owners, tiles - owners * self.tiles // self.world

    def _owners(self, units: Tensor, count: int) -> Tensor:
        """The last rank r whose first unit, r count // W, is not behind: the largest r with r count < (unit + 1) W."""
        return ((units + 1) * self.world - 1) // count


@dataclass(frozen=True)
class _Routes:
    """Who holds which rows of a batch.

    Attributes:
        sent, received: rows that each rank fetches from here, and that this rank fetches from each.
        leaving: places here of the former, in rank order, where the rows are kept.
        order: places of the latter among this rank's samples, in owner order, where messages are.
    """

    sent: list[int]
    received: list[int]
    leaving: Tensor
    order: Tensor


class Fetch:
    """Rows in transit to the rank that asked for them."""

    def __init__(self, work: dist.Work | None, received: Tensor, order: Tensor, store: RowStore) -> None:
        self._work, self._received, self._order, self._store = work, received, order, store

    def wait(self) -> Rows:
        """The rows, in the order asked for."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        rows = torch.empty_like(self._received)
        rows[self._order] = self._received
        return self._store.unpack(rows)


class RowStore:
    """This rank's rows and, if there is one, its share of the bank. Every method is collective.

    Args:
        samples: n.
        stored: K entries of a row.
        width: d of the bank's embeddings; None: no bank.
        device: where rows and bank are kept.
        dtype: of probabilities and bank.
        group: process group; None is the default group, or one rank without a process group.
        rows: the initial rows of the samples that this rank owns (`Shards.own`), K entries each, which are taken over;
            None: the identity.
        computes: where the step computes; None: where rows and bank are kept.

    Attributes:
        rows: those that this rank owns.
        bank, seen: embeddings (own, d), and which samples have one (own,).
    """

    def __init__(
        self,
        samples: int,
        stored: int,
        width: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        group: Group = None,
        rows: Rows | None = None,
        computes: torch.device | None = None,
    ) -> None:
        self.shards = Shards(samples, ranks.world_size(group), rows_alone=width is None)
        self._group, self._rank = group, ranks.rank(group)
        self._device, self._stored = torch.device(device), stored
        self._computes = self._device if computes is None else computes
        self.first, self.stop = self.shards.own(self._rank)
        own = self.stop - self.first
        if rows is None:
            rows = identity(torch.arange(self.first, self.stop), samples, stored, dtype)
        assert rows.columns.shape == (own, stored)
        self.rows = rows.to(self._device)
        pinned = self._device.type == "cpu" and self._computes.type == "cuda"  # tiles travel at every step
        self.bank = None if width is None else torch.zeros(own, width, dtype=dtype, device=device, pin_memory=pinned)
        self.seen = torch.zeros(own, dtype=torch.bool, device=device, pin_memory=pinned)
        self._routed: tuple[Tensor, _Routes] | None = None  # of the last batch
        # under way: the work, what arrives and where it goes, what leaves (kept alive), samples of the whole batch
        self._writes: list[tuple[dist.Work, Tensor, Tensor, Tensor, Tensor]] = []

    def fetch(self, batch: Tensor) -> Fetch:
        """Begin to fetch this rank's rows of a global batch.

        Args:
            batch: (B,) int64 on the CPU, the samples of all ranks in rank order; b = B / W of them are this rank's.
                The same on every rank.
        """
        self.finish(batch)
        routes = self._routes(batch)
        outgoing = upload(self.pack(self.rows.pick(routes.leaving)), self._wire())
        incoming = outgoing.new_empty(len(routes.order), outgoing.shape[1])
        work = self._all_to_all(incoming, outgoing, routes.received, routes.sent)
        return Fetch(work, incoming if work is not None else outgoing, routes.order, self)

    def write(self, batch: Tensor, rows: Rows) -> None:
        """Begin to send this rank's rows of a global batch to their owners, where they replace the old ones.

        Args:
            batch: as for `fetch`.
            rows: b of them, in the order of this rank's samples.
        """
        self.finish()
        routes = self._routes(batch)
        outgoing = self.pack(rows).to(self._wire())[routes.order]
        incoming = outgoing.new_empty(len(routes.leaving), outgoing.shape[1])
        work = self._all_to_all(incoming, outgoing, routes.sent, routes.received)
        if work is None:
            self._put(routes.leaving, outgoing)
        else:
            self._writes.append((work, incoming, routes.leaving, outgoing, batch))

    def finish(self, batch: Tensor | None = None) -> None:
        """Wait for rows in transit to their owners.

        Args:
            batch: only if one of these samples' rows may be under way; None: in any case. The same on every rank.
        """
        if batch is not None and not any(bool(torch.isin(batch, samples).any()) for *_, samples in self._writes):
            return
        for work, incoming, places, *_ in self._writes:
            work.wait()
            self._put(places, incoming)
        self._writes.clear()

    def draw(self, uniform: Tensor) -> Tensor:
        """A column of every row, (n,) int64 on the CPU of every rank (see `Rows.draw`).

        Args:
            uniform: (n,) float64 in [0, 1), the same on every rank.
        """
        self.finish()
        drawn = torch.zeros(self.shards.samples, dtype=torch.int64)
        drawn[self.first : self.stop] = self.rows.to(torch.device("cpu")).draw(uniform[self.first : self.stop])
        if self.shards.world == 1:
            return drawn
        drawn = drawn.to(self._wire())
        dist.all_reduce(drawn, group=self._group)
        return drawn.cpu()

    def refresh(self, batch: Tensor, embeddings: Tensor) -> None:
        """Put the newest embeddings (B, d) of a global batch into the bank, where finite; every rank has them all."""
        assert self.bank is not None
        mine = ((batch >= self.first) & (batch < self.stop)).nonzero()[:, 0]
        places = upload(batch[mine] - self.first, self._device)
        newest = embeddings[upload(mine, embeddings.device)].to(self.bank)
        fine = newest.isfinite().all(1)
        self.bank[places] = torch.where(fine[:, None], newest, self.bank[places])
        self.seen[places] |= fine

    def search(self, queries: Tensor, stored: Tensor) -> Nearest:
        """The learned rows of this rank's samples over all samples of the bank.

        Args:
            queries: (b, d), divided by the temperature.
            stored: (b, K) int32, columns whose logits are asked for.

        Returns:
            For this rank's queries: the K largest logits, largest first, those asked for, and log-sum-exps by tile.
        """
        assert self.bank is not None
        everyone = ranks.all_gather_rows(queries, self._group)
        wanted = ranks.all_gather_rows(stored, self._group)
        found = Nearest.none(wanted, self._stored, self.shards.tiles, self.shards.samples, queries.dtype)
        for tile in self.shards.tiles_of(self._rank):
            start, stop = self.shards.bounds(range(tile, tile + 1))
            place = slice(start - self.first, stop - self.first)
            embeddings, seen = (upload(x[place], everyone.device) for x in (self.bank, self.seen))
            visit_tile(found, everyone, embeddings, seen, start, tile, wanted)
        return self._brought_home(found)

    def whole_tiles(self) -> dict[int, dict[str, Tensor]]:
        """The tiles whose first samples are this rank's, whole, for a checkpoint (collective)."""
        self.finish()
        shards, world = self.shards, self.shards.world
        mine = [tile for tile in shards.touched(self._rank) if tile * shards.tile >= self.first]
        end = shards.bounds(range(mine[-1], mine[-1] + 1))[1] if mine else self.stop
        kept = (mine[0] * shards.tile if mine else self.stop) - self.first  # rows of an earlier rank's tile
        starts = torch.tensor([min(shards.samples - 1, shards.own(rank)[0]) for rank in range(world)])
        writers = shards.owners(starts // shards.tile * shards.tile)
        sent, received = [0] * world, [0] * world
        sent[int(writers[self._rank])] = kept
        for rank in range(self._rank + 1, world):
            first, stop = shards.own(rank)
            received[rank] = max(0, min(stop, end) - first) if mine else 0
        outgoing = self.pack(self.rows.slice(0, kept).to(self._wire()))
        incoming = outgoing.new_empty(sum(received), outgoing.shape[1])
        if (work := self._all_to_all(incoming, outgoing, received, sent)) is not None:
            work.wait()
        found = {tile: self.tensors(tile) for tile in mine}
        if mine and sum(received):
            rest = self.unpack(incoming.to(self._device))
            found[mine[-1]] = {name: torch.cat([x, getattr(rest, name)]) for name, x in found[mine[-1]].items()}
        return found

    def tensors(self, tile: int) -> dict[str, Tensor]:
        """This rank's rows and embeddings of a tile that it owns, or shares."""
        start, stop = (x - self.first for x in self._part_of(tile))
        part = self.rows.slice(start, stop)
        found = {"columns": part.columns, "probabilities": part.probabilities, "rest": part.rest}
        if self.bank is not None:
            found |= {"bank": self.bank[start:stop], "seen": self.seen[start:stop]}
        return found

    def load(self, tile: int, tensors: dict[str, Tensor]) -> None:
        """Restore this rank's part of a tile.

        Args:
            tensors: of the whole tile, from `whole_tiles`.

        Raises:
            ValueError: if it has other shapes or dtypes than here.
        """
        own, (first, last) = self.tensors(tile), self.shards.bounds(range(tile, tile + 1))
        for name, mine in own.items():
            theirs, shape = tensors.get(name), (last - first, *mine.shape[1:])
            if theirs is None or theirs.shape != shape or theirs.dtype != mine.dtype:
                what = "is missing" if theirs is None else f"is {tuple(theirs.shape)} {theirs.dtype}"
                raise ValueError(
                    f"{name} of rows {tile * self.shards.tile}... {what}, but this run needs {shape} "
                    f"{mine.dtype}: data set, field.stored, field.columns or encoder.embedding_dim have changed"
                )
        start, stop = self._part_of(tile)
        for name, mine in own.items():
            mine.copy_(tensors[name][start - first : stop - first])

    def _part_of(self, tile: int) -> tuple[int, int]:
        """First sample of a tile that is this rank's, and the one after its last."""
        start, stop = self.shards.bounds(range(tile, tile + 1))
        return max(start, self.first), min(stop, self.stop)

    def pack(self, rows: Rows) -> Tensor:
        """Rows as (r, words) int32, to travel as one tensor."""
        words = (rows.columns, rows.probabilities.view(torch.int32), rows.rest[:, None].view(torch.int32))
        return torch.cat(words, 1)

    def unpack(self, words: Tensor) -> Rows:
        """The inverse of `pack`."""
        dtype, k = self.rows.rest.dtype, self._stored
        # Copied flat: a view as wider numbers needs an aligned beginning and stride, also where there is one row.
        numbers = words[:, k:].reshape(-1).clone().view(dtype).view(len(words), k + 1)
        p, rest = numbers[:, :k].contiguous(), numbers[:, k].contiguous()
        return Rows(words[:, :k].contiguous(), p, rest, self.shards.samples, self.rows.excluded)

    def _brought_home(self, found: Nearest) -> Nearest:
        """Every query's results from all ranks, merged on the query's rank."""
        world = self.shards.world
        if world > 1:
            b = len(found.logits) // world
            everything = [self._exchanged(x) for x in vars(found).values() if isinstance(x, Tensor)]
            samples, logits, at_stored, peaks, sums = everything
            arrived = Nearest(samples, logits, at_stored, peaks, sums, found.n)  # b rows of every rank
            while world > 1:  # the first half of the ranks left takes in what the others have found
                taking = world // 2 * b
                part, others = arrived.slice(0, taking), arrived.slice(world * b - taking, world * b)
                part.merge(others.samples, others.logits)
                arrived.samples[:taking], arrived.logits[:taking] = part.samples, part.logits
                world -= world // 2
            at_stored, peaks, sums = (x.view(self.shards.world, b, -1) for x in (at_stored, peaks, sums))
            found = Nearest(
                arrived.samples[:b], arrived.logits[:b], at_stored.amax(0), peaks.amax(0), sums.sum(0), found.n
            )
        found.sort()
        return found

    def _exchanged(self, x: Tensor) -> Tensor:
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x.contiguous(), group=self._group)
        return received

    def _routes(self, batch: Tensor) -> _Routes:
        """Who holds which rows of a batch; kept until another one is asked for."""
        if self._routed is not None and self._routed[0] is batch:
            return self._routed[1]
        world = self.shards.world
        owners, b = self.shards.owners(batch), len(batch) // world
        sent = (owners.view(world, b) == self._rank).sum(1).tolist()
        mine = owners[self._rank * b : (self._rank + 1) * b]
        received = torch.bincount(mine, minlength=world).tolist()
        leaving = upload(batch[owners == self._rank] - self.first, self._device)
        routes = _Routes(sent, received, leaving, upload(mine.argsort(stable=True), self._wire()))
        self._routed = batch, routes
        return routes

    def _put(self, places: Tensor, words: Tensor) -> None:
        rows = self.unpack(words.to(self._device))
        self.rows.columns[places] = rows.columns
        self.rows.probabilities[places] = rows.probabilities
        self.rows.rest[places] = rows.rest

    def _wire(self) -> torch.device:
        """The device for messages: NCCL moves tensors on the GPU, gloo those on the CPU."""
        if self.shards.world == 1:
            return self._computes
        nccl = dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _all_to_all(self, incoming: Tensor, outgoing: Tensor, received: list[int], sent: list[int]) -> dist.Work | None:
        if self.shards.world == 1:
            return None
        return dist.all_to_all_single(incoming, outgoing, received, sent, group=self._group, async_op=True)
