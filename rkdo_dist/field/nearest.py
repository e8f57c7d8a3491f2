"""The learned rows over ALL n samples, without an n-wide row: log-sum-exp and the K largest logits, tile by tile.

A tile holds the embeddings of consecutive samples. Tiles can be visited in any order and by different owners: the
result is the same, bit for bit, because logits of a tile depend on nothing else, equal logits are ranked by sample, and
sums over tiles are formed at the end in the order of the tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 512  # queries of a block: a block of logits stays near the cache, whatever the global batch


@dataclass
class Nearest:
    """Partial results of r learned rows, from the tiles seen so far.

    Attributes:
        samples: (r, K) int32, those of the largest logits, in no order; n where there are fewer.
        logits: (r, K), theirs; -inf where there are fewer.
        at_stored: (r, K'), logits of the columns asked for; -inf for those in no tile seen.
        peaks, sums: (r, T), for each tile the largest logit (-inf: no sample) and the sum of exp(logit - peak).
        n: number of samples.
    """

    samples: Tensor
    logits: Tensor
    at_stored: Tensor
    peaks: Tensor
    sums: Tensor
    n: int

    @staticmethod
    def none(stored: Tensor, largest: int, tiles: int, n: int, dtype: torch.dtype) -> Nearest:
        """Before any tile; `stored` (r, K') are the columns asked for, `largest` is K."""
        r = len(stored)

        def full(width: int, value: float) -> Tensor:
            return torch.full((r, width), value, dtype=dtype, device=stored.device)

        samples = torch.full((r, largest), n, dtype=torch.int32, device=stored.device)
        low = -torch.inf
        return Nearest(samples, full(largest, low), full(stored.shape[1], low), full(tiles, low), full(tiles, 0), n)

    def log_sum(self) -> Tensor:
        """log sum_j exp(logit_j) over all tiles (r,) float64; -inf if no tile had a sample."""
        peaks = self.peaks.double()
        top = peaks.amax(1)
        safe = torch.where(top.isinf(), 0.0, top)
        return safe + (self.sums.double() * (peaks - safe[:, None]).exp()).sum(1).log()

    def merge(self, samples: Tensor, logits: Tensor) -> None:
        """Take the K largest of those here and of others (r, c); ties go to the smaller sample."""
        samples, logits = torch.cat([self.samples, samples], 1), torch.cat([self.logits, logits], 1)
        self._choose(samples, logits, _rank(samples, logits).topk(self.samples.shape[1], dim=1, sorted=False).indices)

    def sort(self) -> None:
        """Largest first: an order that does not depend on how tiles were visited."""
        self._choose(self.samples, self.logits, _rank(self.samples, self.logits).argsort(1, descending=True))

    def _choose(self, samples: Tensor, logits: Tensor, chosen: Tensor) -> None:
        self.samples, self.logits = samples.gather(1, chosen), logits.gather(1, chosen)

    def slice(self, start: int, stop: int) -> Nearest:
        """Rows start..stop - 1 (views)."""
        part = slice(start, stop)
        found = (self.samples[part], self.logits[part], self.at_stored[part])
        return Nearest(*found, self.peaks[part], self.sums[part], self.n)


def visit_tile(
    found: Nearest, queries: Tensor, embeddings: Tensor, seen: Tensor, first: int, tile: int, stored: Tensor
) -> None:
    """Add a tile to the partial results.

    Args:
        found: of all r rows; filled in place.
        queries: (r, d), already divided by the temperature.
        embeddings: (t, d) of samples first..first + t - 1, same dtype and device.
        seen: (t,) bool, which of them have an embedding.
        first: number of the tile's first sample.
        tile: number of the tile.
        stored: (r, K') int32, columns whose logits are asked for.
    """
    # A GPU is not waited for: there a tile takes a pass more.
    everything = queries.device.type == "cpu" and bool(seen.all())
    for start in range(0, len(queries), ROWS):
        rows = slice(start, min(start + ROWS, len(queries)))
        x = queries[rows] @ embeddings.T
        if not everything:
            x.masked_fill_(~seen, -torch.inf)
        part = found.slice(rows.start, rows.stop)
        _note_stored(part.at_stored, x, stored[rows], first)
        note(part, x, first)
        found.samples[rows], found.logits[rows] = part.samples, part.logits
        peak = x.amax(1)
        part.peaks[:, tile] = peak
        peak = torch.where(peak.isinf(), 0.0, peak)
        part.sums[:, tile] = x.sub_(peak[:, None]).exp_().sum(1)


def _note_stored(at_stored: Tensor, x: Tensor, stored: Tensor, first: int) -> None:
    local = stored.long().sub_(first)
    inside = (local >= 0) & (local < x.shape[1])
    at_stored.copy_(torch.where(inside, x.gather(1, local.clamp_(0, x.shape[1] - 1)), at_stored))


def note(part: Nearest, x: Tensor, first: int) -> None:
    """Merge the logits x (r, t) of samples first..first + t - 1. A GPU is not waited for: there all are compared."""
    (note_largest if x.device.type == "cpu" else note_all)(part, x, first)


def note_largest(part: Nearest, x: Tensor, first: int) -> None:
    """`note` of those that can be among the K largest: a comparison leaves few of them."""
    k, keys = part.logits.shape[1], x.float()
    threshold = part.logits.amin(1).float()
    if bool(threshold.isinf().any()):
        here = keys.topk(min(k, x.shape[1]), dim=1).values[:, -1]
        threshold = torch.maximum(threshold, here)
    mask = keys >= threshold[:, None]
    mask &= keys > -torch.inf
    rows, columns = mask.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(x))
    width = int(counts.max()) if len(rows) else 0
    if width == 0:
        return
    slot = torch.arange(len(rows), device=x.device) - (counts.cumsum(0) - counts)[rows]
    samples = torch.full((len(x), width), part.n, dtype=torch.int32, device=x.device)
    logits = x.new_full((len(x), width), -torch.inf)
    samples[rows, slot] = (columns + first).int()
    logits[rows, slot] = x[rows, columns]
    part.merge(samples, logits)


def note_all(part: Nearest, x: Tensor, first: int) -> None:
    """`note` without a look at any number."""
    columns = torch.arange(first, first + x.shape[1], dtype=torch.int32, device=x.device)
    part.merge(torch.where(x > -torch.inf, columns, part.n), x)


def _rank(samples: Tensor, logits: Tensor) -> Tensor:
    """Distinct int64 keys in the order of the logits (as float32), and of falling samples among equal ones."""
    bits = logits.float().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (0x7FFFFFFF - samples.long())
