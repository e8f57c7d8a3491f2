"""Supervisors: the rows p(0) that learned rows are fitted to, as kernels use them.

Over the N columns that take part, p(0)(j|i) = share(i) + extra(j|i), and extra is not 0 at few columns only: at the
positive (`Identity`), at the columns of the same label (`SameLabel`), or at listed ones (`Listed`). Kernels never see
p(0) as a matrix; they ask for the three operations of `Supervisor` on their strip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rkdo_dist.field.kernels import Place

# What lists the columns of p(0): (r,) samples' positions in the batch and B -> (r, K) int64 positions of samples, each
# once in a row, and (r, K) float64 weights that sum to 1. The columns are the positive's view of these samples.
Lister = Callable[[Tensor, int], tuple[Tensor, Tensor]]
LISTED: dict[str, Lister] = {}


class Supervisor(Protocol):
    """p(0) of b rows. Strips of `values` or `to` are (r, n), in the computing dtype, and lie at `place`."""

    @property
    def spreads(self) -> bool:
        """Whether every column has a share."""

    def add_dot(self, into: Tensor, values: Tensor, place: Place) -> None:
        """into (r,) += sum_j extra_j values_j, but for a constant that `mean` knows."""

    def mean(self, total: Tensor, dot: Tensor) -> Tensor:
        """sum_j p_j values_j (b,) float64, from the sums of all values and what `add_dot` has added up."""

    def add_mass(self, into: Tensor, values: Tensor, place: Place) -> None:
        """into (r,) += sum of the values at the positive columns."""

    def add(self, to: Tensor, place: Place, factor: float, of_row: Tensor | None = None) -> None:
        """to += factor of_row p, also at an excluded column, which the caller hides."""

    def mixed_entropy(self, taking_part: int, kept: float = 1.0) -> Tensor:
        """Entropy of kept p + (1 - kept) / N (b,) float64."""

    def release(self) -> None:
        """Release the workspace."""


@dataclass(frozen=True)
class Identity:
    """p(0) = (1 - a) [the positive] + a / N.

    Attributes:
        rows: b.
        taking_part: N, the columns of a row that are not excluded.
        debias: a.
        device: of the rows.
    """

    rows: int
    taking_part: int
    debias: float
    device: torch.device

    @property
    def spreads(self) -> bool:
        """Whether every column has a share."""
        return self.debias > 0

    def add_dot(self, into: Tensor, values: Tensor, place: Place) -> None:
        """The value at the positive, not yet times 1 - a."""
        if place.positive is not None:
            into.add_(values.diagonal(place.positive))

    def mean(self, total: Tensor, dot: Tensor) -> Tensor:
        """See `Supervisor`."""
        return (1 - self.debias) * dot.double() + self.debias / self.taking_part * total.double()

    def add_mass(self, into: Tensor, values: Tensor, place: Place) -> None:
        """The value at the positive."""
        self.add_dot(into, values, place)

    def add(self, to: Tensor, place: Place, factor: float, of_row: Tensor | None = None) -> None:
        """A diagonal, which costs nothing beside the rest of a strip."""
        _add_share(to, factor * self.debias / self.taking_part, of_row)
        if place.positive is None:
            return
        kept, diagonal = factor * (1 - self.debias), to.diagonal(place.positive)
        diagonal.add_(kept) if of_row is None else diagonal.add_(of_row, alpha=kept)

    def mixed_entropy(self, taking_part: int, kept: float = 1.0) -> Tensor:
        """See `Supervisor`."""
        one = torch.ones(self.rows, dtype=torch.float64, device=self.device)
        return _entropy_of_two(one, taking_part, self.debias, kept)

    def release(self) -> None:
        """There is none."""


class SameLabel:
    """p(0) = (1 - a) [even over the columns of the row's label, the excluded one left out] + a / N.

    Which columns these are is a mask of the strip, made anew for every strip: it may be most of them.

    Args:
        labels: (B,) integers.
        first_row, rows: which b samples the rows belong to.
        columns: how many columns each sample has, and whether the row's own is excluded.
        taking_part: N.
        debias: a.
        dtype: of the computation.
    """

    def __init__(
        self,
        labels: Tensor,
        first_row: int,
        rows: int,
        columns: tuple[int, bool],
        taking_part: int,
        debias: float,
        dtype: torch.dtype,
    ) -> None:
        self._labels, self._mine = labels, labels[first_row : first_row + rows]
        _, which, counts = labels.unique(return_inverse=True, return_counts=True)
        views, excludes = columns
        self._counts = (counts[which[first_row : first_row + rows]] * views - int(excludes)).to(dtype)
        self._taking_part, self._debias = taking_part, debias
        self._last: tuple[Place, Tensor] | None = None

    @property
    def spreads(self) -> bool:
        """Whether every column has a share."""
        return self._debias > 0

    def add_dot(self, into: Tensor, values: Tensor, place: Place) -> None:
        """The mean over the positives, not yet times 1 - a."""
        into.add_((values * self._mask(values, place)).sum(1) / self._counts_at(values, place))

    def mean(self, total: Tensor, dot: Tensor) -> Tensor:
        """See `Supervisor`."""
        return (1 - self._debias) * dot.double() + self._debias / self._taking_part * total.double()

    def add_mass(self, into: Tensor, values: Tensor, place: Place) -> None:
        """The sum over the positives."""
        into.add_((values * self._mask(values, place)).sum(1))

    def add(self, to: Tensor, place: Place, factor: float, of_row: Tensor | None = None) -> None:
        """See `Supervisor`."""
        _add_share(to, factor * self._debias / self._taking_part, of_row)
        kept = (1 - self._debias) / self._counts_at(to, place)
        to.addcmul_(self._mask(to, place), (kept if of_row is None else kept * of_row)[:, None], value=factor)

    def mixed_entropy(self, taking_part: int, kept: float = 1.0) -> Tensor:
        """See `Supervisor`."""
        return _entropy_of_two(self._counts.double(), taking_part, self._debias, kept)

    def release(self) -> None:
        """Forget the last strip's mask."""
        self._last = None

    def _counts_at(self, values: Tensor, place: Place) -> Tensor:
        return self._counts[place.first : place.first + len(values)]

    def _mask(self, values: Tensor, place: Place) -> Tensor:
        """1 at the positives of a strip, else 0 (r, n)."""
        if self._last is not None and self._last[0] is place:
            return self._last[1]
        rows = self._mine[place.first : place.first + len(values)]
        columns = self._labels[place.first_column : place.first_column + place.block].repeat(len(place.piece.columns))
        mask = (rows[:, None] == columns[None, :]).to(values.dtype)
        if place.excluded is not None:
            mask.diagonal(place.excluded).fill_(0)
        self._last = place, mask
        return mask


@dataclass(frozen=True)
class Listed:
    """p(0) = share + extra at listed columns: any rows that are even but for a few entries.

    Attributes:
        positions: (b, K) int64, samples of the batch, in the view of the positive; 0 where there is nothing to add.
        extra: (b, K) in the computing dtype, what the entry has beyond the share; 0 where there is nothing to add.
        share: (b,) in the computing dtype.
        entropy: (b,) float64.
    """

    positions: Tensor
    extra: Tensor
    share: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, positions: Tensor, weights: Tensor, taking_part: int, debias: float, dtype: torch.dtype) -> Listed:
        """p(0) = (1 - a) [weights at listed columns] + a / N.

        Args:
            positions, weights: (b, K), see `LISTED`.
            taking_part: N.
            debias: a.
            dtype: of the computation.
        """
        extra = (1 - debias) * weights.double()
        share = torch.full_like(extra[:, 0], debias / taking_part)
        high, even = extra + share[:, None], taking_part - (weights != 0).sum(1)
        high = torch.where(weights != 0, high, 0.0)
        entropy = -torch.xlogy(high, high).sum(1) - even * torch.xlogy(share, share)
        return cls(positions, extra.to(dtype), share.to(dtype), entropy)

    @property
    def spreads(self) -> bool:
        """Whether every column has a share."""
        return True

    def slice(self, start: int, stop: int) -> Self:
        """Rows start..stop - 1 (views)."""
        return type(self)(*(getattr(self, f.name)[start:stop] for f in fields(self)))

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """All rows of `parts`, in order."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def dense(self, batch: int) -> Tensor:
        """(b, B), for tests; columns of one view, none excluded."""
        p = self.share[:, None].repeat(1, batch)
        return p.scatter_add_(1, self.positions, self.extra)

    def add_dot(self, into: Tensor, values: Tensor, place: Place) -> None:
        """See `Supervisor`."""
        positions, extra = self._at(values, place)
        into.add_((extra * values.gather(1, positions)).sum(1))

    def mean(self, total: Tensor, dot: Tensor) -> Tensor:
        """In the computing dtype, as the rows are."""
        return (self.share * total + dot).double()

    def add_mass(self, into: Tensor, values: Tensor, place: Place) -> None:
        """The value at the other view, whatever is listed."""
        if place.positive is not None:
            into.add_(values.diagonal(place.positive))

    def add(self, to: Tensor, place: Place, factor: float, of_row: Tensor | None = None) -> None:
        """See `Supervisor`."""
        positions, extra = self._at(to, place)
        share = self.share[place.first : place.first + len(to)]
        if of_row is not None:
            share, extra = share * of_row, extra * of_row[:, None]
        to.add_(share[:, None], alpha=factor)
        to.scatter_add_(1, positions, extra * factor)

    def mixed_entropy(self, taking_part: int, kept: float = 1.0) -> Tensor:
        """See `Supervisor`."""
        if kept == 1:
            return self.entropy
        low = kept * self.share.double() + (1 - kept) / taking_part
        listed = self.extra != 0
        high = torch.where(listed, kept * self.extra.double() + low[:, None], 0.0)
        return -torch.xlogy(high, high).sum(1) - (taking_part - listed.sum(1)) * torch.xlogy(low, low)

    def release(self) -> None:
        """There is none."""

    def _at(self, values: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Positions in a strip and what to add there, each (r, K)."""
        rows = slice(place.first, place.first + len(values))
        positions, extra = self.positions[rows] - place.first_column, self.extra[rows]
        inside = (positions >= 0) & (positions < place.block)
        positions = torch.where(inside, positions + place.piece.positive * place.block, 0)
        return positions, torch.where(inside, extra, 0)


def _add_share(to: Tensor, share: float, of_row: Tensor | None) -> None:
    if share:
        to.add_(share) if of_row is None else to.add_(of_row[:, None], alpha=share)


def _entropy_of_two(positives: Tensor, taking_part: int, debias: float, kept: float) -> Tensor:
    """Entropy of kept p + (1 - kept) / N, where p has two values; `positives` (b,) float64 columns have the larger."""
    low = torch.full_like(positives, kept * (debias / taking_part) + (1 - kept) / taking_part)
    high = kept * (1 - debias) / positives + low
    return -positives * torch.xlogy(high, high) - (taking_part - positives) * torch.xlogy(low, low)
