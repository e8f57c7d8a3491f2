"""In-batch recursion on a strip of logits: the kernel of RKDO, in preallocated buffers.

One fact keeps it short: constants of a row drop out of the gradient of a softmax, q (g - <q, g>), so log p may be off
by any constant of the row that is restored in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from rkdo_dist.field.kernels import RowSums, Walk, hide, might_overflow, note_maximum
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.places import Place
from rkdo_dist.field.supervisors import Supervisor


class RecursiveKernel:
    """In-batch recursion from p(0), D levels (eq. 3 and 4); see `Kernel`.

    Args:
        objective: with in-batch recursion.
        supervisor: p(0) of the b rows.
        rows, columns: size of the largest strip; all strips have this many columns.
        dtype: float32 or float64.
        parts: keep the sums of every part; without, only those that the loss and its gradient need.
    """

    def __init__(
        self,
        objective: Objective,
        supervisor: Supervisor,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        parts: bool,
    ) -> None:
        depth, alpha = objective.depth, objective.couplings
        self._supervisor = supervisor
        self.flows = objective.supervisor_grad == "flow"
        self.keeps_parts = parts or not self.flows
        inverse = [1 / tau for tau in objective.temperatures]
        self.scale = inverse[-1]
        self.shifts = might_overflow(objective, dtype)
        self._ratio = [x / self.scale for x in inverse]
        self._alpha, self._fold, _, self._scale_of_p = alpha, *scaled_chain(alpha)
        # log p must stay finite where p is 0 or underflows
        self._clamps = self.shifts or alpha[0] < 1e-6 or any(fold != 1 for fold in self._fold)
        self._tiny = torch.finfo(dtype).tiny
        kept = [math.prod(1 - a for a in alpha[:t]) for t in range(1, depth + 1)]
        self._on_positive = sum(x * k for x, k in zip(self._ratio[1:], kept, strict=True))
        self._table, self._ratios, per_level = _tables(tuple(self._ratio), alpha, dtype, device)
        self._shares, self._scales, self._log_scales = per_level
        self._shape = rows, columns

    @cached_property
    def _buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """e (D+1, r, n), rho (D, r, n), and P (D, r, n), which shares memory with rho if nothing asks for both."""
        e = self._table.new_empty(len(self._ratio), *self._shape)
        rho = e.new_empty(len(self._alpha), *self._shape)
        return e, rho, torch.empty_like(rho) if self.keeps_parts else rho

    @property
    def walks(self) -> tuple[Walk, ...]:
        """See `Kernel`."""
        return (note_maximum, self.normalise, self.correct) if self.shifts else (self.normalise, self.correct)

    def fused(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """See `Kernel`."""
        if self.shifts:
            note_maximum(x, sums, place)
        e = self._normalise(x, sums, place)
        product = self._log_ratios(e, x, sums, place, note=self.keeps_parts)
        if self.flows:
            product = self._flow(e, product, sums, place, note=True)
        self._differentiate(e, product, x, sums, place)

    def normalise(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """First walk over column blocks x (r, n): normalisers and means."""
        self._normalise(x, sums, place)

    def correct(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """Second walk: log-ratios, and <q, g>, by which gradients through p are corrected."""
        e = self._levels(x, sums, place)
        rho = self._log_ratios(e, x, sums, place, note=self.keeps_parts)
        if self.flows:
            self._flow(e, rho, sums, place, note=True)

    def differentiate(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """See `Kernel`."""
        e = self._levels(x, sums, place)
        product = self._buffers[1]
        if self.flows:
            product = self._flow(e, self._log_ratios(e, x, sums, place, note=False), sums, place, note=False)
        self._differentiate(e, product, x, sums, place)

    def release(self) -> None:
        """See `Kernel`."""
        self.__dict__.pop("_buffers", None)
        self._supervisor.release()

    def row_parts(self, sums: RowSums) -> list[Tensor]:
        """See `Kernel`."""
        z, log_z = sums.z.double(), sums.z.double().log()
        mean_of_q = sums.mean.double() * self._shares / z[:-1]  # times alpha
        divergences = sums.log_ratio.double() * self._scales / z[-1] + self._constants(z)
        cross = torch.zeros_like(z[0])
        mean_of_p = self._supervisor.mean(sums.total[0], sums.positive[0])
        for t, alpha in enumerate(self._alpha, start=1):
            mean_of_p = (1 - alpha) * mean_of_p + mean_of_q[t - 1]
            cross = cross + (log_z[t] - self._ratio[t] * mean_of_p)
        entropy = cross - divergences.sum(0)
        return [*divergences, cross, entropy, sums.positive[1].double() / z[-1]]

    def row_loss(self, sums: RowSums) -> Tensor:
        """See `Kernel`."""
        z = sums.z.double()
        if self.keeps_parts:
            return (sums.log_ratio.double() * self._scales / z[-1] + self._constants(z)).sum(0)
        # sum_t <p(t), rho_t>, with p(t) resolved into p(0) and the q(s): what the gradient has summed already
        flow, constants = sums.flow.double() * self._shares / z[:-1], self._constants(z)
        loss = (1 - self._alpha[0]) * self._supervisor.mean(sums.total[1], sums.positive[2])
        for of_level, constant in zip(flow, constants, strict=True):
            loss = loss + of_level + constant
        return loss

    def _constants(self, z: Tensor) -> Tensor:
        """The constants by which rho_t is smaller than log p(t) - log q(t), (D, b)."""
        return self._log_scales + (z[1:] / z[-1]).log()

    def _levels(self, x: Tensor, sums: RowSums, place: Place) -> Tensor:
        """e_0..e_D (D+1, r, n), 0 at the excluded column; x is shifted in place."""
        if self.shifts:
            x.sub_(sums.shift[:, None])
        hide(x, place.excluded, 0)
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
        if self._supervisor.spreads:
            sums.total[0].add_(x.sum(1))
        self._supervisor.add_dot(sums.positive[0], x, place)
        self._supervisor.add_mass(sums.positive[1], e[-1], place)
        return e

    def _log_ratios(self, e: Tensor, x: Tensor, sums: RowSums, place: Place, note: bool) -> Tensor:
        """rho_1..rho_D (D, r, n). P_t = p(t) z_D / scale keeps rho_t small: it is log p - log q but for a constant
        that is 0 where temperatures agree."""
        rho, p = (buffer[:, : len(x)] for buffer in self._buffers[1:])
        added = (self._table[0] * (sums.z[-1] / sums.z))[:, :, None]
        torch.mul(e[0], added[0], out=p[0])
        self._supervisor.add(p[0], place, self._fold[0], sums.z[-1])
        hide(p[0], place.excluded, self._tiny)
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
            if self._supervisor.spreads:
                hide(rho[0], place.excluded, 0)
                sums.total[1].add_(rho[0].sum(1))
            self._supervisor.add_dot(sums.positive[2], rho[0], place)
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
        self._supervisor.add(x, place, -self._on_positive)
        if self._supervisor.spreads:
            hide(x, place.excluded, 0)


@lru_cache(maxsize=64)
def _tables(
    ratio: tuple[float, ...], alpha: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Constants of an objective on a device, made once: what `_log_ratios` and `_differentiate` multiply with (3, D+1,
    1), tau(D) / tau(s) (D+1, 1, 1); and in float64 alpha, the scales of p, and their logarithms (3, D, 1)."""
    _, added, scales = scaled_chain(alpha)
    table = torch.tensor([[*added, 0.0], *gradient_coefficients(alpha, ratio)], dtype=dtype, device=device)
    ratios = torch.tensor(ratio, dtype=dtype, device=device)
    per_level = torch.tensor([alpha, scales, [math.log(s) for s in scales]], dtype=torch.float64, device=device)
    return table[:, :, None], ratios[:, None, None], per_level[:, :, None]


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
