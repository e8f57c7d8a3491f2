"""The step: one global batch gives one gradient, whatever the ranks, lanes' owners and memory policy."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rkdo_dist.data.stream import MicroBatch
from rkdo_dist.encoders import Encoder
from rkdo_dist.exchange.store import RowStore
from rkdo_dist.field.objectives import Objective, dense
from rkdo_dist.measure import ledger
from rkdo_dist.ranks import runtime
from rkdo_dist.training.facts import Told
from rkdo_dist.training.loop import train_step
from rkdo_dist.training.persistent import PersistentField
from rkdo_dist.training.step import Step, StepSettings
from tests.ranks import RankFailed, run_ranks

LANES, MICRO = 4, 6
OBJECTIVES = {
    "rkdo": Objective.rkdo(),
    "joint": Objective.rkdo(pairing="joint"),
    "symmetric": Objective.infonce(symmetric=True),
    "icon": Objective.icon(),
    "stop": Objective.rkdo(supervisor_grad="stop"),
    "supervised": Objective.supervised(),
}

SUPERVISED, RING = {"objective": "supervised"}, {"exchange": "ring"}


class SmallEncoder(nn.Module):
    """Batch norm and dropout on 8 x 8 images: everything that could depend on who computes what."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(8 * 36, 16),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.body(x), dim=1)


def micro_batch(step: int, lane: int, size: int = 8) -> MicroBatch:
    """Different images in every lane and step."""
    generator = torch.Generator().manual_seed(1000 * step + lane)
    images = torch.randint(0, 256, (MICRO, 3, size, size), generator=generator, dtype=torch.uint8)
    ids = torch.arange(MICRO) + MICRO * lane
    return MicroBatch([str(int(i)) for i in ids], ids, images, ids * 7 % 5)


def make_view(images: torch.Tensor, ids: torch.Tensor, epoch: int, view: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(images.sum()) + view)
    return images / 255.0 - 0.5 + 0.2 * torch.randn(images.shape, generator=generator)


def own(rank: int, world: int) -> range:
    return range(rank * LANES // world, (rank + 1) * LANES // world)


def weights_digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def train(rank: int, world: int, options: dict[str, Any]) -> dict[str, Any]:
    """A few Adam steps; the first gradient, the losses and the weights."""
    rt = runtime.start(1, 60, options.get("reduction", "exact"))
    torch.manual_seed(0)
    double = options.get("double", False)
    encoder = Encoder() if options.get("resnet") else SmallEncoder()
    encoder = encoder.double() if double else encoder
    size = 32 if options.get("resnet") else 8
    view = (lambda *a: make_view(*a).double()) if double else make_view
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    settings = StepSettings(
        seed=3,
        reduction=options.get("reduction", "exact"),
        recompute=options.get("recompute", False),
        views_together=options.get("together", True),
        exchange=options.get("exchange", "gather"),
    )
    step = Step(encoder, view, rt, settings)
    losses, first = [], None
    for t in range(options.get("steps", 3)):
        lanes = [micro_batch(t, lane, size) for lane in own(rank, world)]
        objective, told = OBJECTIVES[options.get("objective", "rkdo")], Told(options.get("stop", {}).get(rank, 0))
        result, _ = train_step(step, lanes, objective, 0, t, lambda told=told: told)
        if first is None:
            first = torch.cat([p.grad.flatten() for p in encoder.parameters()]).numpy().copy()
        optimizer.step()
        losses.append(result.loss)
    return {
        "losses": losses,
        "gradient": first,
        "weights": weights_digest(encoder),
        "parts": result.parts,
        "stop": result.stop,
    }


def plain_gradient(objective: Objective, together: bool = True) -> tuple[float, np.ndarray]:
    """The oracle: one process, plain autograd through every lane's forward and the dense loss, in float64.

    Dropout is left out of the comparison (its draws are the step's own business): use with p = 0.
    """
    torch.manual_seed(0)
    encoder = SmallEncoder().double()
    us, vs = [], []
    for lane in range(LANES):
        batch = micro_batch(0, lane)
        first, second = (make_view(batch.images, batch.ids, 0, k).double() for k in (0, 1))
        u, v = encoder(torch.cat([first, second])).chunk(2) if together else (encoder(first), encoder(second))
        us.append(u)
        vs.append(v)
    labels = torch.cat([micro_batch(0, lane).labels for lane in range(LANES)])
    loss, _ = dense(objective, torch.cat(us), torch.cat(vs), labels)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in encoder.parameters()]).numpy()


@pytest.fixture
def without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", ["exact", "fast"])
@pytest.mark.parametrize("recompute", [False, True])
def test_one_process_equals_plain_autograd(
    without_dropout: None, objective: str, reduction: str, recompute: bool
) -> None:
    loss, gradient = plain_gradient(OBJECTIVES[objective])
    options = {
        "double": True,
        "objective": objective,
        "reduction": reduction,
        "recompute": recompute,
        "steps": 1,
    }
    got = train(0, 1, options)
    assert got["losses"][0] == pytest.approx(loss, rel=1e-12)
    assert np.linalg.norm(got["gradient"] - gradient) <= 1e-10 * np.linalg.norm(gradient)


def test_views_apart_are_two_forwards(without_dropout: None) -> None:
    loss, gradient = plain_gradient(OBJECTIVES["rkdo"], together=False)
    got = train(0, 1, {"double": True, "together": False, "steps": 1})
    assert got["losses"][0] == pytest.approx(loss, rel=1e-12)
    assert np.linalg.norm(got["gradient"] - gradient) <= 1e-10 * np.linalg.norm(gradient)
    assert loss != pytest.approx(plain_gradient(OBJECTIVES["rkdo"])[0], rel=1e-6)  # batch norm sees something else


@pytest.mark.parametrize(
    "options", [{}, {"recompute": True}, {"together": False}, {"objective": "joint"}, SUPERVISED], ids=str
)
def test_exact_gives_the_same_bits_on_any_number_of_ranks(options: dict[str, Any]) -> None:
    one = train(0, 1, options)
    for world in (2, 4):
        for got in run_ranks(train, world, options):
            assert got["losses"] == one["losses"]
            assert got["parts"] == one["parts"]
            assert np.array_equal(got["gradient"], one["gradient"])
            assert got["weights"] == one["weights"]


def test_recompute_changes_no_bit() -> None:
    assert train(0, 1, {})["weights"] == train(0, 1, {"recompute": True})["weights"]


def test_resnet_with_batch_norm_and_adam_in_float32() -> None:
    one = train(0, 1, {"resnet": True, "steps": 2})
    two = run_ranks(train, 2, {"resnet": True, "steps": 2}, timeout=180)
    assert [r["weights"] for r in two] == [one["weights"]] * 2
    assert [r["losses"] for r in two] == [one["losses"]] * 2


@pytest.mark.parametrize("options", [{}, {"recompute": True}, RING, SUPERVISED, {**SUPERVISED, **RING}], ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_fast_agrees_in_float64(world: int, options: dict[str, Any]) -> None:
    options = {**options, "double": True, "reduction": "fast", "steps": 20}
    one = train(0, 1, {"double": True, "steps": 20, "objective": options.get("objective", "rkdo")})
    for got in run_ranks(train, world, options):
        assert np.linalg.norm(got["gradient"] - one["gradient"]) <= 1e-10 * np.linalg.norm(one["gradient"])
        assert got["losses"] == pytest.approx(one["losses"], rel=1e-8)


def _without_batch_norm(rank: int, world: int) -> str:
    rt = runtime.start(1, 60, "exact")
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16), nn.Softmax(dim=1), nn.LayerNorm(16, elementwise_affine=False)
    )
    unit = nn.Sequential(encoder, _Unit())
    step = Step(unit, make_view, rt, StepSettings(3, "exact", False, True, "gather"))
    train_step(step, [micro_batch(0, lane) for lane in own(rank, world)], OBJECTIVES["rkdo"], 0, 0)
    return weights_digest(unit)


class _Unit(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.normalize(x, dim=1)


def test_an_encoder_without_batch_norm() -> None:
    assert run_ranks(_without_batch_norm, 2) == [_without_batch_norm(0, 1)] * 2


def test_a_stop_on_one_rank_reaches_all() -> None:
    assert [r["stop"] for r in run_ranks(train, 2, {"steps": 1, "stop": {1: 75}})] == [75, 75]


def _poisoned(rank: int, world: int, reduction: str) -> str:
    rt = runtime.start(1, 60, reduction)
    torch.manual_seed(0)
    encoder = SmallEncoder()
    before = weights_digest(encoder)

    def poison(images: torch.Tensor, ids: torch.Tensor, epoch: int, view: int) -> torch.Tensor:
        out = make_view(images, ids, epoch, view)
        return out * float("nan") if 0 in ids.tolist() else out  # lane 0 only, so rank 0 only

    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    step = Step(encoder, poison, rt, StepSettings(3, reduction, False, True, "gather"), optimizer)
    _, update = train_step(step, [micro_batch(0, lane) for lane in own(rank, world)], OBJECTIVES["rkdo"], 0, 0)
    assert weights_digest(encoder) == before
    assert update.not_finite
    return update.skipped


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_a_nan_on_one_rank_stops_all_before_any_weight_changes(reduction: str) -> None:
    answers = run_ranks(_poisoned, 2, reduction)
    assert answers == ["an embedding of step 1 is not finite (rank 0, lane 0)"] * 2


def _shared_loss_twice(rank: int, world: int) -> np.ndarray:
    """The control: the mean over all rows on every rank, without gradient through the gather (traps: 1 / W)."""
    from rkdo_dist.exchange import group

    torch.manual_seed(0)
    encoder = SmallEncoder().double()
    us, vs = [], []
    for lane in own(rank, world):
        batch = micro_batch(0, lane)
        u, v = encoder(torch.cat([make_view(batch.images, batch.ids, 0, k).double() for k in (0, 1)])).chunk(2)
        us.append(u)
        vs.append(v)
    u, v = torch.cat(us), torch.cat(vs)
    mine = slice(rank * len(u), (rank + 1) * len(u))
    all_u, all_v = group.all_gather_rows(u.detach()), group.all_gather_rows(v.detach())
    all_u[mine], all_v[mine] = u, v
    dense(OBJECTIVES["rkdo"], all_u, all_v)[0].backward()
    gradient = torch.cat([p.grad.flatten() for p in encoder.parameters()])
    torch.distributed.all_reduce(gradient)
    return (gradient / world).numpy()


def test_the_well_known_mistake_is_seen() -> None:
    torch.manual_seed(0)
    got = run_ranks(_without_dropout, 2)
    right = got[0]["right"]
    assert np.linalg.norm(got[0]["wrong"] - right / 2) <= 1e-10 * np.linalg.norm(right)


def _without_dropout(rank: int, world: int) -> dict[str, np.ndarray]:
    nn.Dropout.forward = lambda self, x: x  # type: ignore[method-assign]
    return {"right": plain_gradient(OBJECTIVES["rkdo"])[1], "wrong": _shared_loss_twice(rank, world)}


def test_unequal_lanes_fail_loudly() -> None:
    with pytest.raises(RankFailed):
        run_ranks(_uneven, 2, timeout=10)


def _uneven(rank: int, world: int) -> None:
    rt = runtime.start(1, 10, "exact")
    step = Step(SmallEncoder(), make_view, rt, StepSettings(3, "exact", False, True, "gather"))
    train_step(step, [micro_batch(0, lane) for lane in range(rank + 1)], OBJECTIVES["rkdo"], 0, 0)


def _collectives(rank: int, world: int, reduction: str) -> list[tuple[str, int]]:
    """What a step after the first sends, by operation; DDP's own buckets apart."""
    rt = runtime.start(1, 60, reduction)
    torch.manual_seed(0)
    encoder = SmallEncoder()
    step = Step(encoder, make_view, rt, StepSettings(3, reduction, False, True, "gather"))
    with ledger.counting() as book:
        for t in range(2):
            book.take()
            train_step(step, [micro_batch(t, lane) for lane in own(rank, world)], OBJECTIVES["rkdo"], 0, t)
    operations: Counter[str] = Counter()
    for (_, operation), calls in book.calls.items():
        operations[operation] += calls
    return sorted(operations.items())


def test_a_step_has_six_collectives_and_four_beside_ddps() -> None:
    # Columns, statistics, facts and the summed gradient; column gradients and the gradient's parts.
    for found in run_ranks(_collectives, 2, "exact"):
        assert found == [("all_gather", 4), ("all_to_all", 2)]
    for found in run_ranks(_collectives, 2, "fast"):  # columns and facts; statistics; column gradients
        assert found == [("all_gather", 2), ("all_reduce", 1), ("reduce_scatter", 1)]


def _skipped_step(rank: int, world: int, reduction: str) -> dict[str, Any]:
    """Persistent rows and bank after three steps, of which the second has a NaN on rank zero."""
    rt = runtime.start(1, 60, reduction)
    torch.manual_seed(0)
    samples = torch.arange(LANES * MICRO)
    persistent = PersistentField(RowStore(LANES * MICRO, 8, 16), "bank", 0.3, lambda step: samples, rt.device)

    def poisoned(images: torch.Tensor, ids: torch.Tensor, epoch: int, view: int) -> torch.Tensor:
        out = make_view(images, ids, epoch, view)
        return out * float("nan") if poison and view == 1 and 0 in ids.tolist() else out

    step = Step(SmallEncoder(), poisoned, rt, StepSettings(3, reduction, False, True, "gather"), None, persistent)
    states, skipped = [], []
    for t in range(3):
        poison = t == 1
        lanes = [micro_batch(t, lane) for lane in own(rank, world)]
        skipped.append(train_step(step, lanes, Objective.persistent(0.5, 0.4), 0, t)[1].skipped)
        persistent.store.finish()
        states.append(persistent.store.rows.dense().numpy().copy())
    assert persistent.store.bank is not None
    return {"rows": states, "skipped": skipped, "bank": bool(persistent.store.bank.isfinite().all())}


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_persistent_rows_stay_as_they_were_in_a_step_that_is_skipped(reduction: str) -> None:
    for found in run_ranks(_skipped_step, 2, reduction):
        first, second, third = found["rows"]
        assert np.array_equal(first, second)
        assert not np.array_equal(second, third)
        assert np.isfinite(third).all()
        assert found["bank"]
        assert ["finite" in text for text in found["skipped"]] == [False, True, False]
