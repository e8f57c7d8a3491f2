"""Kernels, which turn a strip of logits into gradients: their protocol, and the kernel of fixed supervisors.

A kernel is given scaled logits x = l / tau(D) (of the cosine <row, column> / tau(D)) of few rows and many columns, and
works on them in place. With all columns in the strip, `fused` turns x into the gradient in one go. With columns in
blocks, the walks do the same in several visits of every block. What a row needs to know between the walks, and what its
loss is made of, are sums over columns; they live in `RowSums`.

Rows of unit norm have x bounded by 1 / tau, and exp(x) needs no running maximum; for other affinities, and at colder
temperatures, the row's maximum is subtracted first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.places import Place
from rkdo_dist.field.supervisors import Supervisor

MOST_LEVELS = 8  # of a fused kernel: what the registers of a thread hold; deeper recursions take the eager one


@dataclass
class RowSums:
    """Partial results of b rows: sums over the columns seen so far, in scaled (and shifted) coordinates.

    Attributes:
        shift: the largest x of the row (b,), where exp(x) might overflow.
        z: sum_j e_t (D+1, b), with e_t = exp(x tau(D) / tau(t)); the last is that of q(D).
        mean: sum_j q(t-1) log q(D) (D, b).
        log_ratio: sum_j p(t) rho_t (D, b), rho_t = log p(t) - log q(t) + constant.
        flow: sum_j q(t-1) G_t (D, b), G_t the derivative of the loss by p(t), up to a constant.
        total: sums of x (log q(D) in a recursion) and of G_1 (2, b), where every column has a share of p(0).
        positive: `Supervisor.add_dot` of the same, `add_mass` of e_D (of q(D) in a recursion), `add_dot` of G_1 (3, b).
    """

    shift: Tensor
    z: Tensor
    mean: Tensor
    log_ratio: Tensor
    flow: Tensor
    total: Tensor
    positive: Tensor

    @staticmethod
    def zeros(depth: int, b: int, dtype: torch.dtype, device: torch.device) -> RowSums:
        """No column seen yet."""
        sums = [torch.zeros(n, b, dtype=dtype, device=device) for n in (depth + 1, depth, depth, depth, 2, 3)]
        return RowSums(torch.full((b,), -math.inf, dtype=dtype, device=device), *sums)

    def rows(self, start: int, stop: int) -> RowSums:
        """Views of rows start..stop - 1."""
        return RowSums(*(x[..., start:stop] for x in vars(self).values()))


Walk = Callable[[Tensor, RowSums, Place], None]


class Kernel(Protocol):
    """How a strip x (r, n) is worked on. Every visit overwrites x.

    Attributes:
        scale: 1 / tau(D), by which logits are multiplied before a visit.
    """

    scale: float

    @property
    def walks(self) -> tuple[Walk, ...]:
        """Visits of all blocks, one walk after the other, after which the sums are complete."""

    def fused(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """All columns at once: fill `sums` from x and turn x into d loss / d x."""

    def measure(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """All columns at once: fill `sums` from x, the same as `fused` does."""

    def differentiate(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """Last walk, with complete `sums`: turn x into d loss / d x."""

    def row_parts(self, sums: RowSums) -> list[Tensor]:
        """Parts of every row's loss: kl_t, cross_entropy, entropy_p, positive_mass; each (b,) float64."""

    def row_loss(self, sums: RowSums) -> Tensor:
        """Every row's loss (b,) float64."""

    def release(self) -> None:
        """Release the workspace; a further visit allocates it again."""


def might_overflow(objective: Objective, dtype: torch.dtype) -> bool:
    """Whether exp(x), or a product made of it, might leave the range: x is not bounded, or the bound is too large."""
    bound = 1 / min(objective.temperatures)
    return not objective.affinity.unit_norm or bound > 0.35 * math.log(torch.finfo(dtype).max)


def hide(x: Tensor, column: int | None, value: float) -> None:
    """Give one column of every row of x (r, n) a harmless value: `column` of the first, the next of the next row."""
    if column is not None:
        x.diagonal(column).fill_(value)


def note_maximum(x: Tensor, sums: RowSums, place: Place) -> None:
    """The walk before the others where exp(x) might overflow: the largest x of every row."""
    hide(x, place.excluded, -math.inf)
    torch.maximum(sums.shift, x.amax(1), out=sums.shift)


class FixedKernel:
    """KL(p || q) with a fixed p, one level; see `Kernel`.

    Args:
        objective: without in-batch recursion.
        supervisor: p of the b rows.
        taking_part: N, the columns of a row that are not excluded.
        dtype: float32 or float64.

    Attributes:
        log_normaliser: log of what exp(x) is divided by in every row, where the field as a whole is normalised; until
            it is known (None), walks find every row's own.
    """

    log_normaliser: Tensor | None = None

    def __init__(self, objective: Objective, supervisor: Supervisor, taking_part: int, dtype: torch.dtype) -> None:
        self.scale = 1 / objective.temperatures[-1]
        self._shifts = might_overflow(objective, dtype)
        self._supervisor, self._taking_part = supervisor, taking_part

    @property
    def walks(self) -> tuple[Walk, ...]:
        """See `Kernel`."""
        alone = self.log_normaliser is not None or not self._shifts
        return (self.normalise,) if alone else (note_maximum, self.normalise)

    def fused(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """See `Kernel`."""
        self.measure(x, sums, place)
        self._differentiate(x, sums, place)  # x is exp(x) already

    def measure(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """See `Kernel`."""
        for walk in self.walks:
            walk(x, sums, place)

    def normalise(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """x <- exp(x), with what is needed of x and exp(x) noted."""
        self._shift(x, sums)
        hide(x, place.excluded, 0)
        if self._supervisor.spreads:
            sums.total[0].add_(x.sum(1))
        self._supervisor.add_dot(sums.positive[0], x, place)
        x.exp_()
        hide(x, place.excluded, 0)
        if self.log_normaliser is None:
            sums.z[-1].add_(x.sum(1))
        else:
            sums.z[-1].fill_(1)  # exp(x) is q already
        self._supervisor.add_mass(sums.positive[1], x, place)

    def differentiate(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """See `Kernel`."""
        self._shift(x, sums)
        self._differentiate(x.exp_(), sums, place)

    def row_log_sums(self, sums: RowSums) -> Tensor:
        """log sum_j exp(x) of every row (b,) float64."""
        log_sums = sums.z[-1].double().log()
        return log_sums + sums.shift if self._shifts else log_sums

    def row_parts(self, sums: RowSums) -> list[Tensor]:
        """See `Kernel`."""
        z = sums.z[-1].double()
        cross = z.log() - self._supervisor.mean(sums.total[0], sums.positive[0])
        entropy = self._supervisor.mixed_entropy(self._taking_part)
        return [cross - entropy, cross, entropy, sums.positive[1].double() / z]

    def row_loss(self, sums: RowSums) -> Tensor:
        """See `Kernel`."""
        return self.row_parts(sums)[0]

    def release(self) -> None:
        """See `Kernel`."""
        self._supervisor.release()

    def _shift(self, x: Tensor, sums: RowSums) -> None:
        if self.log_normaliser is not None:
            x.sub_(self.log_normaliser)
        elif self._shifts:
            x.sub_(sums.shift[:, None])

    def _differentiate(self, e: Tensor, sums: RowSums, place: Place) -> None:
        """e <- q - p."""
        if self.log_normaliser is None:
            e.div_(sums.z[-1][:, None])
        self._supervisor.add(e, place, -1.0)
        hide(e, place.excluded, 0)
