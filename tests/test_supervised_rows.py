"""Rows that supervise, against dense matrices in float64: every pairing, recursion, share, on 1, 2 and 4 ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rkdo_dist.exchange import group
from rkdo_dist.exchange.store import RowStore
from rkdo_dist.field import recursion
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.persistent import Rows, identity, initial, of_both_views
from rkdo_dist.training.averaged import averaged_field
from rkdo_dist.training.exact import exact_field
from rkdo_dist.training.persistent import PersistentField
from rkdo_dist.training.strategy import as_points, of_points
from tests.ranks import run_ranks

N, LANES, MICRO, D, STORED = 40, 4, 3, 6, 5
BATCH = LANES * MICRO
Result = tuple[float, float, np.ndarray]  # loss, its value at uniform q, gradients (B, 2 d)


def rows_of_all(stored: int = STORED) -> Rows:
    """Sparse random rows of N samples, with the sample itself in them."""
    rng = np.random.default_rng(5)
    columns = np.stack([np.r_[i, rng.permutation(np.delete(np.arange(N), i))[: stored - 1]] for i in range(N)])
    p = rng.dirichlet(np.ones(stored), N)
    return Rows(torch.from_numpy(columns).int(), torch.from_numpy(p), torch.zeros(N, dtype=torch.float64), N)


def batches(steps: int) -> list[Tensor]:
    rng = np.random.default_rng(1)
    return [torch.from_numpy(rng.permutation(N)[:BATCH]) for _ in range(steps)]


def views(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    u, v = torch.nn.functional.normalize(torch.randn(2, BATCH, D, generator=generator, dtype=torch.float64), dim=2)
    return u, v


def objectives() -> list[Objective]:
    made = []
    for pairing in ("cross", "symmetric", "joint"):
        for debias in (0.0, 0.3):
            options: dict[str, Any] = {"supervisor": "rows", "pairing": pairing, "debias": debias, "temperature": 0.4}
            made.append(Objective.of("infonce", **options))
            for gradient in ("flow", "stop") if pairing == "cross" else ("flow",):
                made.append(Objective.of("rkdo", depth=2, coupling=0.3, supervisor_grad=gradient, **options))
    for affinity in ("gaussian", "student", "clusters"):
        options = {"supervisor": "rows", "affinity": affinity, "debias": 0.2}
        made += [Objective.of("rkdo", depth=2, **options), Objective.of("infonce", pairing="joint", **options)]
    return made


def dense(objective: Objective, p_of_batch: Tensor, u: Tensor, v: Tensor) -> Result:
    """The loss by the formula: a row restricted to the batch, in the view of the positive, with a uniform share."""
    u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
    b, sides = len(u), {"u": u, "v": v}
    loss, uniform = torch.zeros((), dtype=torch.float64), 0.0
    restricted = p_of_batch / p_of_batch.sum(1, keepdim=True)
    for piece in objective.slices:
        columns = torch.cat([sides[x] for x in piece.columns])
        p = torch.zeros(b, len(columns), dtype=torch.float64)
        p[:, piece.positive * b : (piece.positive + 1) * b] = (1 - objective.debias) * restricted
        p += objective.debias / objective.column_count(b)
        excluded = None
        if piece.excluded is not None:
            excluded = torch.zeros_like(p, dtype=torch.bool)
            excluded[:, piece.excluded * b : (piece.excluded + 1) * b] = torch.eye(b, dtype=torch.bool)
            p = p.masked_fill(excluded, 0)
        similarity = objective.affinity.logits(sides[piece.rows], columns, objective.column_count(b))
        if objective.recursion == "in_batch":
            arguments = (objective.temperatures, objective.couplings, excluded, objective.supervisor_grad)
            field = recursion.unroll(similarity, p, *arguments)
        else:
            field = recursion.Field([p], [recursion.log_learned(similarity, objective.temperatures[0], excluded)])
        for x, log_q in zip(field.p, field.log_q, strict=True):
            loss = loss + piece.weight * recursion.kl_divergence(x, log_q).mean()
        flat = torch.ones_like(p) if excluded is None else (~excluded).double()
        flat /= flat.sum(1, keepdim=True)
        for alpha in objective.couplings or (0.0,):
            p = (1 - alpha) * p + alpha * flat
            uniform += float(piece.weight * recursion.kl_divergence(p, flat.log()).mean())
    du, dv = torch.autograd.grad(loss, (u, v))
    return float(loss.detach()), uniform, torch.cat([du, dv], 1).numpy()


def lanes_of(rank: int, world: int, step: int) -> list[tuple[Tensor, Tensor]]:
    own = range(rank * LANES // world, (rank + 1) * LANES // world)
    u, v = views(step)
    return [(u[i * MICRO : (i + 1) * MICRO], v[i * MICRO : (i + 1) * MICRO]) for i in own]


def memory_of(rows: Rows, plan: list[Tensor], lane: int | None = None) -> PersistentField:
    samples = rows.samples
    first, stop = RowStore(samples, 1).shards.own(group.rank())
    store = RowStore(samples, rows.columns.shape[1], dtype=torch.float64, rows=rows.pick(torch.arange(first, stop)))
    return PersistentField(store, "batch", 0.1, lambda k: plan[k] if k < len(plan) else None, torch.device("cpu"), lane)


def one_step(memory: PersistentField, objective: Objective, rank: int, world: int, step: int, way: str) -> Result:
    """A step as a strategy takes it; the gradients of this rank's samples."""
    lanes: list[Any] = lanes_of(rank, world, step)
    b = BATCH // world
    memory.begin(step, batches(step + 1)[step][rank * b : (rank + 1) * b])
    points = objective.recursion == "persistent" and objective.pairing == "joint"
    count = BATCH * (2 if points else 1)
    if points:
        lanes, objective = as_points(lanes, objective)
    if way == "exact":
        field = exact_field(lanes, objective, rank * len(lanes), memory)
        means = {x: float(group.all_gather_rows(v).sum()) / count for x, v in field.sums.items()}
    else:
        field = averaged_field(lanes, objective, way, rows=memory)
        means = {x: float(group.all_gather_rows(v).mean()) for x, v in field.sums.items()}
        scale = 1 / world  # the wrapper averages gradients over ranks
        field = dataclasses.replace(field, gradients=[(u * scale, v * scale) for u, v in field.gradients])
    memory.commit()
    if points:
        field = of_points(field)
    assert means["row_mass"] <= 1 + 1e-12
    gradients = torch.cat([torch.cat(pair, 1) for pair in field.gradients]).numpy()
    return means["loss"], means["uniform"], gradients


def fixed_rows(rank: int, world: int) -> list[Result]:
    torch.set_num_threads(1)
    plan = batches(1)
    return [
        one_step(memory_of(rows_of_all(), plan), objective, rank, world, 0, way)
        for objective in objectives()
        for way in WAYS
    ]


def gathered(parts: list[list[Result]], k: int) -> Result:
    """Case k of all ranks."""
    assert len({part[k][:2] for part in parts}) == 1
    return *parts[0][k][:2], np.concatenate([part[k][2] for part in parts])


def agree(found: Result, expected: Result) -> bool:
    scale = np.abs(expected[2]).max()
    return (
        abs(found[0] - expected[0]) < 1e-12 * max(1, abs(expected[0]))
        and abs(found[1] - expected[1]) < 1e-12 * max(1, abs(expected[1]))
        and bool(np.abs(found[2] - expected[2]).max() < 1e-12 * max(1, scale))
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_fixed_rows_equal_the_dense_formula(world: int) -> None:
    samples = batches(1)[0]
    p = rows_of_all().dense()[samples][:, samples]
    parts = [fixed_rows(0, 1)] if world == 1 else run_ranks(fixed_rows, world)
    for k, objective in enumerate(objectives()):
        expected = dense(objective, p, *views(0))
        for way in range(len(WAYS)):
            assert agree(gathered(parts, len(WAYS) * k + way), expected), (objective, WAYS[way])
        wrong = dense(objective, torch.eye(BATCH, dtype=torch.float64), *views(0))
        assert not agree(gathered(parts, len(WAYS) * k), wrong)  # the control: rows that are not used


WAYS = ("exact", "gather", "ring")
STEPS, ALPHA, TAU = 6, 0.3, 0.4
STARTS = {
    "identity": (False, 0.0, "cosine"),
    "neighbours": (True, 0.0, "student"),
    "debiased": (True, 0.2, "cosine"),
}


def first_rows(start: str) -> Rows:
    """What persistent rows over both views begin with; K = 2 N, so that nothing is ever folded."""
    given, debias, _ = STARTS[start]
    everyone = torch.arange(N)
    rows = rows_of_all() if given else identity(everyone, N, 1, torch.float64)
    return initial(of_both_views(rows, everyone), debias, 2 * N - 1)


def persistent(start: str) -> Objective:
    options: dict[str, Any] = {"coupling": ALPHA, "temperature": TAU, "cooling": 0.0, "affinity": STARTS[start][2]}
    return Objective.of("persistent", pairing="joint", **options)


def persistent_rows(rank: int, world: int, way: str) -> list[list[Any]]:
    torch.set_num_threads(1)
    found = []
    for start in STARTS:
        memory = memory_of(first_rows(start), batches(STEPS), MICRO)
        objective = persistent(start)
        results: list[Any] = [one_step(memory, objective, rank, world, step, way) for step in range(STEPS)]
        memory.store.finish()
        own = torch.arange(memory.store.first, memory.store.stop)
        found.append([*results, memory.store.rows.dense(own).numpy()])
    return found


def by_the_papers_equations(start: str) -> tuple[list[Result], np.ndarray]:
    """Equations 1 to 4 with k != i over the 2 N points; point 2 i + w is view w of sample i."""
    given, debias, _ = STARTS[start]
    p = np.zeros((2 * N, 2 * N))
    rows = rows_of_all().dense().numpy() if given else np.eye(N)
    for i in range(N):
        for w in (0, 1):
            for j in range(N):
                for x in (0, 1):
                    share = rows[i, i] if i == j and x != w else 0.0 if i == j else rows[i, j] / 2
                    p[2 * i + w, 2 * j + x] = (1 - debias) * share + (debias / (2 * N - 1) if (i, w) != (j, x) else 0)
    assert np.allclose(p.sum(1), 1)
    results = []
    for step, samples in enumerate(batches(STEPS)):
        u, v = (x.clone().requires_grad_() for x in views(step))
        points = np.concatenate([2 * samples.numpy(), 2 * samples.numpy() + 1])
        x = torch.cat([u, v])
        logits = persistent(start).affinity.logits(x, x, 2 * BATCH - 1)
        logits = (logits / TAU).masked_fill(torch.eye(2 * BATCH, dtype=torch.bool), -torch.inf)
        log_q = torch.log_softmax(logits, 1)
        inside = p[np.ix_(points, points)]
        mass = inside.sum(1, keepdims=True)
        supervisor = torch.from_numpy(inside / mass)
        loss = recursion.kl_divergence(supervisor, log_q).mean()
        du, dv = torch.autograd.grad(loss, (u, v))
        flat = torch.full_like(supervisor, 1 / (2 * BATCH - 1)).log()
        uniform = recursion.kl_divergence(supervisor, flat).mean()
        results.append((float(loss.detach()), float(uniform), torch.cat([du, dv], 1).numpy()))
        p[np.ix_(points, points)] = (1 - ALPHA) * inside + ALPHA * mass * log_q.exp().detach().numpy()
    return results, p


@pytest.mark.parametrize(("world", "way"), [(1, "exact"), (2, "gather"), (4, "exact")])
def test_persistent_rows_with_joint_pairing_are_the_papers_equations(world: int, way: str) -> None:
    parts = [persistent_rows(0, 1, way)] if world == 1 else run_ranks(persistent_rows, world, way)
    for k, start in enumerate(STARTS):
        expected, rows = by_the_papers_equations(start)
        for step, result in enumerate(expected):
            assert agree(gathered([part[k] for part in parts], step), result), (start, step)
        found = np.concatenate([part[k][-1] for part in parts])
        assert np.abs(found - rows).max() < 1e-12
        assert not np.diagonal(found).any()  # k != i
        control = np.eye(2 * N)[np.arange(2 * N) ^ 1]
        assert np.abs(found - control).max() > 0.1  # they have moved


def test_stored_rows_without_their_own_point_sum_to_one_and_never_hold_it() -> None:
    """Truncated rows: the rest is spread over the columns that are neither stored nor the row's own."""
    rows = initial(of_both_views(rows_of_all(), torch.arange(N)), 0.3, 4)
    own = torch.arange(2 * N)
    assert (rows.dense(own).sum(1) - 1).abs().max() < 1e-12
    assert torch.equal(rows.others(), torch.full((2 * N,), 2 * N - 1 - 4))
    assert not (rows.columns == own[:, None]).any()
    memory = memory_of(rows, batches(3), MICRO)
    objective = Objective.of("persistent", coupling=0.5, temperature=TAU, pairing="joint")
    for step in range(3):
        one_step(memory, objective, 0, 1, step, "exact")
    moved = memory.store.rows
    assert (moved.dense(own).sum(1) - 1).abs().max() < 1e-12
    assert not (moved.columns == own[:, None]).any()
    assert not torch.equal(moved.columns, rows.columns)
