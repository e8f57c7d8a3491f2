"""An independent statement of the field's mathematics, row by row in float64 numpy, and data for tests.

Written from the paper's equations, sharing no code with the package: what the dense oracle is tested against.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rkdo_dist.field.objectives import Objective


def embeddings(batch: int, d: int, seed: int = 0, correlation: float = 0.7, copies: int = 0) -> tuple[Tensor, Tensor]:
    """Unit-norm float64 views (B, d); `copies` samples are duplicates of their predecessors."""
    generator = torch.Generator().manual_seed(seed)
    u, noise = (torch.randn(batch, d, generator=generator, dtype=torch.float64) for _ in range(2))
    v = correlation * u + (1 - correlation) * noise
    for i in range(1, min(copies + 1, batch)):
        u[i], v[i] = u[i - 1], v[i - 1]
    return torch.nn.functional.normalize(u, dim=1), torch.nn.functional.normalize(v, dim=1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True) if a > 0))


def rows_and_columns(u: np.ndarray, v: np.ndarray, pairing: str) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """For every row: the vector, the columns that take part, and the position of the positive among them."""
    batch = len(u)
    if pairing == "cross":
        return [(u[i], v, i) for i in range(batch)]
    both, rows = np.concatenate([u, v]), []
    for i in range(2 * batch):
        others = np.delete(both, i, axis=0)
        positive = (i + batch) % (2 * batch)
        rows.append((both[i], others, positive - (positive > i)))
    return rows


def rkdo(
    u: np.ndarray, v: np.ndarray, taus: list[float], alphas: list[float], pairing: str = "cross", debias: float = 0.0
) -> list[float]:
    """Mean KL(p(t) || q(t)) of every level t = 1..D, from p(0) = (1 - debias) identity + debias / N."""
    rows = rows_and_columns(u, v, pairing)
    totals = [0.0] * len(alphas)
    for row, columns, positive in rows:
        s = columns @ row
        p, q = np.full(len(columns), debias / len(columns)), softmax(s / taus[0])
        p[positive] += 1 - debias
        for t, alpha in enumerate(alphas):
            p = (1 - alpha) * p + alpha * q
            q = softmax(s / taus[t + 1])
            totals[t] += kl(p, q) / len(rows)
    return totals


def icon(u: np.ndarray, v: np.ndarray, tau: float, a: float, pairing: str = "cross") -> float:
    """Mean KL(p || q) with p = (1 - a) identity + a / N."""
    rows, total = rows_and_columns(u, v, pairing), 0.0
    for row, columns, positive in rows:
        p = np.full(len(columns), a / len(columns))
        p[positive] += 1 - a
        total += kl(p, softmax(columns @ row / tau)) / len(rows)
    return total


def supcon(u: np.ndarray, v: np.ndarray, labels: np.ndarray, tau: float) -> float:
    """SupCon's L_out (Khosla et al. 2020, eq. 2) over both views."""
    both, both_labels = np.concatenate([u, v]), np.concatenate([labels, labels])
    total = 0.0
    for i in range(len(both)):
        others = [j for j in range(len(both)) if j != i]
        logits = np.array([both[i] @ both[j] / tau for j in others])
        log_q = logits - np.log(np.exp(logits).sum())
        positives = [k for k, j in enumerate(others) if both_labels[j] == both_labels[i]]
        total -= log_q[positives].mean() / len(both)
    return total


def objectives_of(taus: float, depth: int, alpha: float) -> list[Objective]:
    """One of every kind and shape."""
    made = []
    for pairing, symmetric in (("cross", False), ("cross", True), ("joint", False)):
        for gradient in ("flow", "stop"):
            made.append(Objective.rkdo(depth, alpha, taus, 0.1, pairing, gradient, symmetric))
        debiased = Objective.rkdo(depth, alpha, taus, 0.1, pairing, "flow", symmetric, debias=0.3)
        made += [debiased, replace(debiased, supervisor="labels")]
        made.append(Objective.icon(0.2, taus, pairing, symmetric))
        made.append(Objective.infonce(taus, pairing, symmetric))
        made.append(Objective.supervised(taus, 0.1, pairing, symmetric))
    return made
