"""RKDO on a strip of similarities: few rows, many columns, everything in place.

A kernel is given scaled similarities x = <row, column> / tau(D) and works on them in preallocated buffers.
With all columns in the strip, `fused` turns x into the gradient in one go. With columns in blocks,
`normalise`, `correct` and `differentiate` do the same in three walks over the blocks. What a row needs to
know between the walks, and what its loss is made of, are sums over columns; they live in `RowSums`.

Two facts keep it short. Rows are unit-norm, so x is bounded by 1 / tau and exp(x) needs no running maximum
(colder temperatures subtract the row's maximum first). And constants of a row drop out of the gradient of a
softmax, q (g - <q, g>), so log p may be off by any constant of the row that is restored in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rkdo_dist.field.objectives import Objective


@dataclass
class RowSums:
    """What is known of b rows: sums over the columns seen so far, in scaled (and shifted) coordinates.

    Attributes:
        shift: the largest x of the row (b,), where temperatures are so low that exp(x) might overflow.
        z: sum_j e_t (D+1, b), with e_t = exp(x tau(D) / tau(t)).
        mean: sum_j e_(t-1) x (D, b); for a static objective sum_j x.
        log_ratio: sum_j P_t rho_t (D, b), P_t proportional to p(t), rho_t = log p(t) - log q(t) + constant.
        flow: sum_j e_(t-1) G_t (D, b), G_t the derivative of the loss by p(t), up to a constant.
        positive: sums over the positive columns of p(0) x, of e_D, and of p(0) G_1 (3, b).
    """

    shift: Tensor
    z: Tensor
    mean: Tensor
    log_ratio: Tensor
    flow: Tensor
    positive: Tensor

    @staticmethod
    def zeros(depth: int, b: int, dtype: torch.dtype, device: torch.device) -> RowSums:
        """No column seen yet."""
        sums = [torch.zeros(n, b, dtype=dtype, device=device) for n in (depth + 1, depth, depth, depth, 3)]
        return RowSums(torch.full((b,), -math.inf, dtype=dtype, device=device), *sums)

    def rows(self, start: int, stop: int) -> RowSums:
        """Views of rows start..stop - 1."""
        return RowSums(*(x[..., start:stop] for x in vars(self).values()))


@dataclass(frozen=True)
class Place:
    """Where a strip of r rows and n columns lies in the field.

    Attributes:
        positive: column of the first row's positive in this strip (the next row's is one further), or None if
            the strip does not hold it.
        excluded: the same for the excluded self column.
        labels: labels of the rows (r,) and of the columns (n,), where p(0) comes from labels.
        counts: number of columns of the whole field with the row's label (r,), without the excluded one.
        first_row: number of the strip's first row among the b rows.
    """

    positive: int | None
    excluded: int | None
    labels: tuple[Tensor, Tensor] | None = None
    counts: Tensor | None = None
    first_row: int = 0


def exponent_limit(dtype: torch.dtype) -> float:
    """The largest |x| that needs no shift: exp(x) and the products made of it stay in range."""
    return 0.35 * math.log(torch.finfo(dtype).max)


def hide(x: Tensor, place: Place, value: float) -> None:
    """Give the excluded column of every row of x (r, n) a harmless value."""
    if place.excluded is not None:
        x.diagonal(place.excluded).fill_(value)


class RecursiveKernel:
    """In-batch recursion from the identity, D levels (eq. 3 and 4).

    Args:
        objective: with finite temperatures.
        rows, columns: size of the largest strip; all strips have this many columns.
        dtype: float32 or float64.
        parts: keep the sums of every part; without, only those that the loss and its gradient need.
    """

    walks = ("normalise", "correct")

    def __init__(
        self, objective: Objective, rows: int, columns: int, dtype: torch.dtype, device: torch.device, parts: bool
    ) -> None:
        depth, alpha = objective.depth, objective.couplings
        self.objective = objective
        self.flows = objective.supervisor_grad == "flow"
        self.keeps_parts = parts or not self.flows
        inverse = [1 / tau for tau in objective.temperatures]
        self.scale = inverse[-1]
        self.shifts = max(inverse) > exponent_limit(dtype)
        self._ratio = [x / self.scale for x in inverse]
        self._alpha, self._fold, added, self._scale_of_p = alpha, *scaled_chain(alpha)
        # log p must stay finite where p is 0 or underflows
        self._clamps = self.shifts or alpha[0] < 1e-6 or any(fold != 1 for fold in self._fold)
        self._tiny = torch.finfo(dtype).tiny
        kept = [math.prod(1 - a for a in alpha[:t]) for t in range(1, depth + 1)]
        self._on_positive = sum(x * k for x, k in zip(self._ratio[1:], kept, strict=True))
        table = [[*added, 0.0], *gradient_coefficients(alpha, self._ratio)]
        self._table = torch.tensor(table, dtype=dtype, device=device)[:, :, None]
        self._ratios = torch.tensor(self._ratio, dtype=dtype, device=device)[:, None, None]
        self._shape = rows, columns

    @cached_property
    def _buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """e (D+1, r, n), rho (D, r, n), and P (D, r, n), which shares memory with rho if nothing asks for both."""
        e = self._table.new_empty(len(self._ratio), *self._shape)
        rho = e.new_empty(len(self._alpha), *self._shape)
        return e, rho, torch.empty_like(rho) if self.keeps_parts else rho

    def fused(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """All columns at once: fill `sums` from x (r, N) and turn x into d loss / d x."""
        if self.shifts:
            self.maximum(x, sums, place)
        e = self._normalise(x, sums, place)
        product = self._log_ratios(e, x, sums, place, note=self.keeps_parts)
        if self.flows:
            product = self._flow(e, product, sums, place, note=True)
        self._differentiate(e, product, x, sums, place)

    def maximum(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """The walk before the others, only if `shifts`: the largest x of every row."""
        hide(x, place, -math.inf)
        torch.maximum(sums.shift, x.amax(1), out=sums.shift)

    def normalise(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """First walk over column blocks x (r, n): normalisers and means. Overwrites x, as every walk."""
        self._normalise(x, sums, place)

    def correct(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """Second walk: log-ratios, and <q, g>, by which gradients through p are corrected."""
        e = self._levels(x, sums, place)
        rho = self._log_ratios(e, x, sums, place, note=self.keeps_parts)
        if self.flows:
            self._flow(e, rho, sums, place, note=True)

    def differentiate(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """Third walk, with complete `sums`: turn x into d loss / d x."""
        e = self._levels(x, sums, place)
        product = self._buffers[1]
        if self.flows:
            product = self._flow(e, self._log_ratios(e, x, sums, place, note=False), sums, place, note=False)
        self._differentiate(e, product, x, sums, place)

    def release(self) -> None:
        """Give the buffers back; they are made again when needed."""
        self.__dict__.pop("_buffers", None)

    def row_parts(self, sums: RowSums) -> list[Tensor]:
        """Parts of every row's loss: kl_t, cross_entropy, entropy_p, positive_mass; each (b,) float64."""
        z, mean, log_ratio = sums.z.double(), sums.mean.double(), sums.log_ratio.double()
        divergences, cross = [], torch.zeros_like(z[0])
        mean_of_p = sums.positive[0].double()
        for t, alpha in enumerate(self._alpha, start=1):
            mean_of_p = (1 - alpha) * mean_of_p + alpha * mean[t - 1] / z[t - 1]
            cross = cross + z[t].log() - self._ratio[t] * mean_of_p
            divergences.append(log_ratio[t - 1] * self._scale_of_p[t - 1] / z[-1] + self._constant(t, z))
        entropy = cross - torch.stack(divergences).sum(0)
        return [*divergences, cross, entropy, sums.positive[1].double() / z[-1]]

    def row_loss(self, sums: RowSums) -> Tensor:
        """Every row's loss (b,) float64."""
        if self.keeps_parts:
            return torch.stack(self.row_parts(sums)[: len(self._alpha)]).sum(0)
        # sum_t <p(t), rho_t>, with p(t) resolved into p(0) and the q(s): what the gradient has summed already
        z, flow = sums.z.double(), sums.flow.double()
        loss = (1 - self._alpha[0]) * sums.positive[2].double()
        for t, alpha in enumerate(self._alpha, start=1):
            loss = loss + alpha * flow[t - 1] / z[t - 1] + self._constant(t, z)
        return loss

    def _constant(self, t: int, z: Tensor) -> Tensor:
        """The constant by which rho_t is smaller than log p(t) - log q(t)."""
        return math.log(self._scale_of_p[t - 1]) + (z[t] / z[-1]).log()

    def _levels(self, x: Tensor, sums: RowSums, place: Place) -> Tensor:
        """e_0..e_D (D+1, r, n), 0 at the excluded column; x is shifted in place."""
        if self.shifts:
            x.sub_(sums.shift[:, None])
        hide(x, place, 0)
        e = self._buffers[0][:, : len(x)]
        torch.mul(x, self._ratios[:-1], out=e[:-1])
        e[:-1].exp_()
        torch.exp(x, out=e[-1])
        if place.excluded is not None:
            e.diagonal(place.excluded, 1, 2).zero_()
        return e

    def _normalise(self, x: Tensor, sums: RowSums, place: Place) -> Tensor:
        e = self._levels(x, sums, place)
        sums.z.add_(e.sum(2))
        if self.keeps_parts:
            sums.mean.add_(torch.mul(e[:-1], x, out=self._buffers[1][:, : len(x)]).sum(2))
        self._note_positive(0, x, sums, place)
        self._note_positive(1, e[-1], sums, place)
        return e

    def _log_ratios(self, e: Tensor, x: Tensor, sums: RowSums, place: Place, note: bool) -> Tensor:
        """rho_1..rho_D (D, r, n). P_t = p(t) z_D / scale keeps rho_t small: it is log p - log q but for a constant
        that is 0 where temperatures agree."""
        rho, p = (buffer[:, : len(x)] for buffer in self._buffers[1:])
        added = (self._table[0] * (sums.z[-1] / sums.z))[:, :, None]
        torch.mul(e[0], added[0], out=p[0])
        hide(p[0], place, self._tiny)
        if place.positive is not None:
            p[0].diagonal(place.positive).add_(sums.z[-1], alpha=self._fold[0])
        for t in range(1, len(p)):
            previous = p[t - 1] if self._fold[t] == 1 else torch.mul(p[t - 1], self._fold[t], out=p[t])
            torch.addcmul(previous, e[t], added[t], out=p[t])
        if self._clamps:
            p.clamp_min_(self._tiny)
        torch.log(p, out=rho).addcmul_(x, self._ratios[1:], value=-1)
        if note:
            sums.log_ratio.add_(p.mul_(rho).sum(2))
        return rho

    def _flow(self, e: Tensor, rho: Tensor, sums: RowSums, place: Place, note: bool) -> Tensor:
        """e_(t-1) G_t (D, r, n) in place of rho_t, where G_t = rho_t + (1 - alpha(t+1)) G_(t+1)."""
        for t in range(len(rho) - 1, 0, -1):
            rho[t - 1].add_(rho[t], alpha=1 - self._alpha[t])
        if note:
            self._note_positive(2, rho[0], sums, place)
        product = rho.mul_(e[:-1])
        if note:
            sums.flow.add_(product.sum(2))
        return product

    def _differentiate(self, e: Tensor, product: Tensor, x: Tensor, sums: RowSums, place: Place) -> None:
        """x <- sum_s e_s (K_s + f_s G_(s+1)) - p(0) on_positive, with factors K_s and f_s of the row."""
        inverse = sums.z.reciprocal()
        through_p, factor = self._table[1] * inverse, self._table[2] * inverse
        gradient = e[-1].mul_(factor[-1][:, None])
        if self.flows:
            factor = torch.addcmul(factor[:-1], (through_p * inverse)[:-1], sums.flow, value=-1)
        through_p, factor = through_p[:, :, None], factor[:, :, None]
        for s in range(len(product) - 1, -1, -1):
            if self.flows:
                gradient.addcmul_(product[s], through_p[s])
            torch.addcmul(gradient, e[s], factor[s], out=gradient if s else x)
        if place.positive is not None:
            x.diagonal(place.positive).sub_(self._on_positive)

    def _note_positive(self, which: int, values: Tensor, sums: RowSums, place: Place) -> None:
        if place.positive is not None:
            sums.positive[which].copy_(values.diagonal(place.positive))


def scaled_chain(alpha: Sequence[float]) -> tuple[list[float], list[float], list[float]]:
    """Coefficients of P_t = fold P_(t-1) + added q(t-1), where P_t = p(t) / scale.

    The scale absorbs the factors 1 - alpha, so that a step of the recursion is one multiply-add; when it
    becomes small (or alpha is 1), it is folded into P and starts again from 1.

    Returns:
        fold, added, scale, one number per level.
    """
    folds, added, scales, scale = [], [], [], 1.0
    for a in alpha:
        scale *= 1 - a
        fold = 1.0
        if scale < 1e-3:
            fold, scale = scale, 1.0
        folds.append(fold)
        added.append(a / scale)
        scales.append(scale)
    return folds, added, scales


def gradient_coefficients(alpha: Sequence[float], ratio: Sequence[float]) -> list[list[float]]:
    """Factors of q(s), s = 0..D, in d loss / d x: of g through p, and directly.

    Directly: ratio(s) from KL(p(s) || q(s)), and -ratio(t) times the share of q(s) in p(t) from the later levels.

    Args:
        alpha: couplings, levels 1..D.
        ratio: tau(D) / tau(s), levels 0..D.
    """
    depth = len(alpha)
    through_p = [ratio[s] * alpha[s] for s in range(depth)] + [0.0]
    direct = []
    for s in range(depth + 1):
        shares = [alpha[s] * math.prod(1 - a for a in alpha[s + 1 : t]) for t in range(s + 1, depth + 1)]
        later = sum(share * ratio[t] for t, share in enumerate(shares, start=s + 1))
        direct.append((ratio[s] if s > 0 else 0.0) - later)
    return [through_p, direct]
