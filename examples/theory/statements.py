"""Section 6.2 of the paper, measured: its lemmas, its theorem and its two relaxations on explicit distributions.

A field is a pair of matrices p and q, (n, N) float64, whose rows are distributions; its loss is mean_i KL(p_i || q_i)
(eq. 7). The inner minimisation (assumption A2) is exact: each `Family` of learned fields below has a minimiser in
closed form, or one number found to rounding. What the paper states is measured here; what its statements need
beyond what they say is in `conditions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float64]

ALPHAS = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
STEPS = 10
SHAPES = ((4, 2), (8, 8), (16, 64))  # samples, columns
TOLERANCE = 1e-12  # relative and absolute, of a bound that is computed in float64


def loss(p: Field, q: Field) -> float:
    """mean_i KL(p_i || q_i); zero probabilities of p contribute 0, and those of q under p > 0 make it infinite."""
    return float(row_losses(p, q).mean())


def row_losses(p: Field, q: Field) -> Field:
    """KL(p_i || q_i) of every row, (n,), at least 0."""
    seen = p > 0
    with np.errstate(divide="ignore"):
        ratio = np.log(np.where(seen, p, 1.0)) - np.log(np.where(seen, q, 1.0))
    return np.maximum(np.where(seen, p * ratio, 0.0).sum(axis=-1), 0.0)  # rounding may leave -1e-17


def supervisor(p: Field, q: Field, alpha: float) -> Field:
    """(1 - alpha) p + alpha q (eq. 8)."""
    return (1 - alpha) * p + alpha * q


@dataclass(frozen=True)
class Family:
    """A set of learned fields with an exact inner minimisation.

    Attributes:
        name: for tables.
        fit: the member that minimises loss(p, .) for a given p.
        member: any member, from random numbers: where a recursion starts.
        rich: whether the set holds every field (assumption A1).
    """

    name: str
    fit: Callable[[Field], Field]
    member: Callable[[np.random.Generator, tuple[int, int]], Field]
    rich: bool


def every_field() -> Family:
    """All fields: A1 holds, and the minimiser is p itself."""
    return Family(
        "all distributions", lambda p: p, lambda draw, shape: draw.dirichlet(np.ones(shape[1]), shape[0]), True
    )


def one_row() -> Family:
    """All rows alike: the minimiser is the mean row."""

    def member(draw: np.random.Generator, shape: tuple[int, int]) -> Field:
        return np.tile(draw.dirichlet(np.ones(shape[1])), (shape[0], 1))

    return Family("one row for all samples", lambda p: np.tile(p.mean(axis=0), (len(p), 1)), member, False)


def blocks(size: int = 2) -> Family:
    """Rows that are constant on blocks of `size` columns: the minimiser spreads each block's mass evenly."""

    def fit(p: Field) -> Field:
        mass = p.reshape(len(p), -1, size).mean(axis=2)
        return np.repeat(mass, size, axis=1)

    return Family(f"constant on blocks of {size}", fit, lambda draw, s: fit(draw.dirichlet(np.ones(s[1]), s[0])), False)


def fitted_temperature(similarity: Field, sharpest: float = 20.0) -> Family:
    """softmax(similarity / tau) with 1 / tau in [0, `sharpest`]: one number, where the convex loss has its root.

    Args:
        similarity: (n, N), fixed.
        sharpest: the largest 1 / tau; the interval is closed, so that a minimiser exists.
    """

    def field(inverse: float) -> Field:
        logits = inverse * similarity
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def fit(p: Field) -> Field:
        wanted = float((p * similarity).sum(axis=1).mean())
        low, high, inverse = 0.0, sharpest, 1.0
        for _ in range(200):  # Newton's method for the convex loss, kept between the ends
            q = field(inverse)
            means = (q * similarity).sum(axis=1, keepdims=True)
            slope = float(means.mean()) - wanted
            low, high = (low, inverse) if slope > 0 else (inverse, high)
            curvature = float((q * (similarity - means) ** 2).sum(axis=1).mean())
            step = inverse - slope / curvature if curvature > 0 else math.inf
            following = step if low < step < high else (low + high) / 2
            if abs(slope) < 1e-14 or following in (low, high):
                break
            inverse = following
        return field(inverse)

    return Family("softmax with a fitted temperature", fit, lambda draw, _: field(sharpest * draw.random()), False)


def families(draw: np.random.Generator, shape: tuple[int, int]) -> list[Family]:
    """The families, for fields of a shape (an even number of columns)."""
    return [every_field(), one_row(), blocks(), fitted_temperature(draw.uniform(-1, 1, shape))]


@dataclass(frozen=True)
class Start:
    """Where a recursion starts: p(0) and q(0), both (n, N)."""

    name: str
    p: Field
    q: Field


def starts(
    draw: np.random.Generator, repeats: int = 1, shapes: tuple[tuple[int, int], ...] = SHAPES
) -> Iterator[Start]:
    """Explicit distributions: random of several concentrations, peaked, one-hot, with zeros, disjoint, equal."""
    for shape in shapes:
        n, columns = shape
        identity = np.eye(columns)[np.arange(n) % columns]
        for _ in range(repeats):
            for a in (0.03, 0.3, 1.0, 10.0):
                for b in (0.3, 1.0, 30.0):
                    p, q = draw.dirichlet(np.full(columns, a), n), draw.dirichlet(np.full(columns, b), n)
                    yield Start(f"Dirichlet({a:g}) against Dirichlet({b:g})", p, q)
            q = draw.dirichlet(np.ones(columns), n)
            yield Start("one-hot p (the released start)", identity, q)
            yield Start("p nearly one-hot", supervisor(identity, np.full(shape, 1 / columns), 1e-6), q)
            yield Start("q nearly one-hot elsewhere", q, supervisor(np.roll(identity, 1, 1), q, 1e-9))
            yield Start("p has zeros that q has not", _with_zeros(q, draw), q)
            yield Start("q has zeros that p has not", q, _with_zeros(q, draw))
        yield Start("p = q", q, q)
        half = columns // 2
        left, right = np.zeros(shape), np.zeros(shape)
        left[:, :half], right[:, half:] = 1 / half, 1 / (columns - half)
        yield Start("disjoint supports", left, right)


def _with_zeros(p: Field, draw: np.random.Generator) -> Field:
    """Rows without some of their columns, renormalised."""
    kept = draw.random(p.shape) < 0.5
    kept[np.arange(len(p)), p.argmax(axis=1)] = True
    kept[:, -1] &= p.argmax(axis=1) == p.shape[1] - 1  # something is missing in every row
    q = np.where(kept, p, 0.0)
    return q / q.sum(axis=1, keepdims=True)


@dataclass
class Tally:
    """What the cases of a statement said.

    Attributes:
        statement, bound: its name, and what is measured.
        cases: with a finite bound.
        held: of them.
        empty: cases in which the bound is infinite or undefined, so that it says nothing.
        slack: the largest left - right, at most 0 (or rounding) where the bound holds.
        tightest: the largest left / right among cases with a bound above 1e-9.
    """

    statement: str
    bound: str
    cases: int = 0
    held: int = 0
    empty: int = 0
    slack: float = -math.inf
    tightest: float = 0.0

    def add(self, left: float, right: float) -> None:
        """One case of left <= right."""
        if not math.isfinite(right):
            self.empty += 1
            return
        self.cases += 1
        self.held += left <= right + TOLERANCE * (1 + right)
        self.slack = max(self.slack, left - right)
        if right > 1e-9:
            self.tightest = max(self.tightest, left / right)

    @property
    def holds(self) -> bool:
        """Whether every case with a finite bound held."""
        return self.held == self.cases


@dataclass(frozen=True)
class Trace:
    """One recursion with exact inner minimisation.

    Attributes:
        losses: L(0)..L(T).
        intermediate: the loss after the supervisor's step alone (eq. 9), of t = 1..T.
        static: the loss of q(t) against the p(0) that was there at the beginning, t = 0..T.
        moved: the largest change of an entry of p after t = 1.
    """

    losses: list[float]
    intermediate: list[float]
    static: list[float]
    moved: float


def recurse(p: Field, q: Field, fit: Callable[[Field], Field] | None, alpha: float, steps: int = STEPS) -> Trace:
    """The two-stage recursion of sec. 6.2.1: p(t) from q(t-1), then q(t) = fit(p(t)).

    Args:
        p, q: p(0) and q(0), (n, N).
        fit: the exact inner minimisation; None leaves q as it is, which is no learning at all.
        alpha: in [0, 1].
    """
    first, losses, intermediate, static, moved = p, [loss(p, q)], [], [loss(p, q)], 0.0
    for t in range(1, steps + 1):
        before, p = p, supervisor(p, q, alpha)
        intermediate.append(loss(p, q))
        q = q if fit is None else fit(p)
        losses.append(loss(p, q))
        static.append(loss(first, q))
        moved = max(moved, float(np.abs(p - before).max())) if t > 1 else moved
    return Trace(losses, intermediate, static, moved)


def measure(seed: int = 0, repeats: int = 1, shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[Tally]:
    """Lemma 1, Lemma 2, Theorem 3 and equations 14 and 15 over all starts, families and couplings.

    Lemma 2, Theorem 3 and eq. 14 start at a member of the family; Theorem 3 is measured where A1 holds and where it
    does not. In eq. 14, L* is the best value for the supervisor of the same step, as the paper defines it.
    """
    draw = np.random.default_rng(seed)
    lemma_1 = Tally("Lemma 1", "KL of the new supervisor <= (1 - alpha) L(t-1)")
    lemma_2 = Tally("Lemma 2", "L(t) <= loss before q is fitted again")
    rich = Tally("Theorem 3, A1 and A2 hold", "L(t) <= (1 - alpha)^t L(0)")
    poor = Tally("Theorem 3, A1 fails", "L(t) <= (1 - alpha)^t L(0)")
    finite = Tally("Eq. 14, as written", "L(t) <= (1 - alpha) L(t-1) + alpha L*(t)")
    inexact = Tally("Eq. 15", "L(t) <= (1 - alpha) L(t-1) + eps(t)")
    for start in starts(draw, repeats, shapes):
        for alpha in ALPHAS:
            lemma_1.add(loss(supervisor(start.p, start.q, alpha), start.q), _times(1 - alpha, loss(start.p, start.q)))
        for family in families(draw, start.p.shape):
            q = start.q if family.rich else family.member(draw, start.p.shape)
            for alpha in ALPHAS[1::2]:
                trace = recurse(start.p, q, family.fit, alpha)
                _add_trace(trace, alpha, lemma_2, rich if family.rich else poor, finite)
                _add_inexact(start.p, q, family, alpha, draw, inexact)
    return [lemma_1, lemma_2, rich, poor, finite, inexact]


def _times(factor: float, value: float) -> float:
    return math.nan if factor == 0 and math.isinf(value) else factor * value


def _add_trace(trace: Trace, alpha: float, lemma_2: Tally, theorem: Tally, finite: Tally) -> None:
    for t in range(1, len(trace.losses)):
        lemma_2.add(trace.losses[t], trace.intermediate[t - 1])
        theorem.add(trace.losses[t], _times((1 - alpha) ** t, trace.losses[0]))
        finite.add(trace.losses[t], _times(1 - alpha, trace.losses[t - 1]) + alpha * trace.losses[t])


def _add_inexact(p: Field, q: Field, family: Family, alpha: float, draw: np.random.Generator, tally: Tally) -> None:
    """A fit that is missed at random: eps(t) is what it costs beyond not fitting at all."""
    before = loss(p, q)
    for t in range(1, STEPS + 1):
        p = supervisor(p, q, alpha)
        unfitted = loss(p, q)
        q = supervisor(family.fit(p), np.full_like(p, 1 / p.shape[1]), draw.random() / t)
        now = loss(p, q)
        missed = max(0.0, now - unfitted) if math.isfinite(unfitted) else math.inf
        tally.add(now, _times(1 - alpha, before) + missed)
        before = now


def with_errors(error: Callable[[int], float], alpha: float, steps: int = 400) -> list[float]:
    """L(0)..L(T) where every step misses the fit by error(t) exactly: L(t) = loss before the fit + error(t).

    Two columns, all distributions allowed, p(0) = (0.9, 0.1), q(0) uniform; q(t) is found by bisection, on the side of
    p(t) where the other column has more room.
    """
    p, q = np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])
    losses = [loss(p, q)]
    for t in range(1, steps + 1):
        p = supervisor(p, q, alpha)
        wanted = loss(p, q) + error(t)
        near = float(p[0, 1])
        far = 1.0 - 1e-15 if near < 0.5 else 1e-15  # the loss rises from q = p towards here
        while True:
            middle = (near + far) / 2
            if middle in (near, far):
                break
            near, far = (near, middle) if loss(p, _two(middle)) > wanted else (middle, far)
        q = _two(near)
        losses.append(loss(p, q))
    return losses


def _two(second: float) -> Field:
    return np.array([[1 - second, second]])
