"""I-Con, InfoNCE and the supervised objective on a strip of similarities: p is fixed, one level, in place.

The same interface as `strips.RecursiveKernel`; without a recursion there is nothing to correct.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.strips import Place, RowSums, exponent_limit, hide


class StaticKernel:
    """KL(p || q) with p = (1 - a) p(0) + a / N; p(0) is the identity or spread over equal labels.

    Args:
        objective: with an infinite first temperature and depth 1.
        taking_part: N, the columns of a row that are not excluded.
        dtype: float32 or float64.
        counts: number of columns with the label of each of the b rows, in that dtype, where p(0) comes from labels.
    """

    walks = ("normalise",)

    def __init__(self, objective: Objective, taking_part: int, dtype: torch.dtype, counts: Tensor | None) -> None:
        self.objective = objective
        self.scale = 1 / objective.temperatures[1]
        self.shifts = self.scale > exponent_limit(dtype)
        self._spread = objective.couplings[0] / taking_part
        self._kept = 1 - objective.couplings[0]
        self._taking_part, self._counts = taking_part, counts

    def fused(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """All columns at once: fill `sums` from x (r, N) and turn x into d loss / d x."""
        if self.shifts:
            self.maximum(x, sums, place)
        mask = self._normalise(x, sums, place)
        self._differentiate(x, mask, sums, place)

    def maximum(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """The walk before the others, only if `shifts`: the largest x of every row."""
        hide(x, place, -math.inf)
        torch.maximum(sums.shift, x.amax(1), out=sums.shift)

    def normalise(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """First walk over column blocks x (r, n): normaliser and means. Overwrites x, as every walk."""
        self._normalise(x, sums, place)

    def differentiate(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """Last walk, with complete `sums`: turn x into d loss / d x."""
        if self.shifts:
            x.sub_(sums.shift[:, None])
        x.exp_()
        self._differentiate(x, _same_label(x, place), sums, place)

    def release(self) -> None:
        """Nothing to give back: everything happens in place."""

    def row_parts(self, sums: RowSums) -> list[Tensor]:
        """Parts of every row's loss: kl_1, cross_entropy, entropy_p, positive_mass; each (b,) float64."""
        z = sums.z[-1].double()
        positives = torch.ones_like(z) if self._counts is None else self._counts.double()
        mean = self._kept * sums.positive[0].double() + self._spread * sums.mean[0].double()
        cross = z.log() - mean
        high = self._kept / positives + self._spread
        low = torch.full_like(z, self._spread)
        entropy = -positives * torch.xlogy(high, high) - (self._taking_part - positives) * torch.xlogy(low, low)
        return [cross - entropy, cross, entropy, sums.positive[1].double() / z]

    def row_loss(self, sums: RowSums) -> Tensor:
        """Every row's loss (b,) float64."""
        return self.row_parts(sums)[0]

    def _normalise(self, x: Tensor, sums: RowSums, place: Place) -> Tensor | None:
        """x <- e = exp(x), with what is needed of x and e noted; returns the mask of equal labels (r, n)."""
        if self.shifts:
            x.sub_(sums.shift[:, None])
        hide(x, place, 0)
        if self._spread:
            sums.mean[0].add_(x.sum(1))
        mask = _same_label(x, place)
        self._note_positives(0, x, mask, sums, place)
        x.exp_()
        hide(x, place, 0)
        sums.z[-1].add_(x.sum(1))
        self._note_positives(1, x, mask, sums, place)
        return mask

    def _note_positives(self, which: int, values: Tensor, mask: Tensor | None, sums: RowSums, place: Place) -> None:
        if mask is not None and place.counts is not None:
            total = (values * mask).sum(1)
            sums.positive[which].add_(total / place.counts if which == 0 else total)
        elif place.positive is not None:
            sums.positive[which].copy_(values.diagonal(place.positive))

    def _differentiate(self, e: Tensor, mask: Tensor | None, sums: RowSums, place: Place) -> None:
        """e <- q - p."""
        e.div_(sums.z[-1][:, None])
        if self._spread:
            e.sub_(self._spread)
        if mask is not None and place.counts is not None:
            e.addcmul_(mask, (self._kept / place.counts)[:, None], value=-1)
        elif place.positive is not None:
            e.diagonal(place.positive).sub_(self._kept)
        hide(e, place, 0)


def _same_label(x: Tensor, place: Place) -> Tensor | None:
    """1 where a column has the row's label and is not excluded, else 0; like x (r, n)."""
    if place.labels is None:
        return None
    rows, columns = place.labels
    mask = (rows[:, None] == columns[None, :]).to(x.dtype)
    hide(mask, place, 0)
    return mask
