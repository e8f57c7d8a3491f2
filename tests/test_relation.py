"""Recursion with restart: equations against ten-line oracles, the theorems about recursion, bounded memory."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize, softmax

from rkdo_dist.field import relation as restart
from rkdo_dist.field import rows as rows_of_the_field
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.field.persistent import BatchColumns, identity, recur_in_batch
from rkdo_dist.field.presets import Relation
from rkdo_dist.field.recursion import log_learned, supervisory, unroll
from tests.fields import embeddings
from tests.ranks import run_ranks

TAU, TAU_T = 0.1, 0.05


def unit(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


# --- published methods, ten lines each ----------------------------------------------------------------------------


def sce(u: Tensor, k: Tensor, others: Tensor, a: float) -> Tensor:
    """Denize et al., WACV 2023: a row's positive is its own key, its relation that of its key to the other keys."""
    logits = torch.cat([(u * k).sum(1, keepdim=True), u @ others.T], 1) / TAU
    target = torch.cat([torch.full((len(u), 1), 1 - a), a * softmax(k @ others.T / TAU_T, 1)], 1)
    return (torch.xlogy(target, target) - target * log_softmax(logits, 1)).sum(1)


def ressl(u: Tensor, k: Tensor, others: Tensor) -> Tensor:
    """Zheng et al., NeurIPS 2021: two softmaxes over the queue alone."""
    target = softmax(k @ others.T / TAU_T, 1)
    return (torch.xlogy(target, target) - target * log_softmax(u @ others.T / TAU, 1)).sum(1)


def co2(u: Tensor, k: Tensor, others: Tensor, b: float) -> Tensor:
    """Wei et al. 2020: InfoNCE and b times the divergence of the key's and the query's softmax over negatives."""
    logits = torch.cat([(u * k).sum(1, keepdim=True), u @ others.T], 1) / TAU
    return -log_softmax(logits, 1)[:, 0] + b * ressl(u, k, others)


METHODS = {
    "sce": (Relation(0.5), lambda *x: sce(*x, 0.5)),
    "ressl": (Relation(1.0, "apart"), ressl),
    "co2": (Relation(10 / 11, "apart"), lambda *x: co2(*x, 10.0) / 11),
    "weight 0": (Relation(0.0, "apart"), lambda *x: sce(*x, 0.0)),
}


def queue_of(keys: Tensor, older: Tensor) -> restart.Columns:
    both = torch.cat([keys, older])
    return restart.Columns(both, both, torch.arange(len(both)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [9, 70])  # one panel, and several
def test_a_queue_of_keys_equals_the_published_loss(method: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    relation, oracle = METHODS[method]
    monkeypatch.setitem(rows_of_the_field.PANEL_ELEMENTS, "cpu", 1)
    u, k, older = unit(rows, 5, 0).requires_grad_(), unit(rows, 5, 1), unit(40, 5, 2)
    columns = queue_of(k, older)
    found = restart.value_and_gradient(relation, TAU, relation.weight, u.detach(), k, columns, torch.arange(rows))
    losses = [
        oracle(u[i : i + 1], k[i : i + 1], torch.cat([k[:i], k[i + 1 :], older]))[0] for i in range(rows)
    ]  # the keys of the batch are in the queue
    wanted = torch.stack(losses).sum()
    torch.testing.assert_close(found.loss, wanted.detach(), rtol=1e-12, atol=1e-12)
    gradient = torch.autograd.grad(wanted, u)[0]
    torch.testing.assert_close(found.rows, gradient, rtol=1e-12, atol=1e-12)
    forgotten = replace(relation, temperature=TAU)  # control: a teacher at the student's temperature is another loss
    other = restart.value_and_gradient(forgotten, TAU, relation.weight, u.detach(), k, columns, torch.arange(rows))
    assert torch.allclose(other.rows, gradient, rtol=1e-3) == (relation.weight == 0)


LANES, MICRO = 4, 3


def on_ranks(rank: int, world: int) -> list[dict[str, np.ndarray]]:
    """Loss and gradients of every method, summed over this rank's lanes, for its own lanes; exact and merged."""
    from rkdo_dist.exchange import group
    from rkdo_dist.exchange.columns import ExactColumns, GatheredColumns
    from rkdo_dist.training.relation import RelationalField

    found = []
    own = slice(rank * LANES // world, (rank + 1) * LANES // world)
    u, v, keys = (x.split(MICRO) for x in given_batch())
    ids = torch.arange(LANES * MICRO).split(MICRO)
    queues, banks = ([replace(r, columns=x, queue=36) for r, _ in METHODS.values()] for x in ("queue", "bank"))
    for relation in (*queues, *banks, Relation(0.4)):
        for merged in (False, True):
            kept = RelationalField(relation, 124, 5, True, torch.device("cpu"), torch.float64)
            if kept.queue is not None:
                older = unit(24, 5, 2)
                kept.queue.put(older, torch.arange(100, 124), torch.arange(24) % 3)
                kept.queue.advance(24)
            if kept.bank is not None:
                kept.bank.refresh(torch.arange(100, 124), unit(24, 5, 2), torch.arange(24) % 3)
            kept.begin(keys[own], torch.cat(ids[own]), torch.cat(ids[own]) % 3)
            objective = replace(Objective.of("restart", temperature=TAU), relation=relation)
            columns = GatheredColumns() if merged else ExactColumns()
            gradients, sums = kept.field(list(zip(u[own], v[own], strict=True)), objective, columns, merged)
            totals = group.all_gather_rows(sums["loss"].sum()[None])
            du, dv = (group.all_gather_rows(torch.cat([pair[k] for pair in gradients])) for k in (0, 1))
            found.append({"loss": totals.sum().numpy(), "u": du.numpy(), "v": dv.numpy()})
    return found


def given_batch() -> tuple[Tensor, Tensor, Tensor]:
    return unit(LANES * MICRO, 5, 0), unit(LANES * MICRO, 5, 3), unit(LANES * MICRO, 5, 1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_method_is_its_oracle_on_any_number_of_ranks(world: int) -> None:
    u, v, keys = given_batch()
    n, older = len(u), unit(24, 5, 2)
    u.requires_grad_()
    v.requires_grad_()
    wanted = []
    for _, oracle in METHODS.values():
        others = [torch.cat([keys[:i], keys[i + 1 :], older]) for i in range(n)]
        wanted.append(torch.stack([oracle(u[i : i + 1], keys[i : i + 1], others[i])[0] for i in range(n)]).sum())
    wanted *= 2  # over a queue, and over a bank in which 88 samples have no key
    w = softmax((keys @ keys.T / TAU_T).fill_diagonal_(-torch.inf), 1)
    p = 0.6 * torch.eye(n, dtype=torch.float64) + 0.4 * w
    wanted.append((torch.xlogy(p, p) - p * log_softmax(u @ v.T / TAU, 1)).sum())
    for found in run_ranks(on_ranks, world) if world > 1 else [on_ranks(0, 1)]:
        for number, loss in enumerate(wanted):
            du, dv = torch.autograd.grad(loss, (u, v), retain_graph=True, materialize_grads=True)
            for merged in (0, 1):
                mine = found[2 * number + merged]
                assert float(mine["loss"]) == pytest.approx(float(loss.detach()), rel=1e-12)
                np.testing.assert_allclose(mine["u"], du, rtol=1e-11, atol=1e-12)
                np.testing.assert_allclose(mine["v"], dv, rtol=1e-11, atol=1e-12)


# --- dense, with neighbours, mutual ones, confidence, and a sample that is in the queue twice ---------------------


@pytest.mark.parametrize("form", ["mixed", "apart"])
@pytest.mark.parametrize(("neighbours", "mutual"), [(0, False), (4, False), (4, True)])
@pytest.mark.parametrize("confidence", ["none", "entropy"])
def test_bounded_memory_equals_the_dense_oracle(form: str, neighbours: int, mutual: bool, confidence: str) -> None:
    relation = Relation(0.4, form, temperature=0.2, neighbours=neighbours, confidence=confidence)
    n, b = 23, 7
    u, columns, keys = unit(b, 4, 3).requires_grad_(), unit(n, 4, 4).requires_grad_(), unit(n, 4, 5)
    samples = torch.arange(n)
    samples[15] = 2  # an older key of sample 2, which is neither its negative nor related to it
    positive, labels = torch.arange(b), torch.arange(n) % 3
    own = samples[positive][:, None] == samples[None, :]
    excluded = own & ~torch.nn.functional.one_hot(positive, n).bool()
    similarity, everyone = keys[positive] @ keys.T, keys @ keys.T
    candidates = ~own
    if neighbours:
        candidates = restart.nearest(similarity, candidates, neighbours)
    of_columns = restart.nearest(everyone, samples[:, None] != samples[None, :], neighbours) if mutual else None
    if of_columns is not None:
        candidates &= of_columns[:, positive].T
        assert 0 < int((~candidates.any(1)).sum()) < b  # some rows have no relation: they are the identity
    w = restart.relation(similarity, 0.2, candidates)
    a = torch.full((b,), 0.4, dtype=torch.float64)
    a = a * restart.sureness(w, candidates) if confidence == "entropy" else a
    log_q = log_learned(u @ columns.T, TAU, excluded)
    losses = restart.row_losses(log_q, positive, w, a, form)

    given = restart.Columns(columns.detach(), keys, samples, labels)
    lists = restart.nearest_columns(relation, keys, given, torch.arange(n)) if mutual else None
    found = restart.value_and_gradient(relation, TAU, 0.4, u.detach(), keys[positive], given, positive, lists)
    torch.testing.assert_close(found.loss, losses.sum().detach(), rtol=1e-12, atol=1e-12)
    truth = torch.autograd.grad(losses.sum(), (u, columns))
    for mine, wanted in zip((found.rows, found.columns), truth, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-12)
    shares = torch.where(candidates.any(1), a, 0)
    parts = {
        "relation_weight": shares,
        "relation_entropy": -torch.xlogy(w, w).sum(1),
        "relation_precision": (w * (labels[:b, None] == labels[None, :])).sum(1),
        "positive_mass": log_q.exp()[positive, positive],
    }
    taking_part = (~excluded).sum(1)
    flat = -taking_part.double().log()[:, None].expand(b, n).masked_fill(excluded, -torch.inf)
    parts["uniform"] = restart.row_losses(flat, positive, w, a, form)
    for name, value in parts.items():
        torch.testing.assert_close(found.parts[name], value.sum().detach(), rtol=1e-12, atol=1e-12, msg=name)


def test_float32_is_float64_to_a_hundred_thousandth() -> None:
    u, columns, keys = unit(60, 16, 0), unit(200, 16, 1), unit(200, 16, 2)
    for relation in (Relation(), Relation(1.0, "apart")):
        found = []
        for dtype in (torch.float64, torch.float32):
            x, given = u.to(dtype), restart.Columns(columns.to(dtype), keys.to(dtype), torch.arange(200))
            positive = torch.arange(60)
            found.append(
                restart.value_and_gradient(relation, TAU, relation.weight, x, given.keys[:60], given, positive)
            )
        wanted, mine = found
        assert float(mine.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
        for name in ("rows", "columns"):
            exact = getattr(wanted, name)
            assert (getattr(mine, name) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_weight_0_over_a_batch_is_infonce() -> None:
    u, v = (x.requires_grad_() for x in embeddings(12, 6))
    columns = restart.Columns(v.detach(), unit(12, 6, 9), torch.arange(12))
    found = restart.value_and_gradient(Relation(), 0.3, 0.0, u.detach(), columns.keys, columns, torch.arange(12))
    loss, parts = dense(Objective.infonce(0.3), u, v)
    torch.testing.assert_close(found.loss / 12, loss.detach(), rtol=1e-12, atol=0)
    for mine, wanted in zip((found.rows, found.columns), torch.autograd.grad(loss, (u, v)), strict=True):
        torch.testing.assert_close(mine / 12, wanted, rtol=1e-11, atol=1e-14)
    for name in ("positive_mass", "uniform"):
        torch.testing.assert_close(found.parts[name] / 12, parts[name].detach(), rtol=1e-12, atol=1e-14)


# --- what is proved about recursion (docs/theory.md, docs/restart.md) ---------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_in_the_batch_recursion_without_cooling_is_infonce_times_a_constant(seed: int) -> None:
    u, v = (x.requires_grad_() for x in embeddings(10, 4, seed))
    recursive = dense(Objective.rkdo(3, 0.5, 0.5, 0.0, supervisor_grad="stop"), u, v)[0]
    static = dense(Objective.infonce(0.5), u, v)[0]
    for mine, wanted in zip(torch.autograd.grad(recursive, (u, v)), torch.autograd.grad(static, (u, v)), strict=True):
        torch.testing.assert_close(mine, 0.875 * wanted, rtol=1e-12, atol=1e-15)
    flowing = dense(Objective.rkdo(3, 0.5, 0.5, 0.1), u, v)[0]  # control: with cooling and flow it is not exactly so
    assert not torch.allclose(torch.autograd.grad(flowing, u)[0], 0.875 * torch.autograd.grad(static_of(u, v), u)[0])


def static_of(u: Tensor, v: Tensor) -> Tensor:
    return dense(Objective.infonce(0.5), u, v)[0]


def test_persistent_rows_at_one_temperature_are_infonce_and_an_anchor_to_the_past() -> None:
    u, v = embeddings(8, 4)
    coupling, p, pasts = 0.3, torch.eye(8, dtype=torch.float64), []
    for visit in range(4):
        past = log_learned(embeddings(8, 4, visit + 1)[0] @ v.T, 0.5).exp()
        p, pasts = supervisory(p, past, coupling), [*pasts, past]
    kept = (1 - coupling) ** 4
    shares = [coupling * (1 - coupling) ** (3 - visit) for visit in range(4)]
    logits = (u @ v.T / 0.5).requires_grad_()
    q = softmax(logits, 1)
    pulled = sum(share * (q - past) for share, past in zip(shares, pasts, strict=True))
    gradient = torch.autograd.grad(-(p * q.log()).sum(), logits)[0]
    torch.testing.assert_close(gradient, kept * (q - torch.eye(8)) + pulled, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tau_t", "attracted"), [(0.5, 0), (0.1, 1), (2.0, 1)])
def test_a_negative_is_attracted_only_by_a_teacher_at_another_temperature(tau_t: float, attracted: int) -> None:
    s = unit(40, 3, 1) @ unit(40, 3, 1).T
    a, q = 0.5, softmax(s / 0.5, 1)
    pulled = a * softmax(s / tau_t, 1) > q
    pulled.fill_diagonal_(False)
    assert bool(pulled.any()) == bool(attracted)
    if attracted:  # a sharper teacher attracts the similar, a softer one the dissimilar
        mean = float(s[pulled].mean() - s[~torch.eye(40).bool()].mean())
        assert (mean > 0) == (tau_t < 0.5)


def test_the_restart_has_one_fixed_point_personalised_pagerank() -> None:
    n, a = 14, 0.6
    keys, everything = unit(n, 4, 2), torch.eye(n, dtype=torch.float64)
    walk = restart.relation(keys @ keys.T, 0.2, ~everything.bool())
    wanted = (1 - a) * torch.linalg.inv(everything - a * walk)
    for seed in range(2):
        p = softmax(unit(n, n, seed), 1)
        for _ in range(120):
            p = restart.supervisor(torch.arange(n), p @ walk, torch.full((n,), a, dtype=torch.float64))
        torch.testing.assert_close(p, wanted, rtol=0, atol=1e-14)
    q = softmax(unit(n, n, 5), 1)  # control: without a restart every q is a fixed point
    torch.testing.assert_close(supervisory(q, q, 1.0), q)


def test_the_chain_rule_splits_the_mixed_loss() -> None:
    u, columns, keys = unit(6, 4, 0), unit(11, 4, 1), unit(11, 4, 2)
    positive, a = torch.arange(6), torch.full((6,), 0.3, dtype=torch.float64)
    own = torch.nn.functional.one_hot(positive, 11).bool()
    r = restart.relation(keys[:6] @ keys.T, 0.2, ~own)
    log_q = log_learned(u @ columns.T, TAU)
    q_ii = log_q.exp()[own]
    binary = 0.7 * (math.log(0.7) - q_ii.log()) + 0.3 * (math.log(0.3) - torch.log1p(-q_ii))
    without = restart.row_losses(log_q, positive, r, torch.ones(6, dtype=torch.float64), "apart")
    mixed = restart.row_losses(log_q, positive, r, a, "mixed")
    torch.testing.assert_close(mixed, binary + 0.3 * without, rtol=1e-12, atol=0)
    with pytest.raises(AssertionError):  # control: the share of the positive is 1 - a, not 1
        torch.testing.assert_close(mixed, -q_ii.log() + 0.3 * without, rtol=1e-3, atol=0)


def test_geometric_memory_is_the_mean_of_logits_and_arithmetic_memory_only_flattens() -> None:
    logits = torch.randn(3, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    visits = [softmax(x, 1) for x in logits]
    r = visits[0]  # the first visit: r = w, not the identity
    for number, w in enumerate(visits[1:], start=2):
        r = restart.remembered(r, w, 1 - 1 / number, "geometric")
    torch.testing.assert_close(r, softmax(logits.mean(0), 1), rtol=1e-12, atol=1e-15)
    mean = restart.remembered(visits[0], visits[1], 0.6, "arithmetic")
    entropies = [-torch.xlogy(x, x).sum(1) for x in (visits[0], visits[1], mean)]
    assert (entropies[2] > 0.6 * entropies[0] + 0.4 * entropies[1]).all()
    assert not torch.allclose(restart.remembered(visits[0], visits[1], 0.6, "geometric"), mean)


def test_todays_persistent_field_is_a_special_case() -> None:
    """a = 1, rho = alpha, r = e at first, the sample itself kept, tau_T = tau: other code, so equal to rounding."""
    n, coupling = 9, 0.35
    u, v = embeddings(n, 4)
    rows, batch = identity(torch.arange(n), n, n, torch.float64), BatchColumns(n)
    batch.set(torch.arange(n))
    r = torch.eye(n, dtype=torch.float64)
    for step in range(3):
        u = embeddings(n, 4, step + 1)[0]
        w = restart.relation(u @ v.T, 0.5, torch.ones(n, n, dtype=torch.bool))
        r = restart.remembered(r, w, 1 - coupling, "arithmetic")
        rows, _ = recur_in_batch(rows, batch, softmax(u @ v.T / 0.5, 1), coupling)
    torch.testing.assert_close(rows.dense(), r, rtol=0, atol=1e-12)
    p = restart.supervisor(torch.arange(n), r, torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(p, rows.dense(), rtol=0, atol=1e-12)


def test_released_recursion_is_a_special_case() -> None:
    """a = alpha, r = q of the level before with the sample itself kept, e at every step."""
    u, v = embeddings(9, 4)
    s = u @ v.T
    field = unroll(s, torch.eye(9, dtype=torch.float64), [0.5, 0.4], [0.3])
    w = restart.relation(s, 0.5, torch.ones(9, 9, dtype=torch.bool))
    p = restart.supervisor(torch.arange(9), w, torch.full((9,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(field.p[0], p, rtol=0, atol=1e-14)
