"""Section 6.2 measured: minimisers minimise, bounds hold, wrong bounds fail, counterexamples are what they say."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from examples.theory import conditions, statements
from tests.jobs import command

SMALL = ((4, 2), (8, 8))


def slow_loss(p: np.ndarray, q: np.ndarray) -> float:
    def term(a: float, b: float) -> float:
        return 0.0 if a == 0 else math.inf if b == 0 else a * math.log(a / b)

    rows = [sum(term(float(a), float(b)) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    return sum(rows) / len(rows)


def test_the_loss_is_the_mean_divergence_zeros_included() -> None:
    found = [
        (start, statements.loss(start.p, start.q))
        for start in statements.starts(np.random.default_rng(0), shapes=SMALL)
    ]
    assert {math.isinf(value) for _, value in found} == {True, False}
    for start, value in found:
        assert value == pytest.approx(slow_loss(start.p, start.q), rel=1e-10, abs=1e-14), start.name
        for field in (start.p, start.q):
            assert np.allclose(field.sum(axis=1), 1)
            assert (field >= 0).all()


def test_the_inner_minimisation_is_exact() -> None:
    """No other member of a family is better, near or far; what is fitted lies in the family."""
    draw = np.random.default_rng(1)
    for family in statements.families(draw, (6, 8)):
        for concentration in (0.1, 1.0, 10.0):
            p = draw.dirichlet(np.full(8, concentration), 6)
            q = family.fit(p)
            assert statements.loss(q, family.fit(q)) == pytest.approx(0, abs=1e-12), family.name
            others = [family.member(draw, (6, 8)) for _ in range(200)]
            near = [family.fit(statements.supervisor(p, other, 1e-3)) for other in others[:20]]
            assert min(statements.loss(p, other) for other in others + near) >= statements.loss(p, q) - 1e-12, (
                family.name
            )
    assert statements.every_field().rich


def test_what_the_paper_states_holds_on_every_case() -> None:
    tallies = {tally.statement: tally for tally in statements.measure(seed=1, shapes=SMALL)}
    assert len(tallies) == 6
    for tally in tallies.values():
        assert tally.holds, tally
        assert tally.cases > 200, tally
        assert tally.slack < 1e-12, tally
    assert tallies["Lemma 1"].empty > 0, "supports that make the bound infinite are among the cases"
    assert tallies["Theorem 3, A1 and A2 hold"].tightest == 0, "under A1 and A2 the loss is 0 after one step"
    assert tallies["Theorem 3, A1 fails"].tightest > 0.5


def test_a_wrong_bound_is_noticed() -> None:
    """The control: (1 - alpha)^2 in the place of (1 - alpha) fails, though only just."""
    tally = statements.Tally("wrong", "")
    for start in statements.starts(np.random.default_rng(0), shapes=SMALL):
        for alpha in (0.3, 0.5):
            right = (1 - alpha) ** 2 * statements.loss(start.p, start.q)
            tally.add(statements.loss(statements.supervisor(start.p, start.q, alpha), start.q), right)
    assert not tally.holds
    assert tally.held > 0
    skipping = statements.recurse(np.eye(4), np.full((4, 4), 0.25), lambda p: np.roll(p, 1, 1), 0.1, 1)
    assert skipping.losses[1] > skipping.intermediate[0], "Lemma 2 without a minimiser fails"


def test_errors_are_met_exactly() -> None:
    losses = statements.with_errors(lambda t: 0.05, 0.5, 40)
    assert all(after <= 0.5 * before + 0.05 + 1e-12 for before, after in itertools.pairwise(losses))
    assert losses[-1] > 0.05, "the loss before the fit is not negative, and the error comes on top"


# --- what the statements need beyond what they say ---------------------------------------------------------


def test_an_infinite_start_stays_infinite() -> None:
    numbers = conditions.infinite_start().numbers
    assert numbers == {"L(0)": math.inf, "L(20)": math.inf}


def test_under_both_assumptions_every_alpha_arrives_at_once_also_none() -> None:
    numbers = conditions.nothing_left_to_fit().numbers
    assert numbers.pop("L(0)") > 0.5
    assert set(numbers) >= {"L(1), alpha = 0", "L(1), alpha = 0.01"}
    assert max(numbers.values()) < 1e-15


def test_the_loss_decays_when_nothing_is_learned() -> None:
    numbers = conditions.decay_without_learning().numbers
    assert numbers["L(20)"] < 0.5**20 * numbers["L(0)"]
    assert numbers["L(20) / L(19)"] == pytest.approx(0.25, abs=1e-3)
    assert numbers["loss against p(0) at t = 20"] == numbers["L(0)"]


def test_the_released_recursion_is_lower_before_training() -> None:
    numbers = conditions.released_recursion_untrained().numbers
    assert numbers["KL of level 1"] > numbers["KL of level 2"] > numbers["KL of level 3"]
    assert numbers["RKDO at uniform"] == pytest.approx(2.1396, abs=5e-5)  # ../shared/design, and by hand:
    p = np.full(64, 0.5 / 64)
    p[0] += 0.5
    assert numbers["KL of level 1"] == pytest.approx(float((p * np.log(p * 64)).sum()), rel=1e-12)
    assert numbers["I-Con at uniform"] == pytest.approx(2.8472, abs=5e-5)


def test_a_softmax_has_no_minimiser_for_a_one_hot_row() -> None:
    numbers = conditions.no_minimiser().numbers
    assert numbers["x = 1"] > numbers["x = 10"] > numbers["x = 30"] > 0
    assert numbers["unit norm, least"] == pytest.approx(math.log(1 + 63 * math.exp(-(1 + 1 / 63) / 0.5)), rel=1e-12)


def test_cooling_breaks_lemma_2() -> None:
    numbers = conditions.shrinking_family().numbers
    assert numbers["loss before the fit"] == 0
    by_hand = []  # the diagonal at e^(1/tau): two columns, logits +1/tau and -1/tau
    for tau in (0.5, 0.45):
        by_hand.append(1 / (1 + math.exp(-2 / tau)))
    a, b = by_hand
    assert numbers["L(1)"] == pytest.approx(a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)), rel=1e-9)
    assert numbers["L(1)"] > 1e-3


def test_no_floor_is_reached_and_the_loss_against_p0_has_one() -> None:
    numbers = conditions.capacity_leaves_no_floor().numbers
    floor = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert numbers["L(0) = inf over the family"] == pytest.approx(floor, rel=1e-12)
    assert numbers["L(20)"] < 1e-12
    assert numbers["against p(0), t = 20"] == pytest.approx(floor, rel=1e-12)


def test_full_coupling_drops_the_supervision() -> None:
    numbers = conditions.full_coupling_forgets().numbers
    assert numbers["L(1)"] == 0
    assert numbers["against p(0), t = 5"] == numbers["against p(0), t = 0"] > 1
    assert numbers["in-batch loss at uniform"] == numbers["in-batch loss at the ideal"] == 0


def test_annealing_too_fast_stops_the_decay() -> None:
    numbers = conditions.annealed_coupling().numbers
    assert numbers["product of (1 - alpha_t)"] == pytest.approx(0.288788, abs=1e-6)  # prod (1 - 2^-t)
    assert numbers["L(60)"] > 0.02


def test_errors_need_only_vanish() -> None:
    numbers = conditions.errors_need_not_be_summable(60).numbers
    assert numbers["0.1 / t"] < 0.005
    assert 0.05 < numbers["0.05"] < numbers["0.05 / alpha"]


def test_the_command_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = statements.measure
    monkeypatch.setattr(statements, "measure", lambda **options: measured(shapes=SMALL[:1], **options))
    code, text = command(["verify-theory", "--out", str(tmp_path / "out")])
    assert code == 0, text
    for words in ("Lemma 1", "Theorem 3", "Eq. 15", "false as written", "counterexample"):
        assert words in text, words
    facts = json.loads((tmp_path / "out" / "theory.json").read_text())
    for finding in facts["findings"]:  # prose is read in lines, not in columns
        assert finding["finding"] in " ".join(text.split())
    assert all(row["holds"] for row in facts["statements"])
    assert {finding["kind"] for finding in facts["findings"]} == set(conditions.KINDS)
    assert facts["findings"][0]["numbers"]["L(0)"] == "inf"
    assert (tmp_path / "out" / "theory.png").read_bytes().startswith(b"\x89PNG")
    assert command(["verify-theory", "--repeats", "0"])[0] == 2
