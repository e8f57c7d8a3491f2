"""Rows of a relation over the keys of ALL n samples, tile by tile: no n-wide row, and no gradient of the keys.

A tile holds the keys of consecutive samples. `visit` leaves nine numbers of a row and a tile; `combined` makes of all
tiles' numbers what a row comes to; `differentiate` is the tile's part of the row's gradient. Numbers of a tile depend
on nothing else, so whoever holds it, the result is the same if sums over tiles are formed in their order. The row's own
sample is its positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rkdo_dist.field.presets import Relation
from rkdo_dist.field.relation import LOW, RowValues, assembled

NUMBERS = 9  # logit of the positive; peak and sum of q's exponentials, and of w's; w's sums of both logits; counts


@dataclass(frozen=True)
class Tile:
    """Keys of consecutive samples.

    Attributes:
        keys: (t, d).
        seen: (t,) bool, which samples have one.
        labels: (t,) int64; -1 where there is none.
        first: number of the first sample.
    """

    keys: Tensor
    seen: Tensor
    labels: Tensor
    first: int


@dataclass(frozen=True)
class Queries:
    """r rows.

    Attributes:
        rows: the student's embeddings (r, d), divided by tau.
        keys: the teacher's of the same samples (r, d), divided by tau_T.
        samples, labels: (r,) int64.
    """

    rows: Tensor
    keys: Tensor
    samples: Tensor
    labels: Tensor

    def part(self, start: int, stop: int) -> Queries:
        """Rows start..stop - 1 (views)."""
        return Queries(*(x[start:stop] for x in vars(self).values()))


@dataclass(frozen=True)
class Combined:
    """Of rows over all tiles: `RowValues` in float64, and the log-sum-exps (r,) that gradients are made with."""

    values: RowValues
    log_rest: Tensor
    log_relation: Tensor


def visit(of: Queries, tile: Tile) -> Tensor:
    """A tile's numbers of every row (r, `NUMBERS`) float64."""
    x, t, place, inside = _logits(of, tile)
    similar = torch.where(inside, x.gather(1, place)[:, 0], -torch.inf)
    hidden = _hidden(tile, place, inside)
    for logits in (x, t):
        logits.masked_fill_(hidden, LOW)
    peaks = [torch.where(logits.amax(1) <= LOW, 0, logits.amax(1)) for logits in (x, t)]
    q, w = ((logits - peak[:, None]).exp() for logits, peak in zip((x, t), peaks, strict=True))
    same = of.labels[:, None] == tile.labels[None, :]
    numbers = [similar, peaks[0], q.sum(1), peaks[1], w.sum(1), (w * x).sum(1), (w * t).sum(1), (w * same).sum(1)]
    return torch.stack([*(n.double() for n in numbers), (~hidden).sum(1).double()], 1)


def combined(numbers: Tensor, relation: Relation, weight: float) -> Combined:
    """What rows come to, of all tiles' numbers (T, r, `NUMBERS`) in the order of the tiles."""
    similar, peak_q, sum_q, peak_w, sum_w, towards, energy, same, others = numbers.unbind(2)
    log_rest, log_relation = (peak + total.log() for peak, total in ((peak_q, sum_q), (peak_w, sum_w)))
    log_rest, log_relation = log_rest.logsumexp(0), log_relation.logsumexp(0)
    scale = (peak_w - log_relation).exp()
    count = others.sum(0).long()
    values = assembled(
        relation,
        weight,
        similar.amax(0),
        log_rest,
        (scale * towards).sum(0) - log_rest,
        log_relation - (scale * energy).sum(0),
        count,
        count,
    )
    values.parts["relation_precision"] = (scale * same).sum(0)
    return Combined(values, log_rest, log_relation)


def differentiate(of: Queries, tile: Tile, rows: Combined, temperature: float) -> Tensor:
    """The tile's part of the gradient of every row's loss by its embedding (r, d)."""
    x, t, place, inside = _logits(of, tile)
    hidden = _hidden(tile, place, inside)
    values = rows.values
    log_rest, log_relation, share, weight, at_positive = (
        v.to(x.dtype)[:, None]
        for v in (rows.log_rest, rows.log_relation, values.share, values.weight, values.at_positive)
    )
    g = x.sub_(log_rest).exp_().mul_(share).sub_(t.sub_(log_relation).exp_().mul_(weight)).masked_fill_(hidden, 0)
    g.scatter_(1, place, torch.where(inside[:, None], at_positive, g.gather(1, place)))
    return (g @ tile.keys).div_(temperature)


def _logits(of: Queries, tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of q and of w (r, t), the place of each row's own sample (r, 1), and whether it is in the tile (r,)."""
    place = of.samples - tile.first
    inside = (place >= 0) & (place < len(tile.keys))
    place = place.clamp(0, len(tile.keys) - 1)
    return of.rows @ tile.keys.T, of.keys @ tile.keys.T, place[:, None], inside & tile.seen[place]


def _hidden(tile: Tile, place: Tensor, inside: Tensor) -> Tensor:
    """(r, t) bool: samples without a key, and the row's own."""
    hidden = (~tile.seen).expand(len(place), -1).clone()
    return hidden.scatter_(1, place, hidden.gather(1, place) | inside[:, None])
