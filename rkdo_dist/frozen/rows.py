"""How good rows of p a teacher's embeddings make: the share of their mass on the sample's own class.

    w(j|i) prop. to 1[j != i] 1[j in N(i)] exp(<k_i, k_j> / tau)

for N(i) all samples, the k nearest, or the mutual ones among them; walks (P + ... + P^s) / s on the graph of the k
nearest; means of the rows of several visits, arithmetic or geometric (of the logits). Beside it, without labels: the
share of neighbours that are mutual, and the overlap sum_j min(w, w') of the rows of two views.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rkdo_dist.field.neighbours import mutual, nearest, walked
from rkdo_dist.field.persistent import Rows

_ENTRIES = 1 << 21  # of a block of rows
_WALKED = 256  # entries of a row of a walk


@dataclasses.dataclass(frozen=True)
class Teachers:
    """Unit-norm embeddings (N, d) of the same samples by view, and their labels.

    Attributes:
        plain: of the images as they are.
        weak, strong: of random views, one for each visit (at least two).
        labels: (N,) int64, -1 for none.
    """

    plain: Tensor
    weak: Sequence[Tensor]
    strong: Sequence[Tensor]
    labels: Tensor


def grade(
    teachers: Teachers, temperatures: Sequence[float], temperature: float, sizes: Sequence[int], walks: Sequence[int]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Grade the rows of every kind.

    Args:
        temperatures: of the rows over all samples.
        temperature: of all other rows.
        sizes: k of the neighbours, each below N.
        walks: s of the walks.

    Returns:
        For each kind of row a mapping: `group` ("view", "neighbours", "mutual", "walk", "memory"), `view`, what
        distinguishes it (`temperature`, `k`, `steps`, `mean`, `visits`), `precision` (mean over the labelled samples
        that have a row; None without labels), `error` (its standard error) and `rows` (share of the samples with a
        row). And without labels: `mutual` (by k) and `overlap` (by view).
    """
    found = _over_all(teachers, temperatures, temperature)
    neighbours, similarities = nearest(teachers.plain, max(sizes))
    shares = {}
    for k in sizes:
        near, weights = neighbours[:, :k], (similarities[:, :k] / temperature).softmax(1)
        found.append(_graded(near, weights, teachers.labels, group="neighbours", k=k, temperature=temperature))
        both = mutual(near)
        shares[str(k)] = float((both < len(near)).double().mean())
        kept = torch.where(both < len(near), weights, 0.0)
        kept = kept / kept.sum(1, keepdim=True).clamp(min=1e-30)
        found.append(_graded(both, kept, teachers.labels, group="mutual", k=k, temperature=temperature))
    k = sorted(sizes)[len(sizes) // 2]
    for steps in walks:
        rows: Rows = walked(neighbours[:, :k].contiguous(), steps, _WALKED)
        found.append(_graded(rows.columns, rows.probabilities, teachers.labels, group="walk", k=k, steps=steps))
    overlap = {
        view: _overlap(visits[0], visits[1], temperature)
        for view, visits in (("weak", teachers.weak), ("strong", teachers.strong))
    }
    return found, {"mutual": shares, "overlap": overlap}


def own_class_share(labels: Tensor) -> float | None:
    """The mean share of the other samples that are of a labelled sample's class: what uniform rows score."""
    known = labels[labels >= 0]
    if len(known) == 0:
        return None
    counts = torch.bincount(known).double()
    return float((counts * (counts - 1)).sum() / (len(known) * (len(labels) - 1)))


def _blocks(n: int) -> list[slice]:
    size = max(1, _ENTRIES // n)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _logits(keys: Tensor, rows: slice) -> Tensor:
    """Cosines (r, N), -inf at the sample itself."""
    x = keys[rows] @ keys.T
    x[torch.arange(len(x)), torch.arange(rows.start, rows.stop)] = -torch.inf
    return x


def _over_all(teachers: Teachers, temperatures: Sequence[float], temperature: float) -> list[dict[str, Any]]:
    """Rows over all samples: by view and temperature, and means over visits."""
    views = {"plain": teachers.plain, "weak": teachers.weak[0], "strong": teachers.strong[0]}
    asked: list[dict[str, Any]] = [
        {"group": "view", "view": view, "temperature": tau} for view in views for tau in temperatures
    ]
    asked += [
        {"group": "memory", "view": view, "temperature": temperature, "mean": mean, "visits": len(visits)}
        for view, visits in (("weak", teachers.weak), ("strong", teachers.strong))
        for mean in ("arithmetic", "geometric")
    ]
    masses: list[list[Tensor]] = [[] for _ in asked]
    for rows in _blocks(len(teachers.labels)):
        same = (teachers.labels[rows, None] == teachers.labels).float()
        plain = {view: _logits(keys, rows) for view, keys in views.items()}
        for number, one in enumerate(asked):
            if one["group"] == "view":
                p = (plain[one["view"]] / one["temperature"]).softmax(1)
            else:
                visits = [_logits(keys, rows) / temperature for keys in getattr(teachers, one["view"])]
                if one["mean"] == "arithmetic":
                    p = torch.stack([x.softmax(1) for x in visits]).mean(0)
                else:
                    p = torch.stack(visits).mean(0).softmax(1)
            masses[number].append((p * same).sum(1))
    return [_scored(torch.cat(some), teachers.labels >= 0, **one) for some, one in zip(masses, asked, strict=True)]


def _graded(columns: Tensor, p: Tensor, labels: Tensor, **about: Any) -> dict[str, Any]:
    """Sparse rows (N, K) of the plain view, N for no column; rows of zeros do not count."""
    theirs = torch.cat([labels, labels.new_full((1,), -2)])[columns.long()]
    mass = (p * (theirs == labels[:, None])).sum(1)
    return _scored(
        mass, (labels >= 0) & (p.sum(1) > 0), rows=float((p.sum(1) > 0).double().mean()), view="plain", **about
    )


def _scored(mass: Tensor, counted: Tensor, rows: float = 1.0, **about: Any) -> dict[str, Any]:
    some = mass[counted].double()
    precision = float(some.mean()) if len(some) else None
    error = float(some.std() / len(some) ** 0.5) if len(some) > 1 else None
    return {**about, "precision": precision, "error": error, "rows": rows}


def _overlap(first: Tensor, second: Tensor, temperature: float) -> float:
    total = 0.0
    for rows in _blocks(len(first)):
        p, q = ((_logits(keys, rows) / temperature).softmax(1) for keys in (first, second))
        total += float(torch.minimum(p, q).sum(dtype=torch.float64))
    return total / len(first)
