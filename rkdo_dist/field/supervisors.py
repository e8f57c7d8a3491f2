"""Supervisors: the rows p(0) that learned rows are fitted to, as kernels use them.

Over the N columns that take part, p(0)(j|i) = share(i) + extra(j|i), and extra is not 0 at few columns only: at the
positive (`Identity`), at the columns of the same label (`SameLabel`), or at listed ones (`Listed`). Kernels never see
p(0) as a matrix; they ask for the three operations of `Supervisor` on their strip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch
from torch import Tensor

from rkdo_dist.field.places import Place, Slice

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


class _Smoothed:
    """p(0) = (1 - a) [even over the row's positives] + a / N: what `Identity` and `SameLabel` share.

    Sums that `add_dot` makes are not yet multiplied by 1 - a.

    Args:
        positives: columns that are positive (b,) float64.
        taking_part: N, the columns of a row that are not excluded.
        debias: a.
    """

    def __init__(self, positives: Tensor, taking_part: int, debias: float) -> None:
        self._positives, self._taking_part, self._debias = positives, taking_part, debias
        self.spreads = debias > 0

    def mean(self, total: Tensor, dot: Tensor) -> Tensor:
        """See `Supervisor`."""
        if not self.spreads:
            return dot.double()
        return (1 - self._debias) * dot.double() + self._debias / self._taking_part * total.double()

    def mixed_entropy(self, taking_part: int, kept: float = 1.0) -> Tensor:
        """See `Supervisor`; p has two values."""
        positives = self._positives
        low = torch.full_like(positives, kept * (self._debias / taking_part) + (1 - kept) / taking_part)
        high = kept * (1 - self._debias) / positives + low
        return -positives * torch.xlogy(high, high) - (taking_part - positives) * torch.xlogy(low, low)

    def release(self) -> None:
        """See `Supervisor`."""

    def _add_share(self, to: Tensor, factor: float, of_row: Tensor | None) -> None:
        share = factor * self._debias / self._taking_part
        if share:
            to.add_(share) if of_row is None else to.add_(of_row[:, None], alpha=share)


class Identity(_Smoothed):
    """The positive is the other view: a diagonal, which costs nothing beside the rest of a strip.

    Args:
        rows: b.
        device: of the rows.
        taking_part, debias: see `_Smoothed`.
    """

    def __init__(self, rows: int, device: torch.device, taking_part: int, debias: float) -> None:
        super().__init__(torch.ones(rows, dtype=torch.float64, device=device), taking_part, debias)

    def add_dot(self, into: Tensor, values: Tensor, place: Place) -> None:
        """See `Supervisor`."""
        if place.positive is not None:
            into.add_(values.diagonal(place.positive))

    add_mass = add_dot

    def mixed_entropy(self, taking_part: int, kept: float = 1.0) -> Tensor:
        """See `Supervisor`; 0 where p is one column."""
        if kept == 1 and not self.spreads:
            return torch.zeros_like(self._positives)
        return super().mixed_entropy(taking_part, kept)

    def add(self, to: Tensor, place: Place, factor: float, of_row: Tensor | None = None) -> None:
        """See `Supervisor`."""
        self._add_share(to, factor, of_row)
        if place.positive is not None:
            kept, diagonal = factor * (1 - self._debias), to.diagonal(place.positive)
            diagonal.add_(kept) if of_row is None else diagonal.add_(of_row, alpha=kept)


class SameLabel(_Smoothed):
    """The positives are the columns of the row's label, without an excluded one.

    Which columns these are is a mask of the strip, made anew for every strip: it may be most of them.

    Args:
        labels: (B,) integers.
        first_row, rows: which b samples the rows belong to.
        piece: one of the objective's matrices.
        taking_part, debias: see `_Smoothed`.
        dtype: of the computation.
    """

    def __init__(
        self,
        labels: Tensor,
        first_row: int,
        rows: int,
        piece: Slice,
        taking_part: int,
        debias: float,
        dtype: torch.dtype,
    ) -> None:
        self._labels, self._mine = labels, labels[first_row : first_row + rows]
        ordered = labels.sort().values
        counts = torch.searchsorted(ordered, self._mine, right=True) - torch.searchsorted(ordered, self._mine)
        mine = counts * len(piece.columns) - int(piece.excluded is not None)
        super().__init__(mine.double(), taking_part, debias)
        self._counts = mine.to(dtype)
        self._last: tuple[Place, Tensor] | None = None

    def add_dot(self, into: Tensor, values: Tensor, place: Place) -> None:
        """See `Supervisor`."""
        into.add_((values * self._mask(values, place)).sum(1) / self._counts_at(values, place))

    def add_mass(self, into: Tensor, values: Tensor, place: Place) -> None:
        """See `Supervisor`."""
        into.add_((values * self._mask(values, place)).sum(1))

    def add(self, to: Tensor, place: Place, factor: float, of_row: Tensor | None = None) -> None:
        """See `Supervisor`."""
        self._add_share(to, factor, of_row)
        kept = (1 - self._debias) / self._counts_at(to, place)
        to.addcmul_(self._mask(to, place), (kept if of_row is None else kept * of_row)[:, None], value=factor)

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
