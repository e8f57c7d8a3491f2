"""Paired comparisons: two conditions run with the same seeds, compared seed by seed.

Runs of one seed share their data order and initial weights, so the differences within seeds are tested. With few seeds
the tests have little power, and the output says so: with five seeds the smallest p-value of Wilcoxon's test is 1/16,
and the t-test assumes normal differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

NO_EVIDENCE = "no evidence of a difference"
LEVEL = 0.05
POWER = 0.8
_RESAMPLES = 10_000
_SEED = 20250501  # of the bootstrap; any fixed number
_ENUMERATED = 13  # pairs with ties: 2^13 sign vectors, which scipy's default of 9,999 resamples still enumerates


@dataclass(frozen=True)
class Paired:
    """Statistics of n pairs (a, b). With fewer than two pairs only n and the means are numbers, the rest is NaN.

    Attributes:
        n: pairs.
        mean_a, mean_b, sd_a, sd_b: of each side (sample standard deviations, n - 1).
        difference, sd_difference: mean and standard deviation of a - b.
        t_p: two-sided p of the paired t-test; Wilcoxon's if all differences are the same. Accuracies are multiples
            of 1/n, so a few seeds often differ by exactly the same amount, for which Student's p would be 0.
        wilcoxon_p: two-sided p of Wilcoxon's signed-rank test (see `wilcoxon`), zero differences left out.
        interval: 95 % percentile bootstrap interval of the mean difference (10,000 resamples of pairs, fixed seed).
            With five pairs it covers less than 95 %: a resample cannot leave the range of the observed values.
        effect: Cohen's d_z, difference / sd_difference; infinite if all differences are the same and not zero.
    """

    n: int
    mean_a: float
    mean_b: float
    sd_a: float
    sd_b: float
    difference: float
    sd_difference: float
    t_p: float
    wilcoxon_p: float
    interval: tuple[float, float]
    effect: float

    @property
    def margin(self) -> float:
        """Half of Student's 95 % interval of the mean difference: larger or smaller differences are excluded.

        Wider than the bootstrap's with few pairs, and the right one for "how large a difference may have been missed";
        NaN with fewer than two pairs.
        """
        if self.n < 2:
            return math.nan
        return float(stats.t.ppf(1 - LEVEL / 2, self.n - 1)) * self.sd_difference / math.sqrt(self.n)

    @property
    def detectable(self) -> float:
        """The true difference that so many pairs of this spread show with 80 % power (paired t-test, two-sided, LEVEL).

        NaN with fewer than two pairs. Beside a "no evidence", it says what could have been missed.
        """
        return math.nan if self.n < 2 else self.sd_difference * _detectable(self.n)


def _detectable(n: int) -> float:
    """In standard deviations of the differences; over 2,000 quantiles of the estimated one."""
    estimated = np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, n - 1) / (n - 1))
    critical = stats.t.ppf(1 - LEVEL / 2, n - 1) * estimated

    def missing(size: float) -> float:
        return float(stats.norm.cdf(size * math.sqrt(n) - critical).mean()) - POWER

    return float(optimize.brentq(missing, 0.0, 100.0))


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare two conditions seed by seed.

    Args:
        a, b: (n,) finite values, the same seeds in the same order.

    Raises:
        ValueError: if there are no pairs, unequal numbers of values, or values that are not finite.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"need two lists of equally many numbers, got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("paired values must be finite")
    n, nan, difference = len(x), math.nan, _differences(x, y)
    mean = float(difference.mean())
    if n < 2:
        return Paired(n, float(x[0]), float(y[0]), nan, nan, mean, nan, nan, nan, (nan, nan), nan)
    spread = float(difference.std(ddof=1)) if np.ptp(difference) else 0.0
    return Paired(
        n=n,
        mean_a=float(x.mean()),
        mean_b=float(y.mean()),
        sd_a=float(x.std(ddof=1)),
        sd_b=float(y.std(ddof=1)),
        difference=mean,
        sd_difference=spread,
        t_p=_t_test(mean, spread, n) if spread else wilcoxon(difference),
        wilcoxon_p=wilcoxon(difference),
        interval=_bootstrap(difference),
        effect=mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0,
    )


def _differences(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """x - y without the rounding of x and y, so that equal differences tie: accuracies are multiples of 1/n."""
    unit = max(float(np.abs(x).max()), float(np.abs(y).max())) * 1e-12
    return np.round((x - y) / unit) * unit if unit else x - y


def _t_test(mean: float, spread: float, n: int) -> float:
    """Two-sided p of Student's paired t-test."""
    return float(2 * stats.t.sf(abs(mean) / (spread / math.sqrt(n)), n - 1))


def wilcoxon(differences: Sequence[float] | NDArray[np.float64]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of paired differences; zeros are left out, ties get mean ranks.

    Exact up to 13 pairs (all signs are enumerated if there are ties) and up to 50 without ties; beyond that scipy's
    normal approximation.
    """
    d = np.asarray(differences, dtype=np.float64)
    d = d[d != 0]
    if len(d) < 2:  # either sign of one difference is equally far from the middle
        return 1.0
    tied = len(np.unique(np.abs(d))) < len(d)
    method = stats.PermutationMethod() if tied and len(d) <= _ENUMERATED else "auto"
    return float(stats.wilcoxon(d, method=method).pvalue)


def _bootstrap(differences: NDArray[np.float64]) -> tuple[float, float]:
    generator = np.random.default_rng(_SEED)
    chosen = generator.integers(0, len(differences), (_RESAMPLES, len(differences)))
    low, high = np.quantile(differences[chosen].mean(axis=1), [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the smallest of m p-values times m, the next times m - 1, ..., never falling.

    NaN (a cell that could not be tested) stays NaN and does not count among the m.

    Raises:
        ValueError: for a p-value outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    if ((p[tested] < 0) | (p[tested] > 1)).any():
        raise ValueError(f"p-values must lie in [0, 1], got {list(p_values)}")
    adjusted = np.full(len(p), math.nan)
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors)) if len(order) else []
    return [float(value) for value in adjusted]


def verdict(
    result: Paired, p: float | None = None, names: tuple[str, str] = ("first", "second"), level: float = LEVEL
) -> str:
    """A comparison in words.

    Args:
        result: of `paired`.
        p: the p-value that counts, adjusted by `holm` where it is one of many; `result.t_p` if None.
        names: of the two sides.
        level: p-values below it are evidence.

    Returns:
        "no evidence of a difference" (also, with the reason, when there are fewer than two pairs), or which side is
        higher, by how much, with p and effect size.
    """
    p = result.t_p if p is None else p
    if result.n < 2:
        return f"{NO_EVIDENCE} (one seed: nothing to test)"
    if not p < level:
        return NO_EVIDENCE
    higher = names[0] if result.difference > 0 else names[1]
    shown = "< 0.001" if p < 0.001 else f"= {p:.3f}"
    return f"{higher} higher by {abs(result.difference):.4f} (p {shown}, d_z = {result.effect:+.1f})"
