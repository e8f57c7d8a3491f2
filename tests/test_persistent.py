"""The mathematics of persistent rows, against dense float64 transcriptions of the paper's equations in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from rkdo_dist.field import persistent
from rkdo_dist.field.nearest import Nearest, note_all, note_largest, visit_tile
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.field.persistent import BatchColumns, Rows, identity, recur_in_batch, recur_with_bank, restrict, truncate
from rkdo_dist.field.tiled import value_and_gradient
from tests.fields import embeddings, kl, softmax

DOUBLE = torch.float64


def random_rows(seed: int, r: int, n: int, stored: int, filled: int, dtype: torch.dtype = DOUBLE) -> Rows:
    """r rows with `filled` of K slots in use, and a rest if a column is left for it."""
    rng = np.random.default_rng(seed)
    columns = np.full((r, stored), n, dtype=np.int32)
    p = np.zeros((r, stored))
    rest = np.zeros(r)
    for i in range(r):
        columns[i, :filled] = rng.permutation(n)[:filled]
        mass = rng.dirichlet(np.full(filled + 1, 0.3))
        p[i, :filled], rest[i] = mass[:filled], mass[-1]
        if filled == n:
            p[i] /= p[i].sum()
            rest[i] = 0
    return Rows(torch.from_numpy(columns), torch.from_numpy(p).to(dtype), torch.from_numpy(rest).to(dtype), n)


def dense_rows(rows: Rows) -> np.ndarray:
    """All n columns, by the definition alone."""
    out = np.zeros((len(rows.rest), rows.samples))
    for i, (columns, p, rest) in enumerate(
        zip(rows.columns.numpy(), rows.probabilities.numpy(), rows.rest.numpy(), strict=True)
    ):
        stored = [j for j in columns if j < rows.samples]
        if len(stored) < rows.samples:
            out[i] = float(rest) / (rows.samples - len(stored))
        for j, x in zip(columns, p, strict=True):
            if j < rows.samples:
                out[i, j] = x
    return out


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def totals(rows: Rows) -> np.ndarray:
    return rows.probabilities.double().sum(1).numpy() + rows.rest.double().numpy()


sizes = st.tuples(st.integers(0, 10**6), st.integers(2, 40), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))


def shape(drawn: tuple[int, int, float, float, float]) -> tuple[int, int, int, int, int]:
    """seed, n, K, slots in use, B."""
    seed, n, k, used, b = drawn
    stored = 1 + int(k * (n - 1))
    return seed, n, stored, 1 + int(used * (stored - 1)), 2 + int(b * (n - 2))


@settings(max_examples=60, deadline=None)
@given(sizes, st.sampled_from([torch.float32, DOUBLE]))
def test_restriction_is_the_row_on_the_batch_divided_by_its_mass(drawn: tuple, dtype: torch.dtype) -> None:
    seed, n, stored, filled, size = shape(drawn)
    rows = random_rows(seed, 5, n, stored, filled, dtype)
    batch = BatchColumns(n)
    batch.set(torch.from_numpy(np.random.default_rng(seed + 1).permutation(n)))  # another batch before
    samples = torch.from_numpy(np.random.default_rng(seed).permutation(n)[:size])
    batch.set(samples)
    own = torch.arange(5) % size
    found = restrict(rows, batch, own, DOUBLE)
    whole = dense_rows(rows)[:, samples.numpy()]
    mass = whole.sum(1)
    expected = np.where(mass[:, None] > 0, whole / np.where(mass > 0, mass, 1)[:, None], np.eye(size)[own])
    assert found.dense(size).numpy() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.dense(size).sum(1).numpy() == pytest.approx(1, abs=1e-9)
    assert found.mass.numpy() == pytest.approx(mass, rel=1e-12, abs=1e-300)
    assert found.positive.numpy() == pytest.approx(expected[np.arange(5), own], rel=1e-9, abs=1e-12)
    logs = np.log(np.where(expected > 0, expected, 1))
    assert found.entropy.numpy() == pytest.approx(-(expected * logs).sum(1), rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(sizes, st.floats(0, 1))
def test_recursion_in_the_batch_moves_the_mass_inside_and_keeps_the_rest(drawn: tuple, coupling: float) -> None:
    seed, n, _, filled, size = shape(drawn)
    rows = random_rows(seed, 4, n, n, filled)  # K = n: nothing is folded
    batch = BatchColumns(n)
    samples = np.random.default_rng(seed).permutation(n)[:size]
    batch.set(torch.from_numpy(samples))
    q = np.random.default_rng(seed + 2).dirichlet(np.ones(size), size=4)
    after, drift = recur_in_batch(rows, batch, torch.from_numpy(q), coupling)
    expected = dense_rows(rows)
    mass = expected[:, samples].sum(1, keepdims=True)
    moved = coupling * (mass * q - expected[:, samples])
    expected[:, samples] += moved
    assert dense_rows(after) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert dense_rows(after)[:, samples].sum(1) == pytest.approx(mass[:, 0], abs=1e-12)
    assert drift.numpy() == pytest.approx(np.abs(moved).sum(1) / 2, abs=1e-12)
    if coupling > 0.1 and mass.min() < 0.9:  # control: without m the batch would swallow the mass outside
        forgotten = (1 - coupling) * dense_rows(rows)[:, samples] + coupling * q
        assert not np.allclose(forgotten.sum(1), mass[:, 0], atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(sizes, st.floats(0, 1), st.floats(0.05, 2))
def test_recursion_with_the_bank_is_the_mixture_over_all_samples(drawn: tuple, coupling: float, tau: float) -> None:
    seed, n, stored, filled, _ = shape(drawn)
    rng = np.random.default_rng(seed)
    rows = random_rows(seed, 4, n, stored, filled)
    # rows as truncation leaves them: no stored entry is smaller than the even share of the others
    rows = truncate(*by_hand(dense_rows(rows)), stored, n, DOUBLE)
    u, bank = unit(rng, 4, 3), unit(rng, n, 3)
    found = search(rows, u / tau, bank, tile=1 + seed % 7, order=rng.permutation(n))
    after, _ = recur_with_bank(rows, found.at_stored, found.samples, found.logits, found.log_sum(), coupling)
    q = np.stack([softmax(bank @ x / tau) for x in u])
    expected = (1 - coupling) * dense_rows(rows) + coupling * q
    largest = np.sort(expected, axis=1)[:, ::-1][:, :stored]
    kept = np.sort(after.probabilities.numpy(), axis=1)[:, ::-1]
    assert (kept <= largest + 1e-9).all()
    assert kept.sum(1) == pytest.approx(largest.sum(1), abs=1e-9)  # the K largest, up to equal ones
    assert totals(after) == pytest.approx(1, abs=1e-12)
    for i, (columns, p) in enumerate(zip(after.columns.numpy(), after.probabilities.numpy(), strict=True)):
        valid = columns < n
        assert len(set(columns[valid])) == valid.sum()
        assert p[valid] == pytest.approx(expected[i, columns[valid]], rel=1e-9, abs=1e-12)


def by_hand(p: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    columns = torch.arange(p.shape[1], dtype=torch.int32).repeat(len(p), 1)
    return columns, torch.from_numpy(p), torch.zeros(len(p), dtype=DOUBLE)


def search(rows: Rows, queries: np.ndarray, bank: np.ndarray, tile: int, order: np.ndarray | None = None) -> Nearest:
    n = len(bank)
    tiles = range(0, n, tile)
    x = torch.from_numpy(bank)
    found = Nearest.none(rows.columns, rows.columns.shape[1], len(tiles), n, x.dtype)
    visits = list(enumerate(tiles))
    for place in range(len(visits)) if order is None else order[order < len(visits)]:
        number, first = visits[place]
        part = x[first : first + tile]
        seen = torch.ones(len(part), dtype=torch.bool)
        visit_tile(found, torch.from_numpy(queries), part, seen, first, number, rows.columns)
    found.sort()
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 12))
def test_a_tile_gives_the_same_nearest_with_and_without_a_look(seed: int, k: int, tile: int) -> None:
    """Few different logits, so that ties decide; samples without an embedding have none."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(-3, 3, (5, 3 * tile)) / 4.0)
    x[:, torch.from_numpy(rng.random(3 * tile) < 0.2)] = -torch.inf
    found = []
    for note in (note_largest, note_all):
        nearest = Nearest.none(torch.empty(5, 0, dtype=torch.int32), k, 0, 3 * tile, DOUBLE)
        for first in range(0, 3 * tile, tile):
            note(nearest, x[:, first : first + tile].clone(), first)
        nearest.sort()
        found.append(nearest)
    assert torch.equal(found[0].samples, found[1].samples)
    assert torch.equal(found[0].logits, found[1].logits)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 30), st.floats(0, 0.5), st.booleans())
def test_truncation_keeps_the_largest_and_folds_the_others(seed: int, c: int, k: int, other: float, half: bool) -> None:
    rng = np.random.default_rng(seed)
    n = c + (int(rng.integers(1, 9)) if other else 0)
    p = rng.dirichlet(np.full(c, 0.2), size=3) * (1 - other)
    p[:, rng.random(c) < 0.3] = 0
    columns = torch.from_numpy(np.stack([rng.permutation(n)[:c] for _ in range(3)])).int()
    dtype = torch.float32 if half else DOUBLE
    rows = truncate(columns, torch.from_numpy(p.copy()), torch.full((3,), other, dtype=DOUBLE), k, n, dtype)
    assert rows.columns.shape == rows.probabilities.shape == (3, k)
    scale = p.sum(1) + other
    for i in range(3):
        if scale[i] == 0:
            continue
        expected = np.sort(p[i])[::-1][:k] / scale[i]
        got = rows.probabilities[i].double().numpy()
        assert got[: len(expected)] == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert (got[len(expected) :] == 0).all()
        assert ((rows.columns[i] == n).numpy() == (got == 0)).all()
        assert abs(totals(rows)[i] - 1) < (1e-6 if half else 1e-12)


@pytest.mark.parametrize("columns", ["batch", "bank"])
def test_rows_in_float32_sum_to_one_after_many_updates(columns: str) -> None:
    rng, n, stored, size = np.random.default_rng(3), 300, 20, 40
    rows, batch = identity(torch.arange(8), n, stored), BatchColumns(n)
    bank = torch.from_numpy(unit(rng, n, 4)).float()
    worst = 0.0
    for t in range(300):
        samples = torch.from_numpy(np.concatenate([np.arange(8), 8 + rng.permutation(n - 8)[: size - 8]]))
        batch.set(samples)
        coupling = float(rng.choice([0.0, 0.01, 0.5, 1.0]))
        if columns == "batch":
            q = torch.from_numpy(rng.dirichlet(np.full(size, 0.1), size=8)).float()
            rows, _ = recur_in_batch(rows, batch, q, coupling)
        else:
            tau = float(rng.choice([0.02, 0.2]))
            found = search(rows, unit(rng, 8, 4).astype(np.float32) / np.float32(tau), bank.numpy(), 64)
            rows, _ = recur_with_bank(rows, found.at_stored, found.samples, found.logits, found.log_sum(), coupling)
        worst = max(worst, np.abs(totals(rows) - 1).max())
        assert (rows.probabilities >= 0).all(), t
        assert (rows.rest >= 0).all(), t
        supervisor = restrict(rows, batch, torch.arange(8), torch.float32)
        assert torch.isfinite(supervisor.entropy).all()
        assert supervisor.dense(size).sum(1).numpy() == pytest.approx(1, abs=1e-6)
    assert worst < 1e-6


# --- q over all samples, tile by tile -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 20), st.integers(1, 40), st.floats(0.01, 1))
def test_nearest_is_the_same_for_any_tiles_in_any_order(seed: int, n: int, k: int, tile: int, tau: float) -> None:
    rng = np.random.default_rng(seed)
    bank = unit(rng, n, 2).astype(np.float32).round(1)  # rounded: many equal logits
    queries = unit(rng, 3, 2).astype(np.float32).round(1) / np.float32(tau)
    stored = torch.from_numpy(rng.integers(0, n + 1, size=(3, k))).int()
    rows = Rows(stored, torch.zeros(3, k), torch.zeros(3), n)
    found = search(rows, queries, bank, tile, rng.permutation(n))
    logits = (torch.from_numpy(queries) @ torch.from_numpy(bank).T).numpy()
    for i in range(3):
        ranked = sorted(range(n), key=lambda j, i=i: (-logits[i, j], j))[:k]
        got = [j for j in found.samples[i].tolist() if j < n]
        assert len(got) == min(k, n)
        assert found.logits[i, : len(got)].numpy() == pytest.approx(logits[i, ranked], rel=1e-5)
        assert found.log_sum()[i] == pytest.approx(np.log(np.exp(logits[i].astype(np.float64)).sum()), rel=1e-5)
        at = [logits[i, j] if j < n else -np.inf for j in stored[i].tolist()]
        assert found.at_stored[i].numpy() == pytest.approx(np.array(at), rel=1e-5)
    again = search(rows, queries, bank, tile, rng.permutation(n))
    for name in ("samples", "logits", "at_stored", "peaks", "sums"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name


def test_equal_logits_go_to_the_smaller_sample() -> None:
    bank = np.ones((9, 1), dtype=np.float32)
    rows = identity(torch.zeros(1, dtype=torch.int64), 9, 4)
    found = search(rows, np.ones((1, 1), dtype=np.float32), bank, 2, np.arange(9)[::-1])
    assert sorted(found.samples[0].tolist()) == [0, 1, 2, 3]


def test_samples_without_an_embedding_take_no_part() -> None:
    bank, rows = torch.eye(6), identity(torch.tensor([2]), 6, 3)
    found = Nearest.none(rows.columns, 3, 2, 6, torch.float32)
    seen = torch.tensor([True, False, False, False, False, False])
    for tile in (0, 1):
        part = slice(3 * tile, 3 * tile + 3)
        visit_tile(found, torch.ones(1, 6), bank[part], seen[part], 3 * tile, tile, rows.columns)
    found.sort()
    assert found.samples.tolist() == [[0, 6, 6]]
    after, _ = recur_with_bank(rows, found.at_stored, found.samples, found.logits, found.log_sum(), 0.25)
    assert after.dense()[0].tolist() == [0.25, 0, 0.75, 0, 0, 0]


# --- the loss with remembered supervisors -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("tau", [0.5, 0.02])
@pytest.mark.parametrize("stored", [1, 6, 40])
def test_loss_and_gradients_are_those_of_the_dense_formula(dtype: torch.dtype, tau: float, stored: int) -> None:
    n, size, r = 40, 30, 12
    u, v = embeddings(size, 8, seed=1)
    rows = random_rows(5, r, n, stored, max(1, stored // 2), dtype)
    batch = BatchColumns(n)
    batch.set(torch.from_numpy(np.random.default_rng(0).permutation(n)[:size]))
    p = restrict(rows, batch, torch.arange(7, 7 + r), dtype)
    objective = Objective.persistent(0.3, tau)
    found = value_and_gradient(
        objective, u[7 : 7 + r].to(dtype), v[7 : 7 + r].to(dtype), u.to(dtype), v.to(dtype), 7, supervisor=p
    )
    a, b = u.clone().requires_grad_(), v.clone().requires_grad_()
    log_q = torch.log_softmax(a[7 : 7 + r] @ b.T / tau, dim=1)
    target = p.dense(size).double()
    loss = (torch.xlogy(target, target) - target * log_q).sum()
    loss.backward()
    close = 1e-10 if dtype == DOUBLE else 2e-5
    assert float(found.loss) == pytest.approx(loss.item(), rel=close)
    assert (found.rows_u - a.grad[7 : 7 + r]).norm() <= close * a.grad.norm()
    assert found.columns_v is not None
    assert (found.columns_v - b.grad).norm() <= close * b.grad.norm()
    parts = {name: float(x) / r for name, x in found.parts.items()}
    assert parts["cross_entropy"] - parts["entropy_p"] == pytest.approx(float(found.loss) / r, rel=close)
    assert parts["uniform"] == pytest.approx((np.log(size) - p.entropy.mean()).item(), rel=close)
    diagonal = log_q.detach().exp()[torch.arange(r), torch.arange(7, 7 + r)]
    assert parts["positive_mass"] == pytest.approx(diagonal.mean().item(), rel=close)


@pytest.mark.parametrize("stored", [1, 7, 32])
def test_identity_rows_are_infonce_whatever_k_is(stored: int) -> None:
    u, v = embeddings(32, 8)
    batch, rows = BatchColumns(50), identity(torch.arange(32), 50, min(50, stored), DOUBLE)
    batch.set(torch.arange(32))
    p = restrict(rows, batch, torch.arange(32), DOUBLE)
    found = value_and_gradient(Objective.persistent(0.0, 0.3), u, v, u, v, 0, supervisor=p)
    plain = value_and_gradient(Objective.infonce(0.3), u, v, u, v, 0)
    assert float(found.loss) == pytest.approx(float(plain.loss), rel=1e-14)
    assert torch.allclose(found.rows_u, plain.rows_u, rtol=1e-13, atol=1e-15)
    loss, _ = dense(Objective.persistent(0.7, 0.3), u, v)  # without rows: the identity
    assert float(loss) == pytest.approx(float(plain.loss) / 32, rel=1e-12)


def test_the_clock_is_that_of_the_training() -> None:
    assert Objective.persistent(0.5, 0.4, 0.25, progress=0.5).temperatures[-1] == pytest.approx(0.4 * (1 - 0.125))


# --- the paper's statements -------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 20), st.floats(0, 1))
def test_lemma_1(seed: int, n: int, coupling: float) -> None:
    """KL((1 - a) p + a q || q) <= (1 - a) KL(p || q), on the rows themselves."""
    rows, batch = random_rows(seed, 3, n, n, max(1, n // 2)), BatchColumns(n)
    batch.set(torch.arange(n))
    q = np.random.default_rng(seed).dirichlet(np.ones(n), size=3)
    before, after = dense_rows(rows), dense_rows(recur_in_batch(rows, batch, torch.from_numpy(q), coupling)[0])
    for i in range(3):
        assert kl(after[i], q[i]) <= (1 - coupling) * kl(before[i], q[i]) + 1e-9


def test_theorem_3_geometric_decay_when_q_is_kept() -> None:
    n, coupling = 12, 0.3
    rows, batch = identity(torch.arange(n), n, n, DOUBLE), BatchColumns(n)
    batch.set(torch.arange(n))
    q = np.random.default_rng(1).dirichlet(np.ones(n), size=n)
    first = last = np.mean([kl(p, x) for p, x in zip(dense_rows(rows), q, strict=True)])
    for t in range(1, 31):
        rows, _ = recur_in_batch(rows, batch, torch.from_numpy(q), coupling)
        now = np.mean([kl(p, x) for p, x in zip(dense_rows(rows), q, strict=True)])
        assert now <= (1 - coupling) ** t * first + 1e-12
        assert now <= last
        last = now


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="between 1 and 5"):
        identity(torch.arange(5), 5, 6)
    with pytest.raises(ValueError, match="sample 3 occurs twice in one global batch"):
        BatchColumns(5).set(torch.tensor([1, 3, 3]))
    with pytest.raises(ValueError, match="coupling"):
        Objective.persistent(1.5)


def test_a_row_without_mass_in_the_batch_is_supervised_by_itself_and_stays() -> None:
    rows = Rows(torch.tensor([[4, 5]]).int(), torch.tensor([[1.0, 0.0]]), torch.zeros(1), 5)
    batch = BatchColumns(5)
    batch.set(torch.tensor([2, 0]))
    p = restrict(rows, batch, torch.tensor([1]), DOUBLE)
    assert p.dense(2).tolist() == [[0, 1]]
    assert float(p.mass) == float(p.entropy) == 0
    after, _ = recur_in_batch(rows, batch, torch.tensor([[0.5, 0.5]]), 0.7)
    assert torch.equal(after.dense(), rows.dense())


def test_entropy_and_single_probabilities_are_those_of_the_dense_row() -> None:
    rows = random_rows(2, 6, 20, 8, 5)
    whole = dense_rows(rows)
    assert rows.dense().numpy() == pytest.approx(whole, abs=1e-15)
    logs = np.log(np.where(whole > 0, whole, 1))
    assert rows.entropy().numpy() == pytest.approx(-(whole * logs).sum(1), rel=1e-12)
    samples = torch.tensor([0, 3, 7, 19, 5, 11])
    assert rows.at(samples).numpy() == pytest.approx(whole[np.arange(6), samples.numpy()], rel=1e-12)
    both = persistent.Rows.cat([rows.slice(0, 2), rows.slice(2, 6)])
    assert torch.equal(both.columns, rows.columns)
    assert functional.cosine_similarity(both.rest, rows.rest, dim=0) > 0.999
