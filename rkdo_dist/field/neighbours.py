"""Nearest neighbours, exact, and the rows of p that they make.

    from rkdo_dist.field.neighbours import nearest, walked
    neighbours, similarities = nearest(features, 20)        # (n, d) -> (n, 20) int32 and float32, the sample itself out
    rows = walked(neighbours, steps=2, most=256)            # relation rows (P + P^2) / 2 without self, `Rows`

A product of a tile of queries and a tile of samples depends on nothing else, equal similarities are ranked by sample,
so the result is the same, bit for bit, whoever computes which tile (`exchange.neighbours` has the work on many ranks).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from rkdo_dist.field.nearest import ROWS, Nearest, note
from rkdo_dist.field.persistent import Rows

TILE = 4096
METRICS = ("cosine", "euclidean")
_ENTRIES = 1 << 22  # of a chunk of a walk


def nearest(features: Tensor, k: int, metric: str = "cosine", tile: int = TILE) -> tuple[Tensor, Tensor]:
    """The k nearest other samples of every sample, exactly.

    Memory beyond the features is O(n k + tile^2). Computed and ranked in float32, on the features' device.

    Args:
        features: (n, d), floating point.
        k: in [1, n - 1].
        metric: "cosine" (inner products of rows divided by their norms) or "euclidean".
        tile: samples that are visited at once.

    Returns:
        Neighbours (n, k) int32, nearest first (equally near ones by their number), and similarities (n, k) float32:
        cosines, or minus half the squared distance.

    Raises:
        ValueError: if k is out of range, or a feature is not finite (its row is named).
    """
    require_neighbours(k, len(features))
    queries, columns = prepared(features, metric)
    n, parts = len(features), []
    starts = range(0, n, tile)
    for first in starts:
        own = queries[first : first + tile]
        parts.append(search(own, first, k, n, ((start, columns[start : start + tile]) for start in starts)))
    neighbours, similarities = (torch.cat(x) for x in zip(*parts, strict=True))
    if metric == "euclidean":
        similarities -= queries[:, :-1].square().sum(1, keepdim=True) / 2
    return neighbours, similarities


def require_neighbours(k: int, n: int) -> None:
    """Raises ValueError unless n samples have k neighbours each."""
    if not 1 <= k < n:
        raise ValueError(f"neighbours must lie in [1, {n - 1}] for {n} samples (the sample itself is none), got {k}")


def prepared(features: Tensor, metric: str = "cosine") -> tuple[Tensor, Tensor]:
    """Queries and columns (n, d or d + 1) float32 whose inner products rank neighbours as the metric does.

    Raises:
        ValueError: for an unknown metric, or a row that is not finite.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    broken = (~features.isfinite()).any(1).nonzero()
    if len(broken):
        raise ValueError(f"features must be finite, but row {int(broken[0])} is not ({len(broken)} rows are not)")
    x = features.double()
    if metric == "cosine":
        x = torch.nn.functional.normalize(x, dim=1).float()
        return x, x
    x = x - x.mean(0)
    one, norms = torch.ones_like(x[:, :1]), x.square().sum(1, keepdim=True)
    return torch.cat([x, one], 1).float(), torch.cat([x, -norms / 2], 1).float()


def search(queries: Tensor, first: int, k: int, n: int, tiles: Iterable[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """The k largest inner products of consecutive samples with all others.

    Args:
        queries: (r, d) float32 of samples first..first + r - 1.
        k, n: see `nearest`.
        tiles: all samples, in any order: number of the tile's first sample, and its columns (t, d).

    Returns:
        Samples (r, k) int32 and inner products (r, k), largest first.
    """
    found = Nearest.none(torch.empty(len(queries), 0, dtype=torch.int32, device=queries.device), k, 0, n, queries.dtype)
    for start, columns in tiles:
        visit(found, queries, first, columns, start)
    found.sort()
    return found.samples, found.logits


def visit(found: Nearest, queries: Tensor, first: int, columns: Tensor, start: int) -> None:
    """Add samples start..start + t - 1, whose columns (t, d) are given, to what `search` has found."""
    for row in range(0, len(queries), ROWS):
        part = slice(row, min(row + ROWS, len(queries)))
        x = queries[part] @ columns.T
        own = torch.arange(first + part.start, first + part.stop, device=x.device)[:, None] - start
        here, own = (own >= 0) & (own < len(columns)), own.clamp(0, len(columns) - 1)
        x.scatter_(1, own, x.gather(1, own).masked_fill_(here, -torch.inf))
        block = found.slice(part.start, part.stop)
        note(block, x, start)
        found.samples[part], found.logits[part] = block.samples, block.logits


def mutual(neighbours: Tensor) -> Tensor:
    """Neighbours (n, k) of which each has the other among its own; n takes the place of those that do not.

    Args:
        neighbours: (n, k) int32.
    """
    n, rows = len(neighbours), torch.arange(len(neighbours), device=neighbours.device)
    # i is among the neighbours of j: the pair (j, i) is in the list of all pairs
    pairs = (rows[:, None] * (n + 1) + neighbours).flatten().sort().values
    wanted = neighbours.long() * (n + 1) + rows[:, None]
    place = torch.searchsorted(pairs, wanted).clamp_(max=len(pairs) - 1)
    return torch.where((pairs[place] == wanted) & (neighbours < n), neighbours, n)


def walked(neighbours: Tensor, steps: int = 1, most: int = 256, own: range | None = None) -> Rows:
    """Relation rows (P + P^2 + ... + P^s) / s without the sample itself, P even over a sample's neighbours.

    A step of the walk goes to any neighbour alike. After every step a row keeps its `most` largest entries (equal ones:
    the smaller sample) and is divided by its sum; so is the mean of all steps, from which returns to the sample itself
    are taken first. A sample without neighbours has a row of zeros.

    Args:
        neighbours: (n, k) int32, n for none.
        steps: s >= 1.
        most: entries of a row, at least 1; with s = 1, k of them are kept whatever it is.
        own: the samples whose rows are made; None: all.

    Returns:
        Rows of K = k (s = 1) or `most` entries, largest first, in float32, with no rest.

    Raises:
        ValueError: if steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"walk must be at least 1 step, got {steps}")
    n, k = neighbours.shape
    own = range(n) if own is None else own
    width = k if steps == 1 else most
    rows = max(1, _ENTRIES // (width * k if steps > 1 else k))
    parts = [_walked(neighbours, steps, width, part) for part in _chunks(own, rows)]
    columns, p = (torch.cat(x) for x in zip(*parts, strict=True)) if parts else (neighbours[:0], neighbours[:0].float())
    return Rows(columns.int(), p.float(), p.new_zeros(len(p)).float(), n)


def with_self(relation: Rows, own: range, degree: Tensor, weight: float | None = None) -> Rows:
    """p(.|i) = (1 - w) e_i + w relation: one entry more than the relation, the sample itself first.

    Args:
        relation: rows of the samples `own`, without these samples themselves.
        degree: (r,) number of neighbours of each.
        weight: w in [0, 1]; None: m / (m + 1) for m neighbours, so that a row of one step is even over the sample and
            its neighbours.

    Returns:
        Rows that sum to 1; those of samples without neighbours are the identity.
    """
    samples = torch.arange(own.start, own.stop, dtype=torch.int32, device=relation.columns.device)
    share = degree / (degree + 1) if weight is None else torch.where(degree > 0, weight, 0.0)
    share = share.to(relation.probabilities.dtype)
    columns = torch.cat([samples[:, None], relation.columns], 1)
    p = torch.cat([1 - share[:, None], share[:, None] * relation.probabilities], 1)
    return Rows(columns, p, relation.rest, relation.samples)


def _walked(neighbours: Tensor, steps: int, width: int, own: range) -> tuple[Tensor, Tensor]:
    """Columns (r, width) and probabilities (r, width) float64 of some rows."""
    n = len(neighbours)
    counts = torch.cat([(neighbours < n).sum(1), torch.zeros(1, dtype=torch.int64, device=neighbours.device)])
    table = torch.cat([neighbours, torch.full_like(neighbours[:1], n)]).long()  # the last row: no sample
    columns = table[own.start : own.stop]
    p = torch.where(columns < n, 1.0 / counts[own.start : own.stop, None].clamp(min=1), 0.0).double()
    all_columns, all_p = [columns], [p]
    for _ in range(1, steps):
        reached = table[columns]  # (r, C, k)
        each = (p / counts[columns].clamp(min=1))[:, :, None].expand(reached.shape)
        columns, p = largest(reached.flatten(1), each.flatten(1), width, n)
        all_columns.append(columns)
        all_p.append(p)
    columns, p = torch.cat(all_columns, 1), torch.cat(all_p, 1)
    self_ = torch.arange(own.start, own.stop, device=p.device)[:, None]
    return largest(torch.where(columns == self_, n, columns), p, width, n)


def largest(columns: Tensor, p: Tensor, width: int, n: int) -> tuple[Tensor, Tensor]:
    """Equal columns of a row added up, the `width` largest kept and divided by their sum."""
    columns, order = columns.sort(dim=1, stable=True)
    p = torch.where(columns < n, p.gather(1, order), 0.0)
    new = torch.ones_like(columns, dtype=torch.bool)
    new[:, 1:] = columns[:, 1:] != columns[:, :-1]
    place = new.long().cumsum(1) - 1
    added = torch.zeros_like(p).scatter_add_(1, place, p)
    distinct = torch.full_like(columns, n).scatter_(1, place, columns)
    missing = width - added.shape[1]
    if missing > 0:
        added = torch.nn.functional.pad(added, (0, missing))
        distinct = torch.nn.functional.pad(distinct, (0, missing), value=n)
    chosen = added.argsort(dim=1, descending=True, stable=True)[:, :width]
    added, distinct = added.gather(1, chosen), distinct.gather(1, chosen)
    return torch.where(added > 0, distinct, n), added / added.sum(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)


def _chunks(own: range, rows: int) -> Iterator[range]:
    for start in range(own.start, own.stop, rows):
        yield range(start, min(start + rows, own.stop))
