"""Paired statistics against hand computations, enumeration and known values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rkdo_dist.studies.statistics import NO_EVIDENCE, holm, paired, verdict, wilcoxon

A, B = [0.30, 0.25, 0.28, 0.33, 0.29], [0.27, 0.26, 0.24, 0.28, 0.25]


def test_by_hand() -> None:
    found = paired(A, B)  # differences 3, -1, 4, 5, 4 hundredths: mean 3, squares 0 16 1 4 1, variance 22/4 = 5.5
    assert found.n == 5
    assert found.mean_a == pytest.approx(0.29)
    assert found.mean_b == pytest.approx(0.26)
    assert found.difference == pytest.approx(0.03)
    assert found.sd_difference == pytest.approx(math.sqrt(5.5) / 100)
    assert found.effect == pytest.approx(3 / math.sqrt(5.5))
    t = 3 / math.sqrt(5.5 / 5)  # Student's t with 4 degrees of freedom in closed form
    x = t / math.sqrt(4 + t * t)
    assert found.t_p == pytest.approx(1 - (1.5 * x - 0.5 * x**3))
    # ranks of |d|: 3 -> 2, 1 -> 1, 4 -> 3.5, 5 -> 5, 4 -> 3.5; the negative one has rank 1: of 32 sign vectors four are
    # as far from the middle (none or only rank 1 negative, and their mirrors)
    assert found.wilcoxon_p == pytest.approx(4 / 32)


def test_against_scipy_and_numpy() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=12), generator.normal(0.4, size=12)
    found = paired(a.tolist(), b.tolist())
    assert found.t_p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(a, b, method="exact").pvalue)
    assert (found.sd_a, found.sd_b) == pytest.approx((a.std(ddof=1), b.std(ddof=1)))


def test_the_margin_is_students_interval() -> None:
    a, b = np.random.default_rng(5).normal(size=(2, 6))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = paired(a, b)
    assert (found.difference - found.margin, found.difference + found.margin) == pytest.approx((low, high), abs=1e-12)
    assert math.isnan(paired([1.0], [2.0]).margin)


def test_a_known_data_set() -> None:
    # Student (1908), hours of extra sleep by two drugs: t = 4.0621 with 9 degrees of freedom, p = 0.002833
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired(second, first)
    assert found.difference == pytest.approx(1.58)
    assert found.t_p == pytest.approx(0.002833, abs=1e-6)
    assert found.wilcoxon_p == pytest.approx(2 / 2**9)  # nine differences that are not zero, all positive
    assert found.interval[0] > 0.8


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_wilcoxon_with_ties_is_the_enumeration_of_signs(differences: list[int]) -> None:
    d = np.array([x for x in differences if x], dtype=float)
    if not len(d):
        assert wilcoxon(differences) == 1
        return
    ranks = stats.rankdata(np.abs(d))
    signs = np.array(list(itertools.product([0, 1], repeat=len(d))))
    sums, seen, centre = signs @ ranks, ranks[d > 0].sum(), ranks.sum() / 2
    assert wilcoxon(differences) == pytest.approx(np.mean(abs(sums - centre) >= abs(seen - centre)))


def test_wilcoxon_of_many_pairs_is_continuous_with_the_approximation() -> None:
    d = np.random.default_rng(3).normal(0.1, size=400)
    assert wilcoxon(d) == pytest.approx(stats.wilcoxon(d, method="approx").pvalue, rel=1e-12)
    exact, approximate = wilcoxon(d[:50]), stats.wilcoxon(d[:50], method="approx").pvalue
    assert exact != approximate
    assert exact == pytest.approx(approximate, rel=0.02)


def test_thirteen_pairs_with_ties_are_still_exact() -> None:
    d = np.array([1, 1, -1, 2, 2, 3, -3, 4, 5, 5, -2, 6, 7], dtype=float)
    ranks = stats.rankdata(np.abs(d))
    signs = (np.arange(2**13)[:, None] >> np.arange(13)) & 1
    centre = ranks.sum() / 2
    p = np.mean(abs(signs @ ranks - centre) >= abs(ranks[d > 0].sum() - centre))
    assert wilcoxon([*d, 0.0, 0.0]) == pytest.approx(p, rel=1e-12)


def test_the_bootstrap_interval_is_repeatable_and_near_students_for_many_pairs() -> None:
    a = np.random.default_rng(5).normal(1.0, 2.0, 300)
    found = paired(a.tolist(), [0.0] * 300)
    assert found.interval == paired(a.tolist(), [0.0] * 300).interval
    half = stats.t.ppf(0.975, 299) * a.std(ddof=1) / math.sqrt(300)
    assert found.interval == pytest.approx((a.mean() - half, a.mean() + half), abs=0.05)


def test_equal_values_are_no_difference() -> None:
    found = paired(A, A)
    assert (found.difference, found.t_p, found.wilcoxon_p, found.effect) == (0, 1, 1, 0)
    assert verdict(found) == NO_EVIDENCE


def test_a_constant_difference_is_not_the_noise_of_rounding() -> None:
    found = paired([0.1 + x for x in A], A)  # differences of 0.1 that differ in their last bits
    assert found.sd_difference == 0
    assert found.effect == math.inf
    assert found.wilcoxon_p == pytest.approx(2 / 32)


def test_the_same_difference_in_few_seeds_is_no_certainty() -> None:
    found = paired([0.31, 0.32], [0.30, 0.31])  # Student's p would be 0
    assert found.t_p == found.wilcoxon_p == 0.5
    assert verdict(found) == NO_EVIDENCE


def test_one_pair_is_no_evidence() -> None:
    found = paired([1.0], [0.0])
    assert found.n == 1
    assert math.isnan(found.t_p)
    assert math.isnan(found.interval[0])
    assert verdict(found) == f"{NO_EVIDENCE} (one seed: nothing to test)"


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan, 1.0], [1.0, 2.0])])
def test_wrong_values_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"numbers|finite"):
        paired(a, b)


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, and never falling: 0.06 at the end.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_leaves_out_what_was_not_tested() -> None:
    first, nan, second = holm([0.01, math.nan, 0.02])
    assert (first, second) == pytest.approx((0.02, 0.02))
    assert math.isnan(nan)
    with pytest.raises(ValueError, match="p-values"):
        holm([1.5])


def test_verdicts() -> None:
    assert verdict(paired(A, B), names=("RKDO", "I-Con")).startswith("RKDO higher by 0.0300 (p = 0.046")
    assert verdict(paired(B, A), names=("RKDO", "I-Con")).startswith("I-Con higher by 0.0300")
    assert verdict(paired(A, B), p=0.2) == NO_EVIDENCE
    assert "p < 0.001" in verdict(paired([x + 1 for x in A], B))


@pytest.mark.parametrize(("n", "size"), [(3, 3.27), (4, 2.13), (5, 1.69), (6, 1.44), (8, 1.16), (10, 1.00)])
def test_the_difference_that_a_study_sees(n: int, size: float) -> None:
    """Published power of the paired t-test at 80 %, and counted on draws of that size."""
    spread = np.r_[-1.0, 1.0, np.zeros(n - 2)]
    spread /= spread.std(ddof=1)
    assert paired(list(spread), [0.0] * n).detectable == pytest.approx(size, abs=0.015)
    draws = np.random.default_rng(n).normal(size, 1, (4000, n))
    seen = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert seen.mean() == pytest.approx(0.8, abs=0.03)
    assert np.isnan(paired([1.0], [0.0]).detectable)
