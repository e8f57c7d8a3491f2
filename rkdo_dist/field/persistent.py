"""Supervisory rows that persist across training iterations: equations 1 to 3 of the paper as they are written.

A row p(.|i) is a distribution over all n training samples. It is kept as its K largest entries and a remainder that is
spread evenly over the other columns. A visit of a row, at a step with global batch S:

1. `restrict`: the supervisor of the step is the row restricted to S, p_S / m with m = sum_{j in S} p(j|i). It comes
   from earlier iterations, so no gradient passes through it.
2. Recursion (eq. 3), after the forward pass: `recur_in_batch` moves the mass m within S towards the learned row q(t);
   `recur_with_bank` moves the whole row towards q over all n samples (`field.nearest`).
3. Both end in `truncate`: the K largest entries are kept, the rest is folded into the remainder.

With S = all n samples and K = n nothing is ever folded, and both are equation 3.

With joint pairing, the paper's k != i taken literally, the field has 2n points, (sample, view) for both views, and as
many rows over them. Point 2 i + w is view w of sample i; a row never has mass on its own point (`Rows.excluded`), and
begins with all of it on the sample's other view. What follows speaks of samples and means points then.

Everything is computed in float64, whatever the rows are stored in, and every row is divided by its sum when it is
written: rounding does not add up over iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rkdo_dist.field.places import Place
from rkdo_dist.field.supervisors import Listed


@dataclass(frozen=True)
class Rows:
    """r rows of the field over n samples.

    Attributes:
        columns: (r, K) int32, the samples of the stored entries; n where a slot is empty.
        probabilities: (r, K), float32 or float64; 0 where a slot is empty.
        rest: (r,), the mass of all other columns together, in that dtype.
        samples: n.
        excluded: columns of a row that never take part, and are never stored: 1 for its own point, else 0.
    """

    columns: Tensor
    probabilities: Tensor
    rest: Tensor
    samples: int
    excluded: int = 0

    def others(self) -> Tensor:
        """Number of columns that share the rest (r,) int64."""
        return self.samples - self.excluded - (self.columns < self.samples).sum(1)

    def share(self) -> Tensor:
        """The probability of each column that is not stored (r,) float64."""
        others = self.others()
        return torch.where(others > 0, self.rest.double() / others.clamp(min=1), 0.0)

    def entropy(self) -> Tensor:
        """H of the whole row, the remainder included (r,) float64."""
        p, share = self.probabilities.double(), self.share()
        return -torch.xlogy(p, p).sum(1) - self.others() * torch.xlogy(share, share)

    def at(self, samples: Tensor) -> Tensor:
        """p(samples_i | row i) for one sample (r,) of every row, float64."""
        stored = self.columns == samples[:, None]
        found = torch.where(stored, self.probabilities.double(), 0).sum(1)
        return torch.where(stored.any(1), found, self.share())

    def draw(self, uniform: Tensor) -> Tensor:
        """A column j ~ p(.|i) of every row, (r,) int64: the one that a number in [0, 1) selects.

        Entries come in the order in which they are stored, then all other columns in their own; on the CPU.

        Args:
            uniform: (r,) float64.
        """
        p = self.probabilities.double()
        reached = p.cumsum(1)
        stored = reached[:, -1]
        target = uniform * (stored + self.rest.double())
        last = torch.where(p > 0, torch.arange(p.shape[1]), -1).amax(1)
        slot = (reached <= target[:, None]).sum(1)
        # Of the columns that are not stored, number r is column r + the stored ones before it.
        others, share = self.others(), self.share()
        spread = (slot > last) & (share > 0)
        number = ((target - stored) / torch.where(share > 0, share, 1.0)).floor().long()
        number = torch.minimum(number.clamp(min=0), (others - 1).clamp(min=0))
        columns = self.columns.sort(1).values.long()
        before = (columns < self.samples) & (columns - torch.arange(p.shape[1]) <= number[:, None])
        unlisted = number + before.sum(1)
        listed = self.columns.gather(1, torch.minimum(slot, last).clamp(min=0)[:, None])[:, 0].long()
        return torch.where(spread, unlisted, listed)

    def dense(self, own: Tensor | None = None) -> Tensor:
        """All n columns, (r, n) float64: for tests and small n; `own` (r,) are the excluded columns."""
        p = self.share()[:, None].repeat(1, self.samples + 1)
        if own is not None:
            p.scatter_(1, own[:, None], 0.0)
        p.scatter_(1, self.columns.long(), self.probabilities.double())
        return p[:, :-1]

    def slice(self, start: int, stop: int) -> Rows:
        """Rows start..stop - 1 (views)."""
        return self._each(lambda x: x[start:stop])

    def to(self, device: torch.device) -> Rows:
        """The rows on another device."""
        towards = device.type != "cpu"  # numbers that arrive at the host are read at once
        return self._each(lambda x: x.to(device, non_blocking=towards))

    def pick(self, places: Tensor) -> Rows:
        """Copies of the rows at `places`."""
        return self._each(lambda x: x[places])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        columns, probabilities, rest = (change(x) for x in (self.columns, self.probabilities, self.rest))
        return Rows(columns, probabilities, rest, self.samples, self.excluded)

    @staticmethod
    def cat(parts: list[Rows]) -> Rows:
        """All rows of `parts`, in order."""
        if len(parts) == 1:
            return parts[0]
        columns, probabilities = (torch.cat([getattr(p, name) for p in parts]) for name in ("columns", "probabilities"))
        rest = torch.cat([p.rest for p in parts])
        return Rows(columns, probabilities, rest, parts[0].samples, parts[0].excluded)


def identity(samples: Tensor, n: int, stored: int, dtype: torch.dtype = torch.float32) -> Rows:
    """Initial rows: all mass on the sample itself, which stands for its other view.

    Args:
        samples: (r,) integers in [0, n).
        n: number of samples, below 2^31.
        stored: K in [1, n].

    Raises:
        ValueError: if K is out of range.
    """
    if not 1 <= stored <= n:
        raise ValueError(f"a row of {n} samples stores between 1 and {n} entries, got {stored}")
    columns = torch.full((len(samples), stored), n, dtype=torch.int32, device=samples.device)
    columns[:, 0] = samples
    probabilities = torch.zeros(columns.shape, dtype=dtype, device=samples.device)
    probabilities[:, 0] = 1
    return Rows(columns, probabilities, torch.zeros(len(samples), dtype=dtype, device=samples.device), n)


def initial(rows: Rows, debias: float, stored: int) -> Rows:
    """(1 - a) p + a / n over all n samples, as rows of K entries: what persistent rows begin with."""
    listed = rows.columns < rows.samples
    even = debias / (rows.samples - rows.excluded)
    p = torch.where(listed, (1 - debias) * rows.probabilities.double() + even, 0.0)
    other = (1 - debias) * rows.rest.double() + even * rows.others().double()
    return truncate(rows.columns, p, other, stored, rows.samples, rows.rest.dtype, rows.excluded)


def of_both_views(rows: Rows, samples: Tensor) -> Rows:
    """Rows of the points of some samples (see the module), in order, from rows of these samples that have no rest.

    A sample's mass on itself goes to its other view, and that on another sample in halves to both of its views.

    Args:
        rows: r rows over n samples, K entries each.
        samples: (r,) int64, whose they are.

    Returns:
        2r rows over 2n points, 2K entries each.
    """
    n, columns = rows.samples, rows.columns.long()
    self_ = columns == samples[:, None]
    places, masses = [], []
    for view in (0, 1):
        # the entry of the sample itself: all of it at the other view, nothing at its own
        at = [torch.where(self_ & (w == view) | (columns == n), 2 * n, 2 * columns + w) for w in (0, 1)]
        p = [torch.where(self_, rows.probabilities * float(w != view), rows.probabilities / 2) for w in (0, 1)]
        places.append(torch.cat(at, 1))
        masses.append(torch.cat(p, 1))
    columns, p_of_both = (torch.stack(x, 1).flatten(0, 1) for x in (places, masses))
    return Rows(columns.int(), p_of_both, rows.rest.repeat_interleave(2), 2 * n, excluded=1)


class BatchColumns:
    """Position of each of the n samples in a global batch.

    Args:
        n: number of samples; the table of 8 n bytes is kept from batch to batch.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self._table = torch.full((n + 1,), -1, dtype=torch.int64, device=device)
        self.samples = torch.empty(0, dtype=torch.int64, device=device)

    def set(self, samples: Tensor, here: Tensor | None = None) -> None:
        """Take the samples (B,) int64 of another global batch.

        Args:
            samples: on the host, where they are looked at.
            here: the same on the device of the table, if that is another one.

        Raises:
            ValueError: if a sample is in it twice: its columns would not be those of one distribution.
        """
        ordered = samples.sort().values
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise ValueError(f"sample {int(twice[0])} occurs twice in one global batch")
        here = samples if here is None else here
        self._table[self.samples] = -1
        self._table[here] = torch.arange(len(here), device=here.device)
        self.samples = here

    def positions(self, columns: Tensor) -> Tensor:
        """Positions of samples in the batch, int64, -1 for those outside (and for empty slots)."""
        return self._table[columns.long()]


@dataclass(frozen=True)
class Restricted(Listed):
    """Rows restricted to a global batch and divided by their mass there: the supervisor of a step.

    Attributes:
        positions, extra, share, entropy: see `Listed`.
        positive: (r,) float64, p(i|i) of the restricted row.
        mass: (r,) float64, m = sum_{j in S} p(j|i) of the row before.
        other: (r,) int64, positions of the positive.
    """

    positive: Tensor
    mass: Tensor
    other: Tensor

    def add_mass(self, into: Tensor, values: Tensor, place: Place) -> None:
        """The value at the other view, which is a column of its own where rows and columns are points."""
        if place.piece.excluded is None or place.piece.excluded != place.piece.positive:
            super().add_mass(into, values, place)
            return
        rows = slice(place.first, place.first + len(values))
        into.add_(values.gather(1, self.other[rows, None])[:, 0])

    def smoothed(self, debias: float, taking_part: int) -> Restricted:
        """(1 - a) p + a / N over the N columns of a row that take part."""
        if debias == 0:
            return self
        listed, even = self.extra != 0, debias / taking_part
        extra, share = (1 - debias) * self.extra, (1 - debias) * self.share + even
        p = torch.where(listed, extra.double() + share.double()[:, None], 0.0)
        others = taking_part - listed.sum(1)
        entropy = -torch.xlogy(p, p).sum(1) - others * torch.xlogy(share.double(), share.double())
        positive = (1 - debias) * self.positive + even
        return Restricted(self.positions, extra, share, entropy, positive, self.mass, self.other)


def restrict(rows: Rows, batch: BatchColumns, own: Tensor, dtype: torch.dtype) -> Restricted:
    """The supervisor that rows give in a global batch.

    A row without any mass in the batch has no opinion on it: the supervisor is then the identity.

    Args:
        rows: r rows.
        batch: the global batch S, which holds the rows' own samples.
        own: (r,) int64, positions in the batch of the positives: of the rows' own samples; of points, the other views.
        dtype: of the computation that asks.
    """
    size = len(batch.samples)
    positions = batch.positions(rows.columns)
    hit = positions >= 0
    p, share = torch.where(hit, rows.probabilities.double(), 0.0), rows.share()
    misses = size - rows.excluded - hit.sum(1)
    mass = p.sum(1) + misses * share
    silent = mass <= 0
    scale = torch.where(silent, 1.0, mass)
    p, share = p / scale[:, None], share / scale
    p[:, 0] = torch.where(silent, 1.0, p[:, 0])
    positions[:, 0] = torch.where(silent, own, positions[:, 0])
    hit[:, 0] |= silent
    entropy = -torch.xlogy(p, p).sum(1) - torch.where(silent, 0, misses) * torch.xlogy(share, share)
    extra = torch.where(hit, p - share[:, None], 0.0)
    positive = share + torch.where(hit & (positions == own[:, None]), extra, 0.0).sum(1)
    mass = torch.where(silent, 0.0, mass)
    return Restricted(positions.clamp_(min=0), extra.to(dtype), share.to(dtype), entropy, positive, mass, own)


def recur_in_batch(
    rows: Rows, batch: BatchColumns, learned: Tensor, coupling: float, excluded: Tensor | None = None
) -> tuple[Rows, Tensor]:
    """p_S <- (1 - alpha) p_S + alpha m q(t): equation 3 within the batch; mass inside and outside S is kept.

    Args:
        rows: r rows.
        batch: the global batch S of B samples.
        learned: q(t), (r, B); any float dtype, every row sums to 1.
        coupling: alpha in [0, 1].
        excluded: (r,) int64, positions of the rows' own points, where these are excluded; q(t) is 0 there.

    Returns:
        The rows, and how far each has moved: the total variation between before and after, (r,) float64, before
        truncation.
    """
    n, size = rows.samples, len(batch.samples)
    positions = batch.positions(rows.columns)
    hit = positions >= 0
    p, share, hits = rows.probabilities.double(), rows.share(), hit.sum(1)
    inside = share[:, None].repeat(1, size + 1)  # one column more: where entries outside the batch go
    inside.scatter_(1, torch.where(hit, positions, size), p)
    inside = inside[:, :-1]
    if excluded is not None:
        inside.scatter_(1, excluded[:, None], 0.0)
    misses = size - rows.excluded - hits
    mass = torch.where(hit, p, 0.0).sum(1) + misses * share
    change = (learned.double() * mass[:, None]).sub_(inside).mul_(coupling)
    candidates = torch.cat([inside + change, torch.where(hit, 0.0, p)], 1)
    columns = torch.cat([batch.samples.int().expand(len(p), -1), torch.where(hit, n, rows.columns)], 1)
    other = share * (rows.others() - misses)
    drift = change.abs_().sum(1) / 2
    return truncate(columns, candidates, other, rows.columns.shape[1], n, rows.rest.dtype, rows.excluded), drift


def recur_with_bank(
    rows: Rows, at_stored: Tensor, nearest: Tensor, nearest_logits: Tensor, log_sum: Tensor, coupling: float
) -> tuple[Rows, Tensor]:
    """p <- (1 - alpha) p + alpha q_bank(t): equation 3 over all n samples.

    The K largest entries of the mixture are among those stored and the K largest of q_bank, because all columns that
    are not stored have the same probability.

    Args:
        rows: r rows.
        at_stored: (r, K) logits of the stored columns; -inf for those that have no embedding yet.
        nearest, nearest_logits: (r, K) samples (int32, n for none) of the largest logits, and these.
        log_sum: (r,) log-sum-exp of all logits.
        coupling: alpha in [0, 1].

    Returns:
        The rows, and how far each has moved, (r,) float64: the total variation between before and after, before
        truncation, with all columns that are neither stored nor among the nearest taken as one.
    """
    n, p, share = rows.samples, rows.probabilities.double(), rows.share()
    known = torch.where(rows.columns < n, (at_stored.double() - log_sum[:, None]).exp(), 0.0)
    order = rows.columns.sort(1).values
    place = torch.searchsorted(order, nearest).clamp_(max=order.shape[1] - 1)
    new = (order.gather(1, place) != nearest) & (nearest < n)
    found = torch.where(new, (nearest_logits.double() - log_sum[:, None]).exp(), 0.0)
    before = torch.cat([p, torch.where(new, share[:, None], 0.0)], 1)
    learned = torch.cat([known, found], 1)
    change = coupling * (learned - before)
    columns = torch.cat([rows.columns, torch.where(new, nearest, n)], 1)
    unlisted = rows.others() - new.sum(1)
    old_other = share * unlisted
    new_other = torch.where(unlisted > 0, (1 - learned.sum(1)).clamp_(min=0), 0.0)
    other_change = coupling * (new_other - old_other)
    drift = (change.abs().sum(1) + other_change.abs()) / 2
    after = truncate(columns, before + change, old_other + other_change, p.shape[1], n, rows.rest.dtype)
    return after, drift


def truncate(
    columns: Tensor, p: Tensor, other: Tensor, stored: int, n: int, dtype: torch.dtype, excluded: int = 0
) -> Rows:
    """The K largest entries of every row, largest first; the mass of all others is folded into the rest.

    Args:
        columns: (r, C) int32, each sample at most once in a row; n for none.
        p: (r, C) float64, their probabilities; overwritten.
        other: (r,) float64, mass of the columns not listed.
        stored: K; may be more than C.
        dtype: of the result.
        excluded: see `Rows`.

    Returns:
        Rows that sum to 1.
    """
    kept, where = p.topk(min(stored, p.shape[1]), dim=1)
    chosen = torch.where(kept > 0, columns.gather(1, where), n)
    p.scatter_(1, where, 0.0)
    rest = other + p.sum(1)
    rest = torch.where((chosen < n).sum(1) < n - excluded, rest, 0.0)
    total = kept.sum(1) + rest
    kept, rest = (kept / total[:, None]).to(dtype), (rest / total).to(dtype)
    missing = stored - kept.shape[1]
    if missing > 0:
        kept = torch.nn.functional.pad(kept, (0, missing))
        chosen = torch.nn.functional.pad(chosen, (0, missing), value=n)
    return Rows(chosen, kept, rest, n, excluded)
