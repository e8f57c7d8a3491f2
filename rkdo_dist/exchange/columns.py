"""Exchange of the field's columns: from their owners to the rows of every rank, and their gradients back.

The field is sharded by row: each of W ranks holds b rows and needs all B = W b columns. A block of columns is a tensor
(V, n, d): n consecutive samples in V views, which travel in one collective. Ways, the same numbers:

- `LocalColumns`: a rank's columns are its own samples (no exchange).
- `GatheredColumns`: all-gather of the columns; reduce-scatter of their gradients.
- `UnevenColumns`: the same where ranks have different numbers of columns.
- `ExactColumns`: as gathered ones, but gradients are summed in one fixed order.
- `RingColumns`: blocks travel from rank to rank, and a rank holds at most two besides its own; gradients travel with
  their block until they are home. Exchange overlaps with computation.

The gradient of a column is the SUM of what all ranks' rows contribute (the adjoint of all-gather), see `group`.
Every rank must take part in every call. But for `UnevenColumns`, blocks have the same shape on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rkdo_dist.exchange import group as ranks
from rkdo_dist.exchange.group import Group


class LocalColumns:
    """Columns are this rank's own samples, whatever the other ranks do."""

    resident = True
    world, rank = 1, 0

    def gather(self, own: Tensor) -> Tensor:
        """The columns (V, b, d): `own` itself."""
        return own

    def send_home(self, gradients: Tensor) -> Tensor:
        """The gradient of this rank's columns (V, b, d): `gradients` itself."""
        return gradients

    def of_all(self, own: Tensor) -> Tensor:
        """`own` of every rank whose columns these are (1, ...)."""
        return own[None]


class _OfAllRanks:
    """What columns of all ranks have in common.

    Args:
        group: process group; None is the default group, or one rank without a process group.
    """

    def __init__(self, group: Group = None) -> None:
        self.group = group
        self.world, self.rank = ranks.world_size(group), ranks.rank(group)

    def of_all(self, own: Tensor) -> Tensor:
        """`own` of every rank, in rank order (W, ...): for a few numbers. No autograd."""
        return ranks.all_gather_rows(own[None], self.group)


class GatheredColumns(_OfAllRanks):
    """All columns on every rank: 1 / W of them its own, B d numbers in all."""

    resident = True

    def gather(self, own: Tensor) -> Tensor:
        """All ranks' `own` (V, b, d) side by side in rank order, (V, W b, d). No autograd."""
        if self.world == 1:
            return own
        views, b, d = own.shape
        by_rank = ranks.all_gather_rows(own[None], self.group)
        return by_rank.transpose(0, 1).reshape(views, self.world * b, d)

    def send_home(self, gradients: Tensor) -> Tensor:
        """This rank's share (V, b, d) of the sum over ranks of `gradients` (V, W b, d)."""
        if self.world == 1:
            return gradients
        views, batch, d = gradients.shape
        return self._reduce(gradients.view(views, self.world, batch // self.world, d).transpose(0, 1).contiguous())

    def _reduce(self, by_rank: Tensor) -> Tensor:
        """This rank's (V, b, d) of the sum over ranks of (W, V, b, d)."""
        home = torch.empty_like(by_rank[:1])
        ranks.reduce_scatter_single(home, by_rank, group=self.group)
        return home[0]


class UnevenColumns(_OfAllRanks):
    """`GatheredColumns` for ranks that have different numbers of columns: padded to the largest on the way.

    Args:
        counts: every rank's columns.
        group: see `_OfAllRanks`.
    """

    resident = True

    def __init__(self, counts: Sequence[int], group: Group = None) -> None:
        super().__init__(group)
        self._counts = list(counts)
        self._parts = [slice(k * max(counts), k * max(counts) + n) for k, n in enumerate(counts)]

    def gather(self, own: Tensor) -> Tensor:
        """All ranks' `own` (V, n_r, d) side by side in rank order, (V, sum of n, d). No autograd."""
        views, n, d = own.shape
        padded = own.new_zeros(1, views, max(self._counts), d)
        padded[0, :, :n] = own
        flat = ranks.all_gather_rows(padded, self.group).transpose(0, 1).reshape(views, -1, d)
        return torch.cat([flat[:, part] for part in self._parts], dim=1)

    def send_home(self, gradients: Tensor) -> Tensor:
        """This rank's share (V, n_r, d) of the sum over ranks of `gradients` (V, sum of n, d)."""
        views, _, d = gradients.shape
        padded = gradients.new_zeros(self.world, views, max(self._counts), d)
        for k, part in enumerate(gradients.split(self._counts, dim=1)):
            padded[k, :, : part.shape[1]] = part
        home = torch.empty_like(padded[:1])
        ranks.reduce_scatter_single(home, padded, group=self.group)
        return home[0, :, : self._counts[self.rank]]


class ExactColumns(GatheredColumns):
    """`GatheredColumns` whose gradients are summed in tree order: the same bits on any number of ranks."""

    def _reduce(self, by_rank: Tensor) -> Tensor:
        return ranks.exact_reduce_scatter(by_rank, self.group)[0]


class RingColumns(_OfAllRanks):
    """Blocks of columns pass from rank r to rank r + 1; the block at step k of a walk is that of rank r - k."""

    resident = False

    def walk(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Every rank's block once, this rank's first: (index of its first sample, block (V, b, d)).

        While a block is in use, the next one is on its way. The yielded block is overwritten two steps later. The walk
        must be finished, or the other ranks wait.
        """
        own = own.contiguous()
        current, spare = own, [torch.empty_like(own) for _ in range(min(2, self.world - 1))]
        for step in range(self.world):
            under_way: list[dist.Work] = []
            if step < self.world - 1:
                coming = spare[step % 2]
                under_way = self._pass_on(current, coming)
            yield self._first(step, own), current
            _finish(under_way)
            if under_way:
                current = coming

    def walk_home(self, own: Tensor, visit: Callable[[Tensor, int, Tensor], None]) -> Tensor:
        """Walk again; every rank adds to a block's gradient, which ends at the block's owner.

        Args:
            own: this rank's block (V, b, d).
            visit: called as `visit(block, index of its first sample, gradient)`; adds this rank's contribution to
                `gradient` (zeros, shaped like the block).

        Returns:
            The gradient of `own`, summed over ranks in ring order: the owner's contribution first.
        """
        mine, sending, arrived = (torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(3))
        under_way: list[dist.Work] = []
        for step, (first, block) in enumerate(self.walk(own)):
            visit(block, first, mine.zero_())
            _finish(under_way)  # the gradient from the previous rank; and `sending` is free again
            if step > 0:
                mine += arrived
            if self.world > 1:
                mine, sending = sending, mine
                under_way = self._pass_on(sending, arrived)
        _finish(under_way)
        return arrived if self.world > 1 else mine

    def _first(self, step: int, own: Tensor) -> int:
        return (self.rank - step) % self.world * own.shape[1]

    def _pass_on(self, block: Tensor, into: Tensor) -> list[dist.Work]:
        """Start sending `block` to the next rank and receiving the previous rank's."""
        following, previous = ((self.rank + step) % self.world for step in (1, -1))
        if self.group is not None:
            following, previous = (dist.get_global_rank(self.group, r) for r in (following, previous))
        send = dist.P2POp(dist.isend, block, following, self.group)
        receive = dist.P2POp(dist.irecv, into, previous, self.group)
        return dist.batch_isend_irecv([send, receive])


def _finish(under_way: list[dist.Work]) -> None:
    for work in under_way:
        work.wait()
