"""The field of conditional distributions, dense and readable: THE ORACLE that every faster version is
tested against.

A row i of the field is a distribution over N columns. The supervisory rows p(t) and the learned rows q(t)
of an in-batch recursion of depth D are, for t = 1..D (Martin 2025, eq. 3 and 4):

    q(t)(j|i) = softmax_j(<row_i, column_j> / tau(t))
    p(t)      = (1 - alpha(t)) p(t-1) + alpha(t) q(t-1)

Everything here keeps r x N matrices and lets autograd differentiate. Shapes: r rows, N columns, d wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def similarities(rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products <row_i, column_j>: (r, d) and (N, d) give (r, N)."""
    return rows @ columns.T


def log_learned(similarity: Tensor, temperature: float | Tensor, excluded: Tensor | None = None) -> Tensor:
    """log q(j|i), the logarithm of the learned distribution (eq. 4).

    Args:
        similarity: (r, N).
        temperature: tau > 0; infinite gives the flat distribution over the columns that are not excluded.
        excluded: (r, N) bool, True where a column does not take part (the self column k = i); its log q is
            -inf.
    """
    logits = similarity / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    return torch.log_softmax(logits, dim=1)


def supervisory(previous_p: Tensor, previous_q: Tensor, coupling: float) -> Tensor:
    """p(t) = (1 - alpha) p(t-1) + alpha q(t-1) (eq. 3); all (r, N), alpha in [0, 1]."""
    return (1 - coupling) * previous_p + coupling * previous_q


@dataclass(frozen=True)
class Field:
    """The distributions of every level of an in-batch recursion.

    Attributes:
        p: supervisory distributions p(1)..p(D), each (r, N).
        log_q: log q(1)..log q(D), each (r, N), -inf at excluded columns.
    """

    p: list[Tensor]
    log_q: list[Tensor]


def unroll(
    similarity: Tensor,
    initial: Tensor,
    temperatures: Sequence[float | Tensor],
    couplings: Sequence[float],
    excluded: Tensor | None = None,
    supervisor_grad: str = "flow",
) -> Field:
    """The in-batch recursion from p(0) to p(D).

    Args:
        similarity: (r, N).
        initial: p(0), (r, N), rows sum to 1, 0 at excluded columns: the identity for in-batch recursion,
            label neighbourhoods for a supervised objective, remembered rows for a persistent field.
        temperatures: tau(0)..tau(D).
        couplings: alpha(1)..alpha(D).
        excluded: (r, N) bool, see `log_learned`.
        supervisor_grad: "flow" (gradients pass through p, as in the released code) or "stop" (p is fixed
            while q is fitted, the two-stage descent of sec. 6.2.1).
    """
    p = initial
    field = Field([], [])
    log_q = log_learned(similarity, temperatures[0], excluded)
    for temperature, coupling in zip(temperatures[1:], couplings, strict=True):
        q = log_q.exp()
        p = supervisory(p, q.detach() if supervisor_grad == "stop" else q, coupling)
        log_q = log_learned(similarity, temperature, excluded)
        field.p.append(p)
        field.log_q.append(log_q)
    return field


def entropy(p: Tensor) -> Tensor:
    """H(p) = -sum_j p log p per row: (r, N) to (r,). Zero probabilities contribute 0, and no gradient."""
    positive = p > 0
    return -torch.where(positive, p * torch.where(positive, p, 1).log(), 0).sum(1)


def cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """-sum_j p log q per row: (r, N), (r, N) to (r,). Columns with p = 0 contribute 0, also where log q =
    -inf."""
    return -(p * torch.where(p > 0, log_q, 0)).sum(1)


def kl_divergence(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row (eq. 1): (r, N), (r, N) to (r,)."""
    return cross_entropy(p, log_q) - entropy(p)
