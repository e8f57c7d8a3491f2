"""A remembered supervisor on a strip of similarities: p is even but for a few entries of every row, in place.

The same interface as `static_strips.StaticKernel`; p comes from `field.persistent.restrict`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.persistent import Supervisor
from rkdo_dist.field.strips import Place, RowSums, exponent_limit


class SparseKernel:
    """KL(p || q) with p = share + extra at listed columns; all columns are in the strip, none is excluded.

    Args:
        objective: of kind "persistent".
        supervisor: p of the b rows.
        dtype: float32 or float64.
    """

    walks = ("normalise",)

    def __init__(self, objective: Objective, supervisor: Supervisor, dtype: torch.dtype) -> None:
        self.objective = objective
        self.scale = 1 / objective.temperatures[1]
        self.shifts = self.scale > exponent_limit(dtype)
        self._supervisor = supervisor

    def fused(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """All columns at once: fill `sums` from x (r, B) and turn x into d loss / d x."""
        if self.shifts:
            self.maximum(x, sums, place)
        self.normalise(x, sums, place)
        self._differentiate(x, sums, place)

    def maximum(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """The walk before the others, only if `shifts`: the largest x of every row."""
        torch.maximum(sums.shift, x.amax(1), out=sums.shift)

    def normalise(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """First walk: x <- exp(x); normaliser, and the mean of x under p."""
        if self.shifts:
            x.sub_(sums.shift[:, None])
        p = self._supervisor.slice(place.first_row, place.first_row + len(x))
        sums.mean[0].add_(p.share * x.sum(1) + (p.extra * x.gather(1, p.positions)).sum(1))
        x.exp_()
        sums.z[-1].add_(x.sum(1))
        if place.positive is not None:
            sums.positive[1].copy_(x.diagonal(place.positive))

    def differentiate(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """Last walk, with complete `sums`: turn x into d loss / d x."""
        if self.shifts:
            x.sub_(sums.shift[:, None])
        self._differentiate(x.exp_(), sums, place)

    def release(self) -> None:
        """Nothing to give back: everything happens in place."""

    def row_parts(self, sums: RowSums) -> list[Tensor]:
        """Parts of every row's loss: kl_1, cross_entropy, entropy_p, positive_mass; each (b,) float64."""
        z = sums.z[-1].double()
        cross, entropy = z.log() - sums.mean[0].double(), self._supervisor.entropy
        return [cross - entropy, cross, entropy, sums.positive[1].double() / z]

    def row_loss(self, sums: RowSums) -> Tensor:
        """Every row's loss (b,) float64."""
        return self.row_parts(sums)[0]

    def at_uniform(self, batch: int) -> Tensor:
        """Every row's loss if its learned row were uniform (b,) float64: log B - H(p)."""
        return math.log(batch) - self._supervisor.entropy

    def _differentiate(self, e: Tensor, sums: RowSums, place: Place) -> None:
        """e <- q - p."""
        p = self._supervisor.slice(place.first_row, place.first_row + len(e))
        e.div_(sums.z[-1][:, None]).sub_(p.share[:, None])
        e.scatter_add_(1, p.positions, -p.extra)
