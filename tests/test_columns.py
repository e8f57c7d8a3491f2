"""Columns between ranks: every way of exchange equals the single-process oracle, with different data on every rank.

The wrong ways that also train are kept as controls: each must be off by its factor.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from rkdo_dist.exchange.columns import RingColumns
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.losses import FieldInputError, FieldLoss, InfoNCELoss, RKDOLoss
from tests import fields
from tests.ranks import run_ranks

B_LOCAL, D = 5, 4


def objectives() -> list[Objective]:
    return [*fields.objectives_of(0.5, 3, 0.5), Objective.rkdo(2, (0.3, 1.0), 0.002, 0.2, "joint")]


def data(world: int) -> tuple[Tensor, Tensor, Tensor]:
    u, v = fields.embeddings(world * B_LOCAL, D, seed=world, copies=2)
    return u, v, torch.arange(world * B_LOCAL) % 3


def _rank_results(rank: int, world: int, exchange: str) -> list[dict[str, np.ndarray]]:
    u_all, v_all, everyones = data(world)
    mine = slice(rank * B_LOCAL, (rank + 1) * B_LOCAL)
    results = []
    for objective in objectives():
        u, v = u_all[mine].clone().requires_grad_(), v_all[mine].clone().requires_grad_()
        tau = torch.tensor(objective.temperature, dtype=torch.float64, requires_grad=True)
        loss_fn = FieldLoss(objective, exchange=exchange, temperature=tau)
        labels = everyones[mine] if objective.needs_labels else None
        loss, parts = loss_fn(u, v, labels, parts=True)
        (loss * (rank + 1)).backward()  # a factor of the rank's own must reach its rows only
        assert tau.grad is not None
        with torch.no_grad():
            plain = loss_fn(u, v, labels)
        found = {"loss": loss, "plain": plain, "u": u.grad, "v": v.grad, "tau": tau.grad, **parts}
        results.append({name: x.detach().numpy() for name, x in found.items() if x is not None})
    return results


def weighted_oracle(objective: Objective, world: int) -> dict[str, Tensor]:
    """Gradients of the sum over ranks r of (r + 1) times the mean over r's rows; tau's of the mean over ranks."""
    u, v, labels = data(world)
    u.requires_grad_(), v.requires_grad_()
    tau = torch.tensor(objective.temperature, dtype=torch.float64, requires_grad=True)
    totals = {"u": torch.zeros_like(u), "v": torch.zeros_like(v), "tau": torch.zeros_like(tau)}
    losses = []
    for r in range(world):
        rows = torch.arange(r * B_LOCAL, (r + 1) * B_LOCAL)
        loss, _ = dense(objective, u, v, labels, tau, rows)
        du, dv, dtau = torch.autograd.grad(loss * (r + 1), (u, v, tau))
        totals["u"] += du
        totals["v"] += dv
        totals["tau"] += dtau / world
        losses.append(loss.detach())
    return {"loss": torch.stack(losses), **totals}


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_losses_and_gradients_equal_the_single_process_oracle(world: int, exchange: str) -> None:
    per_rank = run_ranks(_rank_results, world, exchange)
    for number, objective in enumerate(objectives()):
        expected = weighted_oracle(objective, world)
        results = [rank_results[number] for rank_results in per_rank]
        steep = max(1.0, 1 / min(objective.temperatures))
        for name in ("loss", "plain"):
            found = np.array([r[name] for r in results])
            np.testing.assert_allclose(found, expected["loss"], rtol=1e-12, atol=1e-14 * steep, err_msg=f"{objective}")
        for name in ("u", "v"):
            found = np.concatenate([r[name] for r in results])
            np.testing.assert_allclose(found, expected[name], rtol=1e-12, atol=1e-14 * steep, err_msg=f"{objective}")
        found = np.array([r["tau"] for r in results])
        assert len(set(found)) == 1
        np.testing.assert_allclose(found[0], expected["tau"], rtol=1e-12, atol=1e-14 * steep**2, err_msg=f"{objective}")
        for r in results:
            np.testing.assert_allclose(r["cross_entropy"] - r["entropy_p"], r["loss"], rtol=1e-9, atol=1e-12 * steep)


class _Encoder(nn.Module):
    """A linear encoder and a learnable temperature; `compute` makes the loss of the embeddings."""

    def __init__(self, compute) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(6, D, dtype=torch.float64)
        self.temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.compute = compute

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u, v = (normalize(self.linear(images), dim=1) for images in (x, y))
        return self.compute(u, v, self.temperature)

    def gradients(self) -> dict[str, np.ndarray]:
        return {name: p.grad.numpy() for name, p in self.named_parameters() if p.grad is not None}


def images(world: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(world)
    x, y = (torch.randn(world * B_LOCAL, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, x + 0.5 * y


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.new_empty(dist.get_world_size() * len(x), x.shape[1])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        mine = gradient.new_empty(len(gradient) // dist.get_world_size(), gradient.shape[1])
        dist.reduce_scatter_tensor(mine, gradient.contiguous())
        return mine


def _without_gradient(x: Tensor) -> Tensor:
    """All-gather without gradient but for this rank's own slice, as many public losses have it."""
    out = _Gather.apply(x.detach()).clone()
    start = dist.get_rank() * len(x)
    return torch.cat([out[:start], x, out[start + len(x) :]])


def _local_rows(u: Tensor, columns: Tensor, tau: Tensor) -> Tensor:
    return cross_entropy(u @ columns.T / tau, dist.get_rank() * len(u) + torch.arange(len(u)))


def _all_rows(u: Tensor, v: Tensor, tau: Tensor) -> Tensor:
    return cross_entropy(u @ v.T / tau, torch.arange(len(u)))


VARIANTS = {
    "gather": lambda u, v, tau: InfoNCELoss()(u, v, temperature=tau),
    "ring": lambda u, v, tau: InfoNCELoss(exchange="ring")(u, v, temperature=tau),
    "local mean, summed gather": lambda u, v, tau: _local_rows(u, _Gather.apply(v), tau),
    "global mean, summed gather": lambda u, v, tau: _all_rows(_Gather.apply(u), _Gather.apply(v), tau),
    "global mean, no gradient": lambda u, v, tau: _all_rows(_without_gradient(u), _without_gradient(v), tau),
    "global mean, no gradient, times W": lambda u, v, tau: (
        dist.get_world_size() * _all_rows(_without_gradient(u), _without_gradient(v), tau)
    ),
    "local mean, no gradient": lambda u, v, tau: _local_rows(u, _without_gradient(v), tau),
}


def _averaged_gradients(rank: int, world: int) -> dict[str, dict[str, np.ndarray]]:
    x, y = images(world)
    mine, found = slice(rank * B_LOCAL, (rank + 1) * B_LOCAL), {}
    for name, compute in VARIANTS.items():
        model = DistributedDataParallel(_Encoder(compute))
        model(x[mine], y[mine]).backward()
        found[name] = model.module.gradients()
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_averaged_gradients_are_those_of_the_global_batch_and_wrong_ways_are_not(world: int) -> None:
    single = _Encoder(lambda u, v, tau: dense(Objective.infonce(0.3), u, v, None, tau)[0])
    single(*images(world)).backward()
    expected = single.gradients()
    for found in run_ranks(_averaged_gradients, world):
        right = ("gather", "ring", "local mean, summed gather", "global mean, summed gather")
        for name, factor in {
            **dict.fromkeys(right, (1.0, 1.0)),
            "global mean, no gradient": (1 / world, 1.0),
            "global mean, no gradient, times W": (1.0, float(world)),
        }.items():
            for parameter, gradient in expected.items():
                wanted = gradient * factor[parameter == "temperature"]
                np.testing.assert_allclose(found[name][parameter], wanted, rtol=1e-11, atol=1e-14, err_msg=name)
        wrong, truth = (g["linear.weight"].ravel() for g in (found["local mean, no gradient"], expected))
        cosine = wrong @ truth / np.linalg.norm(wrong) / np.linalg.norm(truth)
        assert cosine < 0.999  # not even the direction is right


def _rkdo_steps(rank: int, world: int, exchange: str) -> list[np.ndarray]:
    x, y = images(world)
    mine = slice(rank * B_LOCAL, (rank + 1) * B_LOCAL)
    loss_fn = RKDOLoss(exchange=exchange)
    model = DistributedDataParallel(_Encoder(lambda u, v, tau: loss_fn(u, v, temperature=tau)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(x[mine], y[mine]).backward()
        optimizer.step()
    return [p.detach().numpy() for p in model.parameters()]


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_a_few_steps_of_rkdo_under_ddp_follow_the_oracle(exchange: str) -> None:
    single = _Encoder(lambda u, v, tau: dense(Objective.rkdo(), u, v, None, tau)[0])
    optimizer = torch.optim.SGD(single.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        single(*images(3)).backward()
        optimizer.step()
    for found in run_ranks(_rkdo_steps, 3, exchange):
        for mine, expected in zip(found, single.parameters(), strict=True):
            np.testing.assert_allclose(mine, expected.detach().numpy(), rtol=1e-11)


def _subgroup_losses(rank: int, world: int, exchange: str) -> tuple[float, np.ndarray]:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    u_all, v_all, _ = data(world)
    mine = slice(rank * B_LOCAL, (rank + 1) * B_LOCAL)
    u = u_all[mine].clone().requires_grad_()
    loss = RKDOLoss(exchange=exchange, group=groups[rank % 2])(u, v_all[mine])
    loss.backward()
    assert u.grad is not None
    return float(loss.detach()), u.grad.numpy()


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_a_group_of_some_ranks_is_a_global_batch_of_its_own(exchange: str) -> None:
    found = run_ranks(_subgroup_losses, 4, exchange)
    u, v, _ = data(4)
    for members in ((0, 2), (1, 3)):
        rows = torch.cat([torch.arange(r * B_LOCAL, (r + 1) * B_LOCAL) for r in members])
        mine = u[rows].clone().requires_grad_()
        loss, _ = dense(Objective.rkdo(), mine, v[rows])
        (expected,) = torch.autograd.grad(loss, mine)
        assert np.mean([found[r][0] for r in members]) == pytest.approx(loss.item(), rel=1e-12)
        gradient = np.concatenate([found[r][1] for r in members]) / 2
        np.testing.assert_allclose(gradient, expected, rtol=1e-11, atol=1e-15)


def _walks(rank: int, world: int) -> tuple[list[tuple[int, float]], int, list[float]]:
    ring, own = RingColumns(), torch.full((1, 2, 3), float(rank))
    seen, places = [], set()
    for first, block in ring.walk(own):
        seen.append((first, float(block[0, 0, 0])))
        if len(seen) > 1:
            places.add(block.data_ptr())

    def visit(block: Tensor, first: int, gradient: Tensor) -> None:
        assert (gradient == 0).all()
        gradient += 10.0**rank * (1 + first)

    return seen, len(places), ring.walk_home(own, visit).flatten().tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_ring_brings_every_block_once_in_two_places_and_takes_gradients_home(world: int) -> None:
    for rank, (seen, places, home) in enumerate(run_ranks(_walks, world)):
        owners = [(rank - step) % world for step in range(world)]
        assert seen == [(2 * owner, float(owner)) for owner in owners]
        assert places <= 2
        assert home == [sum(10.0**r for r in range(world)) * (1 + 2 * rank)] * 6


def _one_bad_rank(rank: int, world: int, exchange: str) -> list[str]:
    u, v, labels = (x[rank * B_LOCAL : (rank + 1) * B_LOCAL].clone() for x in data(world))
    at = rank == 1
    nan = u.clone()
    nan[0, 0] = torch.nan
    rkdo, messages = RKDOLoss(exchange=exchange), []
    calls = [
        lambda: rkdo(nan if at else u, v),
        lambda: rkdo(u, 2 * v if at else v),
        lambda: rkdo(u[:3] if at else u, v),
        lambda: rkdo(u[:3] if at else u, v[:3] if at else v),
        lambda: rkdo(u[:0] if at else u, v[:0] if at else v),
        lambda: rkdo(u.float() if at else u, v.float() if at else v),
        lambda: RKDOLoss(depth=2 if at else 3, exchange=exchange)(u, v),
        lambda: rkdo(u, v, temperature=torch.tensor(-1.0 if at else 1.0)),
        lambda: FieldLoss(Objective.supervised(), exchange=exchange)(u, v, labels.float() if at else labels),
    ]
    for call in calls:
        try:
            call()
            messages.append("no error")
        except FieldInputError as error:
            messages.append(str(error))
    assert torch.isfinite(rkdo(u, v))  # all ranks are still in step
    return messages


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_bad_input_on_one_rank_is_the_same_error_on_all(exchange: str) -> None:
    messages = run_ranks(_one_bad_rank, 3, exchange)
    assert messages[0] == messages[1] == messages[2]
    expected = [
        "rank 1: u has entries that are not finite",
        "rank 1: v must have rows of unit norm",
        "rank 1: u and v must have the same shape",
        "no error" if exchange == "gather" else "row counts b on all ranks, got rank 0: 5, rank 1: 3, rank 2: 5",
        "rank 1: u is empty",
        "dtypes on all ranks",
        "objectives",
        "rank 1: temperature must be finite and > 0, got -1.0",
        "rank 1: labels must be",
    ]
    for text, message in zip(expected, messages[0], strict=True):
        assert text in message


def _one_rank_dies(rank: int, world: int, exchange: str) -> None:
    u, v, _ = (x[rank * B_LOCAL : (rank + 1) * B_LOCAL] for x in data(world))
    loss_fn = RKDOLoss(exchange=exchange)
    loss_fn(u, v)
    if rank == 1:
        raise RuntimeError("this rank has a problem of its own")
    loss_fn(u, v)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_an_error_on_one_rank_ends_all(exchange: str) -> None:
    outcomes = run_ranks(_one_rank_dies, 3, exchange, timeout=60, check=False)
    assert all(isinstance(text, str) and "Traceback" in text for text in outcomes)
    assert "a problem of its own" in outcomes[1]
