"""SNE and t-SNE, exact: the paper's third family, a small reference in at most a few n x n arrays.

    p(0): C_ij prop. to exp(-|x_i - x_j|^2 beta_i), j != i, with beta_i such that row i has the perplexity asked for
    field: P = (C + C^T) / 2n, Q_ij = k(|y_i - y_j|^2) / sum_{k != l} k(|y_k - y_l|^2)          (t-SNE, van der Maaten)
    row:   P = C / n,          Q_ij = k(|y_i - y_j|^2) / (n sum_{l != i} k(|y_i - y_l|^2))      (SNE; I-Con's "t-SNE")
    loss = sum_ij P_ij log(P_ij / Q_ij);  student: k(s) = (1 + s / nu)^(-(nu + 1) / 2);  gaussian: k(s) = exp(-s)

With a coupling, p recurs over the iterations: P(t) = (1 - alpha) P(t - 1) + alpha Q(t - 1) (the paper's eq. 3), and the
loss that is lowered is the one against P(t). Everything is computed in blocks of rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

AFFINITIES, NORMALISERS = ("student", "gaussian"), ("field", "row")
EXAGGERATION, EARLY = 12.0, 250  # p is multiplied in the first iterations; scikit-learn's values
_ENTRIES = 1 << 22  # of a block
_HALVINGS = 64


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How closeness in the map is measured.

    Attributes:
        affinity: "student" or "gaussian".
        normaliser: "field" (one number for all pairs) or "row".
        freedom: nu > 0 of the student.
    """

    affinity: str = "student"
    normaliser: str = "field"
    freedom: float = 1.0

    def log(self, squared: Tensor) -> Tensor:
        """log k of squared distances; replaces them."""
        if self.affinity == "gaussian":
            return squared.neg_()
        return squared.div_(self.freedom).log1p_().mul_(-(self.freedom + 1) / 2)

    def slope(self, log_k: Tensor) -> Tensor | float:
        """-d log k / d s, from log k."""
        if self.affinity == "gaussian":
            return 1.0
        nu = self.freedom
        return (2 / (nu + 1) * log_k).exp_().mul_((nu + 1) / (2 * nu))


def blocks(n: int) -> Iterator[slice]:
    """Blocks of consecutive rows of an n x n array."""
    size = max(1, _ENTRIES // n)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def perplexity_rows(x: Tensor, perplexity: float) -> Tensor:
    """C (n, n): Gaussian rows with the perplexity asked for, without the diagonal.

    Args:
        x: (n, f).
        perplexity: exp of a row's entropy, in (1, n - 1). Where more than so many samples are equally near, it is more.
    """
    n, found = len(x), torch.empty(len(x), len(x), dtype=x.dtype)
    wide = x.double() - x.double().mean(0)
    norms = wide.square().sum(1)
    for rows in blocks(n):
        squared = (norms[rows, None] + norms - 2 * wide[rows] @ wide.T).clamp_(min=0)
        own = torch.arange(rows.start, rows.stop)
        squared[own - rows.start, own] = torch.inf
        squared -= squared.amin(1, keepdim=True)
        squared /= squared.where(squared < torch.inf, 0.0).mean(1, keepdim=True).clamp(min=1e-300)
        low, high = torch.zeros(len(own), dtype=torch.float64), torch.full((len(own),), torch.inf, dtype=torch.float64)
        beta = torch.ones(len(own), dtype=torch.float64)
        for _ in range(_HALVINGS):
            p = (-squared * beta[:, None]).exp_()
            total = p.sum(1)
            p /= total[:, None]
            flat = total.log() + beta * (p * squared.where(squared < torch.inf, 0.0)).sum(1) > math.log(perplexity)
            low, high = torch.where(flat, beta, low), torch.where(flat, high, beta)
            beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
        p = (-squared * beta[:, None]).exp_()
        found[rows] = p / p.sum(1, keepdim=True)
    return found


def supervisor(x: Tensor, perplexity: float, kernel: Kernel) -> Tensor:
    """P(0) (n, n) of the kernel's normaliser; sums to 1."""
    p, n = perplexity_rows(x, perplexity), len(x)
    if kernel.normaliser == "field":
        for rows in blocks(n):  # in place: a block and its mirror image, from the diagonal on
            from_here = slice(rows.start, n)
            mean = (p[rows, from_here] + p[from_here, rows].T) / 2
            p[rows, from_here] = mean
            p[from_here, rows] = mean.T
    return p.div_(n)


def _log_kernels(y: Tensor, kernel: Kernel) -> Iterator[tuple[slice, Tensor]]:
    """log k of each block of rows (r, n), -inf on the diagonal."""
    norms = y.square().sum(1)
    for rows in blocks(len(y)):
        log_k = kernel.log((norms[rows, None] + norms - 2 * y[rows] @ y.T).clamp_(min=0))
        log_k[torch.arange(len(log_k)), torch.arange(rows.start, rows.stop)] = -torch.inf
        yield rows, log_k


def log_normaliser(y: Tensor, kernel: Kernel) -> Tensor:
    """(n, 1): log of what k is divided by, for each row."""
    sums = torch.cat([log_k.logsumexp(1) for _, log_k in _log_kernels(y, kernel)])
    if kernel.normaliser == "field":
        return sums.logsumexp(0).expand(len(y), 1)
    return (sums + math.log(len(y)))[:, None]


def divergence(p: Tensor, y: Tensor, kernel: Kernel) -> float:
    """sum_ij P_ij log(P_ij / Q_ij), summed in float64."""
    z, total = log_normaliser(y, kernel), 0.0
    for rows, log_k in _log_kernels(y, kernel):
        some = p[rows]
        log_q = (log_k - z[rows]).where(some > 0, 0.0)
        total += float((torch.xlogy(some, some) - some * log_q).double().sum())
    return total


def gradient(p: Tensor, y: Tensor, kernel: Kernel, scale: float = 1.0, coupling: float = 0.0) -> Tensor:
    """Gradient (n, d) of the divergence from `scale` p with respect to the map.

    Args:
        p: (n, n), sums to 1; with a coupling it becomes (1 - coupling) p + coupling Q.
        y: (n, d).
    """
    z, found = log_normaliser(y, kernel), torch.zeros_like(y)
    for rows, log_k in _log_kernels(y, kernel):
        q = (log_k - z[rows]).exp_()
        force = (p[rows] * scale - q).mul_(kernel.slope(log_k))
        if coupling:
            p[rows].mul_(1 - coupling).add_(q, alpha=coupling)
        found[rows] += 2 * (force.sum(1, keepdim=True) * y[rows] - force @ y)
        found += 2 * (force.sum(0)[:, None] * y - force.T @ y[rows])
    return found


def fit(
    p: Tensor,
    start: Tensor,
    kernel: Kernel,
    iterations: int,
    coupling: float = 0.0,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """The map (n, d) after some iterations of scikit-learn's schedule (momentum, gains, early exaggeration).

    Args:
        p: P(0); with a coupling it holds P(t) at the end. It recurs after the early iterations.
        start: (n, d).
    """
    y, update, gains = start.clone(), torch.zeros_like(start), torch.ones_like(start)
    rate = max(len(y) / EXAGGERATION / 4, 50.0)
    for done in range(iterations):
        early = done < EARLY
        found = gradient(p, y, kernel, EXAGGERATION if early else 1.0, 0.0 if early else coupling)
        gains = torch.where(update * found < 0, gains + 0.2, gains * 0.8).clamp_(min=0.01)
        update = (0.5 if early else 0.8) * update - rate * gains * found
        y += update
        progress(done + 1)
    return y
