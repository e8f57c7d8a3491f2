"""Rank facts, agreement between ranks, reductions in a fixed order, and the one rule for the scale of gradients.

The gradient-scale rule of the project: *each rank's loss is the mean over its own rows; gradients of columns are
summed on the rank that owns them; parameter gradients are averaged over ranks.* The result is the gradient of the
mean over all rows of the global batch. Every other combination that "also trains" is wrong by a factor or a
direction (see tests/test_columns.py for the controls).

Floating-point addition is not associative, so a sum that must not depend on the number of ranks needs a fixed order.
`tree_sum` is that order: a balanced binary tree over lanes. A rank's lanes are a subtree, and the ranks' sums are the
upper levels of the same tree, so world sizes that are powers of two give the same bits.

What ranks tell each other about the job (agreement, messages, who has failed) goes through the control group, on the
host: a collective on a device says nothing when a peer is gone, and gives up when one works for long by itself.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
T = TypeVar("T")
P = TypeVar("P", Tensor, list[Tensor])

# Newer releases of torch rename these collectives; older ones know only the longer names.
_all_gather_of_torch = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_messages = dist.batch_isend_irecv  # those of an all-gather, which `measure.ledger` counts as a whole


def is_distributed() -> bool:
    """Whether a default process group exists."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: Group = None) -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size(group) if is_distributed() else 1


def rank(group: Group = None) -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank(group) if is_distributed() else 0


def on_node() -> tuple[int, int]:
    """This process's number among the ranks of its node, and how many they are, as launchers say; (0, 1) if none does.

    Work that is shared on a node is done by everybody then.
    """
    local, count = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    return (local, count) if world_size() > 1 and 0 <= local < count else (0, 1)


class TreeSum(Generic[P]):
    """Sum of a known number of equal-shaped tensors in the order of one fixed tree.

    Let `count` = 2^k * odd. Runs of `odd` neighbours are added from left to right, and the 2^k results by a balanced
    binary tree. For W = 2^w dividing 2^k, each contiguous share of count / W parts is a complete subtree, so adding
    the shares first and their sums afterwards gives the same bits. At most k + 2 tensors are held at a time.

    Parts given may be consumed (added to in place): do not reuse them. A part may also be a list of tensors.

    Raises:
        ValueError: if `count` is not positive.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a sum needs at least one part, got count={count}")
        self.count = count
        self._run = count // (count & -count)  # the odd part
        self._in_run = 0
        self._added = 0
        self._open: P | None = None  # the unfinished run
        self._pending: list[tuple[int, P]] = []  # (runs in it, partial sum), sizes falling

    def add(self, part: P) -> None:
        """Append the next part."""
        self._open = part if self._open is None else _add(self._open, part)
        self._in_run += 1
        self._added += 1
        if self._in_run < self._run:
            return
        done, self._open, self._in_run = self._open, None, 0
        size = 1
        while self._pending and self._pending[-1][0] == size:
            done = _add(self._pending.pop()[1], done)
            size *= 2
        self._pending.append((size, done))

    def total(self) -> P:
        """The sum.

        Raises:
            ValueError: if fewer or more than `count` parts were added.
        """
        if self._added != self.count:
            raise ValueError(f"expected {self.count} parts, got {self._added}")
        return self._pending[0][1]


def _add(first: P, second: P) -> P:
    """`second` added to `first` in place."""
    if isinstance(first, Tensor):
        return first.add_(second)
    torch._foreach_add_(first, second)
    return first


def tree_sum(parts: Tensor) -> Tensor:
    """The sum of `parts` (n, ...) in the order of `TreeSum`, in log2(n) operations; `parts` is consumed.

    Raises:
        ValueError: if there is no part.
    """
    if not len(parts):
        raise ValueError("a sum needs at least one part")
    odd = len(parts) // (len(parts) & -len(parts))
    runs = parts[::odd]
    for k in range(1, odd):
        runs.add_(parts[k::odd])
    while len(runs) > 1:
        runs = runs[0::2].add_(runs[1::2])
    return runs[0]


def exact_reduce_scatter(rows: Tensor, group: Group = None) -> Tensor:
    """Sum over ranks of `rows` (W * b, ...), returned as this rank's slice (b, ...), summed in tree order.

    One all-to-all of the slices and a local tree sum: the traffic of an ordinary reduce-scatter.

    Raises:
        ValueError: if the first dimension is not divisible by the world size, or W is not a power of two.
    """
    world = world_size(group)
    if world == 1:
        return rows
    if rows.shape[0] % world:
        raise ValueError(f"{rows.shape[0]} rows do not divide over {world} ranks")
    sent = rows.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return tree_sum(received.view(world, rows.shape[0] // world, *rows.shape[1:])).clone()


def all_gather_single(out: Tensor, own: Tensor, group: Group = None) -> None:
    """Fill `out` (W * b, ...) with every rank's `own` (b, ...), in rank order; both contiguous.

    On the host by messages from each rank to each other: gloo's own all-gather copies the whole result twice.
    """
    if out.device.type != "cpu" or dist.get_backend(group) != "gloo":
        _all_gather_of_torch(out, own, group=group)
        return
    parts, own = out.view(world_size(group), -1).unbind(), own.view(-1)
    peers = {k: k if group is None else dist.get_global_rank(group, k) for k in range(len(parts)) if k != rank(group)}
    both = [(dist.irecv, parts[k], peer) for k, peer in peers.items()] + [(dist.isend, own, x) for x in peers.values()]
    works = _messages([dist.P2POp(op, x, peer, group) for op, x, peer in both]) if both and own.numel() else []
    parts[rank(group)].copy_(own)
    for work in works:
        work.wait()


def all_gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """All ranks' `rows` (b, ...) stacked in rank order as (W * b, ...); no gradient, equal shapes on every rank."""
    world = world_size(group)
    if world == 1:
        return rows
    out = rows.new_empty((world * rows.shape[0], *rows.shape[1:]))
    all_gather_single(out, rows.contiguous(), group=group)
    return out


class ExactAllReduce:
    """Sums a vector over ranks in tree order: all-to-all of chunks, tree sum on the owner, all-gather.

    The traffic is that of a ring all-reduce. Elementwise addition does not mix elements, so padding and chunking do
    not change any bit. The buffers are kept: fresh ones of a gradient's size cost more than the sum.

    Args:
        length: of the vectors.
        like: gives dtype and device.

    Attributes:
        vector: (length,), to be filled before `reduce`; holds the sum afterwards.
    """

    def __init__(self, length: int, like: Tensor, group: Group = None) -> None:
        self._group, self._world = group, world_size(group)
        self._padded = like.new_zeros(length + -length % self._world)
        self._received = torch.empty_like(self._padded) if self._world > 1 else self._padded
        self.vector = self._padded[:length]

    def reduce(self) -> Tensor:
        """Replace `vector` by its sum over ranks (collective); returns it."""
        if self._world > 1 and self._padded.numel():
            dist.all_to_all_single(self._received, self._padded, group=self._group)
            chunk = tree_sum(self._received.view(self._world, -1))
            all_gather_single(self._padded, chunk, group=self._group)
        return self.vector


_control: Group = None  # None: the default group, which is on the host
_pause = 10.0  # seconds after which a rank that works by itself answers the others


def open_control(timeout: float) -> None:
    """Make the control group: gloo, beside a default group of another backend (collective).

    Args:
        timeout: seconds after which a rank counts as lost that does not answer.
    """
    global _control, _pause
    _pause = min(10.0, timeout / 4)
    if world_size() > 1 and dist.get_backend() != "gloo":
        _control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))  # type: ignore[assignment]


def close_control(broken: bool = False) -> None:
    """Leave the control group, if it is not the default group.

    Args:
        broken: leave it as it is, for a process that ends.
    """
    global _control
    if _control is not None and not broken:
        dist.destroy_process_group(_control)
    _control = None


def control() -> Group:
    """The group of what is not computed: on the host, and a lost peer raises an error in it at once."""
    return _control


def control_is_apart() -> bool:
    """Whether it is not the default group, whose collectives then run on a device and wait for a lost peer."""
    return _control is not None


def barrier() -> None:
    """Wait for all ranks (nothing without a process group)."""
    if world_size() > 1:
        dist.barrier(control())


def all_reduce_max(value: float) -> float:
    """The largest `value` over ranks, in the control group."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device="cpu")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=control())
    return float(tensor)


def all_reduce_integers(numbers: Tensor, group: Group = None) -> Tensor:
    """Replace `numbers`, integers on the device that messages need, by their sum over ranks, which no order changes."""
    if world_size(group) > 1:
        dist.all_reduce(numbers, group=group)
    return numbers


def gather_objects(value: object, group: Group = None) -> list[object]:
    """Every rank's `value` in rank order, on every rank.

    Uses torch's object collective, which pickles: only between the ranks of one job, never with data from outside.

    Args:
        group: None for the control group.
    """
    world = world_size(group)
    if world == 1:
        return [value]
    out: list[object] = [None] * world
    dist.all_gather_object(out, value, group=control() if group is None else group)
    return out


def from_rank_zero(value: T) -> T:
    """Rank zero's `value`, on every rank, so that all make the same decision."""
    return gather_objects(value)[0]  # type: ignore[return-value]


class RankError(RuntimeError):
    """An error of one or more ranks, raised alike on every rank so that none waits for a peer that has left."""


class Attempt(Generic[T]):
    """Something done on every rank that may fail on some; a rank learns of the others' failures later.

    Args:
        action: called without arguments, must not use collectives (a rank may leave it early).
    """

    def __init__(self, action: Callable[[], T]) -> None:
        self._result: T | None = None
        self._error: Exception | None = None
        try:
            self._result = action()
        except Exception as error:
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether it raised an exception here."""
        return self._error is not None

    @property
    def value(self) -> T | None:
        """What the action returned here; None if it has failed."""
        return self._result

    def result(self, failed_anywhere: bool, what: str) -> T:
        """What the action returned here, if it has failed nowhere; otherwise collective.

        Raises:
            RankError: with the ranks and their messages. On one rank alone, the original exception passes unchanged.
        """
        if self._error is not None and world_size() == 1:
            raise self._error
        if failed_anywhere:
            _raise_alike(self._error, what)
        return self._result  # type: ignore[return-value]


def together(action: Callable[[], T], what: str) -> T:
    """Run `action` on every rank; if it raises an exception on any, raise the same error text on all.

    Args:
        action: called without arguments, must not use collectives (a rank may leave it early).
        what: what was being done, for the message.

    Raises:
        RankError: with the ranks and their messages. On one rank alone, the original exception passes unchanged.
    """
    with _answering():
        attempt = Attempt(action)
    while (state := all_reduce_max(float(attempt.failed))) >= _BUSY:
        pass
    return attempt.result(state > 0, what)


_BUSY = 2.0  # more than 1.0, failed


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """While entered, a thread answers the ranks that wait in `together`: a collective would give up after a timeout,
    and a rank may work by itself for longer."""
    if world_size() == 1:
        yield
        return
    done = threading.Event()

    def answer() -> None:
        with contextlib.suppress(RuntimeError):  # a rank is lost: this one learns it itself when it has finished
            while not done.wait(_pause):
                all_reduce_max(_BUSY)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:  # this rank leaves alone, so others must not wait for it to answer
        done.set()
        raise
    done.set()
    thread.join()


def on_main(action: Callable[[], T], what: str) -> T | None:
    """Run `action` on rank zero alone; if it raises an exception, raise the same error text on every rank.

    Returns:
        What it returned, on rank zero; None on others.
    """
    return together(lambda: action() if rank() == 0 else None, what)


def _raise_alike(error: BaseException | None, what: str) -> None:
    """Raise the same text on every rank, given each rank's own error or None."""
    texts = gather_objects(None if error is None else str(error))
    failures = {rank: text for rank, text in enumerate(texts) if text is not None}
    if len(failures) == len(texts) and len(set(texts)) == 1:
        raise RankError(str(texts[0])) from error
    ranks = ", ".join(f"rank {rank}: {text}" for rank, text in failures.items())
    raise RankError(f"{what} failed on {len(failures)} of {len(texts)} ranks: {ranks}") from error
