"""Order of the samples: pure arithmetic, without input or output, ranks or state.

An epoch is planned from (seed, epoch, samples per shard, lanes, micro-batch) alone:

1. The shards are put in an order drawn from (seed, epoch) and read as one long sequence of samples. The
   sequence is a ring that starts at a drawn place inside its first shard, so that every sample is dropped
   about equally often.
2. The first `steps * lanes * micro_batch` samples are cut into `lanes` equal lanes; the remainder of less
   than one global batch is dropped.
3. Where a lane crosses into another shard a new segment begins; a segment is cut into equal windows of at
   most `window` samples, and each window is permuted by a draw from (seed, lane, epoch, place). Windows
   never cross shards, so a reader needs one open shard per lane and opens each shard once, plus at most
   once per lane.
4. Lane l delivers the l-th micro-batch of every step.

Nothing here depends on the number of ranks or loader workers: they only decide who reads which lanes.

All draws are SplitMix64 (Steele, Lea, Flood 2014) written out below: Python's and NumPy's generators do
not promise the same permutations in every version, and an order must survive an upgrade in the middle of a
run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

_MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment: consecutive states of a stream differ by it
Words = TypeVar("Words", int, np.ndarray)
_ENTRIES = 1 << 22  # draws that are sorted at once
_STREAM_SHARDS, _STREAM_START, _STREAM_WINDOW, _STREAM_SUBSTITUTE, _STREAM_PARTNER = 1, 2, 3, 4, 5


def finalised(state: Words) -> Words:
    """SplitMix64's output for its states: integers in [0, 2**64), or an array of uint64."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def hash64(*words: int) -> int:
    """A 64-bit hash of integers: SplitMix64's finaliser folded over `words` (taken modulo 2**64)."""
    state = 0
    for word in words:
        state = finalised((state + GOLDEN + (word & _MASK)) & _MASK)
    return state


def permutation(size: int, key: int) -> np.ndarray:
    """A permutation of `range(size)` as int64, drawn from `key`: the ranks of `size` SplitMix64 outputs."""
    states = np.uint64(key & _MASK) + np.uint64(GOLDEN) * np.arange(1, size + 1, dtype=np.uint64)
    return np.argsort(finalised(states), kind="stable")


@dataclass(frozen=True)
class Window:
    """Samples `start..stop` of one shard, delivered in the order `start + permutation(stop - start, key)`.

    Attributes:
        shard: number of the shard in the index.
        start, stop: positions inside the shard, start < stop.
        key: what the order inside the window is drawn from; None keeps the order of the shard.
        skip: how many samples of that order are already delivered (not 0 only in the first window after a
            seek).
    """

    shard: int
    start: int
    stop: int
    key: int | None = None
    skip: int = 0

    def positions(self) -> np.ndarray:
        """The positions inside the shard still to be delivered, in order (int64)."""
        if self.key is None:
            return np.arange(self.start + self.skip, self.stop)
        return self.start + permutation(self.stop - self.start, self.key)[self.skip :]


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch.

    Args:
        counts: samples in each shard, in index order (>= 0).
        seed, epoch: any integers.
        lanes: micro-batches in a global batch (L >= 1).
        micro_batch: samples in a micro-batch (m >= 1).
        window: most samples that are mixed with each other (>= 1).

    Attributes:
        samples: N, all samples of the index.
        steps: global batches in the epoch, N // (L * m); it may be 0.

    Raises:
        ValueError: for a value out of its range.
    """

    counts: tuple[int, ...]
    seed: int
    epoch: int
    lanes: int
    micro_batch: int
    window: int = 2048
    samples: int = field(init=False)
    steps: int = field(init=False)
    _bases: np.ndarray = field(init=False, repr=False, compare=False)  # id of each shard's first sample
    _pieces: np.ndarray = field(init=False, repr=False, compare=False)  # rows: shard, first position inside it
    _ends: np.ndarray = field(init=False, repr=False, compare=False)  # place in the sequence where each piece ends

    def __post_init__(self) -> None:
        for name in ("lanes", "micro_batch", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        counts = np.asarray(self.counts, dtype=np.int64).reshape(-1)
        if (counts < 0).any():
            raise ValueError(f"a shard cannot hold {counts.min()} samples")
        total = int(counts.sum())
        order = permutation(len(counts), hash64(_STREAM_SHARDS, self.seed, self.epoch))
        order = order[counts[order] > 0]
        lengths, begins = counts[order], np.zeros_like(order)
        if total:
            # The ring begins inside the first shard and ends with the samples before that place.
            turn = hash64(_STREAM_START, self.seed, self.epoch) % int(lengths[0])
            order, begins = np.append(order, order[0]), np.append(begins, 0)
            lengths = np.append(lengths, turn)
            begins[0], lengths[0] = turn, lengths[0] - turn
        values = {
            "counts": tuple(int(c) for c in counts),
            "samples": total,
            "steps": total // (self.lanes * self.micro_batch),
            "_bases": np.cumsum(counts) - counts,
            "_pieces": np.stack([order, begins], axis=1),
            "_ends": np.cumsum(lengths),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def windows(self, lane: int, start_step: int = 0, steps: int | None = None) -> Iterator[Window]:
        """The windows of a lane from the beginning of step `start_step` on, in reading order.

        Seeking costs one binary search in the sequence of shards, whatever the step.

        Args:
            lane: 0 <= lane < lanes.
            start_step: 0 <= start_step <= self.steps; the first window's `skip` leaves out what comes before.
            steps: how many steps' samples are needed (the last window may reach further); None: to the end.

        Raises:
            ValueError: if lane or start_step is out of range.
        """
        if not 0 <= lane < self.lanes:
            raise ValueError(f"lane {lane} is not one of the {self.lanes} lanes")
        if not 0 <= start_step <= self.steps:
            raise ValueError(f"step {start_step} is not inside an epoch of {self.steps} steps")
        length = self.steps * self.micro_batch
        first, last = lane * length, (lane + 1) * length
        place = first + start_step * self.micro_batch
        until = last if steps is None else min(last, place + steps * self.micro_batch)
        piece = int(np.searchsorted(self._ends, place, side="right"))
        while place < until:
            piece_start = int(self._ends[piece - 1]) if piece else 0
            low, high = max(first, piece_start), min(last, int(self._ends[piece]))
            shard, offset = (int(v) for v in self._pieces[piece])
            for a, b in _cut(low, high, self.window):
                if b <= place:
                    continue
                if a >= until:
                    return
                inside = offset + a - piece_start
                key = hash64(_STREAM_WINDOW, self.seed, self.epoch, lane, a)
                yield Window(shard, inside, inside + b - a, key, skip=max(0, place - a))
            place = max(place, high)
            piece += 1

    def micro_batch_ids(self, step: int, lane: int) -> np.ndarray:
        """The samples of one micro-batch in order: int64 of shape (m,), global positions in the index.

        Raises:
            ValueError: if step or lane is out of range.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is not inside an epoch of {self.steps} steps")
        parts = [self._bases[w.shard] + w.positions() for w in self.windows(lane, step, steps=1)]
        return np.concatenate(parts)[: self.micro_batch]


class GlobalBatches:
    """Samples of whole global batches, by vector arithmetic over the lanes.

    The order of each lane's window is kept until the lane has left it, so that batches asked for one after another cost
    one draw of each window: min(N, L * window) numbers of four bytes.
    """

    def __init__(self, plan: EpochPlan) -> None:
        self._plan = plan
        self._first = np.arange(plan.lanes) * (plan.steps * plan.micro_batch)  # place of each lane's first sample
        # of each lane's window: its places in the sequence, what to add to its order to get samples, the order
        self._low, self._high, self._base = (np.zeros(plan.lanes, dtype=np.int64) for _ in range(3))
        self._order = np.zeros((plan.lanes, 0), dtype=np.int32)

    def ids(self, step: int) -> np.ndarray:
        """The samples of the global batch of a step in order: int64 of shape (L * m,).

        Raises:
            ValueError: if the step is out of range.
        """
        plan = self._plan
        if not 0 <= step < plan.steps:
            raise ValueError(f"step {step} is not inside an epoch of {plan.steps} steps")
        places = (self._first + step * plan.micro_batch)[:, None] + np.arange(plan.micro_batch)
        ids, done = np.empty_like(places), np.zeros(places.shape, dtype=bool)
        while not done.all():
            here = (places >= self._low[:, None]) & (places < self._high[:, None])
            lanes, columns = np.nonzero(here)
            ids[here] = self._base[lanes] + self._order[lanes, places[lanes, columns] - self._low[lanes]]
            done |= here
            lanes = np.flatnonzero(~done.all(axis=1))
            if len(lanes):
                self._draw(lanes, places[lanes, done[lanes].argmin(axis=1)])
        return ids.reshape(-1)

    def _draw(self, lanes: np.ndarray, places: np.ndarray) -> None:
        """Put the windows that hold `places` of `lanes` in the place of the lanes' present ones (see `windows`)."""
        plan, length = self._plan, self._plan.steps * self._plan.micro_batch
        pieces = np.searchsorted(plan._ends, places, side="right")
        starts = np.where(pieces > 0, plan._ends[pieces - 1], 0)
        begin = np.maximum(self._first[lanes], starts)
        size = np.minimum(self._first[lanes] + length, plan._ends[pieces]) - begin  # of the segment
        count = -(-size // plan.window)
        k = ((places - begin + 1) * count - 1) // size  # the window of a segment that holds the place
        low, high = begin + size * k // count, begin + size * (k + 1) // count
        self._low[lanes], self._high[lanes] = low, high
        shards, offsets = plan._pieces[pieces].T
        self._base[lanes] = plan._bases[shards] + offsets + low - starts
        state = hash64(_STREAM_WINDOW, plan.seed, plan.epoch)
        keys = _folded(_folded(np.full(len(lanes), state, dtype=np.uint64), lanes), low)
        longest = int((high - low).max())
        if longest > self._order.shape[1]:
            self._order = np.pad(self._order, ((0, 0), (0, longest - self._order.shape[1])))
        rows = max(1, _ENTRIES // longest)
        steps = np.uint64(GOLDEN) * np.arange(1, longest + 1, dtype=np.uint64)
        for some in (slice(start, start + rows) for start in range(0, len(lanes), rows)):
            draws = finalised(keys[some, None] + steps)
            draws[np.arange(longest) >= (high - low)[some, None]] = _MASK  # after the window's own, the sort is stable
            self._order[lanes[some], :longest] = np.argsort(draws, axis=1, kind="stable")


def _folded(states: np.ndarray, words: np.ndarray) -> np.ndarray:
    """`hash64` of one more word, for many states."""
    return finalised(states + np.uint64(GOLDEN) + words.astype(np.uint64))


def _cut(low: int, high: int, window: int) -> Iterator[tuple[int, int]]:
    """Cut [low, high) into the fewest pieces of at most `window`, of sizes that differ by at most one."""
    pieces = -(-(high - low) // window)
    for k in range(pieces):
        yield low + (high - low) * k // pieces, low + (high - low) * (k + 1) // pieces


def rank_lanes(lanes: int, rank: int, world: int) -> range:
    """The lanes of one rank: [rank L/W, (rank+1) L/W).

    Raises:
        ValueError: if the world size does not divide the lanes, or the rank is not one of its ranks.
    """
    if world < 1 or lanes % world:
        raise ValueError(f"{world} ranks cannot share {lanes} lanes: the number of ranks must divide the lanes")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} ranks")
    return range(rank * lanes // world, (rank + 1) * lanes // world)


def worker_lanes(lanes: range, worker: int, workers: int) -> range:
    """The contiguous share of a rank's `lanes` that loader worker `worker` of `workers` owns (sizes within
    one)."""
    return lanes[len(lanes) * worker // workers : len(lanes) * (worker + 1) // workers]


def run_length(samples: int) -> int:
    """Samples in a shard whose size nobody chose: an eighth of the split, but 50 to 2000."""
    return max(50, min(2000, -(-samples // 8)))


def substitutes(count: int, broken: int, seed: int, epoch: int) -> Iterator[int]:
    """Other shards to take samples from when shard `broken` of `count` is unusable, in an order drawn from
    its number.

    A function of its arguments alone, so every rank and worker that meets the broken shard chooses alike.
    """
    for shard in permutation(count, hash64(_STREAM_SUBSTITUTE, seed, epoch, broken)):
        if shard != broken:
            yield int(shard)


def partner_draws(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each sample, which selects its partner in an epoch (see `partners`).

    Args:
        ids: int64 (r,), samples of the split.

    Returns:
        float64 (r,), multiples of 2**-53.
    """
    states = np.uint64(hash64(_STREAM_PARTNER, seed, epoch)) + np.uint64(GOLDEN) * ids.astype(np.uint64)
    return (finalised(states) >> np.uint64(11)) * 2.0**-53


def chosen_blocks(blocks: int, spread: int | None) -> Sequence[int]:
    """All of so many blocks, or where there are more than `spread` so many of them, evenly spaced."""
    return range(blocks) if spread is None or blocks <= spread else [k * blocks // spread for k in range(spread)]


def evaluation_blocks(
    counts: Sequence[int],
    batch_size: int,
    rank: int,
    world: int,
    limit: int | None = None,
    spread: int | None = None,
) -> Iterator[tuple[int, list[Window]]]:
    """Blocks of `batch_size` samples in index order; block k belongs to rank k % world. Every sample is in
    one block, unless some blocks alone are asked for.

    Args:
        counts: samples in each shard.
        batch_size: samples in a block (>= 1); the last block may be smaller.
        limit: only the first `limit` samples of the index; None: all.
        spread: where there are more blocks, only so many whole ones, evenly spaced and numbered anew.

    Yields:
        (block number, the windows it is made of), for this rank's blocks.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    ends = np.cumsum(np.asarray(counts, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    total = total if limit is None else min(total, limit)
    blocks = -(-total // batch_size)
    chosen = chosen_blocks(blocks, spread)
    for number in range(rank, len(chosen), world):
        block = chosen[number]
        place, stop = block * batch_size, min(total, (block + 1) * batch_size)
        windows = []
        while place < stop:
            shard = int(np.searchsorted(ends, place, side="right"))
            begin = int(ends[shard]) - int(counts[shard])
            until = min(stop, int(ends[shard]))
            windows.append(Window(shard, place - begin, until - begin))
            place = until
        yield number, windows
