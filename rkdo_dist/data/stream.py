"""The reader: verified shards, in the order of `order`, as micro-batches.

A lane keeps one shard open and fetches its samples by position, so that a seek reads nothing that is not
used. A step is cut into items of whole lanes: one for each loader worker, or one for each lane where there are more
workers than lanes. The workers take items in turn, so any number of them read ahead, and the main process puts a step
together from its items. What is delivered depends on the plan alone.

Workers are started by a fork server, never forked from this process: a fork would copy the locks and
sockets of gloo and NCCL threads, hold a dead rank's connections open, and may hang in OpenMP.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rkdo_dist.data.errors import Unreachable
from rkdo_dist.data.index import DataError, ShardIndex, Split
from rkdo_dist.data.order import EpochPlan, chosen_blocks, evaluation_blocks, worker_lanes
from rkdo_dist.data.partners import Partners
from rkdo_dist.data.samples import Cursor, Lookup, MicroBatch, Packed, Reading, Sample, pack

_AHEAD = 2  # items that each worker reads ahead; they are two steps or more
_BLOCKS = 4  # of an evaluation from which a worker is worth its start


@dataclass(frozen=True)
class Batch:
    """This rank's part of a step: its lanes in order. `step` counts from 0 inside `epoch`."""

    epoch: int
    step: int
    lanes: list[MicroBatch]


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker to the main process: its text alone, no traceback."""

    message: str
    unreachable: bool


class _Items(IterableDataset):
    """Items of one worker: its part of each step or block, or `_Failure` as the last."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self.items(worker, workers)
        except (DataError, OSError) as error:
            yield _Failure(str(error), not isinstance(error, DataError) or isinstance(error, Unreachable))

    def items(self, worker: int, workers: int) -> Iterator[Packed]:
        raise NotImplementedError


@dataclass(frozen=True)
class _Run:
    """Which steps are read: from `step` of `epoch` to the end of epoch `last - 1`, `limit` steps in each."""

    seed: int
    all_lanes: int
    micro_batch: int
    window: int
    epoch: int
    step: int
    last: int
    limit: int | None

    def plan(self, split: Split, epoch: int) -> tuple[EpochPlan, int]:
        """The plan of an epoch and the number of its steps that are used."""
        plan = EpochPlan(split.counts, self.seed, epoch, self.all_lanes, self.micro_batch, self.window)
        return plan, plan.steps if self.limit is None else min(plan.steps, self.limit)


class _TrainingItems(_Items):
    def __init__(self, reading: Reading, run: _Run, lanes: range, partners: Partners | None) -> None:
        self.reading, self.run, self.lanes, self.partners = reading, run, lanes, partners

    def parts(self, workers: int) -> list[range]:
        """The lanes of each item of a step."""
        count = min(max(1, workers), len(self.lanes))
        return [worker_lanes(self.lanes, part, count) for part in range(count)]

    def items(self, worker: int, workers: int) -> Iterator[Packed]:
        lookup = None if self.partners is None else Lookup(self.reading)
        turns = itertools.cycle(range(workers))
        for epoch in range(self.run.epoch, self.run.last):
            partners = None if self.partners is None else self.partners.of(epoch)
            if self.partners is not None and partners is None:
                return  # the stream has ended
            plan, stop = self.run.plan(self.reading.split, epoch)
            start = self.run.step if epoch == self.run.epoch else 0
            cursors: dict[int, Cursor] = {}
            try:
                for step in range(start, stop):
                    for lanes in self.parts(workers):
                        if next(turns) == worker:
                            yield pack(self._samples(plan, step, lanes, cursors, lookup, partners))
            finally:
                for cursor in cursors.values():
                    cursor.close()
                if lookup is not None:
                    lookup.close()

    def _samples(
        self,
        plan: EpochPlan,
        step: int,
        lanes: range,
        cursors: dict[int, Cursor],
        lookup: Lookup | None,
        partners: np.ndarray | None,
    ) -> list[Sample]:
        """A step's samples of some lanes, each lane's partners after it; `cursors` by lane stay where they are."""
        found: list[Sample] = []
        for lane in lanes:
            if lane not in cursors:
                cursors[lane] = Cursor(self.reading, plan.seed, plan.epoch)
            first = list(itertools.islice(cursors[lane].samples(plan.windows(lane, step, steps=1)), plan.micro_batch))
            found += first
            if lookup is not None and partners is not None:
                found += [lookup.partner(sample, int(partners[sample.id])) for sample in first]
        return found


class _EvaluationItems(_Items):
    def __init__(
        self, reading: Reading, batch_size: int, rank: int, world: int, limit: int | None, spread: int | None
    ) -> None:
        self.reading = reading
        self.blocks = (batch_size, rank, world, limit, spread)

    def items(self, worker: int, workers: int) -> Iterator[Packed]:
        cursor = Cursor(self.reading)
        blocks = evaluation_blocks(self.reading.split.counts, *self.blocks)
        try:
            for k, (_, windows) in enumerate(blocks):
                if k % workers == worker:
                    yield pack(list(cursor.samples(windows)))
        finally:
            cursor.close()


def _settle(worker: int) -> None:
    """Silence a worker, and end it with its rank.

    Signals that a terminal or scheduler sends to the whole process group are for the rank, which ends its
    workers. When it does so in the middle of a hand-over, the thread that serves it would print a broken
    connection. A rank that is killed tells nobody: torch's worker watches its parent, which is the server that has
    forked it, and the server stays for as long as it has workers.
    """
    rank = multiprocessing.parent_process()
    if rank is not None:
        threading.Thread(target=_end_with, args=(rank.sentinel,), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _report_unless_disconnected


def _end_with(sentinel: int) -> None:
    """End this process as soon as the one that asked for it has gone."""
    connection.wait([sentinel])
    os._exit(1)


def _report_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _as_it_is(item: Any) -> Any:
    return item


def start_worker_server() -> None:
    """Start the process that loader workers come from, so that it loads its libraries while this one does
    other work.

    Calling it is never needed: the first stream with workers does it too, and waits for it.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    forkserver.ensure_running()


def _loaded(items: _Items, workers: int, pin: bool) -> Generator[Packed, None, None]:
    """Iterate over `items`, in workers if there are any; their errors are raised here, without worker
    tracebacks."""
    if workers:
        start_worker_server()
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_settle if workers else None,
        pin_memory=pin,
        generator=torch.Generator(),  # or the loader would draw from the global generator, and shift every later draw
    )
    iterator: Iterator[Any] = iter(())
    try:
        iterator = iter(loader)  # starts the workers
        for item in iterator:
            if isinstance(item, _Failure):
                raise (Unreachable if item.unreachable else DataError)(item.message)
            yield item
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A worker (or the server that starts them) that is killed in a hand-over shows as a broken connection.
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise DataError(f"a loader worker ended unexpectedly ({error or type(error).__name__})") from None
    finally:
        del iterator  # ends the workers


def lane_stream(
    index: ShardIndex,
    split: str,
    *,
    seed: int,
    all_lanes: int,
    micro_batch: int,
    lanes: range | None = None,
    epoch: int = 0,
    start_step: int = 0,
    epochs: int = 1,
    steps_per_epoch: int | None = None,
    window: int = 2048,
    size: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    on_corrupt: str = "abort",
    partners: Partners | None = None,
) -> Generator[Batch, None, None]:
    """The micro-batches of this rank's lanes, step after step.

    The same samples in the same order whatever `lanes` the other ranks have, and whatever `workers` is.
    Close the generator (or leave it to be collected) to end the workers.

    Args:
        index, split: what to read.
        seed, all_lanes, micro_batch, window: of the plan, see `order.EpochPlan` (`all_lanes` is L, over
            all ranks).
        lanes: this rank's, see `order.rank_lanes`; None: all.
        epoch, start_step: where to begin; nothing before is read.
        epochs: how many epochs to go through, the first included; workers stay and read ahead across their
            borders.
        steps_per_epoch: stop each epoch after so many steps; None: all of them.
        size: side of the delivered images; None: as they are (they must agree then).
        workers: loader processes (0: read in this one).
        pin_memory: deliver page-locked tensors.
        on_corrupt: "abort" raises `DataError` at the first sample that cannot be trusted or decoded;
            "skip" puts other samples in its place, chosen from (seed, epoch, shard, position) alone, and
            counts them in `skipped`.
        partners: samples whose views are the second ones; those of an epoch must be set before its first batch is
            asked for. A damaged one is replaced by the sample itself, if `on_corrupt` is "skip".

    Raises:
        DataError: at once if there is no such split or it is smaller than one global batch; later for
            damaged shards or samples (named), or a worker that was killed.
        ValueError: for an argument out of its range.
    """
    reading = Reading(index, index.split(split), size, on_corrupt)
    run = _Run(seed, all_lanes, micro_batch, window, epoch, start_step, epoch + epochs, steps_per_epoch)
    plan, steps = run.plan(reading.split, epoch)
    if plan.steps == 0:
        raise DataError(
            f"split {split!r} of {index.place} has {plan.samples} samples, fewer than one global batch of "
            f"{all_lanes * micro_batch}: use a smaller train.global_batch or more data"
        )
    if not 0 <= start_step <= steps:
        raise ValueError(f"start_step {start_step} is not inside an epoch of {steps} steps")
    lanes = range(all_lanes) if lanes is None else lanes
    if workers < 0 or not lanes or lanes[0] < 0 or lanes[-1] >= all_lanes:
        raise ValueError(f"cannot read lanes {lanes} of {all_lanes} with {workers} workers")
    return _batches(_TrainingItems(reading, run, lanes, partners), workers, pin_memory)


def _batches(items: _TrainingItems, workers: int, pin: bool) -> Generator[Batch, None, None]:
    run, shares = items.run, [len(lanes) for lanes in items.parts(workers)]
    flow, paired = _loaded(items, workers, pin), items.partners is not None
    try:
        for epoch in range(run.epoch, run.last):
            for step in range(run.step if epoch == run.epoch else 0, run.plan(items.reading.split, epoch)[1]):
                yield Batch(epoch, step, [micro for share in shares for micro in next(flow).split(share, paired)])
    finally:
        if items.partners is not None:
            items.partners.end()
        flow.close()


def evaluation_stream(
    index: ShardIndex,
    split: str,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    limit: int | None = None,
    *,
    spread: int | None = None,
    size: int | None = None,
    workers: int = 0,
) -> Generator[tuple[int, MicroBatch], None, None]:
    """This rank's blocks of a split in index order: block k holds samples [k batch_size, (k+1) batch_size).

    Block k goes to rank k % world, so that every sample is delivered exactly once for any number of ranks,
    in blocks that do not depend on it.

    Args:
        index, split, size: as in `lane_stream`.
        workers: loader processes at most; one for every few blocks.
        batch_size: samples in a block; the last may be smaller.
        limit: only the first `limit` samples; None: all.
        spread: only so many blocks, evenly spaced, see `order.evaluation_blocks`.

    Yields:
        (block number, micro-batch), block numbers rising.

    Raises:
        DataError, ValueError: as `lane_stream`.
    """
    reading = Reading(index, index.split(split), size)
    if batch_size < 1 or workers < 0 or not 0 <= rank < world or (limit is not None and limit < 0):
        raise ValueError(
            f"cannot read blocks of {batch_size} on rank {rank} of {world} with {workers} workers, limit {limit}"
        )
    samples = reading.split.samples if limit is None else min(reading.split.samples, limit)
    blocks = len(chosen_blocks(-(-samples // batch_size), spread))
    workers = min(workers, len(range(rank, blocks, world)) // _BLOCKS)
    return _blocks(_EvaluationItems(reading, batch_size, rank, world, limit, spread), workers)


def _blocks(items: _EvaluationItems, workers: int) -> Generator[tuple[int, MicroBatch], None, None]:
    flow = _loaded(items, workers, False)
    try:
        for number, _ in evaluation_blocks(items.reading.split.counts, *items.blocks):
            yield number, next(iter(next(flow).split(1)))
    finally:
        flow.close()
