"""The dense oracle against an independent formula, its invariants, and its known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rkdo_dist.field import recursion
from rkdo_dist.field.objectives import Objective, dense
from tests import fields

ALPHAS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
TAUS = st.floats(0.01, 10)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 20), st.integers(1, 9), st.integers(1, 6), ALPHAS, TAUS, st.floats(0, 0.9),
    st.sampled_from(["cross", "joint"]), st.sampled_from([0.0, 0.0, 0.3, 1.0]), st.integers(0, 3), st.integers(0, 99),
)  # fmt: skip
def test_rkdo_equals_the_papers_equations(batch, d, depth, alpha, tau, beta, pairing, debias, copies, seed) -> None:
    u, v = fields.embeddings(batch, d, seed, copies=copies)
    objective = Objective.rkdo(depth, alpha, tau, beta, pairing, debias=debias)
    loss, parts = dense(objective, u, v)
    taus = [tau * (1 - beta * t / depth) for t in range(depth + 1)]
    expected = fields.rkdo(u.numpy(), v.numpy(), taus, [alpha] * depth, pairing, debias)
    scale = max(1.0, float(parts["cross_entropy"]))  # what the divergences are differences of
    assert float(loss) == pytest.approx(sum(expected), rel=1e-10, abs=1e-12 * scale)
    for t, value in enumerate(expected, start=1):
        assert float(parts[f"kl_{t}"]) == pytest.approx(value, rel=1e-10, abs=1e-12 * scale)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 20), TAUS, st.sampled_from(["cross", "joint"]), ALPHAS, st.integers(0, 99))
def test_icon_equals_its_definition(batch, tau, pairing, a, seed) -> None:
    u, v = fields.embeddings(batch, 5, seed)
    expected = fields.icon(u.numpy(), v.numpy(), tau, a, pairing)
    assert float(dense(Objective.icon(a, tau, pairing), u, v)[0]) == pytest.approx(expected, rel=1e-10, abs=1e-11 / tau)


@pytest.mark.parametrize("pairing", ["cross", "joint"])
@pytest.mark.parametrize("gradient", ["flow", "stop"])
def test_gradients_equal_finite_differences_of_the_papers_equations(pairing: str, gradient: str) -> None:
    u, v = fields.embeddings(6, 4)
    u.requires_grad_()
    (found,) = torch.autograd.grad(dense(Objective.rkdo(3, 0.4, 0.3, 0.2, pairing, gradient), u, v)[0], u)
    taus, fixed = [0.3 * (1 - 0.2 * t / 3) for t in range(4)], u.detach().numpy().copy()

    def value(x: np.ndarray) -> float:
        if gradient == "flow":
            return sum(fields.rkdo(x, v.numpy(), taus, [0.4] * 3, pairing))
        return _with_fixed_supervisor(x, fixed, v.numpy(), taus, 0.4, pairing)

    step = 1e-6
    for i, k in ((0, 0), (3, 2), (5, 3)):
        high, low = fixed.copy(), fixed.copy()
        high[i, k] += step
        low[i, k] -= step
        assert float(found[i, k]) == pytest.approx((value(high) - value(low)) / (2 * step), rel=1e-6, abs=1e-9)


def _with_fixed_supervisor(
    x: np.ndarray, fixed: np.ndarray, v: np.ndarray, taus: list[float], alpha: float, pairing: str
) -> float:
    """The loss as a function of q alone: p comes from `fixed`."""
    rows, old = fields.rows_and_columns(x, v, pairing), fields.rows_and_columns(fixed, v, pairing)
    total = 0.0
    for (row, columns, positive), (row0, columns0, _) in zip(rows, old, strict=True):
        p = np.zeros(len(columns))
        p[positive] = 1
        for t in range(1, len(taus)):
            p = (1 - alpha) * p + alpha * fields.softmax(columns0 @ row0 / taus[t - 1])
            total += fields.kl(p, fields.softmax(columns @ row / taus[t])) / len(rows)
    return total


def test_known_values_at_uniform_q() -> None:
    assert Objective.rkdo().at_uniform(64) == pytest.approx(2.1396, abs=5e-5)
    assert Objective.icon().at_uniform(64) == pytest.approx(2.8472, abs=5e-5)
    for batch, lower in ((64, 24.85), (32, 29.75), (4096, 8.19)):
        ratio = Objective.rkdo().at_uniform(batch) / Objective.icon().at_uniform(batch)
        assert 100 * (1 - ratio) == pytest.approx(lower, abs=5e-3)


@pytest.mark.parametrize("objective", fields.objectives_of(0.4, 3, 0.3), ids=lambda o: f"{o.name}-{o.pairing}")
def test_at_uniform_is_the_value_at_equal_embeddings(objective: Objective) -> None:
    same = torch.zeros(10, 3, dtype=torch.float64)
    same[:, 0] = 1
    labels = torch.tensor([0] * 5 + [1] * 5)
    loss, parts = dense(objective, same, same, labels)
    positives = {"cross": 5, "joint": 9}[objective.pairing] if objective.needs_labels else 1
    assert float(loss) == pytest.approx(objective.at_uniform(10, positives), rel=1e-12)
    assert float(parts["uniform"]) == pytest.approx(float(loss), rel=1e-12)


@pytest.mark.parametrize("objective", fields.objectives_of(0.4, 3, 0.3), ids=lambda o: f"{o.name}-{o.pairing}")
def test_at_ideal_is_the_value_at_a_simplex(objective: Objective) -> None:
    if objective.needs_labels:
        return
    simplex = torch.nn.functional.normalize(torch.eye(6, dtype=torch.float64) - 1 / 6, dim=1)
    assert float(dense(objective, simplex, simplex)[0]) == pytest.approx(objective.at_ideal(6), rel=1e-12)


def test_infonce_is_cross_entropy_on_the_diagonal_and_rkdo_without_coupling() -> None:
    u, v = fields.embeddings(12, 6)
    expected = torch.nn.functional.cross_entropy(u @ v.T / 0.3, torch.arange(12))
    for objective in (
        Objective.infonce(0.3),
        Objective.icon(0.0, 0.3),
        Objective.rkdo(depth=1, coupling=0.0, temperature=0.3, cooling=0.0),
    ):
        torch.testing.assert_close(dense(objective, u, v)[0], expected, rtol=1e-12, atol=0)
    back = torch.nn.functional.cross_entropy(v @ u.T / 0.3, torch.arange(12))
    clip = dense(Objective.infonce(0.3, symmetric=True), u, v)[0]
    torch.testing.assert_close(clip, (expected + back) / 2, rtol=1e-12, atol=0)


def test_supervised_is_supcon() -> None:
    u, v = fields.embeddings(9, 4)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 3])
    _, parts = dense(Objective.supervised(0.2), u, v, labels)
    expected = fields.supcon(u.numpy(), v.numpy(), labels.numpy(), 0.2)
    assert float(parts["cross_entropy"]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="labels"):
        dense(Objective.supervised(0.2), u, v)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 20), st.integers(1, 6), ALPHAS, TAUS, st.integers(0, 99), st.booleans())
def test_rows_of_the_field_are_distributions(batch, depth, alpha, tau, seed, excluding) -> None:
    u, v = fields.embeddings(batch, 4, seed)
    excluded = torch.eye(batch, dtype=torch.bool) if excluding else None
    initial = torch.eye(batch, dtype=torch.float64).roll(1, 0)
    taus = Objective.rkdo(depth, alpha, tau).temperatures
    field = recursion.unroll(recursion.similarities(u, v), initial, taus, [alpha] * depth, excluded)
    for rows in (*field.p, *(x.exp() for x in field.log_q)):
        assert (rows >= 0).all()
        torch.testing.assert_close(rows.sum(1), torch.ones(batch, dtype=torch.float64), rtol=1e-12, atol=0)
        if excluding:
            assert (rows.diagonal() == 0).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), ALPHAS, st.integers(0, 99))
def test_lemma_1_the_jensen_step(columns, alpha, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, logits = (torch.randn(5, columns, generator=generator, dtype=torch.float64).mul(3) for _ in range(2))
    p, log_q = p.softmax(1), logits.log_softmax(1)
    mixed = recursion.supervisory(p, log_q.exp(), alpha)
    bound = (1 - alpha) * recursion.kl_divergence(p, log_q)
    assert (recursion.kl_divergence(mixed, log_q) <= bound + 1e-12).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 12), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 99))
def test_theorem_3_geometric_decay_where_fitting_does_not_make_q_worse(columns, alpha, fitted, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(5, columns, generator=generator, dtype=torch.float64).softmax(1) for _ in range(2))
    first = recursion.kl_divergence(p, q.log())
    for t in range(1, 8):
        p = recursion.supervisory(p, q, alpha)
        q = (1 - fitted) * q + fitted * p  # fitted = 1 is the exact inner minimisation
        assert (recursion.kl_divergence(p, q.log()) <= (1 - alpha) ** t * first + 1e-12).all()


def test_permuting_the_samples_changes_nothing() -> None:
    u, v = fields.embeddings(11, 5)
    order, labels = torch.randperm(11, generator=torch.Generator().manual_seed(3)), torch.arange(11) % 3
    for objective in fields.objectives_of(0.3, 2, 0.6):
        permuted, original = dense(objective, u[order], v[order], labels[order])[0], dense(objective, u, v, labels)[0]
        torch.testing.assert_close(permuted, original, rtol=1e-12, atol=0)


def test_zero_probabilities_contribute_zero_with_finite_gradients() -> None:
    u, v = (x.requires_grad_() for x in fields.embeddings(6, 4))
    for objective in (Objective.rkdo(3, 0.0), Objective.rkdo(3, (0.0, 0.5, 1.0), 0.01), Objective.supervised(0.05)):
        loss, _ = dense(objective, u, v, torch.tensor([0, 0, 1, 1, 2, 3]))
        gradients = torch.autograd.grad(loss, (u, v))
        assert torch.isfinite(loss)
        assert all(torch.isfinite(g).all() for g in gradients)


def test_training_clock_uses_one_temperature_on_every_level() -> None:
    objective = Objective.rkdo(clock="training", cooling=0.4, progress=0.5)
    assert objective.temperatures == pytest.approx([0.4] * 4)
    assert Objective.rkdo(cooling=0.4, progress=0.5) == Objective.rkdo(cooling=0.4)


def test_a_changed_temperature_keeps_proportions() -> None:
    doubled = Objective.rkdo().with_temperature(1.0)
    assert doubled.temperatures == pytest.approx(Objective.rkdo(temperature=1.0).temperatures)
    assert Objective.icon().with_temperature(0.1).temperatures == (pytest.approx(0.1),)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"depth": 0}, "depth"),
        ({"depth": 2.5}, "depth"),
        ({"depth": True}, "depth"),
        ({"coupling": 1.5}, "coupling"),
        ({"coupling": float("nan")}, "coupling"),
        ({"coupling": (0.5, 0.5)}, "coupling"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"cooling": 1.0}, "cooling"),
        ({"pairing": "both"}, "pairing"),
        ({"supervisor_grad": "half"}, "supervisor_grad"),
        ({"clock": "wall"}, "clock"),
        ({"progress": 1.5}, "progress"),
        ({"pairing": "joint", "symmetric": True}, "symmetric"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Objective.rkdo(**arguments)


def test_static_objectives_check_their_arguments() -> None:
    for make in (lambda: Objective.icon(debias=1.2), lambda: Objective.supervised(debias=-0.1)):
        with pytest.raises(ValueError, match="debias"):
            make()
    for make in (lambda: Objective.icon(temperature=0), lambda: Objective.infonce(-1), lambda: Objective.supervised(0)):
        with pytest.raises(ValueError, match="temperature"):
            make()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"temperatures": (0.5, 0.5), "couplings": (0.5, 0.5), "recursion": "in_batch"}, "D \\+ 1 temperatures"),
        ({"temperatures": (0.5, 0.5), "couplings": (0.5,)}, "else one temperature"),
        ({"temperatures": (0.5,), "recursion": "in_batch"}, "else one temperature"),
        ({"temperatures": (math.inf,)}, "temperature must be finite"),
        ({"temperatures": (0.5,), "supervisor": "teacher"}, "supervisor must be one of identity, labels, rows"),
        ({"temperatures": (0.5,), "affinity": "gaussian"}, "affinity must be one of `field.affinity`, got 'gaussian'"),
        ({"temperatures": (0.5,), "recursion": "persistent"}, "goes with supervisor='rows'"),
        (
            {"temperatures": (0.5,), "recursion": "persistent", "supervisor": "rows", "symmetric": True},
            "goes with supervisor='rows'",
        ),
    ],
)
def test_an_objective_that_cannot_be_is_refused(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Objective("mine", 0.5, **arguments)
