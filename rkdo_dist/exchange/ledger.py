"""What this rank's collectives carry: counted always (a few additions per collective), timed when asked.

Every collective of the package runs inside `carrying`, which notes its operation, its payload and what it is for
(`purpose`). A payload is an exact number of bytes, whatever algorithm the backend chooses:

| operation | payload | bytes that a rank sends, in the bandwidth-optimal algorithms |
|---|---|---|
| `all_gather` | its own share | (W - 1) payload |
| `reduce_scatter`, `all_to_all` | all it brings: W shares | (W - 1) / W payload |
| `all_reduce` | the tensor | 2 (W - 1) / W payload (reduce-scatter and all-gather) |
| `broadcast` | the tensor | (W - 1) / W payload, mean over ranks |
| `gather` | its own share | (W - 1) / W payload, mean over ranks |
| `send` | the tensor | payload |
| `objects` | not known: torch pickles them; only calls are counted | - |

(Chan et al. 2007, "Collective communication: theory, practice, and experience".) `measure.wire` predicts the payloads
of a step; tests require prediction and ledger to be equal. What DDP and DeepSpeed send does not pass through here by
itself: DDP's is noted by a communication hook while it is measured.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor

OPERATIONS = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce", "broadcast", "gather", "send", "objects")
# What collectives are for. SMALL is all that names no purpose: flags, digests, checks, the loss and its parts.
COLUMNS, COLUMN_GRADIENTS = "columns", "column gradients"
GRADIENTS, STATISTICS, SYNC_NORM = "parameter gradients", "batch statistics", "synchronised batch norm"
SMALL = "reports and checks"
Entry = tuple[str, str]  # (purpose, operation)


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

    def copy(self) -> Ledger:
        """As it is now."""
        return Ledger(Counter(self.payload), Counter(self.calls))

    def since(self, before: Ledger) -> Ledger:
        """What has been added to `before`; entries without calls are left out."""
        calls = Counter({e: n - before.calls[e] for e, n in self.calls.items() if n != before.calls[e]})
        return Ledger(Counter({e: self.payload[e] - before.payload[e] for e in calls}), calls)

    def sent(self, world: int) -> dict[Entry, float]:
        """Bytes that a rank sends, by entry (the mean over ranks for `gather`)."""
        return {entry: sent_bytes(entry[1], payload, world) for entry, payload in self.payload.items()}


def sent_bytes(operation: str, payload: int, world: int) -> float:
    """Bytes that a rank sends for a payload on `world` ranks, by the table of this module."""
    if operation == "all_gather":
        return float((world - 1) * payload)
    if operation in ("reduce_scatter", "all_to_all", "broadcast", "gather"):
        return (world - 1) * payload / world
    if operation == "all_reduce":
        return 2 * (world - 1) * payload / world
    return float(payload if world > 1 else 0)


def rounds(operation: str, world: int) -> int:
    """Messages that a rank sends one after another in a collective: what latency multiplies."""
    if operation == "send":
        return 1 if world > 1 else 0
    return (2 if operation == "all_reduce" else 1) * (world - 1)


_book = Ledger()
_purposes = [SMALL]
_clock: Callable[[], AbstractContextManager[None]] | None = None


def book() -> Ledger:
    """A copy of this process's ledger."""
    return _book.copy()


@contextlib.contextmanager
def purpose(name: str) -> Iterator[None]:
    """What the collectives inside are for."""
    _purposes.append(name)
    try:
        yield
    finally:
        _purposes.pop()


def carrying(operation: str, payload: int) -> AbstractContextManager[None]:
    """Note one collective, which the caller makes inside the context.

    Args:
        operation: one of `OPERATIONS`.
        payload: bytes, as the table of this module defines them for the operation.
    """
    assert operation in OPERATIONS, operation
    _book.note((_purposes[-1], operation), payload)
    return _clock() if _clock is not None else contextlib.nullcontext()


def waiting() -> AbstractContextManager[None]:
    """The time in the context is spent waiting for transfers that have been noted already."""
    return _clock() if _clock is not None else contextlib.nullcontext()


def note(name: str, operation: str, payload: int) -> None:
    """Note a collective that somebody else makes (DDP) for the purpose `name`."""
    _book.note((name, operation), payload)


@contextlib.contextmanager
def timed_by(clock: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """While open, every collective of this process runs inside a `clock()` of its own."""
    global _clock
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
