"""In-batch recursion on a strip of logits: the kernel of RKDO, in preallocated buffers.

One fact keeps it short: constants of a row drop out of the gradient of a softmax, q (g - <q, g>), so log p may be off
by any constant of the row that is restored in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from rkdo_dist.field.kernels import RowSums, Walk, hide, might_overflow, note_maximum
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.places import Place
from rkdo_dist.field.supervisors import Identity, Supervisor


class _Buffers:
    """Of a strip: q (D+1, r, n), rho (D, r, n), and p (D, r, n), which shares memory with rho if nothing asks for both;
    and their levels one by one."""

    def __init__(self, q: Tensor, rho: Tensor, p: Tensor) -> None:
        self.q, self.rho, self.p = q, rho, p
        self.before, self.last = q[:-1], q[-1]
        self.qs, self.rhos, self.ps = q.unbind(), rho.unbind(), p.unbind()


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
        alpha = objective.couplings
        self._supervisor = supervisor
        self.flows = objective.supervisor_grad == "flow"
        self.keeps_parts = parts or not self.flows
        inverse = [1 / tau for tau in objective.temperatures]
        self.scale = inverse[-1]
        self.shifts = might_overflow(objective, dtype)
        self._ratio = [x / self.scale for x in inverse]
        self._alpha = alpha
        # log p must stay finite where p is 0 or underflows
        self._clamps = self.shifts or alpha[0] < 1e-6
        # where p(0) is 0 beside the positive, log p(1) = log alpha q(0) needs no logarithm there
        self._knows_first = isinstance(supervisor, Identity) and not supervisor.spreads and not self._clamps
        self._tiny = torch.finfo(dtype).tiny
        kept = [math.prod(1 - a for a in alpha[:t]) for t in range(1, len(alpha) + 1)]
        self._on_positive = sum(x * k for x, k in zip(self._ratio[1:], kept, strict=True))
        self._through_p, self._direct = gradient_coefficients(alpha, self._ratio)
        self._ratios, self._table, self._couplings, self._powers = _tables(tuple(self._ratio), alpha, dtype, device)
        self._shape = rows, columns
        self._kept: dict[int, _Buffers] = {}
        self._room: list[Tensor] = []

    def _buffers(self, rows: int) -> _Buffers:
        """Those of a strip of so many rows; a shorter one uses the memory of the largest."""
        if rows not in self._kept:
            most, columns = self._shape
            if not self._room:
                levels = len(self._alpha)
                counts = (levels + 1, levels, levels) if self.keeps_parts else (levels + 1, levels)
                self._room = [self._ratios.new_empty(n * most * columns) for n in counts]
            views = [room[: len(room) // most * rows].view(-1, rows, columns) for room in self._room]
            self._kept[rows] = _Buffers(views[0], views[1], views[-1])
        return self._kept[rows]

    @property
    def walks(self) -> tuple[Walk, ...]:
        """See `Kernel`."""
        return (note_maximum, self.normalise, self.correct) if self.shifts else (self.normalise, self.correct)

    def fused(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """See `Kernel`."""
        self.measure(x, sums, place)
        self._differentiate(x, sums, place)

    def measure(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """See `Kernel`."""
        self._softmax(x, sums, place)
        self._log_ratios(x, sums, place, note=self.keeps_parts)
        if self.flows:
            self._flow(x, sums, place, note=True)

    def normalise(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """First walk over column blocks x (r, n): normalisers."""
        if self.shifts:
            x.sub_(sums.shift[:, None])
        hide(x, place.excluded, -math.inf)
        sums.z.add_(torch.mul(x, self._ratios, out=self._buffers(len(x)).q).exp_().sum(2))

    def correct(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """Second walk: log-ratios, and <q, g>, by which gradients through p are corrected."""
        self._learned(x, sums, place)
        self._log_ratios(x, sums, place, note=self.keeps_parts)
        if self.flows:
            self._flow(x, sums, place, note=True)

    def differentiate(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """See `Kernel`."""
        self._learned(x, sums, place)
        if self.flows:
            self._log_ratios(x, sums, place, note=False)
            self._flow(x, sums, place, note=False)
        self._differentiate(x, sums, place)

    def release(self) -> None:
        """See `Kernel`."""
        self._kept.clear()
        self._room.clear()
        self._supervisor.release()

    def row_parts(self, sums: RowSums) -> list[Tensor]:
        """See `Kernel`."""
        log_z = self._log_z(sums.z)
        mean_of_q = sums.mean.double() * self._couplings
        divergences = sums.log_ratio.double() + self._constants(log_z)
        cross = torch.zeros_like(log_z[0])
        mean_of_p = self._supervisor.mean(sums.total[0], sums.positive[0])
        for t, alpha in enumerate(self._alpha, start=1):
            mean_of_p = (1 - alpha) * mean_of_p + mean_of_q[t - 1]
            cross = cross + (log_z[t] - self._ratio[t] * mean_of_p)
        entropy = cross - divergences.sum(0)
        return [*divergences, cross, entropy, sums.positive[1].double()]

    def row_loss(self, sums: RowSums) -> Tensor:
        """See `Kernel`."""
        constants = self._constants(self._log_z(sums.z))
        if self.keeps_parts:
            return (sums.log_ratio.double() + constants).sum(0)
        # sum_t <p(t), rho_t>, with p(t) resolved into p(0) and the q(s): what the gradient has summed already
        loss = (1 - self._alpha[0]) * self._supervisor.mean(sums.total[1], sums.positive[2])
        for of_level, constant in zip(sums.flow.double() * self._couplings, constants, strict=True):
            loss = loss + of_level + constant
        return loss

    def _log_z(self, z: Tensor) -> Tensor:
        """Logarithms of the normalisers of q(D)^(tau(D) / tau(t)) (D+1, b) float64: 0 for q(D) itself."""
        log_z = z.double().log()
        return log_z - self._powers * log_z[-1]

    def _constants(self, log_z: Tensor) -> Tensor:
        """The constants by which rho_t is smaller than log p(t) - log q(t), (D, b)."""
        if not self._knows_first:
            return log_z[1:]
        return torch.cat([log_z[1:2] + (math.log(self._alpha[0]) - log_z[0]), log_z[2:]])

    def _softmax(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """q(0)..q(D) of rows whose columns are all there; x becomes log q(D), 0 at the excluded column."""
        buffers = self._buffers(len(x))
        hide(x, place.excluded, -math.inf)
        if self.shifts:  # large logits lose digits when log q is made of them at once
            x.sub_(x.amax(1, keepdim=True))
        torch.softmax(x, 1, out=buffers.last)
        # Normalisers are what is missing between x and log q, read off at a column where q does not underflow.
        assert place.positive is not None
        positive = partial(torch.diagonal, offset=place.positive, dim1=-2, dim2=-1)
        at = partial(torch.amax, dim=-1) if self.shifts else positive
        log_q = at(buffers.last).log()
        x.sub_((at(x) - log_q)[:, None])
        torch.softmax(torch.mul(x, self._ratios[:-1], out=buffers.before), 2, out=buffers.before)
        torch.div((log_q * self._ratios[:, :, 0]).exp_(), at(buffers.q), out=sums.z)
        hide(x, place.excluded, 0)

    def _learned(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """The same in a block of columns, with complete `sums`."""
        buffers = self._buffers(len(x))
        if self.shifts:
            x.sub_(sums.shift[:, None])
        x.sub_(sums.z[-1].log()[:, None])
        hide(x, place.excluded, -math.inf)
        torch.mul(x, self._ratios, out=buffers.q).exp_()
        buffers.q.mul_(self._log_z(sums.z).neg_().exp_().to(x.dtype)[:, :, None])
        hide(x, place.excluded, 0)

    def _log_ratios(self, x: Tensor, sums: RowSums, place: Place, note: bool) -> None:
        """rho_1..rho_D, which is log p - log q but for a constant of the row."""
        buffers, alpha = self._buffers(len(x)), self._alpha
        qs, rhos, ps = buffers.qs, buffers.rhos, buffers.ps
        if note:
            sums.mean.add_(torch.mul(buffers.before, x, out=buffers.rho).sum(2))
            if self._supervisor.spreads:
                sums.total[0].add_(x.sum(1))
            self._supervisor.add_dot(sums.positive[0], x, place)
            self._supervisor.add_mass(sums.positive[1], buffers.last, place)
        torch.mul(qs[0], alpha[0], out=ps[0])
        self._supervisor.add(ps[0], place, 1 - alpha[0])
        for t in range(1, len(alpha)):
            torch.lerp(ps[t - 1], qs[t], alpha[t], out=ps[t])
        if place.excluded is not None:
            buffers.p.diagonal(place.excluded, 1, 2).fill_(self._tiny)
        if self._clamps:
            buffers.p.clamp_min_(self._tiny)
        first = int(self._knows_first)
        if first:  # log p(1) is that of alpha q(0), but at the positive
            torch.mul(x, self._ratio[0] - self._ratio[1], out=rhos[0])
            if place.positive is not None:
                q = qs[0].diagonal(place.positive)
                rhos[0].diagonal(place.positive).add_(q.reciprocal().mul_(1 / alpha[0] - 1).log1p_())
        torch.log(buffers.p[first:], out=buffers.rho[first:]).addcmul_(x, self._ratios[1 + first :], value=-1)
        if note:
            sums.log_ratio.add_(buffers.p.mul_(buffers.rho).sum(2))

    def _flow(self, x: Tensor, sums: RowSums, place: Place, note: bool) -> None:
        """q(t-1) G_t in place of rho_t, where G_t = rho_t + (1 - alpha(t+1)) G_(t+1)."""
        buffers = self._buffers(len(x))
        rhos = buffers.rhos
        for t in range(len(rhos) - 1, 0, -1):
            rhos[t - 1].add_(rhos[t], alpha=1 - self._alpha[t])
        if note:
            if self._supervisor.spreads:
                hide(rhos[0], place.excluded, 0)
                sums.total[1].add_(rhos[0].sum(1))
            self._supervisor.add_dot(sums.positive[2], rhos[0], place)
        product = buffers.rho.mul_(buffers.before)
        if note:
            sums.flow.add_(product.sum(2))

    def _differentiate(self, x: Tensor, sums: RowSums, place: Place) -> None:
        """x <- sum_s q_s (K_s + f_s (G_(s+1) - <q_s, G_(s+1)>)) - p(0) on_positive."""
        buffers = self._buffers(len(x))
        torch.mul(buffers.last, self._direct[-1], out=x)
        if self.flows:
            factors = torch.addcmul(self._table[1], self._table[0], sums.flow, value=-1).unsqueeze(2).unbind()
            for q, factor, product, through_p in zip(buffers.qs, factors, buffers.rhos, self._through_p, strict=False):
                x.add_(product, alpha=through_p).addcmul_(q, factor)
        else:
            for q, direct in zip(buffers.qs, self._direct[:-1], strict=False):
                x.add_(q, alpha=direct)
        self._supervisor.add(x, place, -self._on_positive)
        if self._supervisor.spreads:
            hide(x, place.excluded, 0)


@lru_cache(maxsize=64)
def _tables(
    ratio: tuple[float, ...], alpha: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Constants of an objective on a device, made once: tau(D) / tau(s) (D+1, 1, 1), and the factors of q(s), s < D,
    through p and directly (2, D, 1); in float64 alpha (D, 1), and those quotients again (D+1, 1)."""
    powers = torch.tensor(ratio, dtype=torch.float64, device=device)[:, None]
    factors = torch.tensor(gradient_coefficients(alpha, ratio), dtype=dtype, device=device)[:, :-1, None]
    couplings = torch.tensor(alpha, dtype=torch.float64, device=device)[:, None]
    return powers.to(dtype)[:, :, None], factors, couplings, powers


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
