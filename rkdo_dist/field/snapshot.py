"""Rows of a relation between snapshots of an encoder: sparse, remembered from one to the next.

A snapshot embeds every sample once; its relation w is the softmax of similarities at the teacher's temperature over the
sample's (mutual) nearest neighbours. What is remembered of it is `field.relation.remembered` on stored entries alone:
a column that a row does not store has probability 0 in it, so of two rows' geometric mean only the columns of both are
left. Where a snapshot finds no neighbours the memory stays, and where there is no memory it is w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rkdo_dist.field.neighbours import largest
from rkdo_dist.field.persistent import Rows

_ENTRIES = 1 << 22  # of a chunk


def attended(embeddings: Tensor, neighbours: Tensor, own: range, temperature: float) -> Tensor:
    """w over the listed neighbours of the samples `own`, (r, k) float64; zeros for a sample without any.

    Args:
        embeddings: unit-norm, of all samples (n, d).
        neighbours: (r, k) int32, n for none.
        temperature: tau_T > 0.
    """
    n, k = len(embeddings), neighbours.shape[1]
    rows = max(1, _ENTRIES // (k * embeddings.shape[1]))
    found = []
    for start in range(0, len(neighbours), rows):
        part = neighbours[start : start + rows]
        first = own.start + start
        mine, theirs = embeddings[first : first + len(part)], embeddings[part.long().clamp(max=n - 1)]
        logits = (mine[:, None, :].double() * theirs.double()).sum(2) / temperature
        logits.masked_fill_(part == n, -1e30)
        found.append(torch.softmax(logits, 1) * (part < n))
    return torch.cat(found) if found else neighbours.double()


def at(columns: Tensor, p: Tensor, asked: Tensor, n: int) -> Tensor:
    """Probabilities (r, C') at the columns asked for (r, C'), of rows with entries (r, C); 0 where none is stored."""
    rows, found = max(1, _ENTRIES // (columns.shape[1] * asked.shape[1])), []
    for part in (slice(start, start + rows) for start in range(0, len(p), rows)):
        same = (asked[part, :, None] == columns[part, None, :]) & (asked[part] < n)[:, :, None]
        found.append((same * p[part, None, :]).sum(2))
    return torch.cat(found) if found else torch.zeros(asked.shape, dtype=p.dtype)


def remember(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], momentum: float, mean: str, stored: int, n: int
) -> tuple[Tensor, Tensor]:
    """r after a snapshot: columns (r, stored) int64 and probabilities float64, largest first.

    Args:
        old, new: r before and w, each columns (r, C), n for none, and probabilities; rows sum to 1, or to 0 if empty.
        momentum: 1 - rho, the share that stays, in [0, 1).
        mean: "arithmetic" or "geometric".
    """
    before, now = (rows[1].sum(1, keepdim=True) > 0 for rows in (old, new))
    if mean == "geometric":
        p = at(*old, new[0], n) ** momentum * new[1] ** (1 - momentum)
        met = before & (p.sum(1, keepdim=True) > 0)
        shares = torch.where(before & ~now, old[1], 0.0), torch.where(met, p, new[1])
    else:
        kept = torch.where(before & now, momentum, before.double())
        shares = kept * old[1], (1 - kept) * new[1]
    return largest(torch.cat([old[0].long(), new[0].long()], 1), torch.cat(shares, 1), stored, n)


def supervising(
    relation: tuple[Tensor, Tensor], own: range, weight: float, confidence: Tensor | None, n: int
) -> tuple[Rows, Tensor]:
    """p = (1 - a) e + a r, one entry more than r, the sample itself first; and a of every row (r,) float64.

    Args:
        relation: columns and probabilities of r.
        weight: of the relation.
        confidence: kappa of every row (r,), None: 1 - H(r) / log(entries).
    """
    columns, p = relation
    if confidence is None:
        entries = (p > 0).sum(1)
        peaked = 1 - entropy(p) / entries.clamp(min=2).double().log()
        confidence = torch.where(entries > 1, peaked.clamp(min=0), 1.0)
    a = torch.where(p.sum(1) > 0, weight * confidence, 0.0)
    samples = torch.arange(own.start, own.stop, device=p.device)
    all_columns = torch.cat([samples[:, None], columns], 1).int()
    probabilities = torch.cat([1 - a[:, None], a[:, None] * p], 1).float()
    return Rows(all_columns, probabilities, probabilities.new_zeros(len(p)), n), a


def entropy(p: Tensor) -> Tensor:
    """H (r,) of rows (r, C)."""
    return -torch.xlogy(p, p).sum(1)
