"""Ledger of this rank's collectives, counted and timed while `counting` is open; nothing of it runs in training.

While open, the functions of torch.distributed that the package calls are replaced by ones that note operation, payload
and purpose. What a collective is for is said by the function that makes it (`_PURPOSES`). A payload is an exact number
of bytes, whatever algorithm the backend chooses:

| operation | payload | bytes that a rank sends, in the bandwidth-optimal algorithms |
|---|---|---|
| `all_gather` | its own share | (W - 1) payload |
| `reduce_scatter`, `all_to_all` | all it brings: W shares | (W - 1) / W payload |
| `all_reduce` | the tensor | 2 (W - 1) / W payload (reduce-scatter and all-gather) |
| `gather` | its own share | (W - 1) / W payload, mean over ranks |
| `broadcast` | the tensor | (W - 1) / W payload, mean over ranks |
| `send` | the tensor | payload |
| `objects` | not known: torch pickles them; only calls are counted | - |

(Chan et al. 2007, "Collective communication: theory, practice, and experience".) `measure.wire` predicts the payloads
of a step; tests require prediction and ledger to be equal. What DDP and DeepSpeed send does not pass through here by
itself: DDP's is noted by a communication hook while it is measured.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from rkdo_dist.exchange import columns, group, store
from rkdo_dist.training.averaged import Averaged
from rkdo_dist.training.exact import Exact

# What collectives are for. SMALL is all that the table below does not name: flags, digests, checks, the loss's parts.
COLUMNS, COLUMN_GRADIENTS = "columns", "column gradients"
GRADIENTS, STATISTICS = "parameter gradients", "batch statistics"
ROWS, BANK = "rows of the field", "queries to the bank"
SMALL = "reports and checks"
Entry = tuple[str, str]  # (purpose, operation)
Clock = Callable[[], AbstractContextManager[None]]


@dataclass
class Ledger:
    """Collectives by (purpose, operation).

    Attributes:
        payload: bytes, as the table above defines them.
        calls: how many collectives.
    """

    payload: Counter[Entry] = field(default_factory=Counter)
    calls: Counter[Entry] = field(default_factory=Counter)

    def note(self, entry: Entry, payload: int, calls: int = 1) -> None:
        """Add collectives of one kind."""
        self.payload[entry] += payload
        self.calls[entry] += calls

    def take(self) -> Ledger:
        """The entries since the last call."""
        taken = Ledger(self.payload, self.calls)
        self.payload, self.calls = Counter(), Counter()
        return taken


def sent_bytes(operation: str, payload: int, world: int) -> float:
    """Bytes that a rank sends for a payload on `world` ranks, by the table of this module."""
    if operation == "all_gather":
        return float((world - 1) * payload)
    if operation in ("reduce_scatter", "all_to_all", "gather", "broadcast"):
        return (world - 1) * payload / world
    if operation == "all_reduce":
        return 2 * (world - 1) * payload / world
    return float(payload if world > 1 else 0)


@contextlib.contextmanager
def counting(clock: Clock = nullcontext) -> Iterator[Ledger]:
    """While open, every collective that the package makes is noted in the ledger given, and runs inside a `clock()`.

    Waiting for one that was started before is inside a `clock()` too.
    """
    book = Ledger()
    before = [(owner, name, getattr(owner, name)) for owner, name, *_ in _COLLECTIVES]
    for owner, name, operation, payload in _COLLECTIVES:
        setattr(owner, name, _noted(getattr(owner, name), operation, payload, book, clock))
    try:
        yield book
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


# Where the package finds each collective, what it counts as, and its payload by its arguments.
_COLLECTIVES: tuple[tuple[Any, str, str, Callable[..., int]], ...] = (
    (group, "all_gather_single", "all_gather", lambda out, own, **_: size(own)),
    (group, "reduce_scatter_single", "reduce_scatter", lambda out, own, **_: size(own)),
    (dist, "all_to_all_single", "all_to_all", lambda out, own, *_, **__: size(own)),
    (dist, "all_reduce", "all_reduce", lambda tensor, **_: size(tensor)),
    (dist, "gather", "gather", lambda tensor, *_, **__: size(tensor)),
    (dist, "broadcast", "broadcast", lambda tensor, *_, **__: size(tensor)),
    (dist, "barrier", "all_reduce", lambda *_, **__: 0),
    (dist, "all_gather_object", "objects", lambda *_, **__: 0),
    (dist, "batch_isend_irecv", "send", lambda both: sum(size(p.tensor) for p in both if p.op is dist.isend)),
)
# The innermost of these functions on the stack says what a collective is for.
_PURPOSES: dict[CodeType, str] = {
    function.__code__: purpose
    for purpose, functions in {
        COLUMNS: (columns.GatheredColumns.gather, columns.RingColumns.walk),
        COLUMN_GRADIENTS: (columns.GatheredColumns.send_home, columns.RingColumns.walk_home),
        GRADIENTS: (Exact._sum_gradients,),
        STATISTICS: (Exact._sum_statistics, Averaged._sum_statistics),
        ROWS: (store.RowStore.fetch, store.RowStore.write),
        BANK: (store.RowStore.search,),
    }.items()
    for function in functions
}


def _noted(
    function: Callable[..., Any], operation: str, payload: Callable[..., int], book: Ledger, clock: Clock
) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        purpose = _purpose()
        if purpose is None:
            return function(*arguments, **options)
        book.note((purpose, operation), payload(*arguments, **options))
        with clock():
            found = function(*arguments, **options)
        if isinstance(found, list):
            return [_TimedWork(work, clock) for work in found]
        return found if found is None else _TimedWork(found, clock)

    return call


def _purpose() -> str | None:
    """Purpose of the collective being called; None if it is not the package that calls it."""
    frame = sys._getframe(2)
    if not frame.f_globals.get("__name__", "").startswith("rkdo_dist."):
        return None
    caller: Any = frame
    while caller is not None:
        if caller.f_code in _PURPOSES:
            return _PURPOSES[caller.f_code]
        caller = caller.f_back
    return SMALL


class _TimedWork:
    """A pending collective, whose `wait` is timed."""

    def __init__(self, work: dist.Work, clock: Clock) -> None:
        self._work, self._clock = work, clock

    def wait(self) -> None:
        """Wait for it."""
        with self._clock():
            self._work.wait()
